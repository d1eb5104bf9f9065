"""A runner that is the first program of its container: `python -I -m carrel.runner`, its bootstrap on standard input.

The agent is of the same user as this process, and holds nothing of it: it may not look into its memory, environment or
descriptors, and the bootstrap stands in no file, argument or variable.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from carrel.protocol.bootstrap import Bootstrap

_PR_SET_DUMPABLE = 4
_SKILLS = Path(__file__).with_name("skills")
_MOST_BYTES = 4 * 1024 * 1024


def main() -> None:
    """Run to the end of the sandbox."""
    # First of all: from here on not even a process of the same user reads /proc/self or traces us.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        sys.exit("this process cannot be hidden from its agent")
    line = sys.stdin.buffer.readline(_MOST_BYTES)
    if not line.endswith(b"\n"):
        sys.exit("no bootstrap came: whoever started this container has gone")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    bootstrap = Bootstrap.model_validate_json(line)
    for path, place in bootstrap.places.items():
        found = os.stat(path)
        if (found.st_dev, found.st_ino) != place:
            sys.exit(f"{path} is not the folder that was to be mounted there")
    os.environ["CLAUDE_AGENT_SDK_SKIP_VERSION_CHECK"] = "1"
    os.chdir(bootstrap.workspace)
    from carrel.runner.main import run

    own = {"cli_path": bootstrap.cli_path or _claude(), "skills": bootstrap.skills or str(_SKILLS), "own_caps": True}
    run(bootstrap.model_copy(update=own))


def _claude() -> str:
    """The image's Claude Code program."""
    if found := shutil.which("claude"):
        return found
    spec = find_spec("claude_agent_sdk")
    bundled = Path(spec.origin).parent / "_bundled" / "claude" if spec is not None and spec.origin else None
    if bundled is None or not bundled.is_file():
        sys.exit("there is no Claude Code program in this image")
    return str(bundled)


if __name__ == "__main__":
    main()
