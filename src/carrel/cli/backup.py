"""`carrel backup` and `carrel restore`: everything of an installation in one file, and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from carrel.cli.context import context_of
from carrel.errors import OperatorError

if TYPE_CHECKING:
    from carrel.cli.archive import Manifest

__all__ = ["backup", "restore"]

# The databases are imported when they are used; no other command has to wait for them.


def backup(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(metavar="TARGET.tar.gz", help="The archive; it must not exist yet.")],
    data: Annotated[Path | None, typer.Option(help="The data folder. (default: CARREL_DATA or ./carrel-data)")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in YAML. (default: DATA/config.yaml)")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Only say whether an archive is whole.")] = False,
) -> None:
    """Put the database, all files, the admin key and config.yaml into one archive. The server may run meanwhile."""
    from carrel.cli import installation

    if verify:
        _tell(f"{target} is whole", installation.check(target))
        return
    given = context_of(context)
    manifest, left_out = installation.save(given.settings(config, {"data": data or given.data}), target)
    for name in left_out:
        sys.stderr.write(f"carrel: left out, for it is no file or could not be read: {name!r}\n")
    _tell(f"{target} is written", manifest)


def restore(
    context: typer.Context,
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE.tar.gz", help="What `carrel backup` has written.")],
    data: Annotated[Path | None, typer.Option(help="The data folder to make; it must be new, or empty.")] = None,
    users: Annotated[Path | None, typer.Option(help="Where users' directories go. (default: DATA/users)")] = None,
    database_url: Annotated[
        str | None, typer.Option(help="An empty PostgreSQL database. (default: what the settings name)")
    ] = None,
) -> None:
    """Make a data folder of an archive. All of it is verified before anything is written."""
    from carrel.cli import installation

    chosen = data or context_of(context).data
    if chosen is None:
        raise OperatorError("Say with --data where to: a folder that is not there yet, or is empty.")
    folder = chosen.expanduser().absolute()
    place = users.expanduser().absolute() if users is not None else None
    manifest = installation.load(archive, folder, users=place, database_url=database_url)
    _tell(f"{folder} is restored", manifest)
    _advise(manifest, folder, place, database_url)


def _tell(what: str, manifest: Manifest) -> None:
    size = sum(file["size"] for file in manifest.files.values())
    facts = manifest.facts
    sys.stdout.write(
        f"{what}: {len(manifest.files)} files, {size} bytes, rows of {facts['engine']} at revision {facts['revision']}, "
        f"made by Carrel {facts['version']} at {facts['made_at']}\n"
    )


def _advise(manifest: Manifest, folder: Path, users: Path | None, database_url: str | None) -> None:
    """Say what the settings have to say from now on."""
    if users is not None:
        sys.stdout.write(f"Set users.base_dir to {users}.\n")
    elif manifest.facts.get("users_base_dir") not in (None, str(folder / "users")) and (folder / "users").is_dir():
        sys.stdout.write(
            f"Users' directories were in {manifest.facts['users_base_dir']} and are now in {folder / 'users'}; "
            "see what users.base_dir says.\n"
        )
    if manifest.facts.get("objects_path") is not None and (folder / "objects").is_dir():
        sys.stdout.write(
            f"Snapshots and artifacts were in {manifest.facts['objects_path']} and are now in {folder / 'objects'}; "
            "see what objects.path says.\n"
        )
    if database_url is not None:
        sys.stdout.write("Set database.url to the database that was named here.\n")
