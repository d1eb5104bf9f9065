"""Whether the server lives and works. Open to all."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from carrel import __version__
from carrel.api.dependencies import ServicesDep
from carrel.api.routes.shapes import answer, example

router = APIRouter(tags=["health"])


@router.get("/health", responses={200: example({"status": "healthy", "version": __version__})})
async def health(services: ServicesDep) -> Response:
    """Whether the server works."""
    parts = await services.ready()
    well = all(parts.values())
    status = "healthy" if well else "unhealthy"
    return answer({"status": status, "version": __version__, "components": parts}, status=200 if well else 503)


@router.get("/health/live", responses={200: example({"alive": True})})
async def live() -> Response:
    """Whether the process answers."""
    return answer({"alive": True})


@router.get("/health/ready", responses={200: example({"ready": True}), 503: example({"ready": False}, "Not now.")})
async def ready(services: ServicesDep) -> Response:
    """Whether it takes new work."""
    parts = await services.ready()
    well = all(parts.values())
    return answer({"ready": well, "components": parts}, status=200 if well else 503)
