"""What the owner's steps do to a session's rows, each in one transaction."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from carrel import abc
from carrel.errors import (
    DiskFull,
    SandboxLost,
    SandboxOutOfDisk,
    SandboxOutOfMemory,
    SandboxOutOfProcesses,
    TurnTimedOut,
)
from carrel.model import (
    Failure,
    Interaction,
    InteractionStatus,
    OnSandboxLost,
    RewoundPart,
    Sandbox,
    SandboxStatus,
    Session,
    SessionStatus,
    SnapshotReason,
    StopReason,
    Turn,
    TurnStatus,
    WorkspaceMode,
    new_id,
    utc_now,
)
from carrel.protocol.environments import Environment
from carrel.protocol.events import SessionDeleted, SessionRewound, WorkspaceRestored
from carrel.protocol.link import Asked
from carrel.sessions import transitions
from carrel.sessions.admission import Admission
from carrel.sessions.asking import asked_frame
from carrel.sessions.environments import kept_environment
from carrel.sessions.hub import token_hash

_STRIKE_AGAIN = frozenset({SandboxOutOfMemory.code, SandboxOutOfProcesses.code, SandboxOutOfDisk.code, DiskFull.code})
"""Whoever took such a turn up again would do the same again."""
_MOST_ATTEMPTS = 5
"""How many agents may be lost in taking one call up before its turn fails."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A session's rows, as one step sees them."""

    session: Session | None
    deleting: bool
    sandbox: Sandbox | None
    live: Turn | None
    queued: list[Turn]
    asked: list[Interaction]
    """What waits for people."""
    open_call: Interaction | None
    """The call that the turn at work was held up at, and that has not happened."""
    environment: Environment | None
    """The version that the session keeps."""
    stopped: bool
    """Whether its environment takes no prompts."""


def view(tx: abc.Transaction, session_id: str) -> View:
    """The session's rows, all as they are at one instant."""
    session = tx.sessions.get(session_id)
    live = tx.turns.live(session_id)
    untaken = [] if session is None else list(tx.interactions.untaken(session_id))
    return View(
        session=session,
        deleting=session is None and tx.sessions.deleting(session_id),
        sandbox=tx.sandboxes.current(session_id),
        live=live,
        queued=list(tx.turns.queued(session_id)),
        asked=[each for each in untaken if each.status is InteractionStatus.PENDING],
        open_call=None if live is None else transitions.call_of(live, untaken),
        environment=None if session is None else kept_environment(tx, session),
        stopped=session is not None and session.environment in tx.environments.stopped(),
    )


def spoilt(session: Session, sandbox: Sandbox | None) -> bool:
    """Whether a session of a warm pool is of no use any more. It is started once, and then taken or thrown away."""
    return sandbox is None and (session.generation > 0 or session.error is not None)


def discard(tx: abc.Transaction, session_id: str) -> bool:
    """Throw a session of a warm pool away, unless somebody was quicker to take it. Whether it goes."""
    session = tx.sessions.get(session_id)
    if session is None or session.reserved is None:
        return False
    tx.sessions.mark_deleting(session_id)
    return True


def goes_on(turn: Turn, open_call: Interaction | None) -> bool:
    """Whether a new agent takes the turn up when its sandbox is lost: asked for, or nothing was begun.

    Args:
        turn: the turn at work.
        open_call: the one it was held up at by a question to a person, if it has not happened.
    """
    if turn.interrupt_reason is not None:
        return False
    if turn.options.get("on_sandbox_lost") == OnSandboxLost.CONTINUE:
        return True
    return open_call is not None and int(turn.options.get("attempt", 1)) <= _MOST_ATTEMPTS


def end_waiting(tx: abc.Transaction, session_id: str, turn_id: str, reason: StopReason) -> None:
    """End a turn that waits without a process: there is nobody who would have to be told first."""
    session, turn = tx.sessions.get(session_id), tx.turns.get(turn_id)
    sandbox = tx.sandboxes.current(session_id)
    if session is None or turn is None or turn.status.ended or sandbox is not None:
        return
    reason = turn.interrupt_reason or reason
    failure = turn.error
    if failure is None and reason is StopReason.TIMEOUT:
        late = TurnTimedOut()
        failure = Failure(code=late.code, message=late.message)
    status = TurnStatus.INTERRUPTED if failure is None else TurnStatus.FAILED
    transitions.complete_turn(tx, session, turn, status, stop_reason=reason, error=failure)
    transitions.settle(tx, tx.sessions.get(session_id) or session, stop_reason=reason)


def mark_deleted(tx: abc.Transaction, session_id: str) -> list[Session]:
    """The session is gone for everyone from here on, with all below it; owners remove what is left of them.

    Answers those below, each before its parent.
    """
    below = list(reversed(tx.trees.below(session_id)))
    for gone in (*(each.id for each in below), session_id):
        transitions.emit(tx, gone, SessionDeleted())
        tx.sessions.mark_deleting(gone)
    return below


class Launching(Enum):
    """What became of a sandbox that was to be launched."""

    STORED = auto()
    OUTDATED = auto()
    """The rows have changed: look at them again."""
    WAITS = auto()
    """All places are taken; whoever gives them away says when it is time."""
    OCCUPIED = auto()
    """Another session works in its persistent workspace, in which one at a time may."""


def launching(tx: abc.Transaction, spec: abc.LaunchSpec, runtime: str, admission: Admission) -> Launching:
    """Store a sandbox that is to be launched, if one is still wanted and its turn may go to work."""
    session = tx.sessions.get(spec.session_id)
    if session is None or session.generation + 1 != spec.generation:
        return Launching.OUTDATED
    if session.status in (SessionStatus.STOPPED, SessionStatus.FAILED) or session.restoring is not None:
        return Launching.OUTDATED
    queued, live = tx.turns.queued(session.id), tx.turns.live(session.id)
    if not queued and live is None and session.reserved is None:
        # What it was wanted for has been cancelled meanwhile.
        return Launching.OUTDATED
    if live is not None and live.status is TurnStatus.WAITING:
        return Launching.OUTDATED
    wanted = session.status is SessionStatus.IDLE and queued and live is None
    if wanted and not admission.admits(tx, queued[0].id):
        return Launching.WAITS
    if occupants(tx, session):
        return Launching.OCCUPIED
    tx.sandboxes.add(
        Sandbox(
            id=spec.sandbox_id,
            session_id=spec.session_id,
            generation=spec.generation,
            status=SandboxStatus.LAUNCHING,
            runtime=runtime,
            link_token_hash=token_hash(spec.link_token),
            agent_token_hash=token_hash(spec.agent_token),
            network=spec.template.network,
            environment=_version_of(session),
            created_at=utc_now(),
        )
    )
    if session.status not in (SessionStatus.STARTING, SessionStatus.WAITING):
        # The gateway may have died between the end of a lost sandbox and saying so.
        session = transitions.settle(tx, session)
    transitions.set_status(tx, session, SessionStatus.STARTING, generation=spec.generation)
    return Launching.STORED


def put_back(tx: abc.Transaction, session_id: str) -> None:
    """The files are back at what was wanted; so is the conversation from here on, and the log says so."""
    session = tx.sessions.get(session_id)
    if session is None or session.restoring is None:
        return
    wanted = session.restoring
    changes: dict[str, Any] = {"restoring": None}
    snapshot = tx.snapshots.get(wanted.snapshot_id) if wanted.snapshot_id is not None else None
    turn = tx.turns.get(wanted.turn_id) if wanted.turn_id is not None else None
    if turn is not None:
        ended = tx.events.completed(session_id, turn_id=turn.id)
        told = SessionRewound(to_turn_id=turn.id, snapshot_id=wanted.snapshot_id)
        transitions.emit(tx, session_id, told)
        now = tx.sessions.get(session_id) or session
        part = RewoundPart(
            after_turn=turn.number,
            upto_turn=wanted.upto_turn,
            after_seq=ended[1] if ended is not None else now.last_seq,
            upto_seq=now.last_seq,
        )
        changes["rewound"] = (*session.rewound, part)
        if session.agent_session_id is not None:
            # Under another name, so that no file of the agent's in its home passes for this conversation.
            changes["agent_session_id"] = str(uuid.uuid4())
            replace = (session.agent_session_id, changes["agent_session_id"])
            tx.transcripts.rewind(session_id, to_turn=turn.id, replace=replace)
    elif snapshot is not None:
        told_of_files = WorkspaceRestored(
            snapshot_id=snapshot.id, reason="asked", taken_at=snapshot.created_at, seq=snapshot.seq
        )
        transitions.emit(tx, session_id, told_of_files)
    now = tx.sessions.update(session_id, **changes)
    if snapshot is not None:
        # What is newest is what is there: a folder that is lost now comes back as this.
        again = {"id": new_id(), "number": time.time_ns() // 1000, "turn_id": None, "created_at": utc_now()}
        again |= {"reason": SnapshotReason.ASKED, "session_id": session_id, "seq": now.last_seq}
        tx.snapshots.add(snapshot.model_copy(update=again))


def occupants(tx: abc.Transaction, session: Session) -> list[Sandbox]:
    """The sandboxes of other sessions in its persistent workspace, where one session at a time may work in it."""
    workspace = tx.workspaces.get(session.workspace_id) if session.workspace_id is not None else None
    if workspace is None or workspace.mode is not WorkspaceMode.LOCK:
        return []
    return [each for each in tx.sandboxes.in_workspace(workspace.id) if each.session_id != session.id]


def continue_turn(tx: abc.Transaction, session_id: str, turn_id: str, sandbox: Sandbox) -> None:
    """Have this sandbox take up the turn that a lost one has begun."""
    session, turn = tx.sessions.get(session_id), tx.turns.get(turn_id)
    if session is not None and turn is not None and not turn.status.ended:
        transitions.continue_turn(tx, session, turn, sandbox.id)


def resting(tx: abc.Transaction, session: Session, admission: Admission) -> bool:
    """Whether the session's sandbox has nothing to do: no turn waits for it, or none that may go to work now.

    One whose turn waits for a place counts too: its memory may be just what the turn in that place needs.
    """
    if session.status is not SessionStatus.READY:
        return False
    queued = tx.turns.queued(session.id)
    return not queued or not admission.is_next(tx, queued[0].id)


def evict(tx: abc.Transaction, session_id: str, sandbox_id: str, admission: Admission) -> bool:
    """Have a session whose sandbox has nothing to do give it up. Whether it does."""
    session, sandbox = tx.sessions.get(session_id), tx.sandboxes.current(session_id)
    if session is None or not resting(tx, session, admission):
        return False
    if sandbox is None or sandbox.id != sandbox_id:
        return False
    if session.reserved is not None:
        return discard(tx, session_id)
    tx.sandboxes.update(sandbox_id, status=SandboxStatus.ENDING)
    transitions.set_status(tx, session, SessionStatus.IDLE)
    return True


def _version_of(session: Session) -> str:
    return f"{session.environment}:{session.environment_version}"


def outdated(session: Session, sandbox: Sandbox) -> bool:
    """Whether the sandbox was launched for another version of an environment than the session is in by now."""
    return sandbox.environment not in (None, _version_of(session))


def replace(tx: abc.Transaction, session_id: str, sandbox_id: str) -> bool:
    """Have an outdated sandbox end before it is given another turn. A turn at work ends in it. Whether it goes."""
    session, sandbox = tx.sessions.get(session_id), tx.sandboxes.current(session_id)
    if session is None or sandbox is None or sandbox.id != sandbox_id or not outdated(session, sandbox):
        return False
    if tx.turns.live(session_id) is not None or session.status not in (SessionStatus.READY, SessionStatus.STARTING):
        return False
    tx.sandboxes.update(sandbox_id, status=SandboxStatus.ENDING)
    transitions.set_status(tx, session, SessionStatus.IDLE)
    return True


def lose(tx: abc.Transaction, session_id: str, failure: Failure | None = None) -> None:
    """The sandbox is gone: its turn ends with it, unless it is to go on."""
    session = tx.sessions.get(session_id)
    if session is None:
        return
    live = tx.turns.live(session_id)
    lost = SandboxLost()
    told = failure or (live.error if live is not None else None) or Failure(code=lost.code, message=lost.message)
    reason = StopReason.SANDBOX_LOST if told.code == lost.code else StopReason.ERROR
    if failure is None and live is not None and live.error is not None and live.interrupt_reason is not None:
        reason = live.interrupt_reason
    open_call = None if live is None else transitions.open_call(tx, live)
    if live is not None and goes_on(live, open_call) and open_call is not None:
        if open_call.status is InteractionStatus.PENDING:
            return  # it waits without a process from here on
    elif live is not None and (told.code in _STRIKE_AGAIN or not goes_on(live, None)):
        transitions.fail_turn(tx, session, live, told, reason)
    if session.status is SessionStatus.STARTING and tx.turns.queued(session_id):
        # Nothing was begun, so nothing was lost: the next step starts another.
        return
    transitions.settle(tx, session, stop_reason=reason if live is not None else None)


def settle(tx: abc.Transaction, session_id: str) -> None:
    """A session without a sandbox is idle."""
    session = tx.sessions.get(session_id)
    if session is not None:
        transitions.settle(tx, session)


def could_not_start(tx: abc.Transaction, session_id: str, failure: Failure) -> None:
    """What waits for the sandbox fails, and so does the session."""
    fail_waiting(tx, session_id, failure, StopReason.ERROR)
    session = tx.sessions.get(session_id)
    if session is not None and session.status is SessionStatus.STARTING:
        transitions.set_status(tx, session, SessionStatus.FAILED, stop_reason=StopReason.ERROR, error=failure)
    elif session is not None:
        transitions.settle(tx, session, stop_reason=StopReason.ERROR)


def fail_waiting(tx: abc.Transaction, session_id: str, failure: Failure, stop_reason: StopReason) -> None:
    """Fail the turn at work and all that wait."""
    session = tx.sessions.get(session_id)
    if session is None:
        return
    live = tx.turns.live(session_id)
    for turn in [*([live] if live else []), *tx.turns.queued(session_id)]:
        transitions.fail_turn(tx, session, turn, failure, stop_reason)
    error = {} if session.reserved is None else {"error": failure}
    tx.sessions.update(session_id, stop_reason=stop_reason, **error)


def remind(tx: abc.Transaction, session_id: str) -> None:
    """Tell people again of whatever of the session is due."""
    now = utc_now()
    for asked in tx.interactions.pending(session_id):
        if asked.remind_at is not None and asked.remind_at <= now:
            transitions.remind(tx, asked)


def bind_asked(tx: abc.Transaction, session_id: str) -> list[Asked]:
    """What earlier agents have asked, for calls that the next one may make."""
    live = tx.turns.live(session_id)
    return [
        asked_frame(each)
        for each in tx.interactions.untaken(session_id)
        if each.parked or (live is not None and each.turn_id == live.id)
    ]


def expire_asked(tx: abc.Transaction, interaction_ids: list[str]) -> list[Interaction]:
    """Nobody has answered these in time. Those of them that were pending until now."""
    found = [transitions.resolve(tx, each, InteractionStatus.EXPIRED) for each in interaction_ids]
    return [each for each in found if each is not None]


def expire(tx: abc.Transaction, session_id: str, turn_ids: list[str]) -> None:
    """These turns have waited for too long."""
    session = tx.sessions.get(session_id)
    for turn_id in turn_ids:
        turn = tx.turns.get(turn_id)
        if session is not None and turn is not None and turn.status is TurnStatus.QUEUED:
            transitions.complete_turn(tx, session, turn, TurnStatus.EXPIRED, stop_reason=None)
