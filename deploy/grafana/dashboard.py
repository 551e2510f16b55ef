"""The Grafana dashboard, as rows of panels: `python deploy/grafana/dashboard.py` writes its JSON.

Written down here rather than as JSON because thirty panels differ in a title, a unit and a query,
and in nothing else. A test fails when the JSON is not what this writes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any, Literal

OUTPUT = Path(__file__).parent / "dashboards" / "timbre.json"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
COLUMNS = 24
HEIGHTS = {"stat": 4, "timeseries": 8, "bargauge": 8, "table": 8}
MOST_IN_A_LINE = {"stat": 6, "timeseries": 4, "bargauge": 4, "table": 4}

Kind = Literal["stat", "timeseries", "bargauge", "table"]
Json = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One panel; `queries` are pairs of legend and PromQL.

    `thresholds` are the values from which it turns orange and red; `stacked` adds the series up.
    """

    title: str
    description: str
    unit: str
    queries: Sequence[tuple[str, str]]
    kind: Kind = "timeseries"
    thresholds: tuple[float, float] | None = None
    stacked: bool = False
    maximum: float | None = None
    decimals: int | None = None


@dataclass(frozen=True)
class Row:
    """A heading and the panels below it."""

    title: str
    panels: Sequence[Panel]


def rate(metric: str, by: str = "", matching: str = "") -> str:
    """Sum of a counter's rates per second, over the workers chosen."""
    return f"sum{_by(by)}(rate({_of(metric, matching)}[$__rate_interval]))"


def total(metric: str, by: str = "", matching: str = "") -> str:
    """Sum of a metric's values now, over the workers chosen."""
    return f"sum{_by(by)}({_of(metric, matching)})"


def quantile(share: float, histogram: str, by: str = "", matching: str = "") -> str:
    """A quantile of what was observed lately, over the workers chosen."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', labels, matching)})"


def mean(histogram: str) -> str:
    """Mean of what was observed lately, over the workers chosen."""
    return ratio(rate(f"{histogram}_sum"), rate(f"{histogram}_count"))


def ratio(part: str, whole: str, *, each: str = "") -> str:
    """One rate over another; empty rather than NaN while nothing happens.

    `each` names a label that `part` has beside those of `whole`.
    """
    matched = f" ignoring({each}) group_left ()" if each else ""
    return f"{part} /{matched} ({whole} > 0)"


def _of(metric: str, matching: str = "") -> str:
    selector = ", ".join(filter(None, ['instance=~"$instance"', matching]))
    return f"{metric}{{{selector}}}"


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""


GENRE = 'head="genre"'
CACHE_HIT_RATIO = ratio(
    rate("timbre_cache_lookups_total", matching='result="hit"'),
    rate("timbre_cache_lookups_total"),
)

ROWS = (
    Row(
        "At a glance",
        (
            Panel(
                "Workers up",
                "Workers that Prometheus could scrape just now.",
                "none",
                [("", 'sum(up{job="timbre", instance=~"$instance"})')],
                kind="stat",
            ),
            Panel(
                "Tracks per second",
                "Tracks that came to an end: tagged, answered from the cache, or dead letters.",
                "suffix: tracks/s",
                [("", rate("timbre_tracks_total"))],
                kind="stat",
                decimals=1,
            ),
            Panel(
                "Consumer lag",
                "Events in Kafka that are not finished yet, in all partitions.",
                "suffix: events",
                [("", total("timbre_consumer_lag"))],
                kind="stat",
                thresholds=(1_000, 10_000),
            ),
            Panel(
                "End to end, 95 %",
                "Uploads: time from the event's arrival in Kafka to its tags, met by 95 % of them.",
                "s",
                [("", quantile(0.95, "timbre_end_to_end_seconds", matching='priority="upload"'))],
                kind="stat",
                thresholds=(10, 60),
            ),
            Panel(
                "Dead letters",
                "Events that could not be tagged since the workers started.",
                "suffix: events",
                [("", f"{total('timbre_dead_letters_total')} or vector(0)")],
                kind="stat",
                thresholds=(1, 100),
            ),
            Panel(
                "Cache hits",
                "Share of lookups that found the same audio, or the same event, analysed before.",
                "percentunit",
                [("", CACHE_HIT_RATIO)],
                kind="stat",
            ),
        ),
    ),
    Row(
        "Throughput",
        (
            Panel(
                "Tracks",
                "Tracks that came to an end, by outcome.",
                "suffix: tracks/s",
                [("{{outcome}}", rate("timbre_tracks_total", "outcome"))],
                stacked=True,
            ),
            Panel(
                "Events consumed",
                "Events taken from Kafka, by topic; one may hold several tracks.",
                "suffix: events/s",
                [("{{topic}}", rate("timbre_events_total", "topic"))],
                stacked=True,
            ),
            Panel(
                "Audio",
                "Seconds of audio tagged in a second: how many times faster than listening.",
                "suffix: x",
                [("audio", rate("timbre_audio_seconds_total"))],
            ),
            Panel(
                "Windows",
                "Windows of tagged tracks: those that voted, and silent ones, which cost nothing.",
                "suffix: windows/s",
                [("{{kind}}", rate("timbre_windows_total", "kind"))],
                stacked=True,
            ),
            Panel(
                "Fetched",
                "Bytes of audio fetched in a second.",
                "Bps",
                [("fetched", rate("timbre_fetched_bytes_total"))],
            ),
        ),
    ),
    Row(
        "Lag and latency",
        (
            Panel(
                "Consumer lag by partition",
                "Events behind the partition's end, those in work included. One line that grows "
                "alone is a partition that is stuck; all of them growing is too few workers.",
                "suffix: events",
                [("{{topic}} {{partition}}", total("timbre_consumer_lag", "topic, partition"))],
                thresholds=(1_000, 10_000),
            ),
            Panel(
                "Age of the lag",
                "Seconds since a worker last asked Kafka for its lag, which is as old. Beyond a "
                "minute Kafka is away, or no longer lets that worker in.",
                "s",
                [
                    (
                        "{{instance}}",
                        f"time() - {_of('timbre_consumer_lag_measured_timestamp_seconds')}",
                    )
                ],
                thresholds=(60, 120),
            ),
            Panel(
                "End to end",
                "Time from the event's arrival in Kafka to its tags, by priority.",
                "s",
                [
                    ("{{priority}} 50 %", quantile(0.5, "timbre_end_to_end_seconds", "priority")),
                    ("{{priority}} 95 %", quantile(0.95, "timbre_end_to_end_seconds", "priority")),
                ],
                thresholds=(10, 60),
            ),
            Panel(
                "Latency by stage, 50 %",
                "Time a track spends in a stage, met by half of them. Decode and batch overlap: "
                "batch counts only the time that a track waits for it.",
                "s",
                [("{{stage}}", quantile(0.5, "timbre_stage_seconds", "stage"))],
            ),
            Panel(
                "Latency by stage, 95 %",
                "Time a track spends in a stage, met by 95 % of them.",
                "s",
                [("{{stage}}", quantile(0.95, "timbre_stage_seconds", "stage"))],
                thresholds=(60, 300),
            ),
        ),
    ),
    Row(
        "Batches",
        (
            Panel(
                "Batch size",
                "Windows in a batch.",
                "suffix: windows",
                [
                    ("mean", mean("timbre_batch_windows")),
                    ("95 %", quantile(0.95, "timbre_batch_windows")),
                ],
            ),
            Panel(
                "Batch fill",
                "Windows in a batch over the most there may be. Low while nothing waits is right; "
                "low while windows wait means the delay is too short.",
                "percentunit",
                [("mean", mean("timbre_batch_fill"))],
                maximum=1,
            ),
            Panel(
                "Batch wait and compute",
                "Time a batch's oldest window waited, and time the batch took on the device.",
                "s",
                [
                    ("wait 50 %", quantile(0.5, "timbre_batch_wait_seconds")),
                    ("wait 95 %", quantile(0.95, "timbre_batch_wait_seconds")),
                    ("compute 50 %", quantile(0.5, "timbre_batch_compute_seconds")),
                    ("compute 95 %", quantile(0.95, "timbre_batch_compute_seconds")),
                ],
            ),
            Panel(
                "Queue",
                "Windows that wait for a batch, and batches started in a second. A queue at its "
                "limit (TIMBRE_BATCH__QUEUE_WINDOWS) holds the decoders back.",
                "short",
                [
                    ("windows waiting", total("timbre_queue_windows")),
                    ("batches/s", rate("timbre_batch_windows_count")),
                ],
            ),
        ),
    ),
    Row(
        "Failures",
        (
            Panel(
                "Dead letters",
                "Events that could not be tagged, by reason code; `timbre dead-letters list` "
                "shows them.",
                "suffix: events/s",
                [("{{code}}", rate("timbre_dead_letters_total", "code"))],
                stacked=True,
                thresholds=(0.1, 1),
            ),
            Panel(
                "Dead letters since the start",
                "The same, counted since the workers started.",
                "suffix: events",
                [("{{code}}", f"sort_desc({total('timbre_dead_letters_total', 'code')})")],
                kind="bargauge",
                thresholds=(10, 100),
            ),
            Panel(
                "Retries",
                "Attempts repeated, by stage and reason code.",
                "suffix: retries/s",
                [("{{stage}} {{code}}", rate("timbre_retries_total", "stage, code"))],
                stacked=True,
            ),
            Panel(
                "Faults survived",
                "Decoder processes replaced, batches that failed on the device, and times the "
                "consumer was built anew.",
                "suffix: faults/s",
                [
                    ("decoders", rate("timbre_decoder_restarts_total")),
                    ("batches, {{kind}}", rate("timbre_batch_faults_total", "kind")),
                    ("consumer", rate("timbre_consumer_restarts_total")),
                ],
            ),
        ),
    ),
    Row(
        "Cache and Redis",
        (
            Panel(
                "Cache lookups",
                "Lookups by their result.",
                "suffix: lookups/s",
                [("{{result}}", rate("timbre_cache_lookups_total", "result"))],
                stacked=True,
            ),
            Panel(
                "Cache hit ratio",
                "Share of lookups that found an analysis.",
                "percentunit",
                [("hits", CACHE_HIT_RATIO)],
                maximum=1,
            ),
            Panel(
                "Redis backlog",
                "Results in Kafka that Redis could not take yet, and those given up because the "
                "backlog was full (TIMBRE_REDIS__CATCH_UP_MAX).",
                "suffix: results",
                [
                    ("waiting", total("timbre_redis_backlog")),
                    ("given up", total("timbre_redis_dropped_total")),
                ],
                thresholds=(100, 5_000),
            ),
        ),
    ),
    Row(
        "Music",
        (
            Panel(
                "Genres",
                "Tracks by their best genre since the workers started.",
                "suffix: tracks",
                [
                    (
                        "{{label}}",
                        f"sort_desc(topk(15, {total('timbre_labels_total', 'label', GENRE)}))",
                    )
                ],
                kind="bargauge",
            ),
            Panel(
                "Genres over time",
                "Share of each genre among tracks tagged lately: a jump is a change of what is "
                "uploaded, or of the model.",
                "percentunit",
                [
                    (
                        "{{label}}",
                        ratio(
                            rate("timbre_labels_total", "label", GENRE),
                            rate("timbre_labels_total", matching=GENRE),
                            each="label",
                        ),
                    )
                ],
                stacked=True,
                maximum=1,
            ),
            Panel(
                "Uncertain",
                "Share of tracks on which nothing was clear.",
                "percentunit",
                [
                    (
                        "uncertain",
                        ratio(
                            rate("timbre_uncertain_tracks_total"),
                            rate("timbre_tracks_total", matching='outcome=~"tagged|cached"'),
                        ),
                    )
                ],
                thresholds=(0.3, 0.6),
                maximum=1,
            ),
        ),
    ),
    Row(
        "Processes",
        (
            Panel(
                "In flight",
                "Events being worked on.",
                "suffix: events",
                [("{{topic}}", total("timbre_in_flight", "topic"))],
                stacked=True,
            ),
            Panel(
                "Memory",
                "Resident memory of the worker's main process; its decoders come on top.",
                "bytes",
                [("{{instance}}", total("process_resident_memory_bytes", "instance"))],
            ),
            Panel(
                "CPU",
                "Cores kept busy by the worker's main process; its decoders come on top.",
                "suffix: cores",
                [("{{instance}}", rate("process_cpu_seconds_total", "instance"))],
            ),
            Panel(
                "Build",
                "What runs: the worker's version, its model and the model's version.",
                "none",
                [("", total("timbre_build_info", "instance, version, model, model_version"))],
                kind="table",
            ),
        ),
    ),
)


def dashboard() -> Json:
    """The whole dashboard, as Grafana reads it."""
    return {
        "uid": "timbre",
        "title": "Timbre",
        "description": "The tagging workers: throughput, lag, latency, batches, failures, music.",
        "tags": ["timbre"],
        "schemaVersion": 41,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_instances()]},
        "panels": _layout(ROWS),
    }


def _instances() -> Json:
    query = "label_values(timbre_build_info, instance)"
    return {
        "name": "instance",
        "label": "Worker",
        "description": "Workers to look at",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": "instances"},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _layout(rows: Sequence[Row]) -> list[Json]:
    numbers = count(1)
    laid: list[Json] = []
    y = 0
    for row in rows:
        laid.append(
            {
                "id": next(numbers),
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
                "panels": [],
            }
        )
        y += 1
        for line in _lines(row.panels):
            width = COLUMNS // len(line)
            height = max(HEIGHTS[panel.kind] for panel in line)
            for place, panel in enumerate(line):
                position = {"h": height, "w": width, "x": place * width, "y": y}
                laid.append({"id": next(numbers), "gridPos": position} | _panel(panel))
            y += height
    return laid


def _lines(panels: Sequence[Panel]) -> list[Sequence[Panel]]:
    """Panels in lines of about the same number."""
    most = max(MOST_IN_A_LINE[panel.kind] for panel in panels)
    length = ceil(len(panels) / ceil(len(panels) / most))
    return [panels[start : start + length] for start in range(0, len(panels), length)]


def _panel(panel: Panel) -> Json:
    instant = panel.kind in {"bargauge", "table"}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": DATASOURCE,
                "expr": query,
                "legendFormat": legend or "__auto",
                "instant": instant,
                "range": not instant,
                "format": "table" if panel.kind == "table" else "time_series",
            }
            for place, (legend, query) in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel.kind),
    } | ({"transformations": _TABLE} if panel.kind == "table" else {})


_TABLE = [{"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True}}}]


def _defaults(panel: Panel) -> Json:
    steps: list[Json] = [{"color": "green", "value": None}]
    for colour, value in zip(("orange", "red"), panel.thresholds or (), strict=False):
        steps.append({"color": colour, "value": value})
    defaults: Json = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"},
    }
    if panel.kind == "timeseries":
        defaults["min"] = 0
        defaults["custom"] = {
            "fillOpacity": 30 if panel.stacked else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "thresholdsStyle": {"mode": "dashed" if panel.thresholds else "off"},
        }
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.decimals is not None:
        defaults["decimals"] = panel.decimals
    return defaults


def _options(kind: Kind) -> Json:
    last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    match kind:
        case "stat":
            return {"reduceOptions": last, "colorMode": "value", "graphMode": "area"}
        case "bargauge":
            return {"reduceOptions": last, "orientation": "horizontal", "displayMode": "basic"}
        case "table":
            return {"showHeader": True}
        case "timeseries":
            return {
                "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }


def render() -> str:
    """The dashboard's JSON file."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(render())
