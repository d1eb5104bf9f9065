"""What the engine is told to make, where our folders are on its host, and what its numbers mean."""

import re
from pathlib import Path
from typing import Any

import pytest

from carrel.abc import Excess
from carrel.errors import (
    CarrelError,
    DiskFull,
    EngineUnavailable,
    InvalidSettings,
    RuntimeUnavailable,
    SandboxLaunchFailed,
)
from carrel.model import HostFolder, NetworkPolicy, Resources, SandboxTemplate
from carrel.protocol.engine_calls import CALLS
from carrel.runtimes.docker import Caps, ContainerOptions, DockerRuntime, DockerRuntimeOptions, container
from carrel.runtimes.docker.container import Bind
from carrel.runtimes.docker.engine import Refusal
from carrel.runtimes.docker.host_paths import HostPaths, own_mounts
from carrel.runtimes.docker.usage import ended_of, usage_of

MIB = 2**20


def config(template: SandboxTemplate = SandboxTemplate(), **options: Any) -> dict[str, Any]:
    return container.config(
        sandbox_id="s1",
        session_id="t1",
        installation="i1",
        user=(700_001, 700_001),
        template=template,
        options=ContainerOptions(**{"image": "carrel-sandbox:1"} | options),
        binds=[("/on/host/w", Bind(Path("/ours/w"), "/workspace", read_only=False))],
    )


def test_the_wall_stands_whatever_is_asked() -> None:
    everything = SandboxTemplate(
        image="mine:2",
        oci_runtime="runsc",
        mounts=(HostFolder(source="/models", target="/models"),),
        resources=Resources(memory_mb=512, processes=99, cpus=0.5),
        network=NetworkPolicy(mode="open"),
        variables={"A": "b"},
    )
    for template in (SandboxTemplate(), everything):
        found = config(template)
        host = found["HostConfig"]
        assert found["User"] == "700001:700001"
        assert (host["CapDrop"], host["Privileged"], host["ReadonlyRootfs"], host["Init"]) == (
            ["ALL"],
            False,
            True,
            True,
        )
        assert host["SecurityOpt"] == ["no-new-privileges:true"], "and no seccomp of ours: the engine's default holds"
        assert not {"CapAdd", "Devices", "PidMode", "UsernsMode", "Binds", "VolumesFrom"} & set(host)
        assert host["IpcMode"] == host["CgroupnsMode"] == "private"
        assert (found["OpenStdin"], found["StdinOnce"]) == (True, True)
        assert found["Env"] == ["CARREL_SANDBOX=s1"], "nothing else may be read off the container"
        assert found["Entrypoint"][1] == "-I", "the workspace, where it starts, is not on the runner's path"


def test_a_template_wins_over_the_settings() -> None:
    caps = Caps(memory_bytes=4096 * MIB, processes=512, cpus=2.0)
    plain = config(caps=caps)["HostConfig"]
    assert (plain["Memory"], plain["MemorySwap"], plain["PidsLimit"], plain["NanoCpus"]) == (
        4096 * MIB,
        4096 * MIB,
        512,
        2_000_000_000,
    )
    assert plain["NetworkMode"] == "none"
    assert "Runtime" not in plain
    template = SandboxTemplate(
        image="mine:2",
        oci_runtime="runsc",
        mounts=(HostFolder(source="/models", target="/models"),),
        resources=Resources(memory_mb=512, processes=99, cpus=0.5),
        network=NetworkPolicy(mode="open"),
    )
    own = config(template, caps=caps)
    host = own["HostConfig"]
    assert (own["Image"], host["Runtime"], host["NetworkMode"]) == ("mine:2", "runsc", "bridge")
    assert (host["Memory"], host["PidsLimit"], host["NanoCpus"]) == (512 * MIB, 99, 500_000_000)
    assert [(mount["Source"], mount["Target"], mount["ReadOnly"]) for mount in host["Mounts"]] == [
        ("/on/host/w", "/workspace", False),
        ("/models", "/models", True),
    ]


def test_names_that_are_allowed_need_no_network_of_the_containers() -> None:
    allowing = SandboxTemplate(network=NetworkPolicy(mode="allow", allow=("example.org",)))
    assert config(allowing)["HostConfig"]["NetworkMode"] == "none"


def test_without_caps_there_are_none() -> None:
    assert not {"Memory", "MemorySwap", "PidsLimit", "NanoCpus"} & set(config()["HostConfig"])


# ------------------------------------------------------------------------------------------------------------- paths


def test_on_the_host_itself_paths_are_what_they_are() -> None:
    assert HostPaths().of(Path("/data/sessions")) == "/data/sessions"


def test_the_innermost_mount_says_where_a_folder_is_on_the_host() -> None:
    inspected = {
        "Mounts": [
            {"Type": "volume", "Source": "/var/lib/docker/volumes/db/_data", "Destination": "/data"},
            {"Type": "bind", "Source": "/srv/users", "Destination": "/data/users"},
            {"Type": "tmpfs", "Destination": "/tmp"},
        ]
    }
    paths = HostPaths(own_mounts(inspected))
    assert paths.of(Path("/data/sessions/1")) == "/var/lib/docker/volumes/db/_data/sessions/1"
    assert paths.of(Path("/data/users/u")) == "/srv/users/u"
    with pytest.raises(InvalidSettings, match=r"docker\.data_on_host"):
        paths.of(Path("/elsewhere"))


# ----------------------------------------------------------------------------------------------------------- numbers


def stats(current: int, limit: int = 0, **memory: int) -> dict[str, Any]:
    usage = memory.pop("usage", 0)
    return {
        "pids_stats": {"current": current, "limit": limit},
        "memory_stats": {"usage": usage, "stats": memory},
        "cpu_stats": {"cpu_usage": {"total_usage": 1_500_000_000}},
    }


@pytest.mark.parametrize("name", ["total_inactive_file", "inactive_file"])
def test_what_is_given_back_at_once_does_not_count(name: str) -> None:
    usage = usage_of(stats(3, usage=100 * MIB, **{name: 40 * MIB}), out_of_memory=False)
    assert usage is not None
    assert (usage.memory_bytes, usage.processes, usage.cpu_seconds, usage.excess) == (60 * MIB, 3, 1.5, None)


def test_a_cap_that_is_met() -> None:
    full = usage_of(stats(64, limit=64), out_of_memory=False)
    killed = usage_of(stats(3), out_of_memory=True)
    assert full is not None
    assert killed is not None
    assert (full.excess, killed.excess) == (Excess.PROCESSES, Excess.MEMORY)


def test_what_has_ended_takes_nothing_but_may_say_of_what() -> None:
    assert usage_of(stats(0), out_of_memory=False) is None
    assert ended_of({"State": {"Running": False, "OOMKilled": False}}, out_of_memory=False) is None
    assert ended_of({"State": {"Running": True, "OOMKilled": True}}, out_of_memory=True) is None
    for state, heard in (({"Running": False, "OOMKilled": True}, False), ({"Running": False}, True)):
        found = ended_of({"State": state}, out_of_memory=heard)
        assert found is not None
        assert found.excess is Excess.MEMORY


# ------------------------------------------------------------------------------------------------------------ engine


@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (400, "invalid mount config", SandboxLaunchFailed),
        (500, "failed to update store for object type *libnetwork.endpoint", RuntimeUnavailable),
        (500, "write /var/lib/docker/x: no space left on device", DiskFull),
    ],
)
def test_what_a_launch_is_told_of_a_refusal(status: int, message: str, told: type[CarrelError]) -> None:
    assert type(Refusal(status, message).told()) is told


async def test_without_an_engine_the_start_says_what_to_do(tmp_path: Path) -> None:
    from contextlib import AsyncExitStack

    options = DockerRuntimeOptions(
        installation="i",
        folder=tmp_path / "containers",
        link_folder=tmp_path,
        gateway_folder=tmp_path,
        containers=ContainerOptions(image="x"),
        host=f"unix://{tmp_path}/nobody.sock",
        wait_seconds=0,
    )
    async with AsyncExitStack() as stack:
        with pytest.raises(EngineUnavailable, match="choose runtime: local"):
            await DockerRuntime(options).start(stack)


def test_the_calls_are_what_the_engine_s_client_makes() -> None:
    """Whoever adds one adds it to the list, by which proxies before the engine's socket go."""
    source = Path(container.__file__).with_name("engine.py").read_text()
    made = {
        "version(": "/version",
        "system.info(": "/info",
        "images.inspect(": "/images/{}/json",
        '"containers/create"': "/containers/create",
        ".attach(": "/containers/{}/attach",
        "container.start(": "/containers/{}/start",
        "containers.list(": "/containers/json",
        ".show(": "/containers/{}/json",
        "/stats": "/containers/{}/stats",
        ".log(": "/containers/{}/logs",
        ".delete(": "/containers/{}",
        "events.run(": "/events",
    }
    assert {call.path for call in CALLS} == set(made.values())
    assert all(text in source for text in made)
    assert source.count("self._docker.") == 13, "a call that is new here stands in the list and in this test"


def test_the_guide_has_all_the_calls_and_no_others() -> None:
    page = Path(__file__).parents[3] / "docs/docker.md"
    shown = re.findall(r"`((?:GET|POST|DELETE|PUT|HEAD) /[^` ]*)`", page.read_text())
    assert sorted(shown) == sorted(f"{call.method} {call.path}" for call in CALLS)
