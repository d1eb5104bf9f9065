"""What a session may have in its environment: its own options where they are free, and never more than that allows.

docs/environments.md has the table; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from carrel.errors import EnvironmentForbids
from carrel.model import PermissionMode, PermissionRule, RuleScope
from carrel.protocol.environments import EnvironmentSpec
from carrel.protocol.permissions import PermissionRules
from carrel.protocol.spec import SessionSpec

__all__ = ["MODES", "NARROWING", "agents_options", "check_options", "refuses_allowing", "with_rules"]

MODES: Final = (
    PermissionMode.PLAN,
    PermissionMode.DONT_ASK,
    PermissionMode.DEFAULT,
    PermissionMode.ACCEPT_EDITS,
    PermissionMode.AUTO,
    PermissionMode.BYPASS,
)
"""From the one that lets an agent do the least to the one that lets it do all."""


def check_options(name: str, environment: EnvironmentSpec, own: SessionSpec) -> None:
    """Look whether a session of the environment may have these options.

    Raises:
        EnvironmentForbids: it may not; the message says which.
    """
    for option, refuses in NARROWING.items():
        if getattr(own, option) is not None and (why := refuses(environment, own)) is not None:
            raise EnvironmentForbids(
                f"{option}: the environment {name} does not let a session have this: {why}.",
                environment=name,
                option=option,
            )


def _wider_mode(ceiling: PermissionMode | None, wish: PermissionMode | str | None) -> bool:
    if ceiling is None or wish is None:
        return False
    return MODES.index(PermissionMode(wish)) > MODES.index(ceiling)


def _permission_mode(environment: EnvironmentSpec, own: SessionSpec) -> str | None:
    ceiling = environment.options.permission_mode
    return f"at most {ceiling}" if _wider_mode(ceiling, own.permission_mode) else None


def _among(what: str) -> Callable[[EnvironmentSpec, SessionSpec], str | None]:
    def refuses(environment: EnvironmentSpec, own: SessionSpec) -> str | None:
        allowed, wished = getattr(environment.options, what), getattr(own, what)
        if allowed is None or allowed == "all":
            return None
        if wished == "all":
            return f"only {_listed(allowed)}"
        more = [each for each in wished if each not in allowed]
        return f"{_listed(more)} is not among {_listed(allowed)}" if more else None

    return refuses


def _allow_rules(environment: EnvironmentSpec, own: SessionSpec) -> str | None:
    given = environment.options
    allowed = given.permission_rules().allow
    if given.allowed_tools is None and not allowed:
        return None
    more = [rule for rule in own.permission_rules().allow if rule not in allowed]
    return f"{_listed(more)} is not among {_listed(allowed)}" if more else None


def _session_tools(environment: EnvironmentSpec, own: SessionSpec) -> str | None:
    given = environment.options
    if not own.session_tools or given.session_tools:
        return None
    if given.session_tools is None and given.tools is None:
        return None
    return "it has none, or names the tools that there are"


def refuses_allowing(environment: EnvironmentSpec, rule: str) -> bool:
    """Whether it names the rules that allow calls, and this is none of them."""
    allowed = environment.options.permission_rules().allow
    return (environment.options.allowed_tools is not None or bool(allowed)) and rule not in allowed


def with_rules(environment: EnvironmentSpec, own: SessionSpec, rules: Iterable[PermissionRule]) -> SessionSpec:
    """The options with the rules that people have written; what the environment does not let them allow is left out."""
    found: dict[str, list[str]] = {"allow": [], "ask": [], "deny": []}
    for rule in rules:
        wider = rule.effect == "allow" and rule.scope is not RuleScope.ENVIRONMENT
        if not (wider and refuses_allowing(environment, rule.rule)):
            found[rule.effect].append(rule.rule)
    if not any(found.values()):
        return own
    given = own.permissions or PermissionRules()
    allow, ask, deny = (tuple(dict.fromkeys((*getattr(given, effect), *more))) for effect, more in found.items())
    return own.model_copy(update={"permissions": PermissionRules.model_construct(allow=allow, ask=ask, deny=deny)})


def _max_turns(environment: EnvironmentSpec, own: SessionSpec) -> str | None:
    most = environment.options.max_turns
    return f"at most {most}" if most is not None and (own.max_turns or 0) > most else None


def _servers(environment: EnvironmentSpec, own: SessionSpec) -> str | None:
    servers = own.mcp_servers or {}
    if servers and environment.options.tools is not None:
        return "it names the tools that there are, and servers bring others"
    taken = sorted(set(servers) & set(environment.options.mcp_servers or {}))
    return f"{_listed(taken)} is a server of its own" if taken else None


def _agents(environment: EnvironmentSpec, own: SessionSpec) -> str | None:
    given = environment.options
    for name, agent in (own.agents or {}).items():
        if _wider_mode(given.permission_mode, agent.get("permissionMode")):
            return f"permissionMode of {name} is more than {given.permission_mode}"
        more = [each for each in agent.get("tools") or () if given.tools is not None and each not in given.tools]
        if more:
            return f"{_listed(more)} of {name} is not among {_listed(given.tools or ())}"
        if given.tools is not None and agent.get("mcpServers"):
            return f"{name} brings servers, and it names the tools that there are"
    return None


def _variables(environment: EnvironmentSpec, own: SessionSpec) -> str | None:
    exposed = {use.variable_name for use in environment.secrets if use.expose == "env"}
    fixed = {*environment.sandbox.variables, *(environment.options.env_vars or {}), *exposed}
    taken = sorted(set(own.env_vars or {}) & fixed)
    return f"{_listed(taken)} is set by it" if taken else None


NARROWING: Final[Mapping[str, Callable[[EnvironmentSpec, SessionSpec], str | None]]] = {
    "permission_mode": _permission_mode,
    "tools": _among("tools"),
    "allowed_tools": _allow_rules,
    "permissions": _allow_rules,
    "mcp_servers": _servers,
    "agents": _agents,
    "skills": _among("skills"),
    "setting_sources": _among("setting_sources"),
    "max_turns": _max_turns,
    "session_tools": _session_tools,
    "env_vars": _variables,
}
"""The options that a session cannot choose freely where its environment names them; each says why it refuses, or None."""

_ADDED_UP: Final = ("mcp_servers", "agents", "env_vars")
"""Maps of which a session's entries stand beside its environment's."""


def agents_options(environment: EnvironmentSpec, own: SessionSpec, defaults: SessionSpec) -> SessionSpec:
    """The options that an agent is started with: the session's own, then the environment's, then the defaults.

    Args:
        environment: the version that the session keeps.
        own: what its creator has named.
        defaults: what the settings say of every session that does not say otherwise.
    """
    given = _over(_as_dict(environment.options), _as_dict(defaults))
    result = _over(_as_dict(own), given)
    for name in _ADDED_UP:
        both = {**(given.get(name) or {}), **(getattr(own, name) or {})}
        if both:
            result[name] = both
    forbidden = dict.fromkeys([*(given.get("disallowed_tools") or ()), *(own.disallowed_tools or ())])
    if forbidden:
        result["disallowed_tools"] = list(forbidden)
    if own.permissions is not None and environment.options.permissions is not None:
        one, other = environment.options.permissions, own.permissions
        result["permissions"] = {
            kind: [*dict.fromkeys((*getattr(one, kind), *getattr(other, kind)))] for kind in ("allow", "ask", "deny")
        }
    variables = {**environment.sandbox.variables, **(result.get("env_vars") or {})}
    if variables:
        result["env_vars"] = variables
    return SessionSpec.model_validate(result)


def _as_dict(spec: SessionSpec) -> dict[str, Any]:
    return spec.model_dump(exclude_none=True)


def _over(given: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    below = dict(below)
    if "append_system_prompt" in given:
        below.pop("system_prompt", None)  # what is added to Claude Code's own prompt wants that one
    if "system_prompt" in given:
        below.pop("append_system_prompt", None)
    return below | given


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
