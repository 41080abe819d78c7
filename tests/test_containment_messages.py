"""Attacks by way of messages: a kernel that forges what the host reads from its sockets.

The kernel holds the key of its connection, so its code can sign whatever it likes. It may lie about itself; it must not
crash the host, hang it, fill its memory, or lose a cell of the record.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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
def signed(kind, content, parent=None):
    w = K.session
    parts = [pack(p) for p in (w.msg(kind)['header'], parent or PARENT['header'], {})]
    parts.append(content if isinstance(content, bytes) else pack(content))
    return [b'x', b'<IDS|MSG>', w.sign(parts)] + parts
def raw_often(frames, times):
    '''The same frames again and again, without a copy: what they hold costs the kernel nothing.'''
    K.iopub_thread.schedule(lambda: [K.iopub_thread.socket.send_multipart(frames, copy=False) for _ in range(times)])
IDENT = PARENT['header']['session'].encode()
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

    async def test_an_error_without_end_in_a_reply(self, victim: Session) -> None:
        status = await attack(victim, """
content = {'status': 'error', 'ename': 'E' * 30_000_000, 'evalue': 'v' * 30_000_000, 'traceback': ['t' * 9_000_000]}
frames = [IDENT] + signed('execute_reply', content)[1:]
(K.shell_stream.socket if K.shell_stream else K.shell_socket).send_multipart(frames)
forge('status', {'execution_state': 'idle'})
time.sleep(1)
""")  # fmt: skip
        assert status == "error"
        assert max(len(line) for line in (folder(victim) / "session.log").read_bytes().splitlines()) < 5_000_000

    async def test_requests_that_nobody_takes_hold_nobody_up(self, victim: Session) -> None:
        """Forged replies to interrupts made the host send requests, until the send itself waited: with every session."""
        async with watched() as gaps:
            await victim.execute(TOOLS + """
def flood():
    for _ in range(5_000):
        K.control_stream.socket.send_multipart([IDENT] + signed('interrupt_reply', {'status': 'ok'})[1:])
K.shell_channel_thread.io_loop.add_callback(time.sleep, 60)
time.sleep(0.3)
K.control_thread.io_loop.add_callback(flood)
time.sleep(60)
""", timeout=5)  # fmt: skip
            await victim.restart()  # the shell channel sleeps on, whatever is interrupted
        assert max(gaps) < 3, f"the event loop stood still for {max(gaps):.1f} s"
        await usable(victim)

    async def test_cells_faster_than_they_are_recorded(self, victim: Session) -> None:
        """They wait in the kernel, not in the host, and our own cell does not wait behind them."""
        feed = victim._feed
        most = [0]

        async def count() -> None:
            while True:
                most[0] = max(most[0], feed.unrecorded)
                await asyncio.sleep(0.005)

        counter = asyncio.create_task(count())
        began = time.monotonic()
        await victim.execute(TOOLS + """
burst = []
for n in range(4_000):
    p = {'msg_id': f'burst-{n}', 'session': 'lab', 'username': ''}
    burst.append(signed('execute_input', {'code': 'never ran', 'execution_count': 1}, p))
    burst.append(signed('status', {'execution_state': 'idle'}, p))
K.iopub_thread.schedule(lambda: [K.iopub_thread.socket.send_multipart(frames) for frames in burst])
import time
while True: time.sleep(1)  # that thread has the interpreter to itself
""", timeout=12)  # fmt: skip
        counter.cancel()
        assert time.monotonic() - began < 12 + 2 + 8
        assert most[0] < 1000, "ended cells that wait for their line"
        assert sum(line["msg_id"].startswith("burst-") for line in events(victim, "code_execution")) == 4_000
        await usable(victim)

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


@asynccontextmanager
async def watched() -> AsyncIterator[list[float]]:
    """How long the event loop stood still, each time."""
    gaps = [0.0]

    async def watch() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    watcher = asyncio.create_task(watch())
    try:
        yield gaps
        await asyncio.sleep(0.05)  # what stood still until now is counted too
    finally:
        watcher.cancel()


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

    async def test_a_message_in_parts_without_end(self, victim: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each part is small enough, and the whole is never there: 3 GB, of which the host keeps what it can bear."""
        monkeypatch.setattr("sandbox_kernel.guard.GROWTH", 200 * 2**20)
        before = peak()
        await victim.execute(
            TOOLS + "raw_often([b'x', b'<IDS|MSG>'] + [bytes(30 * 2**20)] * 100, 1)\ntime.sleep(12)", timeout=30
        )
        assert peak() - before < 1500
        await usable(victim)

    async def test_large_messages_are_not_read_ahead(self, victim: Session) -> None:
        before = peak()
        code = "raw_often(signed('stream', b'{\"name\": \"stdout\", \"text\": \"' + b'y' * 8_000_000 + b'\"}'), 300)\nwhile True: pass"
        await victim.execute(TOOLS + code, timeout=8)
        assert peak() - before < 400
        await usable(victim)

    async def test_what_comes_with_displays(self, victim: Session) -> None:
        """Metadata, ids, many of one id, values that are nothing but structure, tracebacks of empty lines."""
        before = peak()
        async with watched() as gaps:
            await attack(victim, """
structure = [{}] * 10_000
for _ in range(200): forge('display_data', {'data': {'text/plain': 'x'}, 'metadata': {'m': structure}})
for n in range(20): forge('display_data', {'data': {'text/plain': 'x'}, 'metadata': {}, 'transient': {'display_id': str(n) + 'x' * 8_000_000}})
raw_often(signed('display_data', {'data': {'text/plain': 'x' * 1_000_000}, 'metadata': {}, 'transient': {'display_id': 'd'}}), 300)
for _ in range(8): forge('display_data', {'data': {'application/json': structure * 20}, 'metadata': {}})
for _ in range(12): forge('error', {'ename': 'E', 'evalue': '', 'traceback': [''] * 900_000})
""", timeout=60)  # fmt: skip
        assert peak() - before < 500
        assert max(gaps) < 3, f"the event loop stood still for {max(gaps):.1f} s"
        assert max(len(line) for line in (folder(victim) / "session.log").read_bytes().splitlines()) < 30_000_000

    async def test_very_many_pictures_do_not_stop_the_host(self, victim: Session) -> None:
        async with watched() as gaps:
            result = await victim.execute("""
import base64, os
for n in range(900): display({'image/png': base64.b64encode(os.urandom(300)).decode()}, raw=True)
display({f'image/{n}': base64.b64encode(os.urandom(30)).decode() for n in range(10_000)}, raw=True)
""")  # fmt: skip
        assert result.status == "ok"
        assert max(gaps) < 1.5, f"the event loop stood still for {max(gaps):.1f} s"
        await usable(victim)

    async def test_the_host_stays_responsive_meanwhile(self, victim: Session) -> None:
        async with watched() as gaps:
            await victim.execute(
                TOOLS
                + "while True: raw_content('stream', b'{\"name\": \"stdout\", \"text\": \"' + b'y' * 1000 + b'\"}')",
                timeout=3,
            )
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
