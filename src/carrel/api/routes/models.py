"""The models that the upstream offers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from carrel.api.dependencies import PrincipalDep, ServicesDep
from carrel.api.problems import responses
from carrel.api.routes.shapes import Listing, answer, example
from carrel.errors import MissingCredential, UpstreamUnreachable

router = APIRouter(tags=["models"])

_EXAMPLE = {"id": "claude-opus-5-5", "display_name": "Claude Opus 5.5", "created_at": "2026-09-30T00:00:00Z"}


class Model(BaseModel):
    """A model, as the upstream describes it."""

    model_config = ConfigDict(extra="allow")

    id: str


@router.get(
    "/models",
    response_model=Listing[Model],
    responses=responses(MissingCredential, UpstreamUnreachable)
    | {200: example({"data": [_EXAMPLE], "next_cursor": None})},
)
async def list_models(services: ServicesDep, principal: PrincipalDep) -> Response:
    """The models that a session may name. Aliases such as `opus` are passed on to the upstream too."""
    models: list[dict[str, Any]] = await services.models()
    return answer({"data": models, "next_cursor": None})
