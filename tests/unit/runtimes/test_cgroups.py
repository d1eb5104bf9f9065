"""Control groups of both versions: found, made with their caps, measured, ended.

Version 2 and the odd places are tried over folders that look like it; the real kernel of this machine has its say in
the conformance suite and in tests/integration/test_caps.py.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from carrel.abc import Excess
from carrel.errors import InvalidSettings
from carrel.runtimes.local.caps import Fence
from carrel.runtimes.local.cgroups import Caps, Cgroups, Group, GroupV1, GroupV2, name_of

CAPS = Caps(memory_bytes=500_000_000, processes=100, cpus=1.5)
V2_FILES = {
    "memory.current": "300000000",
    "memory.max": "max",
    "memory.swap.max": "max",
    "memory.oom.group": "0",
    "memory.stat": "anon 200000000\nactive_file 60000000\ninactive_file 40000000\n",
    "memory.events": "low 0\nhigh 0\nmax 7\noom 0\noom_kill 0\n",
    "pids.current": "12",
    "pids.max": "max",
    "pids.events": "max 0\n",
    "cpu.max": "max 100000",
    "cpu.stat": "usage_usec 2500000\nuser_usec 1\n",
    "cgroup.procs": "",
    "cgroup.controllers": "cpu memory pids",
    "cgroup.subtree_control": "",
}
V1_FILES: dict[str, dict[str, str]] = {
    "memory": {
        "memory.usage_in_bytes": "300000000",
        "memory.limit_in_bytes": "500000000",
        "memory.memsw.limit_in_bytes": "500000000",
        "memory.stat": "total_active_file 60000000\ntotal_inactive_file 40000000\n",
        "memory.oom_control": "oom_kill_disable 1\nunder_oom 0\noom_kill 0\n",
        "cgroup.procs": "",
    },
    "pids": {"pids.current": "12", "pids.max": "max", "pids.events": "max 0\n", "cgroup.procs": ""},
    "cpuacct": {"cpuacct.usage": "2500000000", "cgroup.procs": ""},
    "cpu": {"cpu.cfs_period_us": "", "cpu.cfs_quota_us": "", "cgroup.procs": ""},
}


def fill(folder: Path, files: dict[str, str]) -> Path:
    os.makedirs(folder, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def v1(folder: Path) -> GroupV1:
    return GroupV1({name: fill(folder / name / "box", files) for name, files in V1_FILES.items()})


def v2(folder: Path) -> GroupV2:
    return GroupV2(dict.fromkeys(("memory", "pids", "cpu"), fill(folder / "box", V2_FILES)))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders with files in them can be removed, and new ones have files, as the kernel's do."""

    def rmdir(self: Path) -> None:
        for path in self.iterdir():
            path.unlink()
        os.rmdir(self)

    mkdir = Path.mkdir

    def make(self: Path, *args: Any, **options: Any) -> None:
        mkdir(self, *args, **options)
        if "kernel" in self.parts and not (self / "cgroup.procs").exists():
            fill(self, V2_FILES)

    monkeypatch.setattr(Path, "rmdir", rmdir)
    monkeypatch.setattr(Path, "mkdir", make)


@pytest.mark.parametrize("make", [v1, v2])
def test_what_is_taken(tmp_path: Path, make: Any) -> None:
    usage = make(tmp_path).measure()
    assert (usage.memory_bytes, usage.processes, usage.cpu_seconds, usage.excess) == (200_000_000, 12, 2.5, None)


@pytest.mark.parametrize("make", [GroupV1, GroupV2])
def test_a_group_that_is_not_there_takes_nothing(tmp_path: Path, make: type[Group]) -> None:
    assert make(dict.fromkeys(("memory", "pids"), tmp_path / "none")).measure() is None


def test_version_1_holds_memory_without_swap_and_kills_nobody_by_itself(tmp_path: Path) -> None:
    group = v1(tmp_path)
    group.make(CAPS)
    read = {
        f"{name}/{path.name}": path.read_text() for name in V1_FILES for path in (tmp_path / name / "box").iterdir()
    }
    assert read["memory/memory.limit_in_bytes"] == read["memory/memory.memsw.limit_in_bytes"] == "500000000"
    assert read["memory/memory.oom_control"] == "1"
    assert read["pids/pids.max"] == "100"
    assert (read["cpu/cpu.cfs_period_us"], read["cpu/cpu.cfs_quota_us"]) == ("100000", "150000")


def test_version_2_holds_memory_without_swap_and_kills_the_whole(tmp_path: Path) -> None:
    group = v2(tmp_path)
    group.make(CAPS)
    read = {path.name: path.read_text() for path in (tmp_path / "box").iterdir()}
    assert (read["memory.max"], read["memory.swap.max"], read["memory.oom.group"]) == ("500000000", "0", "1")
    assert (read["pids.max"], read["cpu.max"]) == ("100", "150000 100000")


def test_no_cap_is_no_cap(tmp_path: Path) -> None:
    v1(tmp_path / "1").make(Caps())
    v2(tmp_path / "2").make(Caps())
    assert (tmp_path / "1/pids/box/pids.max").read_text() == "max"
    assert (tmp_path / "1/memory/box/memory.oom_control").read_text().startswith("oom_kill_disable")
    assert (tmp_path / "2/box/memory.max").read_text() == "max"


def test_a_kernel_that_does_not_account_swap_will_do(tmp_path: Path) -> None:
    group = v1(tmp_path)
    (tmp_path / "memory/box/memory.memsw.limit_in_bytes").unlink()
    group.make(CAPS)
    assert group.measure() is not None


@pytest.mark.parametrize(
    ("file", "text", "excess"),
    [
        ("memory/box/memory.oom_control", "oom_kill_disable 1\nunder_oom 1\noom_kill 0\n", Excess.MEMORY),
        ("memory/box/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n", Excess.MEMORY),
        ("pids/box/pids.events", "max 3\n", Excess.PROCESSES),
    ],
)
def test_version_1_tells_of_a_cap_that_was_met(tmp_path: Path, file: str, text: str, excess: Excess) -> None:
    group = v1(tmp_path)
    (tmp_path / file).write_text(text)
    usage = group.measure()
    assert usage is not None
    assert usage.excess is excess


def test_version_1_takes_what_is_nearly_at_its_end_for_at_its_end(tmp_path: Path) -> None:
    """Memory refused within a system call puts nobody to sleep."""
    group, usage = v1(tmp_path), tmp_path / "memory/box/memory.usage_in_bytes"
    usage.write_text("580000000")  # of which files' caches are 100,000,000, and the cap is 500,000,000
    assert group.measure().excess is None  # type: ignore[union-attr]
    usage.write_text("590000000")
    assert group.measure().excess is Excess.MEMORY  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("file", "text", "excess"),
    [("memory.events", "max 9\noom 1\noom_kill 4\n", Excess.MEMORY), ("pids.events", "max 1\n", Excess.PROCESSES)],
)
def test_version_2_tells_of_a_cap_that_was_met(tmp_path: Path, file: str, text: str, excess: Excess) -> None:
    group = v2(tmp_path)
    (tmp_path / "box" / file).write_text(text)
    assert group.measure().excess is excess  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [v1, v2])
def test_a_note_leads_back_to_the_group(tmp_path: Path, make: Any) -> None:
    group = make(tmp_path)
    group.note(tmp_path / "note")
    again = Group.noted(tmp_path / "note")
    assert again is not None
    assert again.measure() == group.measure()
    assert Group.noted(tmp_path / "nothing") is None


@pytest.mark.usefixtures("kernel")
def test_the_end_forbids_forks_first(tmp_path: Path) -> None:
    group, files = v1(tmp_path), []
    unlink = Path.unlink

    def see(self: Path) -> None:
        if self.name == "pids.max":
            files.append(self.read_text())
        unlink(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", see)
        assert group.end()
    assert files == ["0"]
    assert not list(tmp_path.glob("*/box"))
    assert group.end()


MOUNT_V2 = "36 31 0:32 {root} {point} rw,relatime - cgroup2 cgroup2 rw\n"


def find(tmp_path: Path, own: str, mounts: str) -> Cgroups | None:
    (tmp_path / "own").write_text(own)
    (tmp_path / "mounts").write_text(mounts)
    return Cgroups.find("carrel-x", mounts=tmp_path / "mounts", own=tmp_path / "own")


@pytest.mark.usefixtures("kernel")
def test_version_2_is_found_below_our_own_group(tmp_path: Path) -> None:
    own = fill(tmp_path / "kernel/a/b", V2_FILES | {"cgroup.subtree_control": "cpu memory pids"})
    found = find(tmp_path, "0::/a/b\n", MOUNT_V2.format(root="/", point=tmp_path / "kernel"))
    assert found is not None
    assert (found.version, found.caps_cpu) == (2, True)
    assert (own / "carrel-x/cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    assert [name for name, _ in found.left()] == []
    group = found.group("box", CAPS)
    group.make(CAPS)
    assert (own / "carrel-x/box/memory.max").read_text() == "500000000"
    assert group.entrances == [str(own / "carrel-x/box/cgroup.procs")]
    assert [name for name, _ in found.left()] == ["box"]
    group.end()
    found.close()
    assert not (own / "carrel-x").exists()


@pytest.mark.usefixtures("kernel")
def test_version_2_makes_way_where_only_the_server_is_in_the_way(tmp_path: Path) -> None:
    own = fill(tmp_path / "kernel/a", V2_FILES | {"cgroup.procs": f"{os.getpid()}\n"})
    assert find(tmp_path, "0::/a\n", MOUNT_V2.format(root="/", point=tmp_path / "kernel")) is not None
    assert (own / "carrel-server/cgroup.procs").read_text() == str(os.getpid())
    assert (own / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


@pytest.mark.usefixtures("kernel")
def test_version_2_goes_one_up_where_our_own_group_passes_nothing_on(tmp_path: Path) -> None:
    above = fill(tmp_path / "kernel/unit", V2_FILES)
    fill(above / "server", V2_FILES | {"cgroup.controllers": ""})
    found = find(tmp_path, "0::/unit/server\n", MOUNT_V2.format(root="/", point=tmp_path / "kernel"))
    assert found is not None
    assert (above / "carrel-x").is_dir()


def test_a_part_of_the_hierarchy_may_be_all_that_is_shown(tmp_path: Path) -> None:
    point = tmp_path / "memory"
    mounts = "".join(
        f"3{number} 31 0:32 /docker/box {tmp_path / name} rw - cgroup cgroup rw,{name}\n"
        for number, name in enumerate(("memory", "pids"))
    )
    for name in ("memory", "pids"):
        (tmp_path / name).mkdir()
    assert find(tmp_path, "4:memory:/docker/box\n8:pids:/docker/box\n", mounts) is None
    assert point.is_dir(), "an ordinary folder is no control group, and is left as it was"
    assert list(point.iterdir()) == []


@pytest.mark.parametrize("mounts", ["", MOUNT_V2.format(root="/", point="/nowhere")])
def test_where_there_are_none_none_are_found(tmp_path: Path, mounts: str) -> None:
    assert find(tmp_path, "0::/a\n", mounts) is None


def test_two_installations_have_names_of_their_own(tmp_path: Path) -> None:
    assert name_of(tmp_path / "a") != name_of(tmp_path / "b")
    assert name_of(tmp_path / "a") == name_of(tmp_path / "b/../a")


def test_who_insists_on_control_groups_is_refused_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cgroups, "find", lambda name: None)
    with pytest.raises(InvalidSettings, match="Delegate=yes"):
        Fence(tmp_path, CAPS, "cgroup").open()
    fence = Fence(tmp_path, CAPS, "auto")
    fence.open()
    (tmp_path / "box").mkdir()
    assert fence.enter(tmp_path / "box", "/bin/claude", own_user=False) == "/bin/claude", "nothing to enter"
    assert "--nproc=125:125" in Path(fence.enter(tmp_path / "box", "/bin/claude", own_user=True)).read_text()
    assert fence.measure({"box": {"folder": str(tmp_path / "box")}}) == {}
    assert fence.end(tmp_path / "box")
    fence.close()
