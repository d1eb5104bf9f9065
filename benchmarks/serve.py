"""A server in a process of its own: `python -m benchmarks.serve SETTINGS` (JSON).

At SIGUSR1 it writes what it holds (tasks, threads, objects) to `held.json` in its data folder.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path

import uvloop

from carrel.cli.server import running
from carrel.observability import configure_logging
from carrel.settings import Settings, load_settings


async def _serve(settings: Settings) -> None:
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    loop.add_signal_handler(signal.SIGINT, over.set)
    loop.add_signal_handler(signal.SIGUSR1, _say_what_is_held, settings.data)
    async with running(settings):
        await over.wait()


def _say_what_is_held(data: Path) -> None:
    gc.collect()
    held = {"tasks": len(asyncio.all_tasks()), "threads": threading.active_count(), "objects": len(gc.get_objects())}
    unfinished = data / "held.json.tmp"
    unfinished.write_text(json.dumps(held))
    os.replace(unfinished, data / "held.json")


def main(settings: Settings) -> None:
    """Serve until told to end."""
    configure_logging("warning")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


if __name__ == "__main__":
    main(load_settings(overrides=json.loads(sys.argv[1])))
