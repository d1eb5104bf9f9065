"""The blocking client: `asynchronous.py` without `await`; what both say and read is in `calls.py`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

from carrel.client import calls
from carrel.client.blocking_files import Artifacts, Files, Snapshots, Workspaces
from carrel.client.calls import Call, Listing
from carrel.client.connection import Connection
from carrel.client.responses import error_of, unreachable
from carrel.client.results import result_of_events
from carrel.client.streams import FollowEvents, FollowQuery, FollowTurn, Stream
from carrel.client.types import (
    ApiKey,
    BudgetState,
    Environment,
    EnvironmentStatus,
    Event,
    Frame,
    Interaction,
    Message,
    NetworkReport,
    Secret,
    Session,
    Turn,
    UsageReport,
    User,
)
from carrel.errors import CarrelError
from carrel.protocol.results import TurnResult

__all__ = ["Carrel"]

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Carrel:
    """A client of one server. Use it as `with Carrel(url, api_key=key) as carrel:`.

    A stream holds a connection until it ends; leave one early through `contextlib.closing`.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_seconds: float = 30,
        silence_seconds: float = 60,
        reconnect_seconds: float = 60,
    ) -> None:
        """Make the client; nothing is sent yet.

        Args:
            base_url: such as `http://127.0.0.1:8000`.
            api_key: sent as `Authorization: Bearer`.
            timeout_seconds: how long a short request may take.
            silence_seconds: a stream that sends nothing for so long is taken for broken, and opened again.
            reconnect_seconds: how long a server that was there and is lost is tried again.
        """
        connection = Connection(
            base_url=base_url.rstrip("/"),
            api_key=api_key,
            timeout_seconds=timeout_seconds,
            silence_seconds=silence_seconds,
            reconnect_seconds=reconnect_seconds,
        )
        self._wire = wire = _Wire(connection)
        self.sessions = Sessions(wire)
        self.turns = Turns(wire)
        self.events = Events(wire)
        self.files = Files(wire)
        self.snapshots = Snapshots(wire)
        self.artifacts = Artifacts(wire)
        self.interactions = Interactions(wire)
        self.workspaces = Workspaces(wire)
        self.environments = Environments(wire)
        self.secrets = Secrets(wire)
        self.keys = Keys(wire)
        self.users = Users(wire)
        self.usage = Spending(wire)

    def query(self, prompt: str | None = None, **options: Any) -> TurnResult:
        """Run a one-off prompt in a session that is gone after it. `options` are a session's and a turn's."""
        key = options.pop("idempotency_key", None)
        return self._wire.send(calls.query(prompt, options, key))

    def query_stream(
        self, prompt: str | None = None, *, deltas: bool = True, **options: Any
    ) -> Generator[Frame, None, None]:
        """As `query`, and yield its events and deltas. A connection that breaks cannot be taken up again."""
        return self._wire.frames(FollowQuery(self._wire.base_url, prompt, options, deltas=deltas))

    def audit(self, *, as_csv: bool = False, **filters: str | None) -> Generator[bytes, None, None]:
        """The audit log, newest first, in chunks that end anywhere: lines of JSON, or `as_csv`. For admins.

        `filters`: user, principal, action, object_id, since, until (ISO 8601, with a zone).
        """
        media_type = "text/csv" if as_csv else "application/x-ndjson"
        return self._wire.chunks(calls.export_audit(filters, media_type))

    def health(self) -> dict[str, Any]:
        """What the server says of itself; needs no key."""
        return self._wire.send(calls.health())

    def close(self) -> None:
        """Close every connection."""
        self._wire.http.close()

    def __enter__(self) -> Carrel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Wire:
    """Sends calls, follows streams."""

    def __init__(self, connection: Connection) -> None:
        self.base_url = connection.base_url
        self.reconnect_seconds = connection.reconnect_seconds
        self.http = httpx.Client(**connection.arguments())
        self._stream_timeout = connection.stream_timeout()

    def send(self, call: Call[T]) -> T:
        try:
            response = self.http.request(**call.arguments())
        except httpx.TransportError as error:
            raise unreachable(self.base_url, error) from error
        if not response.is_success:
            raise error_of(response)
        return call.read(response)

    def items(self, listing: Listing[M]) -> Iterator[M]:
        cursor: str | None = None
        while True:
            page = self.send(listing.page(cursor))
            yield from listing.items(page)
            cursor = page.next_cursor
            if cursor is None:
                return

    def chunks(self, call: Call[None]) -> Generator[bytes, None, None]:
        try:
            with self.http.stream(**call.arguments()) as response:
                if not response.is_success:
                    response.read()
                    raise error_of(response)
                yield from response.iter_bytes()
        except httpx.TransportError as error:
            raise unreachable(self.base_url, error) from error

    def frames(self, stream: Stream) -> Generator[Frame, None, None]:
        while True:
            lost: httpx.TransportError | CarrelError | None = None
            arguments = stream.request().arguments() | {"timeout": self._stream_timeout}
            try:
                with self.http.stream(**arguments) as response:
                    if not response.is_success:
                        response.read()
                        raise error_of(response)
                    stream.opened()
                    for chunk in response.iter_bytes():
                        yield from stream.feed(chunk)
                        if stream.over:
                            return
            except (httpx.TransportError, CarrelError) as error:
                lost = error
            time.sleep(stream.lost(lost))


class Sessions:
    """Durable conversations with their files."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def create(self, *, idempotency_key: str | None = None, **spec: Any) -> Session:
        """Make a session. `spec` is the body of `POST /sessions`: title, model, system_prompt, tools…"""
        return self._wire.send(calls.create_session(spec, idempotency_key))

    def get(self, session_id: str) -> Session:
        """The session as it is now."""
        return self._wire.send(calls.get_session(session_id))

    def list(
        self, *, status: str | None = None, q: str | None = None, page_size: int | None = None
    ) -> Iterator[Session]:
        """Every session of the caller, newest first; with `q`, those that have this in their title or conversation."""
        return self._wire.items(calls.list_sessions(status, q, page_size))

    def messages(
        self,
        session_id: str,
        *,
        after: int = 0,
        turn_id: str | None = None,
        thinking: bool = False,
        q: str | None = None,
        page_size: int | None = None,
    ) -> Iterator[Message]:
        """The conversation as whole messages, in order: prompts, answers with their calls, and the tools' results.

        Args:
            session_id: the session.
            after: only messages that began after the event of this number.
            turn_id: only those of this turn.
            thinking: with what the agent thought.
            q: only those in which this was said, in any case of letters.
            page_size: how many are asked for at a time.
        """
        options = {"after": after or None, "turn_id": turn_id, "thinking": thinking, "q": q, "limit": page_size}
        return self._wire.items(calls.list_messages(session_id, options))

    def update(self, session_id: str, **changes: Any) -> Session:
        """Change what is given; None goes back to the default."""
        return self._wire.send(calls.update_session(session_id, changes))

    def delete(self, session_id: str) -> None:
        """Delete the session for good, with its files."""
        self._wire.send(calls.delete_session(session_id))

    def stop(self, session_id: str) -> Session:
        """Stop it by hand: it takes no prompt until `resume`."""
        return self._wire.send(calls.stop_session(session_id))

    def resume(self, session_id: str) -> Session:
        """Take a stopped or failed session up again."""
        return self._wire.send(calls.resume_session(session_id))

    def interrupt(self, session_id: str, *, turn_id: str | None = None) -> Turn:
        """Ask for the end of the turn at work, or of this one only. Raises NothingToInterrupt."""
        return self._wire.send(calls.interrupt_session(session_id, turn_id))

    def fork(self, session_id: str, *, turn_id: str | None = None, idempotency_key: str | None = None) -> Session:
        """A new session that goes on from the end of a turn, by default the last one."""
        return self._wire.send(calls.fork_session(session_id, turn_id, idempotency_key))

    def rewind(
        self, session_id: str, *, turn_id: str | None = None, seq: int | None = None, files: bool = True
    ) -> Session:
        """Go back to the end of a turn, or of the last one that had ended by an event: conversation and files."""
        return self._wire.send(calls.rewind_session(session_id, turn_id, seq, files))

    def network(self, session_id: str, *, cursor: str | None = None, limit: int | None = None) -> NetworkReport:
        """What the session may reach beside the gateway, and what it has asked for: a page of it, the newest first."""
        return self._wire.send(calls.get_network(session_id, cursor, limit))

    def export(self, session_id: str) -> Generator[bytes, None, None]:
        """Everything of the session: lines of JSON, in chunks that end anywhere."""
        return self._wire.chunks(calls.export_session(session_id))


class Turns:
    """Prompts, and what comes of them. `options` are the body of `POST …/turns`: content, timeout_seconds, model…"""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def create(
        self, session_id: str, prompt: str | None = None, *, idempotency_key: str | None = None, **options: Any
    ) -> Turn:
        """Queue a prompt, and do not wait."""
        return self._wire.send(calls.create_turn(session_id, prompt, options, idempotency_key))

    def run(self, session_id: str, prompt: str | None = None, **options: Any) -> TurnResult:
        """Queue a prompt and wait for its end, over as many connections as it takes."""
        stream = self._stream(session_id, prompt, deltas=False, options=options)
        events = [frame for frame in self._wire.frames(stream) if isinstance(frame, Event)]
        return result_of_events(session_id, events)

    def stream(
        self, session_id: str, prompt: str | None = None, *, deltas: bool = True, **options: Any
    ) -> Generator[Frame, None, None]:
        """Queue a prompt and yield its events and deltas until its end, over as many connections as it takes."""
        return self._wire.frames(self._stream(session_id, prompt, deltas=deltas, options=options))

    def _stream(self, session_id: str, prompt: str | None, *, deltas: bool, options: Mapping[str, Any]) -> FollowTurn:
        rest = dict(options)
        key = rest.pop("idempotency_key", None) or str(uuid.uuid4())
        return FollowTurn(
            self._wire.base_url,
            session_id,
            prompt,
            rest,
            deltas=deltas,
            idempotency_key=key,
            give_up_seconds=self._wire.reconnect_seconds,
        )

    def get(self, session_id: str, turn_id: str) -> Turn:
        """The turn as it is now."""
        return self._wire.send(calls.get_turn(session_id, turn_id))

    def list(self, session_id: str, *, page_size: int | None = None) -> Iterator[Turn]:
        """Every turn of the session, newest first."""
        return self._wire.items(calls.list_turns(session_id, page_size))

    def cancel(self, session_id: str, turn_id: str) -> Turn:
        """Take a queued turn back."""
        return self._wire.send(calls.cancel_turn(session_id, turn_id))


class Events:
    """What has happened in a session, and what is happening."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def list(self, session_id: str, *, after: int = 0, limit: int | None = None) -> Sequence[Event]:
        """One page of stored events with a higher `seq` than `after`."""
        page = self._wire.send(calls.list_events(session_id, after, limit))
        return [Event.model_validate(value) for value in page.data]

    def follow(self, session_id: str, *, after: int = 0, deltas: bool = False) -> Generator[Frame, None, None]:
        """Yield every event with a higher `seq` than `after`, once each, until the session is deleted.

        A connection that breaks is opened again where it broke.
        """
        give_up = self._wire.reconnect_seconds
        stream = FollowEvents(self._wire.base_url, session_id, after=after, deltas=deltas, give_up_seconds=give_up)
        return self._wire.frames(stream)


class Interactions:
    """What waits for a person: calls that want to be allowed, questions, plans."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def list(
        self, session_id: str | None = None, *, status: str | None = None, page_size: int | None = None
    ) -> Iterator[Interaction]:
        """What sessions of the caller, or this one, have asked people, oldest first; `status`: such as `pending`."""
        return self._wire.items(calls.list_interactions(session_id, status, page_size))

    def get(self, interaction_id: str) -> Interaction:
        """The interaction as it is now."""
        return self._wire.send(calls.get_interaction(interaction_id))

    def answer(
        self, interaction_id: str, decision: str, *, idempotency_key: str | None = None, **options: Any
    ) -> Interaction:
        """Answer it: `allow` or `deny`. Of several answers at once one counts, the others raise InteractionResolved.

        `options`: updated_input, answers (of a question), message, stop.
        """
        return self._wire.send(calls.answer_interaction(interaction_id, decision, options, idempotency_key))

    def wait(
        self, session_id: str | None = None, *, timeout_seconds: float | None = None, poll_seconds: float = 0.5
    ) -> Interaction:
        """Wait until something waits for a person, and answer the oldest that does.

        Raises:
            TimeoutError: nothing has within `timeout_seconds`.
        """
        until = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            for found in self.list(session_id, status="pending", page_size=1):
                return found
            if until is not None and time.monotonic() >= until:
                raise TimeoutError("nothing waits for a person")
            time.sleep(poll_seconds)


class Environments:
    """Environments: what sessions are opened in, by a name."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def put(self, name: str, spec: Mapping[str, Any]) -> tuple[Environment, bool]:
        """Write the next version, and answer it and whether it is new: the same content again makes none. For admins."""
        return self._wire.send(calls.put_environment(name, spec))

    def get(self, name: str, *, version: int | None = None) -> Environment:
        """The environment in its newest version, or in another."""
        return self._wire.send(calls.get_environment(name, version))

    def list(self, *, page_size: int | None = None) -> Iterator[Environment]:
        """Every environment that the caller may use, in its newest version, by name."""
        return self._wire.items(calls.list_environments(page_size))

    def versions(self, name: str) -> Iterator[Environment]:
        """Every version of the environment, newest first."""
        return self._wire.items(calls.list_environment_versions(name))

    def delete(self, name: str) -> None:
        """Delete it with all of its versions. Raises EnvironmentInUse while sessions are in it. For admins."""
        self._wire.send(calls.delete_environment(name))

    def status(self, name: str) -> EnvironmentStatus:
        """How it does: whether it takes prompts, its warm pool, its sessions, what is wrong with it."""
        return self._wire.send(calls.environment_status(name))

    def start(self, name: str) -> EnvironmentStatus:
        """Have it take prompts, and its warm pool be filled. For admins."""
        return self._wire.send(calls.start_environment(name))

    def stop(self, name: str) -> EnvironmentStatus:
        """Have it take no more prompts; those it has taken are answered. For admins."""
        return self._wire.send(calls.stop_environment(name))


class Secrets:
    """Secrets of environments: written, and never read back. For admins."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def put(self, name: str, value: str) -> None:
        """Keep a secret; what stood under its name is gone. Raises SecretsLocked where the operator has given no key."""
        self._wire.send(calls.put_secret(name, value))

    def list(self) -> Iterator[Secret]:
        """Every secret, without its value, by name."""
        return self._wire.items(calls.list_secrets())

    def delete(self, name: str) -> None:
        """Forget a secret. Raises SecretInUse while environments use it."""
        self._wire.send(calls.delete_secret(name))


class Keys:
    """API keys: your own, and as an admin everybody's."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def create(self, *, idempotency_key: str | None = None, **options: Any) -> ApiKey:
        """Make a key. `options` are the body of `POST /keys`: user, name, scopes, expires_in_seconds."""
        return self._wire.send(calls.create_key(options, idempotency_key))

    def get(self, key_id: str) -> ApiKey:
        """The key as it is now, without its secret."""
        return self._wire.send(calls.get_key(key_id))

    def list(self, *, user: str | None = None, page_size: int | None = None) -> Iterator[ApiKey]:
        """Every key, newest first."""
        return self._wire.items(calls.list_keys(user, page_size))

    def revoke(self, key_id: str) -> None:
        """Have the key open nothing any more."""
        self._wire.send(calls.revoke_key(key_id))


class Users:
    """Users, for admins."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def create(self, user_id: str, **options: Any) -> User:
        """Make a user. `options` are the rest of the body of `POST /users`: budget, daily_budget, max_sessions."""
        return self._wire.send(calls.create_user(user_id, options))

    def get(self, user_id: str) -> User:
        """The user as it is now."""
        return self._wire.send(calls.get_user(user_id))

    def list(self, *, page_size: int | None = None) -> Iterator[User]:
        """Every user, by id."""
        return self._wire.items(calls.list_users(page_size))

    def update(self, user_id: str, **changes: Any) -> User:
        """Change what is given; None goes back to what the server's settings say. `disabled=True` locks out."""
        return self._wire.send(calls.update_user(user_id, changes))


class Spending:
    """What was spent, and what is left."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def get(self, group_by: Sequence[str] = (), **options: Any) -> UsageReport:
        """Sums of usage: the caller's own, an administrator's everybody's.

        Args:
            group_by: any of user, session, turn, model and day, in the order of the rows.
            options: user, session_id, turn_id, model; since and until (days or times); limit and cursor.
        """
        return self._wire.send(calls.get_usage(group_by, options))

    def budgets(self, *, user: str | None = None, session_id: str | None = None) -> Sequence[BudgetState]:
        """What is left of the budgets of a user (by default the caller), and of a session and its turn at work."""
        return self._wire.send(calls.get_budgets(user, session_id))
