"""What a model request costs, from one dated table."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from carrel.model import Usage

_TABLE = Path(__file__).with_name("prices.yaml")


class Price(BaseModel):
    """US dollars for a million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float
    output: float
    cache_write: float
    cache_read: float


class _Above(Price):
    tokens: int


class _Entry(Price):
    above: _Above | None = None


class Prices:
    """A table of prices."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.as_of: date = table["as_of"]
        self._models = {name: _Entry.model_validate(entry) for name, entry in table["models"].items()}
        self._longest_first = sorted(self._models, key=len, reverse=True)

    @classmethod
    def shipped(cls) -> Prices:
        """The table that comes with this release."""
        return cls(yaml.safe_load(_TABLE.read_text()))

    def cost_usd(self, model: str, usage: Usage) -> float | None:
        """What these tokens cost, in US dollars; None where the model's price is not known."""
        name = next((known for known in self._longest_first if model.startswith(known)), None)
        if name is None:
            return None
        price: Price = self._models[name]
        above = self._models[name].above
        read = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
        if above is not None and read > above.tokens:
            price = above
        millionths = (
            usage.input_tokens * price.input
            + usage.output_tokens * price.output
            + usage.cache_creation_input_tokens * price.cache_write
            + usage.cache_read_input_tokens * price.cache_read
        )
        return millionths / 1_000_000
