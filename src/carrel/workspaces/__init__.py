"""The files of sessions: reaching, copying and removing them safely while an agent is at work in the same folder."""

from carrel.workspaces.files import FileEntry, FileType, WorkspaceFiles
from carrel.workspaces.folders import Folders

__all__ = ["FileEntry", "FileType", "Folders", "WorkspaceFiles"]
