"""Errors in the shape of the Messages API."""

from __future__ import annotations

import secrets
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_MESSAGES = {
    400: "The request is invalid, says the script.",
    401: "invalid x-api-key",
    402: "The account has no credit left, says the script.",
    403: "This key may not use this resource, says the script.",
    404: "Not found, says the script.",
    413: "Request exceeds the maximum size",
    429: "This request would exceed the rate limit, says the script.",
    500: "Internal server error",
    504: "The request timed out, says the script.",
    529: "Overloaded",
}
RETRY_AFTER_SECONDS = 1


class ApiError(Exception):
    """A request is answered with an error."""

    def __init__(self, status: int, message: str | None = None) -> None:
        super().__init__(message or _MESSAGES.get(status, "The script asks for this error."))
        self.status = status


def new_id(prefix: str) -> str:
    """An id such as the API gives out: `msg_…`, `toolu_…`, `req_…`."""
    return f"{prefix}_{secrets.token_hex(12)}"


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """What stands in an error response, and in an `error` event of a stream."""
    kind = _TYPES.get(error.status) or ("api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}, "request_id": request_id}


def error_response(error: ApiError) -> JSONResponse:
    """The whole response: body, status, `request-id`, and `retry-after` under a rate limit."""
    request_id = new_id("req")
    headers = {"request-id": request_id}
    if error.status == 429:
        headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    return JSONResponse(error_body(error, request_id), error.status, headers)
