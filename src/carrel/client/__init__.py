"""Carrel's Python client, asynchronous and blocking.

    from carrel.client import Carrel

    with Carrel("http://127.0.0.1:8000", api_key=key) as carrel:
        session = carrel.sessions.create(title="first")
        print(carrel.turns.run(session.id, "Hello").text)

What the server refuses is raised as the class of `carrel.errors` that the server names.
"""

from carrel.client.asynchronous import AsyncCarrel
from carrel.client.blocking import Carrel
from carrel.client.types import (
    ApiKey,
    Artifact,
    BudgetState,
    Change,
    Delta,
    Diff,
    Environment,
    EnvironmentStatus,
    Event,
    FileEntry,
    Frame,
    Interaction,
    Message,
    NamedWorkspace,
    NetworkReport,
    NetworkRequest,
    Patch,
    Secret,
    Session,
    Snapshot,
    Turn,
    UnpackedArchive,
    UsageReport,
    UsageRow,
    User,
)
from carrel.protocol.results import ToolCall, TurnResult

__all__ = [
    "ApiKey",
    "Artifact",
    "AsyncCarrel",
    "BudgetState",
    "Carrel",
    "Change",
    "Delta",
    "Diff",
    "Environment",
    "EnvironmentStatus",
    "Event",
    "FileEntry",
    "Frame",
    "Interaction",
    "Message",
    "NamedWorkspace",
    "NetworkReport",
    "NetworkRequest",
    "Patch",
    "Secret",
    "Session",
    "Snapshot",
    "ToolCall",
    "Turn",
    "TurnResult",
    "UnpackedArchive",
    "UsageReport",
    "UsageRow",
    "User",
]
