"""What a child may have: what its parent has, or less. docs/children.md has the table.

What a child does not name is as its parent has it, and what its parent's rules forbid or ask about holds for it too. What
it names is looked at, and refused where it is more; nothing is narrowed behind its creator's back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from carrel.errors import WiderThanParent
from carrel.model import NetworkPolicy, PermissionMode, Resources
from carrel.protocol.environments import Environment
from carrel.protocol.permissions import PermissionRules
from carrel.protocol.spec import SessionSpec
from carrel.sessions.narrowing import MODES

__all__ = ["Rights", "check_within", "inherited"]

_FILLED_IN: Final = ("permission_mode", "tools", "skills", "setting_sources", "max_turns", "session_tools")
"""Options of the parent's that hold for a child in another environment too, where neither names another value."""
_NOT_INHERITED: Final = frozenset({"output_format"})
"""What the parent is to answer in is no business of the child's."""


@dataclass(frozen=True, kw_only=True)
class Rights:
    """What a session's agent may do."""

    environment: Environment
    spec: SessionSpec
    """What its agent is started with, its own options and its environment's together."""
    permission_mode: PermissionMode
    network: NetworkPolicy


def inherited(parent: Rights, parents_own: SessionSpec, environment: Environment, given: SessionSpec) -> SessionSpec:
    """The options in a child's row.

    Args:
        parent: what its parent may do.
        parents_own: the options in its parent's row.
        environment: the version of the environment that the child is to be in.
        given: what its creator names.
    """
    own = _as_dict(given)
    same = (environment.name, environment.version) == (parent.environment.name, parent.environment.version)
    if same:
        above = {name: value for name, value in _as_dict(parents_own).items() if name not in _NOT_INHERITED}
        if "system_prompt" in own or "append_system_prompt" in own:
            above = {k: v for k, v in above.items() if k not in ("system_prompt", "append_system_prompt")}
        own = above | own
    for name in () if same else _FILLED_IN:
        theirs = getattr(parent.spec, name)
        if theirs is not None and name not in own and getattr(environment.spec.options, name) is None:
            own[name] = theirs
    if not same and parent.network.mode != "open" and "network" not in own:
        own["network"] = parent.network
    _keep_rules(own, parent.spec)
    return SessionSpec.model_validate(own)


def _keep_rules(own: dict[str, Any], parents: SessionSpec) -> None:
    """What is forbidden or asked about stays so."""
    rules = parents.permission_rules()
    given = PermissionRules.model_validate(own.get("permissions") or {})
    deny, ask = _together(given.deny, rules.deny), _together(given.ask, rules.ask)
    if deny or ask:
        own["permissions"] = {"allow": list(given.allow), "ask": ask, "deny": deny}
    if parents.disallowed_tools:
        own["disallowed_tools"] = _together(own.get("disallowed_tools") or (), parents.disallowed_tools)


def check_within(parent: Rights, child: Rights) -> None:
    """Look whether a child may have its rights.

    Raises:
        WiderThanParent: it may not; the message says what is too much.
    """
    _check_environment(parent.environment, child.environment)
    if MODES.index(child.permission_mode) > MODES.index(parent.permission_mode):
        raise WiderThanParent("permission_mode", f"at most {parent.permission_mode}")
    if not child.network.within(parent.network):
        raise WiderThanParent("network", f"{child.network} is more than {parent.network}")
    for name in ("tools", "skills", "setting_sources"):
        _check_among(name, getattr(parent.spec, name), getattr(child.spec, name))
    if child.spec.session_tools and not parent.spec.session_tools:
        raise WiderThanParent("session_tools", "its parent has none")
    most = parent.spec.max_turns
    if most is not None and (child.spec.max_turns is None or child.spec.max_turns > most):
        raise WiderThanParent("max_turns", f"at most {most}")
    if parent.permission_mode is not PermissionMode.BYPASS:
        allowed = parent.spec.permission_rules().allow
        more = [rule for rule in child.spec.permission_rules().allow if rule not in allowed]
        if more:
            raise WiderThanParent("allowed_tools", f"its parent is not allowed {_listed(more)}")
    _check_servers(parent.spec.mcp_servers or {}, child.spec.mcp_servers or {})
    _check_agents(parent, child.spec.agents or {})


def _check_among(name: str, allowed: Any, wished: Any) -> None:
    if allowed is None or allowed == "all":
        return
    if wished is None or wished == "all":
        raise WiderThanParent(name, f"only {_listed(allowed)}")
    more = [each for each in wished if each not in allowed]
    if more:
        raise WiderThanParent(name, f"{_listed(more)} is not among {_listed(allowed)}")


def _check_servers(allowed: Mapping[str, Any], wished: Mapping[str, Any]) -> None:
    more = [name for name, server in wished.items() if allowed.get(name) != server]
    if more:
        raise WiderThanParent("mcp_servers", f"its parent does not have {_listed(more)}")


def _check_agents(parent: Rights, agents: Mapping[str, dict[str, Any]]) -> None:
    known = parent.spec.agents or {}
    for name, agent in agents.items():
        if known.get(name) == agent:
            continue
        mode = agent.get("permissionMode")
        if mode is not None and MODES.index(PermissionMode(mode)) > MODES.index(parent.permission_mode):
            raise WiderThanParent("agents", f"permissionMode of {name} is more than {parent.permission_mode}")
        if parent.spec.tools is not None and agent.get("tools") is not None:
            _check_among("agents", parent.spec.tools, agent["tools"])
        if any(isinstance(server, dict) for server in agent.get("mcpServers") or ()):
            raise WiderThanParent("agents", f"{name} brings servers that its parent does not have")


def _check_environment(parent: Environment, child: Environment) -> None:
    """Another environment is one of the same make, with no more in it."""
    if (parent.name, parent.version) == (child.name, child.version):
        return
    one, other = parent.spec, child.spec
    if one.runtime != other.runtime:
        raise WiderThanParent("environment", f"{child.name} has another runtime")
    for name in ("image", "platform", "oci_runtime"):
        if getattr(one.sandbox, name) != getattr(other.sandbox, name):
            raise WiderThanParent("environment", f"{child.name} has another {name}")
    shown = {(each.source, each.target): each.read_only for each in one.sandbox.mounts}
    for mount in other.sandbox.mounts:
        read_only = shown.get((mount.source, mount.target))
        if read_only is None or (read_only and not mount.read_only):
            raise WiderThanParent("environment", f"{child.name} shows more of the host")
    _check_resources(child.name, one.sandbox.resources, other.sandbox.resources)
    secrets = {use.name for use in other.secrets} - {use.name for use in one.secrets}
    if secrets:
        raise WiderThanParent("environment", f"{child.name} uses other secrets")
    if any(value != one.sandbox.variables.get(name) for name, value in other.sandbox.variables.items()):
        raise WiderThanParent("environment", f"{child.name} has other variables")


def _check_resources(name: str, most: Resources, wished: Resources) -> None:
    for what in Resources.model_fields:
        limit, wish = getattr(most, what), getattr(wished, what)
        if limit is not None and (wish is None or wish > limit):
            raise WiderThanParent("environment", f"{name} gives more {what}")


def _as_dict(spec: SessionSpec) -> dict[str, Any]:
    return spec.model_dump(exclude_none=True)


def _together(one: Iterable[str], other: Iterable[str]) -> list[str]:
    return list(dict.fromkeys((*one, *other)))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
