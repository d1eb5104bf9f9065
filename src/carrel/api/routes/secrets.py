"""Secrets: set, list by name, delete. No value is ever told."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Path
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from carrel.api.dependencies import AdminDep, ServicesDep
from carrel.api.problems import responses
from carrel.api.routes.shapes import Listing, answer, example
from carrel.errors import SecretInUse, SecretNotFound, SecretsLocked, ValidationFailed
from carrel.protocol.environments import SECRET_NAME, Secret

router = APIRouter(prefix="/secrets", tags=["environments"])

SecretId = Annotated[str, Path(max_length=128, description="The secret's name.")]
NewSecretId = Annotated[str, Path(pattern=SECRET_NAME, description="The secret's name.")]

_EXAMPLE = {
    "name": "NPM_TOKEN",
    "key_id": "9f2c4e6a8b0d1f35",
    "created_at": "2026-11-21T09:30:00Z",
    "updated_at": "2026-11-21T09:30:00Z",
    "updated_by": "admin",
}


class SecretValue(BaseModel):
    """A secret's value."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    value: str = Field(
        min_length=1, max_length=65_536, pattern=r"^[^\x00]*$", repr=False, json_schema_extra={"writeOnly": True}
    )


@router.put("/{secret_id}", status_code=204, responses=responses(SecretsLocked, ValidationFailed))
async def set_secret(
    secret_id: NewSecretId,
    services: ServicesDep,
    principal: AdminDep,
    body: Annotated[SecretValue, Body(examples=[{"value": "npm_…"}])],
) -> Response:
    """Keep a secret, sealed with the operator's key; what stood under its name is gone. Needs `admin`."""
    await services.secrets.put(principal, secret_id, body.value)
    return Response(status_code=204)


@router.get(
    "",
    response_model=Listing[Secret],
    responses=responses() | {200: example({"data": [_EXAMPLE], "next_cursor": None}, "In the order of their names.")},
)
async def list_secrets(services: ServicesDep, principal: AdminDep) -> Response:
    """The names of all secrets; their values are never told. Needs `admin`."""
    return answer({"data": await services.secrets.all(), "next_cursor": None})


@router.delete("/{secret_id}", status_code=204, responses=responses(SecretNotFound, SecretInUse))
async def delete_secret(secret_id: SecretId, services: ServicesDep, principal: AdminDep) -> Response:
    """Forget a secret that no environment uses. Needs `admin`."""
    await services.secrets.delete(secret_id)
    return Response(status_code=204)
