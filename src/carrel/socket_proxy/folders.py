"""The folders that a container may be shown of its host, and no others."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

from carrel.errors import EngineCallRefused

__all__ = ["Bindable"]


class Bindable:
    """Folders in which whatever is a folder or a file may be bound into a container.

    The engine follows symbolic links on its host, as root. A gateway that has been taken over could put one into its
    own folder; so each part of a path is looked at where we see the same folder.
    """

    def __init__(self, folders: Sequence[tuple[PurePosixPath, Path]] = ()) -> None:
        """Of pairs of a folder as the host has it, and as we see it."""
        self._folders = sorted(folders, key=lambda pair: len(pair[0].parts), reverse=True)

    @classmethod
    def shown_below(cls, folder: Path, inspected: Mapping[str, Any]) -> Bindable:
        """Of what our own container is shown in or below a folder.

        Args:
            folder: where we see it.
            inspected: what the engine says of our container.
        """
        return cls(
            [
                (PurePosixPath(mount["Source"]), Path(mount["Destination"]))
                for mount in inspected.get("Mounts", [])
                if mount.get("Source") and Path(mount["Destination"]).is_relative_to(folder)
            ]
        )

    @property
    def on_host(self) -> list[str]:
        """Where they are on the host."""
        return [str(theirs) for theirs, _ in self._folders]

    def check(self, source: str) -> None:
        """Look at a path of the host that is to be bound.

        Raises:
            EngineCallRefused: it is outside, or leads out by a symbolic link, or is not there.
        """
        path = PurePosixPath(source)
        if not path.is_absolute() or str(path) != source or ".." in path.parts:
            raise EngineCallRefused("A bind whose source is not a plain absolute path is not passed on.")
        for theirs, ours in self._folders:
            if path != theirs and path.is_relative_to(theirs):
                self._walk(ours, path.relative_to(theirs).parts)
                return
        raise EngineCallRefused("A bind from outside of the gateway's folders is not passed on.")

    @staticmethod
    def _walk(folder: Path, parts: Sequence[str]) -> None:
        with ExitStack() as opened:
            try:
                here = os.open(folder, os.O_PATH | os.O_DIRECTORY)
                opened.callback(os.close, here)
                for number, part in enumerate(parts, 1):
                    here = os.open(part, os.O_PATH | os.O_NOFOLLOW, dir_fd=here)
                    opened.callback(os.close, here)
                    mode = os.fstat(here).st_mode
                    if not (
                        stat.S_ISDIR(mode) or (number == len(parts) and (stat.S_ISREG(mode) or stat.S_ISSOCK(mode)))
                    ):
                        raise EngineCallRefused("A bind that leads over a link, or to a device, is not passed on.")
            except OSError as error:
                raise EngineCallRefused(
                    "A bind of what is not there, or may not be looked at, is not passed on.",
                    operator_detail=repr(error),
                ) from error
