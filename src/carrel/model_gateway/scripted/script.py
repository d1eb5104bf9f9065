"""Scripts: which steps answer which prompt, and the YAML files they are written in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from carrel.model_gateway.scripted import steps
from carrel.model_gateway.scripted.inline import find_steps
from carrel.model_gateway.scripted.steps import Step, StepError


class ScriptError(ValueError):
    """A script file cannot be used; the message names the line and the key."""


@dataclass(frozen=True)
class Rule:
    """Prompts in which `pattern` is found are answered with `steps`."""

    pattern: re.Pattern[str]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Script:
    """Rules tried in order. Where none matches: `default`, or without one the built-in `[[step: …]]` marks."""

    rules: tuple[Rule, ...] = field(default=())
    default: tuple[Step, ...] | None = None

    def steps_for(self, prompt: str) -> tuple[Step, ...]:
        """The steps that answer this prompt; none means the short friendly answer."""
        for rule in self.rules:
            if rule.pattern.search(prompt):
                return rule.steps
        return find_steps(prompt) if self.default is None else self.default


BUILTIN = Script()


def load_script(path: str | Path) -> Script:
    """Read a script file; `ScriptError` says what is wrong and in which line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ScriptError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ScriptError(f"{path}: is not UTF-8 text") from None
    return parse_script(text, name=str(path))


def parse_script(text: str, *, name: str = "script") -> Script:
    """A script from its YAML text; `name` stands at the head of every complaint."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ScriptError(f"{name}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ScriptError(f"{name}: not valid YAML: {error}") from None
    return _Reader(name).script(root)


class _Reader:
    """Walks the nodes of a YAML document, which, unlike its values, know their lines."""

    def __init__(self, name: str) -> None:
        self._name = name

    def script(self, root: yaml.Node | None) -> Script:
        if root is None:
            raise ScriptError(f"{self._name}: the script is empty; it wants rules, default or both")
        entries = self._mapping(root, "the script", {"rules", "default"})
        if not entries:
            raise self._error(root, "the script", "wants rules, default or both")
        rules = self._list(entries["rules"], "rules") if "rules" in entries else []
        return Script(
            rules=tuple(self._rule(node, f"rules[{i}]") for i, node in enumerate(rules)),
            default=self._steps(entries["default"], "default") if "default" in entries else None,
        )

    def _rule(self, node: yaml.Node, where: str) -> Rule:
        entries = self._mapping(node, where, {"pattern", "steps"})
        for key in ("pattern", "steps"):
            if key not in entries:
                raise self._error(node, where, f"lacks {key}")
        pattern = self._value(entries["pattern"])
        if not isinstance(pattern, str):
            raise self._error(entries["pattern"], f"{where}.pattern", "wants a text")
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            problem = f"is not a regular expression: {error}"
            raise self._error(entries["pattern"], f"{where}.pattern", problem) from None
        return Rule(compiled, self._steps(entries["steps"], f"{where}.steps"))

    def _steps(self, node: yaml.Node, where: str) -> tuple[Step, ...]:
        return tuple(self._step(each, f"{where}[{i}]") for i, each in enumerate(self._list(node, where)))

    def _step(self, node: yaml.Node, where: str) -> Step:
        if isinstance(node, yaml.ScalarNode) and steps.is_bare(node.value):
            return steps.from_text(node.value, "")
        if not isinstance(node, yaml.MappingNode) or not node.value:
            raise self._error(node, where, "wants one step such as `say: Hello`")
        key = node.value[0][0]
        entries = self._mapping(node, where, set(steps.NAMES))
        if len(entries) > 1:
            raise self._error(key, where, f"has more than one step: {', '.join(entries)}")
        name, value = next(iter(entries.items()))
        try:
            return steps.from_value(name, self._value(value))
        except StepError as error:
            raise self._error(value, f"{where}.{name}:", str(error)) from None

    def _list(self, node: yaml.Node, where: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(node, where, "wants a list")
        return list(node.value)

    def _mapping(self, node: yaml.Node, where: str, known: set[str]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, where, f"wants a mapping with {', '.join(sorted(known))}")
        entries: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value not in known:
                raise self._error(key, where, f"does not know {key.value!r}; known: {', '.join(sorted(known))}")
            if key.value in entries:
                raise self._error(key, where, f"has {key.value!r} twice")
            entries[key.value] = value
        return entries

    def _value(self, node: yaml.Node) -> Any:
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            raise self._error(node, "a value", error.problem or "is not understood") from None
        finally:
            loader.dispose()

    def _error(self, node: yaml.Node, where: str, problem: str) -> ScriptError:
        return ScriptError(f"{self._name}, line {node.start_mark.line + 1}: {where} {problem}")
