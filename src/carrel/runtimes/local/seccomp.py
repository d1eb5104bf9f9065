"""The system calls an agent may not make: a seccomp filter in the form the kernel takes.

Namespaces do not hold everything. Keyrings belong to whoever logged in, and to all its children: through the session's
keyring an agent could read the operator's keys, and two agents could talk. A vsock leads out of a virtual machine from
within any network namespace. The rest are large doors into the kernel that no agent needs; what wants a capability is
refused without us.
"""

from __future__ import annotations

import errno
import platform
import struct

__all__ = ["program"]

_REFUSED_EVERYWHERE = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "mount_setattr": 442,
}
_X86_64 = {
    "syslog": 103,
    "mount": 165,
    "umount2": 166,
    "kexec_load": 246,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "perf_event_open": 298,
    "open_by_handle_at": 304,
    "setns": 308,
    "kexec_file_load": 320,
    "bpf": 321,
    "userfaultfd": 323,
}
_AARCH64 = {
    "umount2": 39,
    "mount": 40,
    "kexec_load": 104,
    "syslog": 116,
    "add_key": 217,
    "request_key": 218,
    "keyctl": 219,
    "perf_event_open": 241,
    "open_by_handle_at": 265,
    "setns": 268,
    "bpf": 280,
    "userfaultfd": 282,
    "kexec_file_load": 294,
}
_MACHINES = {"x86_64": (0xC000003E, 41, _X86_64), "aarch64": (0xC00000B7, 198, _AARCH64)}
"""Each with its mark, its number for `socket`, and its numbers for what is refused."""
_SOCKETS = (1, 2, 10, 16)
"""Unix, IPv4, IPv6, netlink: the only families of sockets there are for an agent."""
_X32 = 0x40000000

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000


def program(machine: str | None = None) -> bytes | None:
    """The filter for this machine, or None for one whose calls we do not know."""
    known = _MACHINES.get(machine or platform.machine())
    if known is None:
        return None
    architecture, socket, numbers = known
    refused = sorted({*numbers.values(), *_REFUSED_EVERYWHERE.values()})
    families = [_step(_IF_EQUAL, family, yes=len(_SOCKETS) - i) for i, family in enumerate(_SOCKETS)]
    calls = [_step(_IF_EQUAL, number, yes=len(refused) - i) for i, number in enumerate(refused)]
    return b"".join(
        [
            _step(_LOAD, _MACHINE_AT),
            # Another architecture has other numbers for the same calls.
            _step(_IF_EQUAL, architecture, yes=1),
            _step(_RETURN, _KILL),
            _step(_LOAD, _NUMBER_AT),
            _step(_IF_EQUAL, socket, no=len(families) + 3),
            _step(_LOAD, _FIRST_ARGUMENT_AT),
            *families,
            _step(_RETURN, _REFUSE),
            _step(_RETURN, _ALLOW),
            _step(_IF_AT_LEAST, _X32, yes=len(calls) + 1),
            *calls,
            _step(_RETURN, _ALLOW),
            _step(_RETURN, _REFUSE),
        ]
    )


def _step(what: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", what, yes, no, value)
