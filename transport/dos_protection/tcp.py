"""The kernel's view of a TCP connection that libzmq owns: its byte counters, and how to end it."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import termios

AVAILABLE = sys.platform == "linux" and hasattr(socket, "TCP_INFO")
"""True if the kernel counts bytes. Without it only connections are counted."""
_TCP_INFO_BYTES = 208  # up to tcpi_bytes_sent, Linux 4.19
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def duplicate(fd: int) -> socket.socket:
    """A duplicate of the descriptor of a connection. It stays with the connection when libzmq
    closes the number and the kernel gives it to another.

    Raises:
        OSError: the number is no socket now, or this process has no descriptor left.
    """
    copy = os.dup(fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def counters(end: socket.socket) -> tuple[int, int, int] | None:
    """Bytes received, acknowledged by the peer, and sent; None if this kernel is too old."""
    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _TCP_INFO_BYTES:
        return None
    acked, received = struct.unpack_from("=QQ", info, 120)
    return received, acked, struct.unpack_from("=Q", info, 200)[0]


def in_queue(end: socket.socket) -> int:
    """Bytes that the kernel has received and libzmq has not read yet."""
    return int(struct.unpack("i", fcntl.ioctl(end, termios.FIONREAD, bytes(4)))[0])


def reset(end: socket.socket) -> None:
    """End a connection without closing libzmq's descriptor: libzmq reads the end of the stream and
    frees everything."""
    # A reset instead of FIN: after FIN the kernel would keep the connection for a minute, and a
    # peer that only writes would never notice.
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.shutdown(socket.SHUT_RDWR)


def reset_borrowed(fd: int, port: int) -> bool:
    """`reset` by number, if it is a connection to this local port: for want of a descriptor for a
    duplicate. The number may have gone to another connection of that port, which is reset then and
    has to come back."""
    borrowed = socket.socket(fileno=fd)
    try:
        ours = borrowed.family in _FAMILIES and borrowed.getsockname()[1] == port
        if ours:
            reset(borrowed)
        return ours
    finally:
        borrowed.detach()
