import re
from pathlib import Path

from worker.metrics import Metrics

PAGE = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()


def test_the_page_of_metrics_lists_each_of_them_and_names_no_other() -> None:
    metrics = Metrics()
    metrics.build.info({})
    shown = re.findall(r"^# TYPE (timbre_\w+)", metrics.render().decode(), re.MULTILINE)
    assert sorted(re.findall(r"^\| `(timbre_\w+)` \|", PAGE, re.MULTILINE)) == sorted(shown)
    named = {name.removesuffix("_bucket") for name in re.findall(r"timbre_\w+", PAGE)}
    assert named == set(shown)
