"""Every error a user of Carrel can meet.

    CarrelError
    ├── InvalidRequest                  400
    │   ├── InvalidPath                 400
    │   ├── InvalidCursor               400
    │   └── ValidationFailed            422
    │       └── IdempotencyMismatch     422
    ├── AuthenticationRequired          401
    ├── Forbidden                       403
    │   └── UntrustedOrigin             403
    ├── NotFound                        404
    │   ├── SessionNotFound             404
    │   ├── TurnNotFound                404
    │   ├── FileNotFound                404
    │   └── RouteNotFound               404
    ├── MethodNotAllowed                405
    ├── Conflict                        409
    │   ├── SessionStopped              409
    │   ├── SessionFailed               409
    │   ├── NothingToInterrupt          409
    │   ├── TurnNotCancellable          409
    │   ├── TurnNotFinished             409
    │   ├── IdempotencyInFlight         409
    │   ├── NotAFile                    409
    │   └── PathConflict                409
    ├── FileTooLarge                    413
    ├── TooMany                         429
    │   └── QueueFull                   429
    ├── Unavailable                     503
    │   ├── Draining                    503
    │   ├── UpstreamUnreachable         503
    │   └── MissingCredential           503
    ├── TurnFailure                     (how a turn can fail; told in the turn, never as a status of HTTP)
    │   ├── SandboxLost
    │   ├── SandboxLaunchFailed
    │   │   └── AgentStartFailed
    │   ├── TurnTimedOut
    │   ├── AgentFailed
    │   └── SpoolFull
    ├── DemoFailed                      (ends `carrel demo`, with exit code 1)
    └── OperatorError                   (stops a command, with exit code 2)
        ├── InvalidSettings
        ├── DataFolderInUse
        ├── IsolationUnavailable
        ├── UnsafeConfiguration
        ├── MigrationRequired
        └── ServerUnreachable

An error keeps apart what the user reads (``message``), what the operator reads (``operator_detail``) and what
metrics count (``code``). ``str(error)`` is for logs; only ``message`` ever leaves the process.
The first line of a class's docstring is its default message.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, ClassVar


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class CarrelError(Exception):
    """Something went wrong inside Carrel."""

    http_status: ClassVar[int] = 500
    code: ClassVar[str] = "carrel_error"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "code" not in cls.__dict__:
            cls.code = _snake(cls.__name__)

    def __init__(self, message: str | None = None, *, operator_detail: str | None = None, **context: Any) -> None:
        """Make the error.

        Args:
            message: what the user reads; without it, the first line of the class's docstring.
            operator_detail: what only the log may say.
            context: facts a program may want, shown beside the message (must be JSON).
        """
        self.message = message or (inspect.getdoc(type(self)) or "").split("\n", 1)[0]
        self.operator_detail = operator_detail
        self.context = context
        super().__init__(self.message if operator_detail is None else f"{self.message} [{operator_detail}]")

    @property
    def retry_after_seconds(self) -> int | None:
        """Seconds after which a repeat may succeed; None where a repeat will not help."""
        value = self.context.get("retry_after_seconds")
        return int(value) if value is not None else None


class InvalidRequest(CarrelError):
    """The request is not valid."""

    http_status = 400


class InvalidPath(InvalidRequest):
    """The path does not name a place inside the workspace."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"The path {path!r} is not allowed: {reason}.", path=path)


class InvalidCursor(InvalidRequest):
    """The cursor is not one this list handed out; start again without it."""


class ValidationFailed(InvalidRequest):
    """A field of the request has a wrong value."""

    http_status = 422


class IdempotencyMismatch(ValidationFailed):
    """This Idempotency-Key was used with another request; use a new key for a new request."""


class AuthenticationRequired(CarrelError):
    """A valid key is required: send it as `Authorization: Bearer <key>`. The first key is in DATA/admin.key."""

    http_status = 401


class Forbidden(CarrelError):
    """This is not allowed."""

    http_status = 403


class UntrustedOrigin(Forbidden):
    """Without authentication the server answers only to its own address, and never to a page of another origin."""


class NotFound(CarrelError):
    """There is no such thing."""

    http_status = 404


class SessionNotFound(NotFound):
    """There is no session with this id."""


class TurnNotFound(NotFound):
    """There is no turn with this id in this session."""


class FileNotFound(NotFound):
    """There is no such file in the workspace."""

    def __init__(self, path: str) -> None:
        super().__init__(f"There is no file {path!r} in the workspace.", path=path)


class RouteNotFound(NotFound):
    """There is no such address here; /docs lists them all."""


class MethodNotAllowed(CarrelError):
    """This address does not take this method; /docs lists what it takes."""

    http_status = 405


class Conflict(CarrelError):
    """This cannot be done in the present state."""

    http_status = 409


class SessionStopped(Conflict):
    """The session is stopped; call resume before sending it a prompt."""


class SessionFailed(Conflict):
    """The session could not be started; call resume to try again."""


class NothingToInterrupt(Conflict):
    """No turn of this session is running."""


class TurnNotCancellable(Conflict):
    """Only a queued turn can be cancelled; interrupt the session to end one that runs."""


class TurnNotFinished(Conflict):
    """A session can be forked only at a turn that has ended."""


class IdempotencyInFlight(Conflict):
    """The first request with this Idempotency-Key is still being worked on; ask again shortly."""

    def __init__(self) -> None:
        super().__init__(retry_after_seconds=1)


class NotAFile(Conflict):
    """The path is not a regular file."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path!r} is not a regular file.", path=path)


class PathConflict(Conflict):
    """Something else stands in the way at this path."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"The path {path!r} cannot be used: {reason}.", path=path)


class FileTooLarge(CarrelError):
    """The body is larger than the limit."""

    http_status = 413

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"The body is larger than the limit of {max_bytes} bytes.", max_bytes=max_bytes)


class TooMany(CarrelError):
    """Too many requests; try again later."""

    http_status = 429


class QueueFull(TooMany):
    """This session's queue of turns is full; wait for some to end."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"This session already has {limit} turns queued; wait for some to end.", retry_after_seconds=5)


class Unavailable(CarrelError):
    """The service cannot do this now; try again later."""

    http_status = 503


class Draining(Unavailable):
    """The server is shutting down and takes no new turns."""

    def __init__(self) -> None:
        super().__init__(retry_after_seconds=5)


class UpstreamUnreachable(Unavailable):
    """The model's API did not answer, or not as it should; try again later."""


class MissingCredential(Unavailable):
    """No credential for the model is set, so no turn can run. \
Set ANTHROPIC_API_KEY (or ANTHROPIC_AUTH_TOKEN, or CLAUDE_CODE_OAUTH_TOKEN) for the server and restart it, \
or try Carrel without one: `carrel serve --model-upstream scripted`."""


class TurnFailure(CarrelError):
    """The turn failed."""


class SandboxLost(TurnFailure):
    """The turn's sandbox ended unexpectedly, and it is not known how far the turn had come. \
The conversation and files up to there are kept; send the prompt again if it should be repeated."""


class SandboxLaunchFailed(TurnFailure):
    """The session's sandbox could not be started; the server's log says why."""


class AgentStartFailed(SandboxLaunchFailed):
    """Claude Code could not be started in the sandbox."""


class TurnTimedOut(TurnFailure):
    """The turn took longer than its timeout_seconds and was interrupted; the session can be used."""


class AgentFailed(TurnFailure):
    """The agent ended the turn with an error."""


class SpoolFull(TurnFailure):
    """The gateway was away for so long that the runner had no room left to keep events; the turn was interrupted."""


class DemoFailed(CarrelError):
    """Something in the demo did not come out as it should."""


class OperatorError(CarrelError):
    """The command cannot go on."""


class InvalidSettings(OperatorError):
    """A setting is wrong."""


class DataFolderInUse(OperatorError):
    """Another server uses this data folder; stop it, or give this one another folder with --data."""


class IsolationUnavailable(OperatorError):
    """The isolation that is asked for is not available on this machine."""


class UnsafeConfiguration(OperatorError):
    """This configuration would be unsafe, so it is refused."""


class MigrationRequired(OperatorError):
    """The database was made by a newer release of Carrel; upgrade Carrel, or restore a backup."""


class ServerUnreachable(OperatorError):
    """No server answers; start one with `carrel serve`."""


def all_errors() -> dict[str, type[CarrelError]]:
    """Every error class by its code; the documentation and the tests are made from this."""
    found: dict[str, type[CarrelError]] = {}

    def visit(cls: type[CarrelError]) -> None:
        found[cls.code] = cls
        for child in cls.__subclasses__():
            visit(child)

    visit(CarrelError)
    return found
