"""What code in a session can make of the agent: it answers every request with the lie named by the first argument."""

import json
import os
import sys
import time


def answer(header, body=b""):
    os.write(1, json.dumps({"size": len(body), **header}).encode() + b"\n" + body)


def listing(*files, refused=(), more=False, tag="t"):
    answer({"tag": tag}, json.dumps({"files": files, "refused": list(refused), "more": more}).encode())


LIE = sys.argv[sys.argv.index("--lie") + 1]
ENTRY = [1, 3, 1, False]
PAGES = 0

for line in sys.stdin.buffer:
    op = json.loads(line)["op"]
    if LIE == "silence":
        continue
    if LIE == "dies":
        sys.exit(0)
    if LIE == "no line end":
        os.write(1, b"x" * 1_000_000)
    elif LIE == "line by the byte" or (LIE == "body by the byte" and op == "list"):
        if LIE == "body by the byte":
            os.write(1, b'{"size": 4000000}\n')
        while True:
            os.write(1, b" ")
            time.sleep(0.05)
    elif LIE == "file by the byte" and op == "list":
        listing(["a.bin", 1, 1_000_000, 1, False])
    elif LIE == "file by the byte":
        os.write(1, b'{"size": 1000000, "ino": 1, "mtime_ns": 1}\n')
        while True:
            os.write(1, b"x")
            time.sleep(0.05)
    elif LIE == "pages without end" and op == "list":
        PAGES += 1
        listing([f"new{PAGES}", *ENTRY], more=True)
    elif LIE == "not json":
        os.write(1, b"hello\n")
    elif LIE == "no object":
        os.write(1, b"[1, 2]\n")
    elif LIE == "deep":
        os.write(1, b"[" * 50_000 + b"\n")
    elif LIE == "huge body":
        os.write(1, b'{"size": 99999999999999}\n')
    elif LIE == "negative body":
        os.write(1, b'{"size": -5}\n')
    elif LIE == "float body":
        os.write(1, b'{"size": 1e400}\n')
    elif LIE == "long number":
        os.write(1, b'{"size": ' + b"9" * 60_000 + b"}\n")
    elif LIE == "way out" and op == "list":
        listing(
            ["../../etc/x", *ENTRY], ["/etc/passwd", *ENTRY], ["a//b", *ENTRY], ["\ud800", *ENTRY], ["a\0b", *ENTRY]
        )
    elif LIE == "odd types" and op == "list":
        listing([["x"], *ENTRY], ["y", "1", None, 2, 3])
    elif LIE == "endless pages" and op == "list":
        listing(["same", *ENTRY], more=True)
    elif LIE == "short file" and op == "list":
        listing(["a.bin", 1, 1000, 1, False])
    elif LIE == "short file" and op == "get":
        os.write(1, b'{"size": 1000, "ino": 1, "mtime_ns": 1}\n' + b"x" * 10)
        sys.exit(0)
    elif LIE == "other file" and op == "list":
        listing(["a.bin", 1, 10, 1, False])
    elif LIE == "other file" and op == "get":
        os.write(1, b'{"size": 20, "ino": 2, "mtime_ns": 1}\n' + b"x" * 20 + b'{"changed": false}\n')
    elif LIE == "giant file" and op == "list":
        listing(["a.bin", 1, 1 << 62, 1, False], ["b.bin", 1, 10, 1, False])
    elif LIE == "giant file" and op == "get":
        os.write(1, b'{"size": 4611686018427387904, "ino": 1, "mtime_ns": 1}\n')
    elif LIE == "refusals" and op == "list":
        listing(refused=[["\x1b[31m" + "n" * 100_000, "r" * 100_000]] * 100)
    elif LIE == "removes nothing" and op == "list":
        listing(["a.bin", *ENTRY])
    elif LIE == "removes nothing" and op == "get":
        os.write(1, b'{"size": 3, "ino": 1, "mtime_ns": 1}\nabc{"changed": false}\n')
    elif LIE == "removes nothing" and op == "remove":
        answer({}, json.dumps(["../x", {"a": 1}, 5]).encode())
    else:
        answer({"error": "x" * 30_000})
