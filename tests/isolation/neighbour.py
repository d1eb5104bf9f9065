"""Runs inside another sandbox and leaves traces of every kind for the prober to find. Ends with its sandbox."""

import ctypes
import json
import os
import signal
import socket
import sys
from pathlib import Path

plan = json.loads(Path("plan.json").read_text())
marker = plan["marker"]
ready, done = os.pipe()
if os.fork():
    os.close(done)
    os.read(ready, 1)
    print("the neighbour is there")
    sys.exit()
os.setsid()
for folder in ("/tmp", "/workspace", "/home/agent", "/dev/shm", "/run"):
    try:
        Path(folder, marker + "-file").write_text(marker)
    except OSError:  # /run may be read-only
        continue
libc = ctypes.CDLL(None, use_errno=True)
libc.shmget(plan["shm_key"], 4096, 0o1666)
libc.mq_open(ctypes.c_char_p(f"/{marker}".encode()), os.O_RDWR | os.O_CREAT, 0o666, None)
abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\0" + marker)
abstract.listen()
tcp = socket.socket()
tcp.bind(("127.0.0.1", plan["neighbour_port"]))
tcp.listen()
caught = []
signal.signal(signal.SIGCONT, lambda *_: Path("/workspace/signalled").touch())
os.write(done, b"x")
null = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
while True:
    signal.pause()
