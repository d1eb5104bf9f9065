"""Checks that a request is one the Messages API would take, in as far as the scripted model relies on it."""

from __future__ import annotations

from typing import Any

from carrel.model_gateway.scripted.errors import ApiError

_ROLES = ("user", "assistant", "system")


def check_message_request(body: Any) -> None:
    """Raises the API's 400 for a body that `POST /v1/messages` refuses."""
    check_token_request(body)
    limit = body.get("max_tokens")
    if limit is None:
        raise ApiError(400, "max_tokens: Field required")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ApiError(400, "max_tokens: Input should be greater than or equal to 1")
    if not isinstance(body.get("stream", False), bool | None):
        raise ApiError(400, "stream: Input should be a valid boolean")


def check_token_request(body: Any) -> None:
    """Raises the API's 400 for a body whose model, messages or system cannot be read."""
    if not isinstance(body, dict):
        raise ApiError(400, "The request body is not a JSON object")
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise ApiError(400, "model: Field required")
    messages = body.get("messages")
    if messages is None:
        raise ApiError(400, "messages: Field required")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages: at least one message is required")
    for index, message in enumerate(messages):
        _check_message(message, f"messages.{index}")
    if body.get("system"):
        _check_content(body["system"], "system")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise ApiError(400, f"{where}: Input should be an object")
    if message.get("role") not in _ROLES:
        raise ApiError(400, f"{where}.role: Input should be 'user', 'assistant' or 'system'")
    _check_content(message.get("content"), f"{where}.content")


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise ApiError(400, f"{where}: Input should be a string or a list of blocks")
    for index, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise ApiError(400, f"{where}.{index}.type: Field required")
        if block["type"] == "text" and not isinstance(block.get("text"), str):
            raise ApiError(400, f"{where}.{index}.text: Field required")
        if block["type"] == "tool_result" and isinstance(block.get("content"), list):
            _check_content(block["content"], f"{where}.{index}.content")
