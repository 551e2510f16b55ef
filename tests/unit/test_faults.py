"""What a run of faults leaves behind, with scenarios and a stand that do nothing."""

import ast
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from tests.faults import __main__ as faults
from tests.faults import checker
from tests.faults.checker import Verdict
from tests.faults.scenarios import Outcome, conclude
from tests.faults.stand import Failed, Lane, Stand

SOUND = Verdict(events=3, tags=3, dead_letters=0, lost=0, duplicates=0, differing=0)
LOST = Verdict(events=3, tags=2, dead_letters=0, lost=1, duplicates=0, differing=0)


class NoStand(Stand):
    """Starts nothing."""

    async def __aenter__(self) -> Self:
        return self


async def passes(stand: Stand, quick: bool) -> Outcome:
    return Outcome(SOUND, 0.5)


async def long_form(stand: Stand, quick: bool) -> Outcome:
    return Outcome(LOST if quick else SOUND, 0.5)


async def loses(stand: Stand, quick: bool) -> Outcome:
    stand.counted = LOST
    raise Failed("nothing is lost")


async def stumbles(stand: Stand, quick: bool) -> Outcome:
    raise ValueError("no lane was made")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the runs of this module write; an old report lies there."""
    listed = {run.__name__: run for run in (passes, long_form, loses, stumbles)}
    path = tmp_path / "build" / "faults.json"
    path.parent.mkdir()
    path.write_text('[{"fault": "old"}]')
    for name, value in (("SCENARIOS", listed), ("Stand", NoStand), ("FILE", path)):
        monkeypatch.setattr(faults, name, value)
    kafka_log = logging.getLogger("aiokafka")
    level = kafka_log.level
    yield path
    kafka_log.setLevel(level)


async def test_a_fault_that_failed_is_in_the_report_with_what_was_counted(report: Path) -> None:
    assert await faults._run(["loses", "passes", "stumbles"], quick=True) == 1

    lost, sound, stumbled = json.loads(report.read_text())
    assert lost == {
        "fault": "loses", "events": 3, "tags": 2, "dead_letters": 0, "lost": 1, "duplicates": 0,
        "differing": 0, "failed": "nothing is lost",
    }  # fmt: skip
    assert sound == {
        "fault": "passes", "events": 3, "tags": 3, "dead_letters": 0, "lost": 0, "duplicates": 0,
        "differing": 0, "recovery_s": 0.5,
    }  # fmt: skip
    assert stumbled["fault"] == "stumbles"
    assert "no lane was made" in stumbled["failed"]


async def test_where_all_pass_the_status_is_0(report: Path) -> None:
    assert await faults._run(["passes"], quick=True) == 0

    assert [line["fault"] for line in json.loads(report.read_text())] == ["passes"]


@pytest.mark.parametrize(
    ("arguments", "status", "lines"),
    [
        (["long_form"], 0, [("long_form", 0)]),
        (["long_form", "--quick"], 0, [("long_form", 1)]),
        (["loses"], 1, [("loses", 1)]),
        ([], 1, [("passes", 0), ("long_form", 0), ("loses", 1), ("stumbles", None)]),
    ],
)
def test_a_name_runs_one_fault_and_none_runs_all_in_long_form_with_a_row_each(
    report: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    lines: list[tuple[str, int | None]],
) -> None:
    monkeypatch.setattr(sys, "argv", ["faults", *arguments])

    assert faults.main() == status

    written = json.loads(report.read_text())
    assert [(line["fault"], line.get("lost")) for line in written] == lines
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("│")]
    assert [row.split()[1] for row in rows] == [fault for fault, _ in lines]


async def test_a_run_that_comes_to_nothing_leaves_no_old_report(
    report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "Stand", None)
    with pytest.raises(TypeError):
        await faults._run(["passes"], quick=True)

    assert json.loads(report.read_text()) == []


def test_a_name_that_no_fault_has_is_refused(
    report: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["faults", "passes", "pases"])

    with pytest.raises(SystemExit):
        faults.main()

    assert "no such fault: pases" in capsys.readouterr().err


def test_what_is_lost_is_told_by_nothing_of_the_workers() -> None:
    nodes = list(ast.walk(ast.parse(Path(checker.__file__).read_text())))
    modules = [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]

    imported = {module.partition(".")[0] for module in modules}

    assert imported - sys.stdlib_module_names == {"aiokafka"}


class Judged(Lane):
    """One of which only the verdict counts."""

    def __init__(self, folder: Path, verdict: Verdict) -> None:
        self.spool = folder / "spool"
        self.checker = checker.Checker({}, checker.Topics((), "tags", "features", "letters"))
        self._verdict = verdict

    async def verdict(self) -> Verdict:
        return self._verdict


@pytest.mark.parametrize(
    ("verdict", "broken"),
    [
        (LOST, "nothing is lost"),
        (replace(SOUND, differing=1), "don't contradict each other"),
        (replace(SOUND, duplicates=3), "at most 2 duplicates"),
    ],
)
async def test_no_fault_passes_that_loses_contradicts_or_repeats_too_much(
    tmp_path: Path, verdict: Verdict, broken: str
) -> None:
    with pytest.raises(Failed, match=broken):
        await conclude(Judged(tmp_path, verdict), [], duplicates_at_most=2)


async def test_no_fault_passes_that_leaves_files_in_the_spool(tmp_path: Path) -> None:
    lane = Judged(tmp_path, replace(SOUND, duplicates=2))
    outcome = await conclude(lane, [], duplicates_at_most=2)
    assert outcome.verdict.duplicates == 2

    (lane.spool / "process").mkdir(parents=True)
    (lane.spool / "process" / "track").touch()
    with pytest.raises(Failed, match="the spool is empty"):
        await conclude(lane, [], duplicates_at_most=2)
