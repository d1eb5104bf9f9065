"""What a model request costs, from one dated table."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from carrel.errors import InvalidSettings
from carrel.model import Usage

_TABLE = Path(__file__).with_name("prices.yaml")
_MILLION = 1_000_000
_ONE_HOUR_FACTOR = 2.0

_Usd = Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]


class Price(BaseModel):
    """US dollars for a million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: _Usd
    output: _Usd
    cache_write: _Usd
    cache_read: _Usd
    cache_write_1h: _Usd | None = None
    """Of entries that are kept for an hour; by default twice the price of input."""

    @property
    def one_hour(self) -> float:
        """The price of writing to the cache for an hour."""
        return self.input * _ONE_HOUR_FACTOR if self.cache_write_1h is None else self.cache_write_1h


class _Above(Price):
    tokens: int = Field(ge=1)


class _Entry(Price):
    above: _Above | None = None


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    as_of: date | None = None
    models: dict[Annotated[str, Field(min_length=1, max_length=200)], _Entry]


class Prices:
    """A table of prices. A model's name matches the longest entry it begins with."""

    def __init__(self, models: dict[str, _Entry], as_of: date | None) -> None:
        self.as_of = as_of
        self._models = models
        self._longest_first = sorted(models, key=len, reverse=True)

    @classmethod
    def shipped(cls) -> Prices:
        """The table that comes with this release."""
        table = _Table.model_validate(yaml.safe_load(_TABLE.read_text()))
        return cls(table.models, table.as_of)

    @classmethod
    def load(cls, path: Path | None) -> Prices:
        """The shipped table, with the operator's own over it.

        Raises:
            InvalidSettings: the file cannot be used; the message says where it is wrong.
        """
        shipped = cls.shipped()
        if path is None:
            return shipped
        try:
            table = _Table.model_validate(yaml.safe_load(path.read_text()))
        except OSError as error:
            raise InvalidSettings(f"prices_file: {path}: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            line = " ".join(str(error).split())
            raise InvalidSettings(f"prices_file: {path} is not YAML: {line}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the table"
            raise InvalidSettings(f"prices_file: {path}: {where}: {first['msg']}.") from error
        return cls({**shipped._models, **table.models}, table.as_of or shipped.as_of)

    def _entry(self, model: str) -> _Entry | None:
        name = next((known for known in self._longest_first if model.startswith(known)), None)
        return None if name is None else self._models[name]

    def cost_usd(self, model: str, usage: Usage, *, one_hour_tokens: int = 0) -> float | None:
        """What these tokens cost, in US dollars; None where the model's price is not known.

        Args:
            model: the name the request or its answer gives.
            usage: the tokens.
            one_hour_tokens: how many of those written to the cache are kept there for an hour.
        """
        entry = self._entry(model)
        if entry is None:
            return None
        price: Price = entry
        read = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
        if entry.above is not None and read > entry.above.tokens:
            price = entry.above
        for_an_hour = min(one_hour_tokens, usage.cache_creation_input_tokens)
        millionths = (
            usage.input_tokens * price.input
            + usage.output_tokens * price.output
            + (usage.cache_creation_input_tokens - for_an_hour) * price.cache_write
            + for_an_hour * price.one_hour
            + usage.cache_read_input_tokens * price.cache_read
        )
        return millionths / _MILLION

    def ceiling(self, model: str, input_tokens: int, *, one_hour: bool) -> tuple[float, float] | None:
        """The most that so much input may cost, and the most that a token of output may, in US dollars; None: unknown.

        Args:
            model: the name the request gives.
            input_tokens: as many or fewer.
            one_hour: whether any of it may be written to the cache for an hour.
        """
        entry = self._entry(model)
        if entry is None:
            return None
        prices: list[Price] = [entry]
        if entry.above is not None and input_tokens > entry.above.tokens:
            prices.append(entry.above)
        # What is in the cache now may be gone from it when the request arrives: all of it may have to be written again.
        dearest = max(
            max(price.input, price.cache_write, price.cache_read, price.one_hour if one_hour else 0.0)
            for price in prices
        )
        return input_tokens * dearest / _MILLION, max(price.output for price in prices) / _MILLION
