"""What each setting is called, what it may be, and which one was meant."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from carrel.model import NetworkPolicy
from carrel.settings.model import Settings

__all__ = ["Leaf", "groups", "is_whole", "leaves", "nearest"]

_CUTOFF = 0.6


@dataclass(frozen=True)
class Leaf:
    """One setting, by its dotted name."""

    name: str
    field: FieldInfo

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        extra = self.field.json_schema_extra
        if isinstance(extra, dict) and "variable" in extra:
            return str(extra["variable"])
        return "CARREL_" + self.name.upper().replace("-", "_").replace(".", "__")

    @property
    def description(self) -> str:
        """What it means."""
        return self.field.description or ""

    @property
    def default(self) -> Any:
        """Its value where nobody says anything."""
        return self.field.get_default(call_default_factory=True)

    @property
    def optional(self) -> bool:
        """Whether it may be null."""
        return type(None) in _choices(self.field.annotation)

    @property
    def type(self) -> Any:
        """What it is, null aside."""
        (found,) = (choice for choice in _choices(self.field.annotation) if choice is not type(None))
        return found

    @property
    def secret(self) -> bool:
        """Whether its value is never shown."""
        return self.type is SecretStr

    @property
    def opaque(self) -> bool:
        """Whether secrets may stand inside of its value."""
        return self.secret or get_origin(self.type) is dict

    @property
    def is_list(self) -> bool:
        """Whether it has several values."""
        return get_origin(self.type) is list

    @property
    def structured(self) -> bool:
        """Whether an environment variable says it in JSON."""
        return get_origin(self.type) is dict or (self.is_list and isinstance(_model(get_args(self.type)[0]), type))

    @property
    def numeric(self) -> bool:
        """Whether it is a number."""
        return self.type in (int, float)

    @property
    def allowed(self) -> str:
        """What it may be, in words."""
        return _kind(self.type, self.field.metadata) + (", or null" if self.optional else "")


def leaves(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[Leaf]:
    """Every setting, in the order of the model, groups opened."""
    for name, field in model.model_fields.items():
        group, keys = _model(field.annotation), _keyed(field.annotation)
        if group is not None and not is_whole(field):
            yield from leaves(group, f"{prefix}{name}.")
        elif keys is not None:
            for key in get_args(keys[0]):
                yield from leaves(keys[1], f"{prefix}{name}.{key}.")
        else:
            yield Leaf(prefix + name, field)


def is_whole(field: FieldInfo) -> bool:
    """Whether a model is one setting, and no group of several."""
    return isinstance(field.json_schema_extra, dict) and "whole" in field.json_schema_extra


def groups(names: Iterable[str]) -> frozenset[str]:
    """Every beginning of the dotted names that stands before a dot."""
    return frozenset(
        ".".join(parts[:count]) for parts in (name.split(".") for name in names) for count in range(1, len(parts))
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was most likely meant, if any is like it; of equals the first."""
    last = _last(name)

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio()
        # A setting at the wrong place: the right name in another group.
        end = difflib.SequenceMatcher(None, last.lower(), _last(candidate).lower()).ratio()
        return max(whole, end * 0.95)

    best = max(known, key=likeness, default=None)  # of several the first
    return best if best is not None and likeness(best) >= _CUTOFF else None


def _last(name: str) -> str:
    return name.rpartition("__")[2] if "__" in name else name.rpartition(".")[2]


def _choices(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _keyed(annotation: Any) -> tuple[Any, type[BaseModel]] | None:
    """The names and the group of `dict[Literal[…], Group]`."""
    if get_origin(annotation) is not dict:
        return None
    keys, value = get_args(annotation)
    group = _model(value)
    return (keys, group) if get_origin(keys) is Literal and group is not None else None


def _kind(kind: Any, bounds: list[Any]) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is list:
        item = get_args(kind)[0]
        if _model(item) is not None:
            return "a list such as [{type: local, path: /srv/plugin}]"
        return f"a list of {_kind(item, []).removeprefix('one of ') if get_origin(item) is Literal else 'texts'}"
    if get_origin(kind) is dict:
        return "a mapping"
    if kind is NetworkPolicy:
        return "gateway-only, open, or {allow: [example.org, '*.example.net', 'example.com:8443']}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(choice.value) for choice in kind)
    words = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    return words.get(kind, "a text") + "".join(_bound(bound) for bound in bounds)


def _bound(bound: Any) -> str:
    match bound:
        case Ge():
            return f", at least {bound.ge}"
        case Gt():
            return f", more than {bound.gt}"
        case Le():
            return f", at most {bound.le}"
        case Lt():
            return f", less than {bound.lt}"
    return ""
