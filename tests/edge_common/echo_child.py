"""A child process for `test_children`: it sends each message back, or does what the message
says."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from edge_common.children import Unpacker, pack

sock = socket.socket(fileno=int(sys.argv[1]))
unpacker = Unpacker()
while data := sock.recv(65536):
    for body in unpacker.feed(data):
        if body == b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif body == b"garbage":
            sock.sendall(b"\xff" * 8)
        elif body == b"print":
            print("printed", flush=True)
            sock.sendall(pack(body))
        elif body == b"linger":
            time.sleep(1000)
        else:
            sock.sendall(pack(body))
sys.exit(3)
