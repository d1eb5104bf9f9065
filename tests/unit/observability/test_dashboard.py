"""The dashboard asks for metrics and labels that exist, shows every one of ours, and docs/monitoring.md explains each."""

import json
import re
from pathlib import Path

import pytest

from carrel.observability import Metrics

ROOT = Path(__file__).resolve().parents[3]
DASHBOARD = json.loads((ROOT / "deploy/grafana/carrel.json").read_text())
PAGE = (ROOT / "docs/monitoring.md").read_text()
OF_PROMETHEUS = {"instance", "job", "le"}


@pytest.fixture
def families():
    """Every sample's name that a server may show, with its labels."""
    found: dict[str, set[str]] = {}
    collectors = set(Metrics().registry._collector_to_names)
    for collector in collectors:
        labels = set(getattr(collector, "_labelnames", ()))
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            for suffix in suffixes:
                found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
        for family in collector.collect():
            for sample in family.samples:
                found.setdefault(sample.name, set(sample.labels))
    return found


def queries():
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"], target["legendFormat"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield "annotation", annotation["expr"], ""


def test_every_query_names_a_metric_and_labels_that_exist(families):
    asked = list(queries())
    assert len(asked) > 30
    for title, expression, legend in asked:
        names = re.findall(r"\b((?:carrel|process)_[a-z_]+)\{", expression)
        assert names, f"{title}: {expression}"
        labels = {label for name in names for label in families.get(name, set())} | OF_PROMETHEUS
        for name in names:
            assert name in families, f"{title} asks for {name}"
        used = set(re.findall(r"(\w+)=~?\"", expression)) | set(re.findall(r"\{\{(\w+)\}\}", legend))
        for group in re.findall(r"by \(([^)]*)\)", expression):
            used |= {label.strip() for label in group.split(",")}
        assert used <= labels, f"{title}: {used - labels}"


def test_every_metric_of_ours_is_shown_and_explained(families):
    shown = " ".join(expression for _, expression, _ in queries())
    for name in families:
        if name.startswith("carrel_") and not name.endswith(("_sum", "_count", "_created", "_bucket")):
            assert f"{name}{{" in shown, f"no panel shows {name}"
        if name.startswith("carrel_") and not name.endswith("_created"):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert f"`{base}`" in PAGE, f"docs/monitoring.md does not explain {base}"


def test_panels_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
