"""Every error a user of Carrel can meet.

    CarrelError
    ├── InvalidRequest                  400
    │   ├── InvalidPath                 400
    │   ├── InvalidCursor               400
    │   ├── WorkspaceMissing            400
    │   ├── ArchiveInvalid              400
    │   └── ValidationFailed            422
    │       └── IdempotencyMismatch     422
    ├── AuthenticationRequired          401
    ├── Forbidden                       403
    │   ├── MissingScope                403
    │   ├── BoundToSession              403
    │   ├── EngineCallRefused           403
    │   ├── EnvironmentForbids          403
    │   ├── WiderThanParent             403
    │   ├── TooDeep                     403
    │   └── UntrustedOrigin             403
    ├── NotFound                        404
    │   ├── SessionNotFound             404
    │   ├── TurnNotFound                404
    │   ├── InteractionNotFound         404
    │   ├── RuleNotFound                404
    │   ├── FileNotFound                404
    │   ├── WorkspaceNotFound           404
    │   ├── SnapshotNotFound            404
    │   ├── ArtifactNotFound            404
    │   ├── UserNotFound                404
    │   ├── KeyNotFound                 404
    │   ├── ObjectNotFound              404
    │   ├── EnvironmentNotFound         404
    │   ├── SecretNotFound              404
    │   └── RouteNotFound               404
    ├── MethodNotAllowed                405
    ├── Conflict                        409
    │   ├── SessionStopped              409
    │   ├── SessionFailed               409
    │   ├── NothingToInterrupt          409
    │   ├── InteractionResolved         409
    │   ├── InteractionChanged          409
    │   ├── TurnNotCancellable          409
    │   ├── TurnNotFinished             409
    │   ├── IdempotencyInFlight         409
    │   ├── UserExists                  409
    │   ├── NotAFile                    409
    │   ├── PathConflict                409
    │   ├── WorkspaceExists             409
    │   ├── WorkspaceInUse              409
    │   ├── WorkspaceOverQuota          409
    │   ├── TurnAtWork                  409
    │   ├── TurnRewound                 409
    │   ├── SnapshotMissing             409
    │   ├── NotARepository              409
    │   ├── CloneFailed                 409
    │   ├── FilesShared                 409
    │   ├── NoPatch                     409
    │   ├── PatchConflict               409
    │   ├── EnvironmentInUse            409
    │   ├── EnvironmentStopped          409
    │   ├── EnvironmentFixed            409
    │   ├── SecretInUse                 409
    │   └── SecretsLocked               409
    ├── InteractionExpired              410
    ├── FileTooLarge                    413
    ├── ArchiveTooLarge                 413
    ├── SnapshotTooLarge                413
    ├── TooMany                         429
    │   ├── QueueFull                   429
    │   ├── SessionBusy                 429
    │   ├── SessionLimitReached         429
    │   ├── ChildLimitReached           429
    │   └── RateLimited                 429
    ├── ObjectUnreadable                (it is there, and is not given out)
    │   ├── ObjectDamaged
    │   └── ObjectKeyMissing
    ├── Unavailable                     503
    │   ├── Draining                    503
    │   ├── StoreUnavailable            503
    │   │   ├── StoreFull               503
    │   │   └── StoreOutcomeUnknown     503
    │   ├── ObjectStoreUnavailable      503
    │   ├── OutOfMemory                 503
    │   ├── UpstreamUnreachable         503
    │   ├── LoginExpired                503
    │   └── MissingCredential           503
    ├── TurnFailure                     (how a turn can fail; told in the turn, never as a status of HTTP)
    │   ├── SandboxLost
    │   ├── SandboxLaunchFailed
    │   │   ├── AgentStartFailed
    │   │   ├── ImageMissing
    │   │   ├── SecretMissing
    │   │   └── RuntimeUnavailable
    │   ├── TurnTimedOut
    │   ├── BudgetReached
    │   ├── PriceUnknown
    │   ├── SandboxOutOfMemory
    │   ├── SandboxOutOfProcesses
    │   ├── SandboxOutOfDisk
    │   ├── DiskFull
    │   ├── AgentFailed
    │   └── SpoolFull
    ├── EnvironmentProblem              (what is wrong with an environment; told in its status)
    │   ├── McpServerForbidden
    │   ├── McpServerMissing
    │   ├── McpServerRefused
    │   └── McpServerUnreachable
    ├── DemoFailed                      (ends `carrel demo`, with exit code 1)
    └── OperatorError                   (stops a command, with exit code 2)
        ├── InvalidSettings
        ├── DataFolderInUse
        ├── IsolationUnavailable
        ├── EngineUnavailable
        ├── EngineElsewhere
        ├── UnsafeConfiguration
        ├── MigrationRequired
        ├── ForeignDatabase
        ├── BackupInvalid
        ├── TargetNotEmpty
        │   └── DatabaseNotEmpty
        └── ServerUnreachable

An error keeps apart what the user reads (``message``), what the operator reads (``operator_detail``) and what
metrics count (``code``). ``str(error)`` is for logs; only ``message`` ever leaves the process.
The first line of a class's docstring is its default message.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Sequence
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


class WorkspaceMissing(InvalidRequest):
    """The user's directory is not there, and this server does not make any; the operator makes it."""


class ArchiveInvalid(InvalidRequest):
    """The archive is damaged, or holds what may not be unpacked."""

    def __init__(self, reason: str, *, member: str | None = None) -> None:
        where = "" if member is None else f" at {member!r}"
        super().__init__(f"The archive cannot be unpacked{where}: {reason}.", member=member)


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


class MissingScope(Forbidden):
    """This key does not have the scope that the call needs."""

    def __init__(self, scope: str) -> None:
        super().__init__(f"This call needs a key with the scope {scope}.", scope=scope)


class BoundToSession(Forbidden):
    """This token is bound to one session and cannot do this; use a key of its user's."""


class EngineCallRefused(Forbidden):
    """The socket proxy does not pass this call on."""


class EnvironmentForbids(Forbidden):
    """The environment does not let a session have this; a session can only have less than its environment."""


class WiderThanParent(Forbidden):
    """A child can have what its parent has, or less, and never more."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: a child can have what its parent has, or less: {why}.", option=what)


class TooDeep(Forbidden):
    """There are as many sessions above this one as are allowed, so it can begin none."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"There may be {limit} sessions above one, and this would be below one more.", limit=limit)


class UntrustedOrigin(Forbidden):
    """On loopback the server answers to its own names alone, and nowhere to a page of another origin; list those that may call in cors_origins."""


class NotFound(CarrelError):
    """There is no such thing."""

    http_status = 404


class SessionNotFound(NotFound):
    """There is no session with this id."""


class TurnNotFound(NotFound):
    """There is no turn with this id in this session."""


class InteractionNotFound(NotFound):
    """There is no interaction with this id."""


class RuleNotFound(NotFound):
    """There is no such rule about calls of tools."""


class FileNotFound(NotFound):
    """There is no such file in the workspace."""

    def __init__(self, path: str) -> None:
        super().__init__(f"There is no file {path!r} in the workspace.", path=path)


class WorkspaceNotFound(NotFound):
    """There is no such workspace."""


class SnapshotNotFound(NotFound):
    """There is no such snapshot of this session."""


class ArtifactNotFound(NotFound):
    """There is no such artifact of this session."""


class UserNotFound(NotFound):
    """There is no user with this id."""


class KeyNotFound(NotFound):
    """There is no API key with this id."""


class ObjectNotFound(NotFound):
    """There is no such object in the object store."""


class EnvironmentNotFound(NotFound):
    """There is no such environment, or no such version of it, that you may use; GET /environments lists those that you may."""


class SecretNotFound(NotFound):
    """There is no secret of this name."""


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


class InteractionResolved(Conflict):
    """Somebody has answered this already, or the turn that waited for it has ended."""


class InteractionChanged(Conflict):
    """This is not the call that waits: its input_digest is another. Read the interaction again, then answer it."""


class InteractionExpired(CarrelError):
    """Nobody has answered this in time, so the call was denied."""

    http_status = 410


class TurnNotCancellable(Conflict):
    """Only a queued turn can be cancelled; interrupt the session to end one that runs."""


class TurnNotFinished(Conflict):
    """A session can be forked only at a turn that has ended."""


class IdempotencyInFlight(Conflict):
    """The first request with this Idempotency-Key is still being worked on; ask again shortly."""

    def __init__(self) -> None:
        super().__init__(retry_after_seconds=1)


class UserExists(Conflict):
    """There is a user with this id already."""


class NotAFile(Conflict):
    """The path is not a regular file."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path!r} is not a regular file.", path=path)


class PathConflict(Conflict):
    """Something else stands in the way at this path."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"The path {path!r} cannot be used: {reason}.", path=path)


class WorkspaceExists(Conflict):
    """There is a workspace of this name already."""


class WorkspaceInUse(Conflict):
    """Sessions have this workspace; delete them first, or let them come to rest."""


class WorkspaceOverQuota(Conflict):
    """The workspace holds more than its quota; delete files from it, or raise the quota."""


class TurnAtWork(Conflict):
    """A turn of the session waits or is at work; wait for its end, or interrupt it."""


class TurnRewound(Conflict):
    """The session has gone back behind this turn, which is no part of its conversation any more."""


class SnapshotMissing(Conflict):
    """The files as they were at the end of this turn were not kept; ask without files, or name another turn."""


class NotARepository(Conflict):
    """The workspace is not a git repository."""


class CloneFailed(Conflict):
    """The repository of the session's workspace could not be cloned."""

    _WHY: ClassVar[dict[str, str]] = {
        "unresolved": "the name of its host is not known",
        "unreachable": "its host does not answer",
        "private_address": "its host has a private address, which the operator has not allowed",
        "forbidden": "this server does not clone from there",
        "authentication": "its host wants another credential, or has none such repository",
        "not_found": "there is none at this address",
        "ref_not_found": "it has no such branch, tag or commit",
        "redirected": "it is elsewhere; name the address that its host leads to",
        "too_large": "it is larger than this server clones",
        "timeout": "it took too long",
        "git_missing": "git is not installed on this server",
        "failed": "git could not read it",
    }

    def __init__(self, reason: str, *, operator_detail: str | None = None) -> None:
        """Make the error; `reason` is a stable word of those above."""
        why = f"The repository could not be cloned: {self._WHY[reason]}."
        super().__init__(why, reason=reason, operator_detail=operator_detail)


class FilesShared(Conflict):
    """Others work in this workspace too, so its files cannot be put back for one session; ask without files."""


class NoPatch(Conflict):
    """There is no patch of this session: its files are no clone of its parent's, or what they were is not there any more."""


class PatchConflict(Conflict):
    """The patch does not fit the parent's files as they are now; nothing was changed."""

    def __init__(self, paths: Sequence[str]) -> None:
        shown = ", ".join(repr(path) for path in paths[:10]) + (", …" if len(paths) > 10 else "")
        super().__init__(
            f"The patch does not fit the parent's files as they are now, so nothing was changed: {shown}. "
            "Bring the two together by hand, or begin a new child.",
            paths=list(paths[:100]),
        )


class EnvironmentInUse(Conflict):
    """Sessions are in this environment; delete them, or move them to another, first."""


class EnvironmentStopped(Conflict):
    """The environment is stopped and takes no prompts; an admin starts it with POST /environments/{name}/start."""


class EnvironmentFixed(Conflict):
    """The environment `default` is always there; give it a new version instead."""


class SecretInUse(Conflict):
    """Environments use this secret; give them a version without it first."""


class SecretsLocked(Conflict):
    """No secret can be kept here, because the operator has given no key for them: set CARREL_SECRETS_KEY and restart."""


class FileTooLarge(CarrelError):
    """The body is larger than the limit."""

    http_status = 413

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"The body is larger than the limit of {max_bytes} bytes.", max_bytes=max_bytes)


class ArchiveTooLarge(CarrelError):
    """The archive holds more than may be unpacked."""

    http_status = 413

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"The archive holds more than may be unpacked: over {limit} {what}.", limit=limit)


class SnapshotTooLarge(CarrelError):
    """There are more files, or larger ones, than a snapshot may hold."""

    http_status = 413

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"The files are more than a snapshot may hold: over {limit} {what}.", limit=limit)


class TooMany(CarrelError):
    """Too many requests; try again later."""

    http_status = 429


class QueueFull(TooMany):
    """This session's queue of turns is full; wait for some to end."""

    def __init__(self, limit: int, *, of_session: bool = True) -> None:
        where = "This session already has" if of_session else "On this server there are already"
        super().__init__(f"{where} {limit} turns queued; wait for some to end.", retry_after_seconds=5)


class SessionBusy(TooMany):
    """This session is at work on another turn; try again when that has ended."""

    def __init__(self) -> None:
        super().__init__(retry_after_seconds=1)


class SessionLimitReached(TooMany):
    """There are as many sessions as are allowed; delete one first."""

    def __init__(self, limit: int, *, of_user: bool) -> None:
        whose = "This user has" if of_user else "This server has"
        super().__init__(
            f"{whose} {limit} sessions, and no more are allowed; delete one, or wait until one expires.",
            limit=limit,
            retry_after_seconds=30,
        )


class ChildLimitReached(TooMany):
    """There are as many sessions below this one as are allowed; stop one first."""

    def __init__(self, limit: int, *, of_tree: bool) -> None:
        whose = "The tree of this session" if of_tree else "This session"
        super().__init__(
            f"{whose} has {limit} children that are not stopped, and no more are allowed; stop or delete one first.",
            limit=limit,
            retry_after_seconds=30,
        )


class RateLimited(TooMany):
    """Too many requests in a short time; wait as long as Retry-After says."""


class ObjectUnreadable(CarrelError):
    """What is stored under this name in the object store cannot be used."""


class ObjectDamaged(ObjectUnreadable):
    """What the object store gave back is not what was stored; restore it from a backup of the store."""


class ObjectKeyMissing(ObjectUnreadable):
    """The object cannot be opened with the encryption keys that are set."""


class Unavailable(CarrelError):
    """The service cannot do this now; try again later."""

    http_status = 503


class Draining(Unavailable):
    """The server is shutting down and takes no new turns."""

    def __init__(self) -> None:
        super().__init__(retry_after_seconds=5)


class StoreUnavailable(Unavailable):
    """The database does not answer just now; nothing is lost, try again."""

    def __init__(self, *, operator_detail: str | None = None) -> None:
        super().__init__(operator_detail=operator_detail, retry_after_seconds=5)


class StoreFull(StoreUnavailable):
    """The disk that holds the database is full; nothing that was stored is lost. Free some room, and try again."""


class StoreOutcomeUnknown(StoreUnavailable):
    """The database went away while it was storing this, and it is not known yet whether it did. \
Look before you send it again, or send it with the same Idempotency-Key."""

    def __init__(self, *, outcome: Awaitable[Any] | None = None, operator_detail: str | None = None) -> None:
        """Make the error.

        Args:
            outcome: answers what the transaction answered, once it is known that it was stored; raises
                StoreUnavailable when it was not.
            operator_detail: what only the log may say.
        """
        super().__init__(operator_detail=operator_detail)
        self.outcome = outcome


class ObjectStoreUnavailable(Unavailable):
    """The object store does not answer as it should just now; try again later."""

    def __init__(self, *, operator_detail: str | None = None) -> None:
        super().__init__(operator_detail=operator_detail, retry_after_seconds=30)


class OutOfMemory(Unavailable):
    """Sessions at work use all the memory this server may use; try again when some of them have ended."""

    def __init__(self) -> None:
        super().__init__(retry_after_seconds=30)


class UpstreamUnreachable(Unavailable):
    """The model's API did not answer, or not as it should; try again later."""


class MissingCredential(Unavailable):
    """No credential for the model is set, so no turn can run. \
Set ANTHROPIC_API_KEY (or ANTHROPIC_AUTH_TOKEN, or CLAUDE_CODE_OAUTH_TOKEN) for the server and restart it, \
or try Carrel without one: `carrel serve --model-upstream scripted`."""


class LoginExpired(Unavailable):
    """The login of an environment has ended."""

    def __init__(self, environment: str) -> None:
        super().__init__(
            f"The login of the environment {environment} has ended; sign in again: carrel env login {environment}"
        )


class TurnFailure(CarrelError):
    """The turn failed."""


class EnvironmentProblem(CarrelError):
    """Something is wrong with the environment."""


class McpServerMissing(EnvironmentProblem):
    """The command of an MCP server is not in the sandbox."""

    def __init__(self, server: str) -> None:
        super().__init__(f"The command of the MCP server {server} is not in the sandbox.")


class McpServerUnreachable(EnvironmentProblem):
    """Nothing answers at the address of an MCP server."""

    def __init__(self, server: str) -> None:
        super().__init__(f"Nothing answers at the address of the MCP server {server}.")


class McpServerRefused(EnvironmentProblem):
    """An MCP server refuses the credential that the gateway sends it."""

    def __init__(self, server: str) -> None:
        super().__init__(f"The MCP server {server} refuses the secret that is sent to it.")


class McpServerForbidden(EnvironmentProblem):
    """An MCP server stands at an address that the gateway does not connect to."""

    def __init__(self, server: str) -> None:
        super().__init__(
            f"The MCP server {server} stands at an address that is not public; egress.private_networks can allow it."
        )


class SandboxLost(TurnFailure):
    """The turn's sandbox ended unexpectedly, and it is not known how far the turn had come. \
The conversation and files up to there are kept; send the prompt again if it should be repeated."""


class SandboxLaunchFailed(TurnFailure):
    """The session's sandbox could not be started; the server's log says why."""


class AgentStartFailed(SandboxLaunchFailed):
    """Claude Code could not be started in the sandbox."""


class ImageMissing(SandboxLaunchFailed):
    """The image that the session's sandbox is to be made of is not there; the operator builds or pulls it."""


class SecretMissing(SandboxLaunchFailed):
    """A secret that the session's environment uses cannot be had: it is not set, or its key is not there. The operator sets it."""


class RuntimeUnavailable(SandboxLaunchFailed):
    """What makes sandboxes does not answer just now; send the prompt again in a while."""


class TurnTimedOut(TurnFailure):
    """The turn took longer than its timeout_seconds and was interrupted; the session can be used."""


class BudgetReached(TurnFailure):
    """A budget is spent; raise it, and send the next prompt."""

    def __init__(self, budget: str = "its budget", remedy: str = "Raise it and send the next prompt to go on.") -> None:
        super().__init__(f"The turn was ended because {budget} has no room for another model request. {remedy}")


class PriceUnknown(TurnFailure):
    """The price of the model is not known, so it cannot be used under a budget in US dollars."""

    def __init__(self, model: str = "of this name") -> None:
        super().__init__(
            f"The price of the model {model} is not known, so it cannot be used under a budget in US dollars. Use "
            "another model or a budget in tokens, or have the operator give its price in prices_file."
        )


class SandboxOutOfMemory(TurnFailure):
    """The session's processes used more memory than one session may, so its sandbox was ended. The conversation and files up to there are kept."""


class SandboxOutOfProcesses(TurnFailure):
    """The session started more processes than one session may, so its sandbox was ended. The conversation and files up to there are kept."""


class SandboxOutOfDisk(TurnFailure):
    """The session's files take more room than one session may, so its sandbox was ended. They are kept, with the conversation; delete some, or have the agent do it, before more is written."""


class DiskFull(TurnFailure):
    """There is no room left on the disk for the session's files; free some, and send the prompt again."""


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


class EngineUnavailable(OperatorError):
    """No Docker engine answers."""


class EngineElsewhere(OperatorError):
    """The Docker engine does not see this server's files, so it is on another host: sandboxes there are not possible yet."""


class UnsafeConfiguration(OperatorError):
    """This configuration would be unsafe, so it is refused."""


class MigrationRequired(OperatorError):
    """The database was made by a newer release of Carrel; upgrade Carrel, or restore a backup."""


class ForeignDatabase(OperatorError):
    """The database holds the tables of something else. Name another with database.path or database.url; \
what an older service left there, `carrel import` brings in."""


class BackupInvalid(OperatorError):
    """The archive is not a backup of Carrel's, or it is damaged; nothing was restored."""


class TargetNotEmpty(OperatorError):
    """There is something at this place already, and nothing is overwritten; name a new one."""


class DatabaseNotEmpty(TargetNotEmpty):
    """The database has rows already, and nothing is overwritten; name an empty one with --database-url."""


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
