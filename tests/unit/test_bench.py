"""What a bench tells, by one that has happened already."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.audio import encode_as
from tests.performance import bench


def test_rates_stand_side_by_side_for_people_and_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    track = encode_as(tmp_path / "track.mp3", 30.0)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "BUILD", tmp_path)

    bench.report(Console(), [track] * 12, {"decode": 2.0, "tag": 4.0, "worker": 3.0})

    told = json.loads((tmp_path / "bench.json").read_text())
    assert told["audio_minutes"] == pytest.approx(6.0, abs=0.1)
    assert (
        told.items()
        >= {
            "decode_tracks_per_s": 6.0,
            "tag_tracks_per_s": 3.0,
            "worker_tracks_per_s": 4.0,
            "worker_vs_decode": 0.667,
            "tracks": 12,
        }.items()
    )
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    shares = {row[0].strip(): row[-1].strip() for row in rows}
    assert shares == {"decode": "1.00", "tag": "0.50", "worker": "0.67"}
