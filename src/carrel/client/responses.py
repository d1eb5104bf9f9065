"""Reads what the server answers: values where it went well, the errors of `carrel.errors` where it did not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import httpx
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from carrel import errors
from carrel.errors import CarrelError, ServerUnreachable

__all__ = ["EXTRA", "error_of", "model_of", "nothing", "object_of", "unreachable"]

M = TypeVar("M", bound=BaseModel)

EXTRA: Final = "allow"
"""What a newer server tells is kept, also where the class is one that the server itself is strict with."""

_MEMBERS = frozenset({"type", "title", "status", "detail", "code", "instance", "message", "operator_detail"})
_BY_STATUS: dict[int, type[CarrelError]] = {
    400: errors.InvalidRequest,
    401: errors.AuthenticationRequired,
    403: errors.Forbidden,
    404: errors.NotFound,
    405: errors.MethodNotAllowed,
    409: errors.Conflict,
    413: errors.FileTooLarge,
    422: errors.ValidationFailed,
    429: errors.TooMany,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.Unavailable,
}


def model_of(cls: type[M]) -> Callable[[httpx.Response], M]:
    """A reader of bodies that are such an object."""

    def read(response: httpx.Response) -> M:
        try:
            return cls.model_validate_json(response.content, extra=EXTRA)
        except ValidationError as error:
            raise _foreign(response) from error

    return read


def object_of(response: httpx.Response) -> dict[str, Any]:
    """Reads a body that is any JSON object."""
    try:
        value = from_json(response.content)
    except ValueError as error:
        raise _foreign(response) from error
    if not isinstance(value, dict):
        raise _foreign(response)
    return value


def nothing(_: httpx.Response) -> None:
    """A reader of bodies that say nothing."""


def error_of(response: httpx.Response) -> CarrelError:
    """The error that an answer tells. Its body has to be read already."""
    try:
        body = from_json(response.content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        body = {}
    cls = errors.all_errors().get(str(body.get("code")))
    if cls is None:
        cls = _BY_STATUS.get(response.status_code, CarrelError)
    context: dict[str, Any] = {name: value for name, value in body.items() if name not in _MEMBERS}
    seconds = response.headers.get("Retry-After", "")
    if "retry_after_seconds" not in context and seconds.isdigit():
        context["retry_after_seconds"] = int(seconds)
    message = str(body.get("detail") or body.get("title") or "") or f"The server answered {response.status_code}."
    # Some classes make their message from other arguments; here the server has made it already.
    error = cls.__new__(cls)
    CarrelError.__init__(error, message, **context)
    return error


def unreachable(base_url: str, error: httpx.TransportError) -> ServerUnreachable:
    """The error for a request that got no whole answer."""
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        message = f"No server answers at {base_url}; start one with `carrel serve`."
    elif isinstance(error, httpx.TimeoutException):
        message = f"The server at {base_url} took too long to answer."
    else:
        message = f"The connection to {base_url} broke before the answer was complete."
    return ServerUnreachable(message, operator_detail=detail)


def _foreign(response: httpx.Response) -> CarrelError:
    return CarrelError(
        f"{response.request.method} {response.request.url.path} was not answered as a Carrel server would; "
        "is this the right address, and is this client of the server's release?"
    )
