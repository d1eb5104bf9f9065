"""Prices: the shipped table, the operator's over it, and what a request costs at most."""

from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carrel.errors import InvalidSettings
from carrel.model import Usage
from carrel.model_gateway.prices import Prices

MODELS = ["claude-opus-5-5-20260930", "claude-haiku-5-5", "claude-opus-4-1", "claude-3-haiku-20240307"]
COUNTS = st.integers(0, 400_000)


def test_the_longest_beginning_counts() -> None:
    prices = Prices.shipped()
    million = Usage(input_tokens=10**6)
    assert prices.cost_usd("claude-opus-5-5", million) == 4
    assert prices.cost_usd("claude-opus-5", million) == 5
    assert prices.cost_usd("gpt", million) is None
    assert prices.ceiling("gpt", 5, one_hour=False) is None


def test_a_long_request_has_a_price_of_its_own() -> None:
    prices = Prices.shipped()
    assert prices.cost_usd("claude-haiku-5-5", Usage(input_tokens=100_000)) == pytest.approx(0.01)
    assert prices.cost_usd("claude-haiku-5-5", Usage(input_tokens=100_001)) == pytest.approx(0.0500005)


def test_an_hour_in_the_cache_costs_twice_the_input() -> None:
    usage = Usage(cache_creation_input_tokens=10**6)
    assert Prices.shipped().cost_usd("claude-opus-5-5", usage, one_hour_tokens=10**6) == 8
    assert Prices.shipped().cost_usd("claude-opus-5-5", usage, one_hour_tokens=500_000) == 6.5


@given(model=st.sampled_from(MODELS), counts=st.tuples(COUNTS, COUNTS, COUNTS), output=COUNTS, one_hour=st.booleans())
def test_no_answer_costs_more_than_its_ceiling(
    model: str, counts: tuple[int, int, int], output: int, one_hour: bool
) -> None:
    plain, written, read = counts
    usage = Usage(
        input_tokens=plain, cache_creation_input_tokens=written, cache_read_input_tokens=read, output_tokens=output
    )
    prices = Prices.shipped()
    found = prices.ceiling(model, sum(counts), one_hour=one_hour)
    assert found is not None
    cost = prices.cost_usd(model, usage, one_hour_tokens=written if one_hour else 0)
    assert cost is not None
    assert cost <= found[0] + output * found[1] + 1e-9


def test_the_operators_table_wins(tmp_path: Path) -> None:
    table = tmp_path / "prices.yaml"
    table.write_text(
        "as_of: 2027-01-01\nmodels:\n  claude-opus-5-5: {input: 1, output: 2, cache_write: 3, cache_read: 4}\n"
        "  ours: {input: 7, output: 0, cache_write: 0, cache_read: 0, cache_write_1h: 9}\n"
    )
    prices = Prices.load(table)
    assert prices.as_of == date(2027, 1, 1)
    assert prices.cost_usd("claude-opus-5-5", Usage(output_tokens=10**6)) == 2
    assert prices.cost_usd("ours-large", Usage(input_tokens=10**6)) == 7
    assert prices.cost_usd("claude-opus-5", Usage(output_tokens=10**6)) == 25
    assert prices.cost_usd("ours", Usage(cache_creation_input_tokens=10**6), one_hour_tokens=10**6) == 9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("models: [", "is not YAML"),
        ("- a list", "the table"),
        ("models: {m: {input: 1}}", "models.m.output"),
        ("models: {m: {input: -1, output: 1, cache_write: 1, cache_read: 1}}", "models.m.input"),
        ("models: {m: {input: .nan, output: 1, cache_write: 1, cache_read: 1}}", "models.m.input"),
        ("models: {m: {input: 1, output: 1, cache_write: 1, cache_read: 1, bonus: 1}}", "models.m.bonus"),
        ("modles: {}", "models"),
    ],
)
def test_a_wrong_table_is_refused_with_its_place(tmp_path: Path, text: str | None, words: str) -> None:
    table = tmp_path / "prices.yaml"
    if text is not None:
        table.write_text(text)
    with pytest.raises(InvalidSettings) as caught:
        Prices.load(table)
    assert words in caught.value.message
    assert str(table) in caught.value.message
