"""A port inside of a network namespace that somebody else has made."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket

__all__ = ["listen_within"]

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_NS_GET_USERNS = 0xB701
_BACKLOG = 128

_libc = ctypes.CDLL(None, use_errno=True)


def listen_within(pid: int, port: int) -> socket.socket:
    """A socket that listens on a loopback port of another process's network namespace.

    A socket stays in the namespace it was made in, whoever holds it. So a child enters, makes it, and hands it back: this
    process itself never enters. As root that needs nothing more; an ordinary user enters the user namespace first which
    the network belongs to, and may, having made it.

    Args:
        pid: a process of the same user's (or, to root, of anybody's) that is in the namespace.
        port: the port on 127.0.0.1.

    Raises:
        OSError: the namespace cannot be entered, or the port is taken.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = os.fork()
        if child == 0:
            _hand_over(theirs, pid, port)
        theirs.close()
        try:
            said, descriptors, _, _ = socket.recv_fds(ours, 1000, 1)
        finally:
            os.waitpid(child, 0)
    if not descriptors:
        raise OSError(f"no port in the sandbox: {said.decode(errors='replace')}")
    listener = socket.socket(fileno=descriptors[0])
    listener.setblocking(False)
    return listener


def _hand_over(channel: socket.socket, pid: int, port: int) -> None:
    """In the child, which ends here."""
    try:
        network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        if os.geteuid() != 0:
            _enter(fcntl.ioctl(network, _NS_GET_USERNS), _CLONE_NEWUSER)
        _enter(network, _CLONE_NEWNET)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind(("127.0.0.1", port))
        listener.listen(_BACKLOG)
        socket.send_fds(channel, [b"."], [listener.fileno()])
    except BaseException as error:
        channel.send(repr(error).encode()[:1000])
    finally:
        os._exit(0)


def _enter(namespace: int, kind: int) -> None:
    if _libc.setns(namespace, kind) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
