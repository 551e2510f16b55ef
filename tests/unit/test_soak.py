"""When a soak fails, and what its command leaves: by one that has happened already."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
from matplotlib.image import imread

from tests.faults import soak
from tests.faults.checker import Verdict
from tests.faults.soak import MIB, POOLED_FDS, Sample, Soak
from tests.faults.stand import Failed, Lane, Stand

SOUND = Verdict(events=5000, tags=5000, dead_letters=0, lost=0, duplicates=0, differing=0)
IDLE = Sample(at_s=0, tracks=500, memory_bytes=700 * MIB, fds=60, processes=2, spool_files=0)


def grown(by: float) -> list[Sample]:
    """5,000 tracks, during which memory grows steadily from that of the 500th to that share more.

    Before them, while all is loaded, it grew by more.
    """
    early = [replace(IDLE, tracks=tracks, memory_bytes=tracks * MIB) for tracks in range(0, 500, 9)]
    late = [
        replace(IDLE, tracks=tracks, memory_bytes=round(700 * MIB * (1 + by * (tracks / 5000))))
        for tracks in range(500, 5001, 10)
    ]
    return early + late


def test_memory_that_stays_and_pools_that_fill_are_no_growth() -> None:
    after = replace(IDLE, fds=IDLE.fds + POOLED_FDS)
    Soak(grown(0.04), IDLE, after).require_no_growth()


@pytest.mark.parametrize(
    ("by", "after", "told"),
    [
        (0.07, IDLE, "memory grew by 5"),
        (0.0, replace(IDLE, fds=IDLE.fds + POOLED_FDS + 1), "descriptors"),
        (0.0, replace(IDLE, processes=3), "processes"),
        (0.0, replace(IDLE, spool_files=1), "spool files"),
    ],
)
def test_what_grows_or_is_left_fails_it(by: float, after: Sample, told: str) -> None:
    with pytest.raises(Failed, match=told):
        Soak(grown(by), IDLE, after).require_no_growth()


class NoStand(Stand):
    """Starts nothing, and has a lane on which all is well."""

    async def __aenter__(self) -> Self:
        return self

    @asynccontextmanager
    async def lane(self, *_: object, **__: object) -> AsyncIterator[Lane]:
        yield SoundLane()


class SoundLane(Lane):
    def __init__(self) -> None:
        pass

    async def verdict(self) -> Verdict:
        return SOUND


@pytest.mark.parametrize(("by", "growth", "status"), [(0.0, 0.0, 0), (0.5, 0.37, 1)])
def test_its_command_draws_it_and_says_by_its_status_whether_it_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: float, growth: float, status: int
) -> None:
    async def happened(lane: Lane, tracks: int, progress: object) -> Soak:
        assert tracks == 5000
        return Soak(grown(by), IDLE, IDLE)

    monkeypatch.setattr(soak, "Stand", NoStand)
    monkeypatch.setattr(soak, "soak", happened)
    monkeypatch.chdir(tmp_path)

    assert asyncio.run(soak._run(5000)) == status

    picture = imread(tmp_path / "build" / "soak.png")
    assert picture.std() > 0.05, "there is something on it"
    report = json.loads((tmp_path / "build" / "soak.json").read_text())
    assert report["growth"] == pytest.approx(growth, abs=0.01)
    assert report["verdict"]["tags"] == 5000
