"""Attacks by way of messages: a kernel that forges what the host reads from its sockets.

The kernel holds the key of its connection, so its code can sign whatever it likes. It may lie about itself; it must not
crash the host, hang it, fill its memory, or lose a cell of the record.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from attacked import attacked, events, folder, run, until, usable

from sandbox_kernel.session import Session

pytestmark = [pytest.mark.usefixtures("image"), pytest.mark.asyncio(loop_scope="module")]

TOOLS = """
import json, os, time, uuid
import zmq
from jupyter_client.session import Session as Wire
K = get_ipython().kernel
PARENT = K.get_parent()
def pack(part):
    return json.dumps(part, default=str).encode()
def forge(kind, content, parent=None, **header):
    '''One signed message on iopub, from the thread that owns the socket.'''
    w = K.session
    msg = w.msg(kind, content={}, parent={})
    msg['header'].update(header)
    frames = [b'kernel.x', b'<IDS|MSG>']
    parts = [pack(p) for p in (msg['header'], PARENT['header'] if parent is None else parent, {}, content)]
    raw(frames + [w.sign(parts)] + parts)
def raw(frames):
    K.iopub_thread.send_multipart(frames)
def raw_content(msg_type, content):
    w = K.session
    parts = [pack(w.msg(msg_type)['header']), pack(PARENT['header']), b'{}', content]
    raw([b'x', b'<IDS|MSG>', w.sign(parts)] + parts)
PARENT = json.loads(pack(PARENT))
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def victim(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    async with attacked(tmp_path_factory.mktemp("m"), memory_limit="1g") as session:
        yield session


async def attack(session: Session, code: str, timeout: float = 15) -> str:
    """Run the attack; however it ends, it has exactly one line and the session goes on. The status it ended with."""
    result = await session.execute(TOOLS + code, timeout=timeout)
    if result.error is not None:  # an error may be forged, but the attack itself must have run
        assert result.error.name not in ("NameError", "TypeError", "AttributeError", "SyntaxError"), (
            result.error.traceback
        )
    lines = [line for line in events(session, "code_execution") if line["msg_id"] == result.msg_id]
    assert len(lines) == 1 and lines[0]["status"] == result.status
    assert len(str(result).encode()) < 64_000
    await usable(session)
    return result.status


WRONG = "[None, 1, -1, 10**400, 1.5, True, 'x', '', [], {}, [[]], {'a': {}}, 'x' * 100_000, '\\ud800', float('nan')]"
FIELDS = {
    "status": ["execution_state"],
    "stream": ["name", "text"],
    "execute_input": ["code", "execution_count"],
    "execute_result": ["data", "metadata", "execution_count"],
    "display_data": ["data", "metadata", "transient"],
    "update_display_data": ["data", "metadata", "transient"],
    "error": ["ename", "evalue", "traceback"],
    "clear_output": ["wait"],
    "comm_open": ["comm_id", "data"],
    "iopub_welcome": ["subscription"],
    "execute_reply": ["status"],
}


class TestForgeries:
    @pytest.mark.parametrize("msg_type", FIELDS)
    async def test_wrong_types_in_every_field(self, victim: Session, msg_type: str) -> None:
        code = f"""
for field in {FIELDS[msg_type]!r}:
    for wrong in {WRONG}:
        forge({msg_type!r}, {{field: wrong}})
        forge({msg_type!r}, {{field: wrong}}, parent={{'msg_id': uuid.uuid4().hex, 'session': 'lab', 'username': ''}})
for wrong in {WRONG}:
    forge({msg_type!r}, wrong)
    forge({msg_type!r}, {{}}, parent=wrong)
    forge({msg_type!r}, {{}}, parent={{'msg_id': wrong, 'session': wrong, 'username': wrong}})
    forge({msg_type!r}, {{}}, msg_id=wrong, session=wrong, date=wrong, version=wrong, username=wrong)
    forge({msg_type!r}, {{}}, msg_type=wrong)
forge('display_data', {{'data': {{'text/plain': ['a', 1], 'application/json': {{'x': [1]}}, '\\ud800': '\\ud800', 'image/png': 7}}, 'metadata': {{'\\ud800': 1}}}})
"""
        assert await attack(victim, code) in ("ok", "error")

    async def test_garbage_frames(self, victim: Session) -> None:
        await attack(victim, """
for frames in ([b''], [b'', b''], [b'<IDS|MSG>'], [b'<IDS|MSG>'] * 9, [b'x', b'<IDS|MSG>', b'bad', b'{', b'}', b'', b''],
               [os.urandom(1000) for _ in range(5)], [b'x'] * 2000, [b'<IDS|MSG>', b'', b'{}', b'{}', b'{}', b'{}']):
    raw(frames)
for content in (b'[' * 100_000, b'{"a":' * 100_000, b'\\xff\\xfe', b'null', b'7', b'"x"', b'[]', b'{"text": "\\\\ud800"}', b'{"a": 1e999}',
                b'{"data": {"application/json": ' + b'[' * 900 + b']' * 900 + b'}}', b'{"execution_count": ' + b'9' * 5000 + b'}'):
    for kind in ('stream', 'display_data', 'execute_result', 'error'):
        raw_content(kind, content)
""")  # fmt: skip
        channel = victim._lifecycle.kernel._channels["iopub"]  # type: ignore[union-attr]
        assert channel.unreadable > 20

    async def test_an_unsigned_message_is_not_believed(self, victim: Session) -> None:
        result = await victim.execute(TOOLS + """
w = K.session
parts = [pack(p) for p in (w.msg('stream')['header'], PARENT['header'], {}, {'name': 'stdout', 'text': 'once\\n'})]
good = [b'x', b'<IDS|MSG>', w.sign(parts)] + parts
raw(good)
raw([b'x', b'<IDS|MSG>', b''] + parts)
raw([b'x', b'<IDS|MSG>', b'0' * 64] + parts)
""")  # fmt: skip
        assert result.stdout.count("once") == 1

    async def test_idle_for_a_cell_that_runs(self, victim: Session) -> None:
        """The lie makes its own cell end early; the next one is run, told apart, and timed all the same."""
        assert await attack(victim, "forge('status', {'execution_state': 'idle'})\ntime.sleep(2)") in ("ok", "error")
        await victim.execute(TOOLS + "forge('status', {'execution_state': 'idle'})\nwhile True: pass", timeout=5)
        began = time.monotonic()
        await victim.execute("'behind the one that still runs'", timeout=2)
        assert time.monotonic() - began < 2 + 2 + 8
        await usable(victim)

    async def test_cells_that_nobody_sent(self, victim: Session) -> None:
        """They are recorded as somebody's, not as ours, and never keep a caller waiting or the session busy."""
        await attack(victim, """
for n in range(300):
    p = {'msg_id': f'made-up-{n}', 'session': 'lab', 'username': ''}
    forge('execute_input', {'code': 'never ran', 'execution_count': 10**9}, parent=p)
    if n % 2: forge('status', {'execution_state': 'idle'}, parent=p)
forge('execute_input', {'code': 'as if it were ours', 'execution_count': 1}, parent={'msg_id': 'mine', 'session': PARENT['header']['session'], 'username': 'sandbox-kernel'})
""")  # fmt: skip
        lines = [line for line in events(victim, "code_execution") if line["code"] == "never ran"]
        assert lines and {line["origin"] for line in lines} == {"jupyterlab:lab"}
        assert not [line for line in events(victim, "code_execution") if line["code"].startswith("as if")]
        result = await victim.execute("while True: pass", timeout=1)
        assert result.status == "timeout"
        await victim.restart()
        assert not victim.busy

    async def test_replies_to_what_is_still_to_come(self, victim: Session) -> None:
        """Another cell's reply cannot be forged: its id cannot be guessed."""
        code = """
me = PARENT['header']['msg_id']
for guess in (me[:-1] + '0', me + '1', me.rpartition('_')[0] + '_99', ''):
    forge('execute_reply', {'status': 'ok', 'execution_count': 1}, parent={**PARENT['header'], 'msg_id': guess})
    forge('error', {'ename': 'Forged', 'evalue': '', 'traceback': []}, parent={**PARENT['header'], 'msg_id': guess})
"""
        assert await attack(victim, code) == "ok"
        assert (await victim.execute("1")).status == "ok"

    async def test_shell_replies_of_every_shape(self, victim: Session) -> None:
        await attack(victim, """
ident = K._parent_ident['shell'] if isinstance(getattr(K, '_parent_ident', None), dict) else []
for content in ({}, [], None, {'status': []}, {'status': 'error', 'ename': 7, 'evalue': {}, 'traceback': {}}, {'status': 'ok', 'execution_count': 10**400}):
    try: K.session.send(K.shell_stream or K.shell_socket, 'execute_reply', content, parent=PARENT['header'], ident=ident)
    except Exception as e: pass
""")  # fmt: skip

    async def test_output_without_end_after_the_cell(self, victim: Session) -> None:
        size = sum(1 for _ in events(victim))
        await attack(victim, """
import threading
def flood():
    end = time.monotonic() + 3
    while time.monotonic() < end: print('x' * 10_000)
    open('/session/state/over', 'w').close()
threading.Thread(target=flood).start()
""")  # fmt: skip
        await until(lambda: (folder(victim) / "state/over").exists())
        await usable(victim)  # what a cell says comes after all that was said before it
        late = events(victim, "output_after_cell")
        assert sum(len(line["text"]) for line in late) < 5_000_000, "what the log takes of it is bounded"
        assert sum(1 for _ in events(victim)) - size < 200


def peak() -> int:
    """The largest resident size this process ever had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class TestSize:
    async def test_a_message_larger_than_any_may_be(self, victim: Session) -> None:
        """It drops the connection and with it the cell's idle: its reply ends it then, without any timeout."""
        before, began = peak(), time.monotonic()
        result = await victim.execute(TOOLS + "raw([b'x', b'<IDS|MSG>'] + [bytes(300 * 2**20)])", timeout=None)
        assert result.status in ("ok", "kernel_died")
        assert time.monotonic() - began < 15
        await usable(victim)
        assert peak() - before < 400

    async def test_a_message_that_swells_when_it_is_read(self, victim: Session) -> None:
        """200 MB of ``{},{},{}`` would take 5 GB as Python objects."""
        before = peak()
        code = "raw_content('display_data', b'{\"data\": {\"application/json\": [' + b'{},' * 60_000_000 + b'{}]}}')"
        await attack(victim, code, timeout=30)
        assert peak() - before < 1000

    async def test_long_fields(self, victim: Session) -> None:
        before = peak()
        await attack(victim, """
big = "x" * 8_000_000
forge('error', {'ename': big, 'evalue': big, 'traceback': [big]})
for _ in range(5):
    forge('display_data', {'data': {big: 'x'}, 'metadata': {}})
    forge('display_data', {'data': {'text/plain': 'x'}, 'metadata': {'m': big}, 'transient': {'display_id': 'd'}})
    forge('update_display_data', {'data': {'text/plain': big}, 'metadata': {}, 'transient': {'display_id': 'd'}})
    forge('stream', {'name': big, 'text': 'short'})
forge('execute_input', {'code': big, 'execution_count': 1}, parent={'msg_id': 'long', 'session': big[:900], 'username': ''})
forge('status', {'execution_state': 'idle'}, parent={'msg_id': 'long', 'session': 'lab'})
""", timeout=30)  # fmt: skip
        line = max(len(str(event)) for event in events(victim))
        assert line < 5_000_000, "no line of the log is endless"
        assert peak() - before < 1500

    async def test_very_many_displays_are_updated(self, victim: Session) -> None:
        before = peak()
        await attack(victim, """
for n in range(100): forge('display_data', {'data': {'text/plain': 'x'}, 'metadata': {}, 'transient': {'display_id': str(n)}})
for n in range(100): forge('update_display_data', {'data': {'text/plain': 'x' * 2_000_000}, 'metadata': {}, 'transient': {'display_id': str(n)}})
""", timeout=40)  # fmt: skip
        assert peak() - before < 400, "100 displays of 2 MB each are not kept"

    async def test_the_host_stays_responsive_meanwhile(self, victim: Session) -> None:
        gaps = [0.0]

        async def watch() -> None:
            last = time.monotonic()
            while True:
                await asyncio.sleep(0.01)
                now = time.monotonic()
                gaps.append(now - last)
                last = now

        watcher = asyncio.create_task(watch())
        await victim.execute(
            TOOLS + "while True: raw_content('stream', b'{\"name\": \"stdout\", \"text\": \"' + b'y' * 1000 + b'\"}')",
            timeout=3,
        )
        watcher.cancel()
        assert max(gaps) < 3, f"the event loop stood still for {max(gaps):.1f} s"
        await usable(victim)

    async def test_the_state_is_forged(self, victim: Session) -> None:
        """The kernel may lie about its variables; the lie is bounded and read as what it is."""
        await run(victim, "x = 1")
        await until(lambda: True)
        await victim.execute(
            "import json, os\nos.unlink('state/python_state.json')\n"
            "json.dump({'variables': {f'v{n}': {'type': 'int', 'value': '1'} for n in range(100_000)}, 'imported_modules': ['os'] * 10_000}, open('state/python_state.json', 'w'))"
        )
        assert isinstance((await victim.state()).variables, dict)
        await usable(victim)
