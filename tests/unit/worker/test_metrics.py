import re
from pathlib import Path

from schemas.events import ModelRef, Tag, WindowCounts
from tests.audio import audio_facts
from worker.analysis import Analysis
from worker.metrics import BatchMetrics, Metrics

PAGE = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()


def test_the_page_of_metrics_lists_each_of_them_and_names_no_other() -> None:
    metrics = Metrics()
    metrics.build.info({})
    shown = re.findall(r"^# TYPE (timbre_\w+)", metrics.render().decode(), re.MULTILINE)
    assert sorted(re.findall(r"^\| `(timbre_\w+)` \|", PAGE, re.MULTILINE)) == sorted(shown)
    named = {name.removesuffix("_bucket") for name in re.findall(r"timbre_\w+", PAGE)}
    assert named == set(shown)


def test_what_is_known_beforehand_begins_at_zero() -> None:
    value = Metrics().registry.get_sample_value
    assert value("timbre_tracks_total", {"outcome": "cached", "priority": "backfill"}) == 0
    assert value("timbre_dead_letters_total", {"code": "audio_not_found"}) == 0
    assert value("timbre_retries_total", {"stage": "fetch", "code": "fetch_timeout"}) == 0
    assert value("timbre_retries_total", {"stage": "publish", "code": "publish_failed"}) == 0
    assert value("timbre_batch_faults_total", {"kind": "hung"}) == 0
    assert value("timbre_cache_lookups_total", {"result": "error"}) == 0


def test_a_track_counts_by_its_best_labels_and_where_it_was_decoded_by_its_windows() -> None:
    tags = [("genre", "jazz"), ("genre", "blues"), ("tags", "calm"), ("tags", "piano")]
    analysis = Analysis(
        audio=audio_facts(),
        tags=[
            Tag(head=head, label=label, category="genre", score=0.4, share=0.5)
            for head, label in tags
        ],
        uncertain=True,
        windows=WindowCounts(total=3, silent=1),
        vote="mean",
        model=ModelRef(name="m", version="1"),
        taggram=None,
        embedding=[1.0],
    )
    metrics = Metrics()
    metrics.count_tagged(analysis, "upload", cached=False, age_s=7.0)
    metrics.count_tagged(analysis, "backfill", cached=True, age_s=-1.0)
    value = metrics.registry.get_sample_value
    assert value("timbre_tracks_total", {"outcome": "tagged", "priority": "upload"}) == 1
    assert value("timbre_tracks_total", {"outcome": "cached", "priority": "backfill"}) == 1
    assert value("timbre_end_to_end_seconds_sum", {"priority": "upload"}) == 7
    assert value("timbre_end_to_end_seconds_sum", {"priority": "backfill"}) == 0
    counted = [value("timbre_labels_total", {"head": head, "label": label}) for head, label in tags]
    assert counted == [2, None, 2, None]
    assert value("timbre_uncertain_tracks_total") == 2
    assert value("timbre_audio_seconds_total") == 3
    assert value("timbre_windows_total", {"kind": "voted"}) == 2
    assert value("timbre_windows_total", {"kind": "silent"}) == 1


def test_a_batch_is_measured_and_is_progress() -> None:
    metrics = Metrics()
    progress: list[None] = []
    BatchMetrics(metrics, lambda: progress.append(None)).on_batch(4, 0.5, 0.1, 0.2)
    names = ("batch_windows", "batch_fill", "batch_wait_seconds", "batch_compute_seconds")
    value = metrics.registry.get_sample_value
    assert [value(f"timbre_{name}_sum") for name in names] == [4, 0.5, 0.1, 0.2]
    assert len(progress) == 1
