"""The files of sessions: reaching, copying and removing them safely while an agent is at work in the same folder; snapshots."""

from carrel.workspaces.archives import ArchiveFormat, ArchiveLimits, Unpacked, pack, unpack
from carrel.workspaces.files import FileEntry, FileType, WorkspaceFiles
from carrel.workspaces.folders import Folders
from carrel.workspaces.manifests import Change, Manifest
from carrel.workspaces.pruning import KeepRules, superfluous
from carrel.workspaces.scanning import HOME_PARTS, Tree
from carrel.workspaces.snapshots import Restored, Saved, Snapshots

__all__ = [
    "HOME_PARTS",
    "ArchiveFormat",
    "ArchiveLimits",
    "Change",
    "FileEntry",
    "FileType",
    "Folders",
    "KeepRules",
    "Manifest",
    "Restored",
    "Saved",
    "Snapshots",
    "Tree",
    "Unpacked",
    "WorkspaceFiles",
    "pack",
    "superfluous",
    "unpack",
]
