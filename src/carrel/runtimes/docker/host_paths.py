"""Where our folders are on the engine's host, which is the one that binds them."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from carrel.errors import InvalidSettings

__all__ = ["HostPaths", "own_mounts"]


class HostPaths:
    """Turns a path of ours into the engine's host's."""

    def __init__(self, mounts: Sequence[tuple[Path, Path]] = ()) -> None:
        """Of pairs of a folder as we see it and as the host sees it; without any, both see the same."""
        self._mounts = sorted(mounts, key=lambda mount: len(mount[0].parts), reverse=True)

    def of(self, path: Path) -> str:
        """The path on the host.

        Raises:
            InvalidSettings: the host has no such path.
        """
        if not self._mounts:
            return str(path)
        for ours, theirs in self._mounts:
            if path.is_relative_to(ours):
                return str(theirs / path.relative_to(ours))
        raise InvalidSettings(
            f"{path} is in this container's own filesystem, where the engine cannot find it. Put the data folder on a "
            "volume or a bind mount, or say with docker.data_on_host where the host has it."
        )


def own_container() -> str | None:
    """What to call the container that we run in; None where we run in none."""
    return socket.gethostname() if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() else None


def own_mounts(inspected: Mapping[str, Any]) -> list[tuple[Path, Path]]:
    """The folders that our own container is shown of its host, as both sides call them."""
    return [
        (Path(mount["Destination"]), Path(mount["Source"]))
        for mount in inspected.get("Mounts", [])
        if mount.get("Source") and mount.get("Destination")
    ]
