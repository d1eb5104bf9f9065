"""The page that Prometheus reads."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from carrel.api.dependencies import PrincipalDep, ServicesDep
from carrel.api.problems import responses
from carrel.errors import MissingScope, RouteNotFound
from carrel.model import Scope
from carrel.observability.metrics import CONTENT_TYPE

router = APIRouter(tags=["metrics"])


@router.get(
    "/metrics",
    response_class=Response,
    responses=responses(MissingScope)
    | {200: {"description": "Numbers, in Prometheus' text format.", "content": {"text/plain": {}}}},
)
async def read_metrics(services: ServicesDep, principal: PrincipalDep) -> Response:
    """Every number of this server. For admins; Prometheus sends a key as `authorization: {credentials: …}`."""
    if not principal.is_admin:
        raise MissingScope(Scope.ADMIN)
    if services.edges.page is None:
        raise RouteNotFound
    return Response(await services.edges.page(), headers={"Content-Type": CONTENT_TYPE})
