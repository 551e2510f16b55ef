"""The demo, as a person runs it."""

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.audio import encode, tone
from tests.worker_process import TIMBRE
from worker.demo.music import Sample

TIME_LIMIT_S = 200


@pytest.fixture
def own_music(tmp_path: Path) -> Path:
    folder = tmp_path / "my music"
    folder.mkdir()
    encode(folder / "a tone.flac", tone(9, 44_100), 44_100, muxer="flac", codec="flac")
    (folder / "text.mp3").write_text("This is no music.")
    return folder


def environment(kafka: str, redis_url: str, state_dir: Path) -> dict[str, str]:
    return os.environ | {
        "TIMBRE_KAFKA__BOOTSTRAP_SERVERS": kafka,
        "TIMBRE_REDIS__URL": redis_url,
        "TIMBRE_SERVICES__STATE_DIR": str(state_dir),
    }


def test_every_sample_track_is_tagged_and_nothing_is_left(music_files: list[Sample]) -> None:
    before = {process.pid for process in psutil.process_iter()}
    done = subprocess.run(
        [TIMBRE, "demo"], capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    for sample in music_files:
        assert f"demo-{sample.genre} " in done.stdout
    assert f"{len(music_files)} of {len(music_files)} tracks tagged" in done.stdout
    assert "/metrics" in done.stdout
    assert "make demo KEEP=1" in done.stdout
    assert "curl" not in done.stdout, "what has ended is not pointed at"
    addresses = re.findall(r"127\.0\.0\.1:(\d+)", done.stdout)
    left = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if process.pid not in before
        and any(port in " ".join(process.info["cmdline"] or ()) for port in addresses)
    ]
    assert left == []


async def test_own_music_is_tagged_and_kept_running_until_down(
    kafka: str, redis_url: str, own_music: Path, tmp_path: Path
) -> None:
    given = environment(kafka, redis_url, tmp_path / "state")

    async def timbre(*arguments: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            TIMBRE, *arguments, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = await asyncio.wait_for(process.communicate(), TIME_LIMIT_S)
        return process.returncode, output.decode()

    try:
        status, said = await timbre("demo", "--keep", "--music", str(own_music))
        assert status == 1  # one of the two is no music
        assert "1 of 2 tracks tagged" in said
        [track] = re.findall(r"(a-tone-\w+) ", said)[:1]
        status, shown = await timbre("show", track, "--json")
        assert status == 0
        assert f"timbre show {track} " in said
        assert f"export TIMBRE_REDIS__URL={redis_url}\n" in said
        assert json.loads(shown)["track_id"] == track
        state = json.loads((tmp_path / "state" / "services.json").read_text())
        kept = [psutil.Process(pid) for pid, _ in state["processes"]]
        assert len(kept) == 2  # Kafka and Redis were given
    finally:
        status, _ = await timbre("services", "down")
    assert status == 0
    assert not any(process.is_running() for process in kept)


@pytest.mark.parametrize("seen", ["✓ Music", "Submitted"])
def test_an_interrupt_ends_the_demo_and_all_it_started(
    kafka: str, redis_url: str, tmp_path: Path, seen: str
) -> None:
    with subprocess.Popen(
        [TIMBRE, "demo"],
        env=environment(kafka, redis_url, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(line.startswith(seen) for line in process.stdout)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        rest, remarks = process.stdout.read(), process.stderr.read()
        assert process.wait(60) == 130
    assert "nothing is left running" in rest
    assert remarks == ""
    assert started
    _, alive = psutil.wait_procs(started, timeout=15)
    assert alive == []


@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_interrupts_while_something_starts_leave_nothing(tmp_path: Path, delay_s: float) -> None:
    with subprocess.Popen(
        [TIMBRE, "demo"],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # what it kills by mistake is not pytest
    ) as process:
        deadline = time.monotonic() + TIME_LIMIT_S
        while not list(tmp_path.glob("timbre-*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait(60) == 130
    assert "nothing is left running" in said
    assert list(tmp_path.glob("timbre-*")) == []


def test_a_folder_with_nothing_but_names_of_music_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "Live.mp3").mkdir()
    (tmp_path / "._song.mp3").write_bytes(b"")
    done = subprocess.run(
        [TIMBRE, "demo", "--music", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"timbre: {tmp_path} holds no audio files.\n"
