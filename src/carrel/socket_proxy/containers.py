"""What a container may be made like. Every field is named here; one that is not is refused, harmless or not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from carrel.errors import EngineCallRefused
from carrel.socket_proxy.folders import Bindable

__all__ = ["checked_container"]

_LOWEST_ID = 1000
_UNPRIVILEGED = frozenset({"no-new-privileges", "no-new-privileges:true", "no-new-privileges=true"})
_TMPFS_OPTIONS = re.compile(r"(?:[a-z]+(?:=[0-9]+[kmg]?)?(?:,|$))*")
_USER = re.compile(r"([0-9]{1,10})(?::([0-9]{1,10}))?")
_RUNTIME = re.compile(r"[a-z][a-z0-9_-]*")  # no path, and no name of a shim of containerd's

Check = Callable[[Any], bool]


def _kind(*kinds: type) -> Check:
    return lambda value: (
        value is None or (isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds))
    )


_bool = _kind(bool)
_text = _kind(str)
_number = _kind(int)


def _texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _command(value: Any) -> bool:
    return isinstance(value, str) or _texts(value)


def _text_by_text(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(item, str) for item in value.values()))


def _only(**fields: Check) -> Check:
    """An object of these fields alone, spelt exactly so: the engine itself reads `privileged` as `Privileged`."""

    def check(value: Any) -> bool:
        return value is None or (
            isinstance(value, dict) and all(name in fields and fields[name](item) for name, item in value.items())
        )

    return check


def _one_of(*values: Any) -> Check:
    return lambda value: value is None or value in values


def _list_of(item: Check) -> Check:
    return lambda value: value is None or (isinstance(value, list) and all(map(item, value)))


def _tmpfs(value: Any) -> bool:
    return _text_by_text(value) and all(_TMPFS_OPTIONS.fullmatch(options) for options in (value or {}).values())


def _not_negative(value: Any) -> bool:
    return _number(value) and (value is None or value >= 0)


_MOUNT = _only(
    Type=_one_of("bind"),
    Source=_text,
    Target=_text,
    ReadOnly=_bool,
    BindOptions=_only(
        Propagation=_one_of("rprivate", "private", "rslave"), NonRecursive=_bool, CreateMountpoint=_one_of(False)
    ),
)

_HOST_CONFIG: dict[str, Check] = {
    "AutoRemove": _bool,
    "CapAdd": _one_of([]),
    "CapDrop": lambda value: value == ["ALL"],
    "CgroupnsMode": _one_of("private", ""),
    "CpuPeriod": _not_negative,
    "CpuQuota": _not_negative,
    "CpuShares": _not_negative,
    "Init": _bool,
    "IpcMode": _one_of("private", "none"),
    "LogConfig": _only(
        Type=_one_of("json-file", "local", "none"),
        Config=lambda value: _text_by_text(value) and set(value or ()) <= {"max-size", "max-file"},
    ),
    "Memory": _not_negative,
    "MemoryReservation": _not_negative,
    "MemorySwap": _number,
    "MemorySwappiness": _not_negative,
    "Mounts": _list_of(_MOUNT),
    "NanoCpus": _not_negative,
    "NetworkMode": _text,
    "OomScoreAdj": _not_negative,
    "PidsLimit": _number,
    "Privileged": _one_of(False),
    "ReadonlyRootfs": _bool,
    "RestartPolicy": _only(Name=_one_of("no", ""), MaximumRetryCount=_one_of(0)),
    "Runtime": lambda value: value is None or (isinstance(value, str) and _RUNTIME.fullmatch(value) is not None),
    "SecurityOpt": lambda value: (
        isinstance(value, list) and bool(value) and all(_is_unprivileged(each) for each in value)
    ),
    "ShmSize": _not_negative,
    "StorageOpt": lambda value: _text_by_text(value) and set(value or ()) <= {"size"},
    "Tmpfs": _tmpfs,
    "Ulimits": _list_of(_only(Name=_text, Soft=_number, Hard=_number)),
}
_REQUIRED = ("CapDrop", "SecurityOpt", "NetworkMode")

_CONTAINER: dict[str, Check] = {
    "AttachStderr": _bool,
    "AttachStdin": _bool,
    "AttachStdout": _bool,
    "Cmd": _command,
    "Entrypoint": _command,
    "Env": _texts,
    "Healthcheck": _only(Test=_one_of(["NONE"])),
    "HostConfig": lambda value: isinstance(value, dict),
    "Hostname": _text,
    "Image": lambda value: isinstance(value, str) and bool(value),
    "Labels": _text_by_text,
    "OpenStdin": _bool,
    "StdinOnce": _bool,
    "StopSignal": _text,
    "StopTimeout": _not_negative,
    "Tty": _bool,
    "User": _text,
    "WorkingDir": _text,
}


def _is_unprivileged(option: Any) -> bool:
    return isinstance(option, str) and option in _UNPRIVILEGED


def checked_container(
    body: bytes, *, label: tuple[str, str], bindable: Bindable, images: Sequence[str], networks: Sequence[str]
) -> bytes:
    """What the engine is told to make: what was asked for, written anew, with our label.

    Written anew, because what we have read is then what the engine reads: of a field that stands there twice, too.

    Args:
        body: what was asked for.
        label: which every container of ours bears.
        bindable: the folders that it may be shown.
        images: patterns of the images that it may be made of.
        networks: the networks that it may be in.

    Raises:
        EngineCallRefused: it may not be made so.
    """
    try:
        asked = json.loads(body, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise EngineCallRefused("A container that is not told in JSON is not passed on.") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("HostConfig"), dict):
        raise EngineCallRefused("A container without its HostConfig is not passed on.")
    host = asked["HostConfig"]
    _fields(asked, _CONTAINER, "")
    _fields(host, _HOST_CONFIG, "HostConfig.")
    for name in _REQUIRED:
        if name not in host:
            raise EngineCallRefused(f"A container without HostConfig.{name} is not passed on.")
    if not any(fnmatchcase(asked.get("Image", ""), pattern) for pattern in images):
        raise EngineCallRefused("A container of another image than the operator permits is not passed on.")
    if host["NetworkMode"] not in networks:
        raise EngineCallRefused(f"A container in the network `{host['NetworkMode']}` is not passed on.")
    _user(asked.get("User"))
    for mount in host.get("Mounts") or ():
        if not isinstance(mount.get("Source"), str) or not isinstance(mount.get("Target"), str):
            raise EngineCallRefused("A mount without source and target is not passed on.")
        bindable.check(mount["Source"])
    labels = dict(asked.get("Labels") or {})
    if strange := [name for name in labels if name == label[0] or name.startswith("com.docker.")]:
        raise EngineCallRefused(f"The label `{strange[0]}` is not for the gateway to give.")
    return json.dumps(asked | {"Labels": labels | {label[0]: label[1]}}).encode()


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise EngineCallRefused("A container of which something is told twice is not passed on.")
    return found


def _fields(told: Mapping[str, Any], known: Mapping[str, Check], prefix: str) -> None:
    for name, value in told.items():
        if name not in known:
            raise EngineCallRefused(f"A container with {prefix}{name} is not passed on.")
        if not known[name](value):
            raise EngineCallRefused(f"A container with this {prefix}{name} is not passed on.")


def _user(user: Any) -> None:
    """An unprivileged user by number: a name means what the image says, and an empty one is often root."""
    found = _USER.fullmatch(user) if isinstance(user, str) else None
    if found is None or any(int(number) < _LOWEST_ID for number in found.groups() if number is not None):
        raise EngineCallRefused(f"A container whose user is not a number of {_LOWEST_ID} or more is not passed on.")
    if found[2] is None:
        raise EngineCallRefused("A container whose group is not named is not passed on.")  # it would be root's
