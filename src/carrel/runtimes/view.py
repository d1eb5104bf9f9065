"""What every agent sees, whatever it runs in: the same paths and the same variables, so that a session can move."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "COMMANDS",
    "GATEWAY_FOLDER",
    "GATEWAY_SOCKET",
    "HOME",
    "MARK",
    "PLUGINS",
    "WORKSPACE",
    "environment",
    "with_model",
]

WORKSPACE = "/workspace"
HOME = "/home/agent"
GATEWAY_FOLDER = "/run/carrel"
GATEWAY_SOCKET = f"{GATEWAY_FOLDER}/gateway.sock"
PLUGINS = "/opt/carrel/plugins"
MARK = "CARREL_SANDBOX"
"""The environment variable that every process of a sandbox carries; its value is the sandbox's id."""

_GATEWAY_VARIABLES = ("ANTHROPIC_BASE_URL", "ANTHROPIC_UNIX_SOCKET")

COMMANDS = "/usr/local/bin:/usr/bin:/bin"
"""Where an agent's commands are looked for."""


def environment(sandbox_id: str) -> dict[str, str]:
    """The variables of an agent in any sandbox; its home and its gateway are named beside them."""
    return {
        MARK: sandbox_id,
        "PATH": COMMANDS,
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "SHELL": "/bin/bash",
        "USER": "agent",
        "LOGNAME": "agent",
        "IS_SANDBOX": "1",
        "ANTHROPIC_BASE_URL": "http://gateway",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_ERROR_REPORTING": "1",
    }


def with_model(env: Mapping[str, str], model: Mapping[str, str] | None) -> dict[str, str]:
    """The same variables for an agent that asks the model's provider itself; None: it asks our gateway."""
    if model is None:
        return dict(env)
    return {name: value for name, value in env.items() if name not in _GATEWAY_VARIABLES} | dict(model)
