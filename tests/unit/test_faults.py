"""What a run of faults leaves behind, with scenarios and a stand that do nothing."""

import json
from pathlib import Path
from typing import Self

import pytest

from tests.faults import __main__ as faults
from tests.faults.checker import Verdict
from tests.faults.scenarios import Outcome
from tests.faults.stand import Failed, Stand

SOUND = Verdict(events=3, tags=3, dead_letters=0, lost=0, duplicates=0, differing=0)
LOST = Verdict(events=3, tags=2, dead_letters=0, lost=1, duplicates=0, differing=0)


class NoStand(Stand):
    """Starts nothing."""

    async def __aenter__(self) -> Self:
        return self


async def passes(stand: Stand, quick: bool) -> Outcome:
    return Outcome(SOUND, 0.5)


async def loses(stand: Stand, quick: bool) -> Outcome:
    stand.counted = LOST
    raise Failed("nothing is lost")


async def stumbles(stand: Stand, quick: bool) -> Outcome:
    raise ValueError("no lane was made")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the runs of this module write; an old report lies there."""
    listed = {run.__name__: run for run in (passes, loses, stumbles)}
    path = tmp_path / "build" / "faults.json"
    path.parent.mkdir()
    path.write_text('[{"fault": "old"}]')
    for name, value in (("SCENARIOS", listed), ("Stand", NoStand), ("FILE", path)):
        monkeypatch.setattr(faults, name, value)
    return path


async def test_a_fault_that_failed_is_in_the_report_with_what_was_counted(report: Path) -> None:
    assert await faults._run(["loses", "passes", "stumbles"], quick=True) == 1

    lost, sound, stumbled = json.loads(report.read_text())
    assert lost == {
        "fault": "loses", "events": 3, "tags": 2, "dead_letters": 0, "lost": 1, "duplicates": 0,
        "differing": 0, "failed": "nothing is lost",
    }  # fmt: skip
    assert (sound["fault"], sound["recovery_s"]) == ("passes", 0.5)
    assert stumbled["fault"] == "stumbles"
    assert "no lane was made" in stumbled["failed"]


async def test_where_all_pass_the_status_is_0(report: Path) -> None:
    assert await faults._run(["passes"], quick=True) == 0

    assert [line["fault"] for line in json.loads(report.read_text())] == ["passes"]


async def test_a_run_that_comes_to_nothing_leaves_no_old_report(
    report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "Stand", None)
    with pytest.raises(TypeError):
        await faults._run(["passes"], quick=True)

    assert json.loads(report.read_text()) == []
