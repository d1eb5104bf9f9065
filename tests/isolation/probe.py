"""Runs inside a sandbox, from its Bash tool, and tries to get out. Reads `plan.json`, writes `found.json`.

What it writes is, for each attempt by name, what it got hold of, or null where it was refused.
"""

import ctypes
import errno
import json
import os
import platform
import pty
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PLAN = json.loads(Path("plan.json").read_text())
LIBC = ctypes.CDLL(None, use_errno=True)
ATTEMPTS: dict[str, Callable[[], object]] = {}
KEYRING_CALLS = {"x86_64": (248, 250), "aarch64": (217, 219)}.get(platform.machine())


def attempt(function):
    ATTEMPTS[function.__name__] = function
    return function


def apart(function):
    """For what would change this process for the attempts after it, if it succeeded."""

    def in_a_child():
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(there, json.dumps(function()).encode())
            except OSError:
                os.write(there, b"null")
            finally:
                os._exit(0)
        os.close(there)
        with open(here, "rb") as told:
            answer = told.read()
        os.waitpid(child, 0)
        return json.loads(answer)

    in_a_child.__name__ = function.__name__
    return in_a_child


def call(name, *arguments):
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
        except OSError:
            continue
        if got not in (None, b"", "", []):
            return f"{thing}: {got!r}"[:300]
    return None


def read(path):
    with open(path, "rb") as file:
        return file.read(200)


def write(path):
    with open(path, "wb") as file:
        file.write(b"|/tmp/x")
    return "written"


def processes():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


# ------------------------------------------------------------------------------------------------ what must work


@attempt
def control_own_files():
    Path("/workspace/mine").write_text("mine")
    return Path("/home/agent").is_dir() and Path("/workspace/mine").read_text()


@attempt
def control_status():
    return {
        key: value.strip()
        for key, _, value in (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
        if key in ("NoNewPrivs", "CapEff", "CapPrm", "CapBnd", "CapAmb", "CapInh", "Seccomp", "Uid", "Gid", "Groups")
    }


@attempt
def control_gateway():
    return [answer_of(request)[0] for request in (b"", *map(bytes.fromhex, PLAN["good_requests"])) if request]


# ------------------------------------------------------------------------------------------------- files of others


@attempt
def host_files():
    return first(PLAN["private_paths"], read) or first(PLAN["private_paths"], os.listdir)


@attempt
def host_files_through_proc():
    roots = [f"/proc/{pid}/{way}" for pid in [*processes(), *PLAN["host_pids"]] for way in ("root", "cwd")]
    roots = [root for root in roots if not root.startswith(f"/proc/{os.getpid()}/")]
    return first([root + path for root in roots for path in PLAN["private_paths"]], read)


@attempt
def descriptors_that_lead_out():
    found = []
    for pid in processes():
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for name in names:
            try:
                target = os.readlink(f"/proc/{pid}/fd/{name}")
            except OSError:
                continue
            if any(path in target for path in PLAN["private_paths"]) or target.startswith("/proc/1/root"):
                found.append(f"{pid}/{name} -> {target}")
    return found or None


@attempt
def neighbours_marker():
    """By name, over everything that find can see."""
    command = ["find", "/", "-xdev", "-name", PLAN["marker"] + "*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    roots = ["/tmp", "/dev", "/run", "/home", "/workspace", "/mnt", "/var", "/dev/shm", "/dev/mqueue"]
    more = subprocess.run(["find", *roots, "-name", PLAN["marker"] + "*"], capture_output=True, text=True, check=False)
    return sorted({*found, *more.stdout.split()}) or None


@attempt
def shared_memory():
    segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    try:
        call("shmget", PLAN["shm_key"], 0, 0)
    except OSError:
        return segments or None
    return "attached"


@attempt
def message_queue():
    name = ctypes.c_char_p(f"/{PLAN['marker']}".encode())
    return call("mq_open", name, os.O_RDWR)


@attempt
def keyring():
    if KEYRING_CALLS is None:
        return None
    add_key, keyctl = KEYRING_CALLS
    session = ctypes.c_int32(-3)
    try:
        call("syscall", add_key, b"user", b"carrel-probe", b"x", ctypes.c_size_t(1), session)
    except OSError:
        buffer = ctypes.create_string_buffer(4096)
        return call("syscall", keyctl, 11, session, buffer, ctypes.c_size_t(4096))  # KEYCTL_READ
    return "a key stored"


# --------------------------------------------------------------------------------------------- processes of others


@attempt
def processes_of_others():
    mine = os.readlink("/proc/self/ns/pid")
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=False).stdout
    seen = [line for line in listed.splitlines() if any(word in line for word in PLAN["foreign_words"])]
    strangers = []
    for pid in processes():
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") != mine:
                strangers.append(pid)
        except OSError:
            continue
    return (seen + strangers) or None


@attempt
def signals():
    return first(PLAN["host_pids"], lambda pid: os.kill(pid, 0) or "it is there")


@attempt
def signals_to_all():
    """Everything that can be signalled from here is in here: nobody else may notice."""
    os.killpg(os.getpgrp(), signal.SIGCONT)
    os.kill(-1, signal.SIGCONT)


@attempt
def trace():
    def attach(pid):
        call("ptrace", 16, pid, 0, 0)
        return "attached"

    return first(PLAN["host_pids"], attach)


@attempt
def memory_of_others():
    paths = [f"/proc/{pid}/{name}" for pid in PLAN["host_pids"] for name in ("mem", "environ", "maps", "cmdline")]
    return first(paths, read)


# ------------------------------------------------------------------------------------------------------ the kernel


@attempt
def core_pattern():
    return write("/proc/sys/kernel/core_pattern")


@attempt
def sysctls():
    names = ("kernel/modprobe", "kernel/hotplug", "kernel/domainname", "vm/overcommit_memory", "net/ipv4/ip_forward")
    return first([f"/proc/sys/{name}" for name in names], write)


@attempt
def sysrq():
    return write("/proc/sysrq-trigger")


@attempt
def mount():
    os.makedirs("/tmp/m", exist_ok=True)

    def make(how):
        kind, source, flags = how
        call("mount", source, b"/tmp/m", kind, flags, None)
        return "mounted"

    return first(
        [(b"tmpfs", b"none", 0), (b"proc", b"proc", 0), (None, b"/", 0x1000), (None, b"/usr", 0x1000 | 0x20)], make
    )


@attempt
def remount_usr():
    call("mount", b"none", b"/usr", None, 0x20, None)
    return "remounted"


@attempt
def unmount():
    return first([b"/usr", b"/proc", b"/run/carrel", b"/etc/passwd"], lambda path: call("umount2", path, 2) == 0)


@attempt
@apart
def namespaces():
    """A user namespace of its own would give every capability over new namespaces, and with them half the kernel."""
    kinds = {"user": 0x10000000, "mount": 0x20000, "net": 0x40000000, "pid": 0x20000000, "uts": 0x4000000}
    return first(kinds.items(), lambda kind: LIBC.unshare(kind[1]) == 0 or None)


@attempt
def namespaces_by_command():
    result = subprocess.run(["unshare", "-Ur", "id", "-u"], capture_output=True, text=True, check=False)
    return result.stdout or None


@attempt
@apart
def enter_namespaces():
    def enter(pid):
        with open(f"/proc/{pid}/ns/mnt") as file:
            call("setns", file.fileno(), 0)
        return "entered"

    return first([1, *PLAN["host_pids"]], enter)


@attempt
@apart
def change_root():
    os.makedirs("/tmp/root", exist_ok=True)
    os.chroot("/tmp/root")
    return "changed"


@attempt
def device_nodes():
    def make(number):
        path = f"/tmp/node-{number[0]}-{number[1]}"
        os.mknod(path, 0o666 | stat.S_IFBLK, os.makedev(*number))
        return read(path)

    return first([(8, 0), (254, 0), (253, 0), (7, 0), (1, 1)], make)


@attempt
def devices():
    usual = {"null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts", "shm", "fd"}
    usual |= {"stdin", "stdout", "stderr", "core", "mqueue"}
    return sorted(set(os.listdir("/dev")) - usual) or None


@attempt
def kernel_memory():
    return first(["/dev/mem", "/dev/kmem", "/proc/kcore", "/proc/kmsg", "/dev/kmsg"], read)


@attempt
def kernel_log():
    buffer = ctypes.create_string_buffer(4096)
    return call("klogctl", 3, buffer, 4096)


@attempt
@apart
def become_root():
    try:
        os.setuid(0)
    except OSError:
        os.setgroups([0])
    return os.getuid()


@attempt
def setuid_programs():
    """With one of them that still worked, every error in it would be ours."""
    result = subprocess.run(
        ["sh", "-c", "su -c id root </dev/null || mount -t tmpfs none /tmp || passwd -d root"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    return result.stdout if "uid=0" in result.stdout else None


@attempt
def system_files():
    return first(
        ["/etc/shadow", "/etc/sudoers", "/etc/ssl/private", "/root", "/var/log", "/sys/kernel"], read
    ) or first(["/root", "/etc/ssl/private", "/boot", "/sys", "/var/lib"], os.listdir)


@attempt
def change_the_system():
    paths = [
        "/usr/x",
        "/usr/bin/env",
        "/etc/passwd",
        "/etc/x",
        "/opt/carrel/claude",
        "/run/carrel/x",
        "/proc/1/oom_adj",
    ]
    return first(paths, write)


@attempt
def a_terminal_of_ours():
    return first(["/dev/tty", "/dev/console"], lambda path: os.isatty(os.open(path, os.O_RDWR | os.O_NOCTTY)) or None)


@attempt
def control_terminals():
    master, other = pty.openpty()
    os.close(master)
    os.close(other)
    return True


# ----------------------------------------------------------------------------------------------------- the network


@attempt
def interfaces():
    return [name for _, name in socket.if_nameindex() if name != "lo"] or None


@attempt
def loopback():
    def connect(address):
        with socket.create_connection(address, timeout=2) as connection:
            return f"connected from {connection.getsockname()}"

    return first(
        [(host, port) for port in PLAN["ports"] for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0")], connect
    )


@attempt
def addresses():
    def connect(host):
        with socket.create_connection((host, 80), timeout=2):
            return "connected"

    return first([*PLAN["host_addresses"], "169.254.169.254", "1.1.1.1", "2606:4700:4700::1111"], connect)


@attempt
def names():
    return first(["example.com", "api.anthropic.com", "gateway"], lambda name: socket.getaddrinfo(name, 443))


@attempt
def datagrams():
    def send(address):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            return sender.sendto(b"x", address)

    return first([("1.1.1.1", 53), *[(host, 53) for host in PLAN["host_addresses"]]], send)


@attempt
def other_sockets():
    kinds = {"raw": (2, 3, 1), "packet": (17, 3, 0), "vsock": (40, 1, 0), "crypto": (38, 5, 0), "bluetooth": (31, 1, 0)}

    def make(kind):
        socket.socket(*kind[1]).close()
        return "made"

    return first(kinds.items(), make)


@attempt
def abstract_sockets():
    def connect(name):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("\0" + name)
            return "connected"

    listed = [line for line in Path("/proc/net/unix").read_text().splitlines() if PLAN["marker"] in line]
    return first(PLAN["abstract_sockets"], connect) or listed or None


@attempt
def socket_files():
    """Every socket there is, but the gateway's and what the agent itself has made."""
    skipped = ("/proc", "/usr", "/tmp", "/workspace", "/home/agent")
    found = []
    for folder, folders, files in os.walk("/"):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in skipped]
        found += [path for name in files if stat.S_ISSOCK(os.lstat(path := os.path.join(folder, name)).st_mode)]
    found = [path for path in found if path not in ("/run/carrel/gateway.sock", "/run/carrel/egress.sock")]

    def connect(path):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            return "connected"

    return found or first(PLAN["socket_paths"], connect)


# ----------------------------------------------------------------------------------------------------- the gateway


def answer_of(request):
    """The status and the body's beginning of what the gateway answers."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect("/run/carrel/gateway.sock")
        connection.sendall(request.replace(b"TOKEN", os.environ["ANTHROPIC_API_KEY"].encode()))
        data = b""
        try:
            while len(data) < 1_000_000 and (part := connection.recv(65536)):
                data += part
        except TimeoutError:
            data += b"(nothing more)"
    statuses = [status.decode() for status in re.findall(rb"HTTP/1\.1 (\d{3})", data)]
    return ",".join(statuses) or "closed", data[-300:].decode("latin-1")


@attempt
def gateway_answers():
    return {name: answer_of(bytes.fromhex(request)) for name, request in PLAN["requests"].items()}


# --------------------------------------------------------------------------------------------------------- secrets


def secrets():
    return {name: bytes.fromhex(value)[::-1] for name, value in PLAN["reversed_secrets"].items()}


def own_pids():
    """This process and those above it up to the agent: they were told nothing, this one holds what it looks for."""
    return {os.getpid()}


@attempt
def secrets_in_files():
    wanted, found, looked_at = secrets(), [], 0
    skipped = {"/proc", "/usr", "/opt", "/sys"}  # /usr is the host's, read-only; /opt has the agent's program
    for folder, folders, files in os.walk("/"):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in skipped]
        for name in files:
            path = os.path.join(folder, name)
            try:
                if not stat.S_ISREG(os.lstat(path).st_mode):
                    continue
                data = Path(path).read_bytes()
            except OSError:
                continue
            looked_at += 1
            found += [f"{secret} in {path}" for secret, value in wanted.items() if value in data]
    if looked_at < 10:
        return f"only {looked_at} files were read"
    return found or None


@attempt
def secrets_in_processes():
    wanted, found, looked_at = secrets(), [], 0
    for pid in processes():
        if pid in own_pids():
            continue
        for name in ("cmdline", "environ", "maps", "mountinfo", "stack", "comm"):
            try:
                data = Path(f"/proc/{pid}/{name}").read_bytes()
            except OSError:
                continue
            found += [f"{secret} in {pid}/{name}" for secret, value in wanted.items() if value in data]
        try:
            looked_at += memory(pid, wanted, found)
        except OSError:
            continue
    if looked_at < 50_000_000:
        return f"only {looked_at} bytes of memory were read"
    return found or None


def memory(pid, wanted, found):
    size, resident, region = 0, 0, (0, 0)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem, open(f"/proc/{pid}/smaps") as smaps:
        for line in smaps:
            head = line.split(maxsplit=2)
            if "-" in head[0] and not head[0].endswith(":"):
                low, _, high = head[0].partition("-")
                region = (int(low, 16), int(high, 16), head[1])
            elif head[0] == "Rss:" and int(head[1]) and region[2].startswith("r") and region[1] - region[0] < 1 << 30:
                resident += 1
                try:
                    mem.seek(region[0])
                    data = mem.read(region[1] - region[0])
                except (OSError, ValueError, OverflowError):
                    continue
                size += len(data or b"")
                found += [f"{secret} in {pid}'s memory" for secret, value in wanted.items() if value in (data or b"")]
    return size


# -------------------------------------------------------------------------------------------------------------- run


def main():
    found = {}
    for name, function in ATTEMPTS.items():
        if name in PLAN.get("skip", ()):
            continue
        begun = time.monotonic()
        try:
            got = function()
        except OSError as error:
            got = None
            found[name + " (refused)"] = errno.errorcode.get(error.errno or 0, str(error))
        except Exception as error:
            got = f"the probe itself failed: {error!r}"
        found[name] = got
        found[name + " (seconds)"] = round(time.monotonic() - begun, 2)
    Path("found.json").write_text(json.dumps(found, default=str))
    print("probed", len(ATTEMPTS))


if __name__ == "__main__":
    assert struct.calcsize("P") == 8, "a 64-bit Python is needed"
    sys.exit(main())
