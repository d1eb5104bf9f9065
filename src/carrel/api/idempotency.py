"""`Idempotency-Key`: a request that is sent twice is done once.

A key lives a day per principal. The object a request makes is noted in the transaction that makes it, so that a server
that dies before it has answered still knows, on the repeat, what it had made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from hashlib import sha256

from starlette.requests import Request
from starlette.responses import Response

from carrel import abc
from carrel.api.dependencies import Services
from carrel.api.sse import wanted
from carrel.errors import IdempotencyInFlight, IdempotencyMismatch, StoreUnavailable, ValidationFailed
from carrel.model import Principal, utc_now
from carrel.sessions.service import Mark

LIFETIME = timedelta(hours=24)
_LONGEST_KEY = 255


async def once(
    request: Request,
    services: Services,
    principal: Principal,
    make: Callable[[Mark | None], Awaitable[Response]],
    replay: Callable[[str], Awaitable[Response]] | None = None,
    *,
    keep: bool = True,
) -> Response:
    """Answer a request, or repeat its first answer.

    Args:
        request: its header carries the key, if there is one.
        services: where keys are kept.
        principal: whose key it is.
        make: does what is asked and answers it.
        replay: answers for the object that the first request made, where its answer was not kept.
        keep: whether the answer is kept; not where it holds a secret.

    Raises:
        IdempotencyMismatch: another request came with this key before.
        IdempotencyInFlight: the first request is not answered yet.
    """
    key = request.headers.get("idempotency-key")
    if key is None:
        return await make(None)
    if not 0 < len(key) <= _LONGEST_KEY:
        raise ValidationFailed(f"Idempotency-Key: must have 1 to {_LONGEST_KEY} characters")
    record = abc.IdempotencyRecord(
        principal=principal.name,
        key=key,
        fingerprint=await _fingerprint(request),
        boot_id=services.boot_id,
        object_id=None,
        status=None,
        body=None,
        created_at=utc_now(),
    )
    earlier = await services.store.write(lambda tx: _reserve(tx, record))
    if earlier is not None:
        again = await _again(request, services, record, earlier, replay)
        if again is not None:
            return again
    return await _first(services, record, make, keep=keep)


async def _fingerprint(request: Request) -> str:
    digest = sha256(f"{request.method} {request.url.path}\n".encode())
    digest.update(await request.body())
    return digest.hexdigest()


def _reserve(tx: abc.Transaction, record: abc.IdempotencyRecord) -> abc.IdempotencyRecord | None:
    tx.idempotency.prune(record.created_at - LIFETIME)
    return tx.idempotency.reserve(record)


async def _again(
    request: Request,
    services: Services,
    record: abc.IdempotencyRecord,
    earlier: abc.IdempotencyRecord,
    replay: Callable[[str], Awaitable[Response]] | None,
) -> Response | None:
    """The answer of a repeat; None when the first request came to nothing and this one takes its place."""
    if earlier.fingerprint != record.fingerprint:
        raise IdempotencyMismatch
    if earlier.status is not None and earlier.body is not None:
        media_type = "application/json" if earlier.body else None
        return Response(earlier.body, status_code=earlier.status, media_type=media_type)
    if earlier.object_id is not None and replay is not None:
        finished = earlier.status is not None or earlier.boot_id != services.boot_id
        if finished or wanted(request):
            return await replay(earlier.object_id)
    if earlier.boot_id == services.boot_id:
        raise IdempotencyInFlight
    await services.store.write(lambda tx: tx.idempotency.update(record.principal, record.key, boot_id=record.boot_id))
    return None


async def _first(
    services: Services,
    record: abc.IdempotencyRecord,
    make: Callable[[Mark | None], Awaitable[Response]],
    *,
    keep: bool,
) -> Response:
    try:
        answer = await make(Mark(record.principal, record.key))
    except BaseException:
        # Nothing was made, or what was made is noted: either way a repeat may try again.
        await _note(services, lambda tx: _forget_unless_made(tx, record))
        raise
    body = bytes(answer.body).decode() if keep and hasattr(answer, "body") else None
    await _note(
        services, lambda tx: tx.idempotency.update(record.principal, record.key, status=answer.status_code, body=body)
    )
    return answer


async def _note(services: Services, work: Callable[[abc.Transaction], None]) -> None:
    """Store how the request ended; where the store is away, when it is back, or no repeat would ever be answered."""
    try:
        await services.store.write(work)
    except StoreUnavailable:
        services.background(services.store.write_surely(work))


def _forget_unless_made(tx: abc.Transaction, record: abc.IdempotencyRecord) -> None:
    kept = tx.idempotency.reserve(record)
    if kept is None or kept.object_id is None:
        tx.idempotency.remove(record.principal, record.key)
    else:
        tx.idempotency.update(record.principal, record.key, status=200)
