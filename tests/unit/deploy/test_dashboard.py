"""The dashboard: what it shows exists, and it is the one that its script writes."""

import json
import re
import runpy
from itertools import combinations
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from tests.unit.deploy.compose import ROOT
from worker.metrics import Metrics

GRAFANA = ROOT / "deploy/grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards/timbre.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
SERIES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
    "gauge": ("",),
}
SCRAPED = {"up": {"job", "instance"}}
"""What Prometheus adds of its own."""
SELECTOR = re.compile(r"(\w+)\{([^}]*)\}")
GROUPED = re.compile(r"by \(([^)]*)\)")
MATCHED = re.compile(r"(\w+)=~?\"")


def known() -> dict[str, set[str]]:
    """The labels of every series of the worker."""
    metrics = Metrics()
    labels = {
        name: set(metric._labelnames)
        for metric, names in metrics.registry._collector_to_names.items()
        if hasattr(metric, "_labelnames")
        for name in names
    }
    found = dict(SCRAPED)
    families: list[Metric] = list(metrics.registry.collect())
    for family in families:
        for suffix in SERIES[family.type]:
            found[family.name + suffix] = {"instance", "job", "le"} | labels.get(
                family.name + suffix, set()
            )
    build = "timbre_build_info"
    found[build] |= {"version", "model", "model_version"}
    return found


KNOWN = known()


def test_the_file_is_what_its_script_writes() -> None:
    written = runpy.run_path(str(GRAFANA / "dashboard.py"))["render"]()
    assert (GRAFANA / "dashboards/timbre.json").read_text() == written, (
        "run `python deploy/grafana/dashboard.py`"
    )


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_names_metrics_and_labels_that_exist(query: str) -> None:
    selectors = SELECTOR.findall(query)
    assert len(selectors) == query.count("{")
    grouped = {label for group in GROUPED.findall(query) for label in group.split(", ")}
    for name, matchers in selectors:
        assert name in KNOWN
        assert set(MATCHED.findall(matchers)) | grouped <= KNOWN[name]


def test_every_metric_of_the_worker_is_shown() -> None:
    shown = {name for query in QUERIES for name, _ in SELECTOR.findall(query)}
    families = [family for family in Metrics().registry.collect() if "timbre_" in family.name]
    hidden = {
        family.name
        for family in families
        if not {family.name + suffix for suffix in SERIES[family.type]} & shown
    }
    assert hidden == set()


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_explains_itself(panel: dict[str, Any]) -> None:
    assert panel["description"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]


def test_panels_do_not_overlap() -> None:
    for one, other in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
    assert max(panel["gridPos"]["x"] + panel["gridPos"]["w"] for panel in PANELS) <= 24


def test_the_data_source_is_the_one_provisioned() -> None:
    provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    scraping = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (source,) = provisioned
    used = {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]}
    assert used == {source["uid"]}
    assert source["jsonData"]["timeInterval"] == scraping["global"]["scrape_interval"]
