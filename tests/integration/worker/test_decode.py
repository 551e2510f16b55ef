import asyncio
import gc
import os
import signal
import socket
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import av
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from schemas.events import Priority
from tests.audio import ENCODINGS, encode, encode_as, noise, tone, wav
from tests.memory import peak_bytes
from tests.waiting import until
from worker.decode import pool as pool_module
from worker.decode import process as decoder_process
from worker.decode.decoder import DecodedFacts, decode_windows
from worker.decode.handle import Block, DecoderProcess
from worker.decode.pool import DecoderPool, Decoding
from worker.decode.process import Setup
from worker.errors import (
    AudioEmpty,
    AudioTooLong,
    AudioUnreadable,
    DecodeFailed,
    DecoderCrashed,
    DecodeTimeout,
)
from worker.settings import MIB, DecodeSettings, WindowSettings
from worker.windows import Windows

RATE_HZ = 16_000
WINDOW = 3 * RATE_HZ


@dataclass(frozen=True)
class Heard:
    facts: DecodedFacts
    windows: Windows
    silent: NDArray[np.bool_]


def pool_of(
    processes: int = 1, windows: WindowSettings | None = None, **limits: float
) -> DecoderPool:
    settings = DecodeSettings.model_validate({"processes": processes, **limits})
    return DecoderPool(
        settings, windows or WindowSettings(), sample_rate_hz=RATE_HZ, window_samples=WINDOW
    )


async def hear(pool: DecoderPool, path: Path, *, priority: Priority = "upload") -> Heard:
    """Decode a track, giving each block back as soon as it is copied."""
    windows, silent = [np.empty((0, WINDOW), np.float32)], [np.empty(0, np.bool_)]
    async with pool.decode(path, priority=priority) as decoding:
        async for block in decoding:
            windows.append(block.windows.copy())
            silent.append(block.silent)
            block.release()
    return Heard(decoding.facts, np.concatenate(windows), np.concatenate(silent))


def plain(path: Path) -> Windows:
    """The windows of a track that is decoded without a pool."""
    windows = decode_windows(
        path, RATE_HZ, window_samples=WINDOW, hop_samples=WINDOW, min_tail_samples=RATE_HZ
    )
    return np.concatenate(list(windows))


async def outcome(pool: DecoderPool, path: Path) -> str:
    """`ok`, or the code of the error that the track ends with; others are raised."""
    try:
        await hear(pool, path)
    except DecodeFailed as error:
        return error.code
    return "ok"


async def drain(decoding: Decoding) -> None:
    async for block in decoding:
        block.release()


async def leave_half_way(pool: DecoderPool, path: Path) -> None:
    async with pool.decode(path) as decoding:
        await anext(decoding)


async def kill_idle(pool: DecoderPool) -> None:
    """Kill the pool's only process, and wait until the pool knows."""
    before = pool.pids
    decoders(pool)[0].kill()
    await until(lambda: before != pool.pids)


def decoders(pool: DecoderPool) -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in pool.pids]


def decoder_of(pool: DecoderPool, path: Path) -> psutil.Process:
    """The decoder process that has this file open."""
    [process] = [
        process
        for process in decoders(pool)
        if str(path) in {file.path for file in process.open_files()}
    ]
    return process


def open_files() -> int:
    """Descriptors of this process, without those that earlier tests left to the collector."""
    gc.collect()
    return psutil.Process().num_fds()


def mapped(pid: int) -> Iterator[tuple[int, int, str]]:
    """Where a process's memory begins and ends, and the inode of the file there (0: none)."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, _, _, _, inode, *_ = line.split()
        start, end = (int(address, 16) for address in place.split("-"))
        yield start, end, inode


@pytest.fixture(scope="module")
async def pool() -> AsyncIterator[DecoderPool]:
    async with pool_of(processes=2, timeout_s=30.0) as pool:
        yield pool


async def test_the_terminals_interrupt_does_not_reach_a_decoder(pool: DecoderPool) -> None:
    assert all(os.getpgid(process.pid) != os.getpgid(0) for process in decoders(pool))


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minute of audio, 20 windows."""
    path = tmp_path_factory.mktemp("song") / "song.flac"
    return encode(path, noise(60.0, RATE_HZ), RATE_HZ, muxer="flac", codec="flac")


async def test_every_encoding_gives_the_windows_of_the_plain_decoder(
    pool: DecoderPool, tmp_path: Path
) -> None:
    paths = [encode_as(tmp_path / f"tone.{suffix}", 10.5) for suffix in ENCODINGS]

    heard = await asyncio.gather(*(hear(pool, path) for path in paths))

    for path, one in zip(paths, heard, strict=True):
        assert np.array_equal(one.windows, plain(path)), path.name
        assert not one.silent.any()
        assert one.facts.duration_s == pytest.approx(10.5, abs=0.2)


async def test_a_full_track_gives_the_windows_of_the_plain_decoder(
    pool: DecoderPool, shared_data: Path
) -> None:
    path = min((shared_data / "audio" / "tracks").glob("*.mp3"))

    assert np.array_equal((await hear(pool, path)).windows, plain(path))


@pytest.mark.parametrize("muxer", ["mov", "aiff", "caf"])
async def test_channels_in_the_order_of_films_are_averaged_alike(
    pool: DecoderPool, tmp_path: Path, muxer: str
) -> None:
    signal = noise(3.0, RATE_HZ, channels=6)
    path = encode(tmp_path / "surround", signal, RATE_HZ, muxer=muxer, codec="pcm_s16be")
    data = path.read_bytes()
    order = data.lower().index(b"chan") + {"mov": 8, "aiff": 8, "caf": 12}[muxer]
    c_l_r_ls_rs_lfe = (124 << 16 | 6).to_bytes(4)
    path.write_bytes(data[:order] + c_l_r_ls_rs_lfe + data[order + 4 :])

    heard = await hear(pool, path)

    np.testing.assert_allclose(heard.windows[0], signal.mean(axis=1), atol=1e-4)
    assert heard.facts.channels == 6


async def test_silent_windows_are_told_from_the_others(pool: DecoderPool, tmp_path: Path) -> None:
    signal = tone(12.0, RATE_HZ)
    signal[WINDOW : 2 * WINDOW] *= 1e-4
    path = tmp_path / "quiet"
    path.write_bytes(wav(signal, RATE_HZ))

    assert (await hear(pool, path)).silent.tolist() == [False, True, False, False]


async def test_hop_tail_and_silence_are_those_of_the_settings(tmp_path: Path) -> None:
    signal = tone(7.0, RATE_HZ)
    signal[3 * RATE_HZ :] *= 0.01
    path = tmp_path / "fading"
    path.write_bytes(wav(signal, RATE_HZ))

    async def heard(**changed: float) -> Heard:
        async with pool_of(windows=WindowSettings.model_validate(changed)) as pool:
            return await hear(pool, path)

    assert [len(one.windows) for one in (await heard(), await heard(min_tail_s=1.1))] == [3, 2]
    overlapping = await heard(hop_s=1.0, silence_dbfs=-30.0)
    starts = range(0, len(signal) - WINDOW + 1, RATE_HZ)
    expected = np.stack([signal[start : start + WINDOW, 0] for start in starts])
    np.testing.assert_allclose(overlapping.windows, expected, atol=1e-4)
    assert overlapping.silent.tolist() == [False, False, False, True, True]


async def test_windows_are_read_where_the_decoder_wrote_them(song: Path) -> None:
    """Neither pickled nor copied on their way."""
    async with pool_of() as pool, pool.decode(song) as decoding:
        block = await anext(decoding)
        address = block.windows.ctypes.data
        [process] = decoders(pool)
        [read] = [file for start, end, file in mapped(os.getpid()) if start <= address < end]
        assert read in [file for _, _, file in mapped(process.pid) if file != "0"]
        block.release()


async def test_a_held_block_stays_as_it_is_while_the_track_goes_on(song: Path) -> None:
    async with pool_of(slots=2, slot_windows=3) as pool:
        whole = await hear(pool, song)
        async with pool.decode(song) as decoding:
            held = await anext(decoding)
            following: list[Windows] = []
            async for block in decoding:
                following.append(block.windows.copy())
                block.release()
            assert np.array_equal(held.windows, whole.windows[:3])
            assert np.array_equal(np.concatenate(following), whole.windows[3:])
            held.release()
            held.release()
        assert np.array_equal((await hear(pool, song)).windows, whole.windows)


async def test_the_decoder_waits_for_blocks_to_be_released(song: Path) -> None:
    async with (
        pool_of(slots=2, slot_windows=3) as pool,
        pool.decode(song) as decoding,
    ):
        held = [await anext(decoding) for _ in range(2)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await anext(decoding)
        held[0].release()
        assert len((await anext(decoding)).windows) == 3


async def test_waiting_for_the_consumer_is_no_work_of_the_decoder(song: Path) -> None:
    async with (
        pool_of(slots=2, slot_windows=3, timeout_s=1.5) as pool,
        pool.decode(song) as decoding,
    ):
        async for block in decoding:
            await asyncio.sleep(0.5)
            block.release()
        assert decoding.facts.duration_s == 60.0


async def test_leaving_half_way_leaves_the_pool_whole(song: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(wav(tone(9.0, RATE_HZ), RATE_HZ))
    async with pool_of(slots=2, slot_windows=3) as pool:
        whole = await hear(pool, other)
        async with pool.decode(song) as decoding:
            kept = await anext(decoding)
            as_it_was = kept.windows.copy()

        assert np.array_equal((await hear(pool, other)).windows, whole.windows)
        assert np.array_equal(kept.windows, as_it_was), "an abandoned track's memory is its own"
        kept.release()
        assert np.array_equal((await hear(pool, other)).windows, whole.windows)


async def test_a_cancelled_track_leaves_the_pool_whole(song: Path) -> None:
    async with pool_of() as pool:
        whole = await hear(pool, song)
        for delay_s in (0.0, 0.001, 0.02, 0.05):
            task = asyncio.create_task(hear(pool, song))
            await asyncio.sleep(delay_s)
            task.cancel()
            await asyncio.wait([task])
        assert np.array_equal((await hear(pool, song)).windows, whole.windows)


async def test_leaving_waits_for_blocks_still_in_use(song: Path) -> None:
    blocks: list[Block] = []
    async with pool_of(slots=2, slot_windows=50) as pool:
        [before] = decoders(pool)
        async with pool.decode(song) as decoding:
            blocks = [block async for block in decoding]
            asyncio.get_running_loop().call_later(0.2, blocks[0].release)
        await hear(pool, song)
        assert [before] == decoders(pool), "the process serves the next track"


async def test_a_block_may_be_released_after_its_pool_has_closed(song: Path) -> None:
    async with pool_of(slots=2, slot_windows=3) as pool:
        track = pool.decode(song)
        held = await anext(await track.__aenter__())
    as_it_was = held.windows.copy()

    await track.__aexit__(None, None, None)

    assert np.array_equal(held.windows, as_it_was)
    held.release()


async def test_a_process_serves_one_track_after_the_other(song: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"no audio")
    async with pool_of() as pool:
        before = decoders(pool)
        for path in (song, broken, song, tmp_path / "gone"):
            await outcome(pool, path)
        assert decoders(pool) == before


async def test_tracks_are_served_in_the_order_they_came(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(wav(tone(0.1, RATE_HZ), RATE_HZ))
    served: list[str] = []

    async def hear_often(pool: DecoderPool, name: str) -> None:
        for _ in range(4):
            await hear(pool, path)
            served.append(name)

    async with pool_of() as pool:
        await asyncio.gather(*(hear_often(pool, name) for name in "abc"))

    assert "".join(served) == "abcabcabcabc"


async def test_a_killed_decoder_ends_its_track_alone(song: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.flac"
    other.write_bytes(song.read_bytes())
    async with (
        pool_of(processes=2, slots=2, slot_windows=3) as pool,
        pool.decode(song) as neighbour,
    ):
        (await anext(neighbour)).release()
        async with pool.decode(other) as victim:
            (await anext(victim)).release()
            decoder_of(pool, other).kill()
            with pytest.raises(DecoderCrashed, match="SIGKILL"):
                await drain(victim)
        await drain(neighbour)
        assert neighbour.facts.duration_s == 60.0
        assert (await hear(pool, other)).facts.duration_s == 60.0


async def test_a_decoder_killed_while_idle_is_replaced(song: Path) -> None:
    async with pool_of() as pool:
        for _ in range(2):
            await kill_idle(pool)
            assert (await hear(pool, song)).facts.duration_s == 60.0


async def test_a_decoder_that_crashes_is_told_by_its_signal_and_replaced(song: Path) -> None:
    async with pool_of(slots=2, slot_windows=3) as pool:
        async with pool.decode(song) as decoding:
            (await anext(decoding)).release()
            decoder_of(pool, song).send_signal(signal.SIGSEGV)
            with pytest.raises(DecoderCrashed, match="SIGSEGV") as crashed:
                await drain(decoding)
        assert not crashed.value.retryable, "it would crash over the file again"
        assert (await hear(pool, song)).facts.duration_s == 60.0


async def test_a_decoder_that_hangs_meets_its_limit(song: Path) -> None:
    async with pool_of(slots=2, slot_windows=3, timeout_s=2.0) as pool:
        async with pool.decode(song) as decoding:
            for block in [await anext(decoding) for _ in range(2)]:  # until then it waited for us
                block.release()
            hung = decoder_of(pool, song)
            hung.suspend()
            started_s = time.monotonic()
            with pytest.raises(DecodeTimeout, match="more than 2 s"):
                await asyncio.wait_for(drain(decoding), 10)
            assert time.monotonic() - started_s < 5.0
        assert (await hear(pool, song)).facts.duration_s == 60.0
        assert not hung.is_running()


async def test_a_decoder_that_gives_nothing_for_long_is_ended_long_before_its_limit(
    song: Path,
) -> None:
    pool = pool_of(slots=2, slot_windows=3, timeout_s=60.0, stall_timeout_s=1.0)
    async with pool, pool.decode(song) as decoding:
        for block in [await anext(decoding) for _ in range(2)]:
            block.release()
        decoder_of(pool, song).suspend()
        started_s = time.monotonic()
        with pytest.raises(DecodeTimeout, match=r"nothing for 1 s.*DECODE__STALL_TIMEOUT_S"):
            await asyncio.wait_for(drain(decoding), 10)
        assert time.monotonic() - started_s < 5.0


async def test_each_block_gives_a_decoder_new_time(song: Path) -> None:
    async with pool_of(slots=2, slot_windows=3, timeout_s=60.0, stall_timeout_s=1.0) as pool:
        await hear_slowly(pool, song)


async def test_a_decoder_that_is_slow_at_every_block_meets_its_limit(song: Path) -> None:
    async with pool_of(slots=2, slot_windows=3, timeout_s=1.0) as pool:
        with pytest.raises(DecodeTimeout, match="more than 1 s"):
            await hear_slowly(pool, song)


async def hear_slowly(pool: DecoderPool, path: Path) -> None:
    """Decode a track of seven blocks or more, with 0.4 s to each of five."""
    async with pool.decode(path) as decoding:
        blocks = [await anext(decoding) for _ in range(2)]
        slow = decoder_of(pool, path)
        for _ in range(5):
            blocks.pop(0).release()
            with suppress(psutil.NoSuchProcess):
                slow.suspend()
                await asyncio.sleep(0.4)
                slow.resume()
            blocks.append(await anext(decoding))


async def test_a_track_may_be_given_up_while_its_decoder_waits_for_free_blocks(song: Path) -> None:
    async with pool_of(slots=2, slot_windows=3) as pool:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3), pool.decode(song) as decoding:
                assert [block async for block in decoding]
        assert (await hear(pool, song)).facts.duration_s == 60.0


async def test_a_decoder_that_takes_too_much_memory_ends_its_track_alone(
    song: Path, tmp_path: Path
) -> None:
    greedy = tmp_path / "greedy"
    greedy.write_bytes(wav(noise(0.05, 3_072_000, channels=64), 3_072_000))
    async with pool_of(max_memory_bytes=8 * MIB) as pool:
        [before] = decoders(pool)
        with pytest.raises(DecoderCrashed, match=r"more than 8 MiB|died"):
            await hear(pool, greedy)
        assert (await hear(pool, song)).facts.duration_s == 60.0
        assert decoders(pool) != [before]


async def test_hours_of_audio_pass_in_bounded_memory(song: Path, tmp_path: Path) -> None:
    ten_minutes = np.zeros((8000 * 600, 1), np.float32)
    hours = encode(tmp_path / "hours.flac", ten_minutes, 8000, muxer="flac", codec="flac", times=12)
    async with pool_of() as pool:
        [process] = decoders(pool)
        await hear(pool, song)
        short_bytes, own_bytes = peak_bytes(process.pid), psutil.Process().memory_info().rss
        windows = 0
        async with pool.decode(hours) as decoding:
            async for block in decoding:
                assert block.silent.all()
                windows += len(block.windows)
                block.release()

        assert windows == 2400
        assert decoding.facts.duration_s == 7200.0
        assert peak_bytes(process.pid) < 1.2 * short_bytes
        assert psutil.Process().memory_info().rss < own_bytes + 20 * MIB


async def test_a_track_over_the_longest_duration_is_refused(song: Path) -> None:
    async with pool_of(max_duration_s=59.0) as pool:
        with pytest.raises(AudioTooLong, match="longer than 59 s"):
            await hear(pool, song)


async def test_a_picture_of_fifty_megabytes_is_passed_over(tmp_path: Path) -> None:
    audio = encode_as(tmp_path / "tone.mp3", 30.0).read_bytes()
    picture = b"\0image/png\0\3\0\x89PNG\r\n\x1a\n" + os.urandom(50 * MIB)
    frame = b"APIC" + len(picture).to_bytes(4) + b"\0\0" + picture
    size = bytes(len(frame) >> shift & 0x7F for shift in (21, 14, 7, 0))
    path = tmp_path / "with-picture"
    path.write_bytes(b"ID3\3\0\0" + size + frame + audio)
    async with pool_of(max_memory_bytes=256 * MIB) as pool:
        [process] = decoders(pool)
        own_bytes = peak_bytes(process.pid)
        heard = await hear(pool, path)
        grown_bytes = peak_bytes(process.pid) - own_bytes
        assert grown_bytes < 140 * MIB, "once for each time that it is opened"

    assert heard.facts.duration_s == pytest.approx(30.0, abs=0.1)


class Bait(BaseHTTPRequestHandler):
    """Answers everything with audio, and remembers that it was asked."""

    asked: list[str]
    audio: bytes

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.audio)

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def bait(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A web server's address, and the list of what was fetched from it."""
    Bait.asked, Bait.audio = [], encode_as(tmp_path / "bait.mp3", 4.0).read_bytes()
    with ThreadingHTTPServer(("127.0.0.1", 0), Bait) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Bait.asked
        server.shutdown()


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{url}/a.mp3\n#EXT-X-ENDLIST\n",
    "hls of a file": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{file}\n#EXT-X-ENDLIST\n",
    "hls key": (
        '#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXT-X-KEY:METHOD=AES-128,URI="{url}/key"\n'
        "#EXTINF:4,\n{file}\n#EXT-X-ENDLIST\n"
    ),
    "m3u": "#EXTM3U\n#EXTINF:4,a\n{url}/a.mp3\n",
    "pls": "[playlist]\nFile1={url}/a.mp3\nNumberOfEntries=1\n",
    "concat": "ffconcat version 1.0\nfile {file}\nfile {url}/a.mp3\n",
    "concat of a neighbour": "ffconcat version 1.0\nfile bait.mp3\n",
    "dash": (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT4S"><Period><AdaptationSet mimeType="audio/mpeg">'
        '<Representation id="1" bandwidth="1"><BaseURL>{url}/a.mp3</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    ),
    "sdp": (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {port} RTP/AVP 0\n"
    ),
    "rtsp text": "RTSPtext\nrtsp://127.0.0.1:{port}/a\n",
    "smil": '<smil><body><audio src="{url}/a.mp3"/></body></smil>',
    "asx": '<asx version="3.0"><entry><ref href="{url}/a.mp3"/></entry></asx>',
}


@pytest.mark.parametrize("kind", PLAYLISTS)
async def test_a_playlist_makes_nobody_open_another_address_or_file(
    kind: str, pool: DecoderPool, bait: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, asked = bait
    text = PLAYLISTS[kind].format(url=url, port=url.rsplit(":")[-1], file=tmp_path / "bait.mp3")
    playlist = tmp_path / "playlist.m3u8"
    playlist.write_text(text)

    with pytest.raises(AudioUnreadable):
        await hear(pool, playlist)

    assert not asked


async def test_a_playlist_is_bait_to_ffmpeg_left_alone(
    bait: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, asked = bait
    playlist = tmp_path / "playlist.m3u8"
    playlist.write_text(PLAYLISTS["hls"].format(url=url))

    with playlist.open("rb") as file, await asyncio.to_thread(av.open, file) as container:
        assert container.format.name == "hls"

    assert asked


def sound_elsewhere(whole: bytes, path: bytes) -> bytes:
    """An MP4 file without its sound, which it says lies in the file of that name beside it."""
    index = whole.rindex(b"moov") - 4
    alias = bytes(130) + b"\0\1\0\1" + bytes(16)  # from here one level, and one down
    alias += b"\0\2" + len(path).to_bytes(2) + path + b"\xff\xff\0\0"
    entry = (12 + len(alias)).to_bytes(4) + b"alis" + bytes(4) + alias
    data = bytearray(whole[index:])
    at = 0
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        at = data.index(box, at)
        data[at - 4 : at] = (int.from_bytes(data[at - 4 : at]) + len(entry) - 12).to_bytes(4)
    data[at + 12 : at + 24] = entry
    header = whole.index(b"mdat") + 4
    return whole[:header] + bytes(index - header) + data


async def test_a_movie_whose_sound_lies_in_another_file_makes_nobody_open_it(
    pool: DecoderPool, tmp_path: Path
) -> None:
    whole = encode_as(tmp_path / "sound.m4a").read_bytes()
    movie = tmp_path / "movie.m4a"
    movie.write_bytes(sound_elsewhere(whole, b"/sound.m4a"))

    with av.open(str(movie), options={"enable_drefs": "1"}) as container:
        assert any(frame.to_ndarray().any() for frame in container.decode(audio=0)), "a bait"
    with pytest.raises(AudioEmpty):
        await hear(pool, movie)


async def test_truncated_files_give_a_result_or_a_typed_error(
    pool: DecoderPool, tmp_path: Path
) -> None:
    outcomes = {}
    for suffix in ENCODINGS:
        whole = encode_as(tmp_path / f"tone.{suffix}", 2.0).read_bytes()
        for cut in (1, 4, 16, 44, 128, 512, *(len(whole) * n // 5 for n in range(1, 5)), -1):
            path = tmp_path / f"{suffix} cut at {cut}"
            path.write_bytes(whole[:cut])
            outcomes[path.name] = asyncio.create_task(outcome(pool, path))

    codes = {name: await task for name, task in outcomes.items()}

    assert set(codes.values()) <= {"ok", "audio_unreadable", "audio_empty"}, codes


async def test_files_with_fuzzed_headers_give_a_result_or_a_typed_error(
    pool: DecoderPool, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    outcomes = {}
    for suffix in ENCODINGS:
        whole = encode_as(tmp_path / f"tone.{suffix}", 1.0).read_bytes()
        for trial in range(12):
            data = np.frombuffer(whole, np.uint8).copy()
            places = random.integers(0, min(600, len(data)), size=random.integers(1, 12))
            data[places] = random.integers(0, 256, size=places.size)
            path = tmp_path / f"{suffix} fuzzed {trial}"
            path.write_bytes(data.tobytes())
            outcomes[path.name] = asyncio.create_task(outcome(pool, path))

    codes = {name: await task for name, task in outcomes.items()}

    assert set(codes.values()) <= {"ok", "audio_unreadable", "audio_empty", "audio_too_long"}, codes


async def test_odd_files_of_others_cut_short_give_a_result_or_a_typed_error(
    pool: DecoderPool, shared_data: Path, tmp_path: Path
) -> None:
    paths = sorted(path for path in (shared_data / "audio" / "odd").rglob("*") if path.is_file())
    assert paths
    codes: dict[tuple[Path, float], str] = {}
    for share in (0.1, 0.5, 0.95):
        cut = [tmp_path / f"{number} cut at {share}" for number in range(len(paths))]
        for path, whole in zip(cut, paths, strict=True):
            data = whole.read_bytes()
            path.write_bytes(data[: int(len(data) * share)])
        ends = await asyncio.gather(*(outcome(pool, path) for path in cut))
        codes |= {(path, share): code for path, code in zip(paths, ends, strict=True)}

    assert set(codes.values()) <= {"ok", "audio_unreadable", "audio_empty"}, codes


async def test_a_decoder_process_holds_no_secrets_and_has_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIMBRE_KAFKA__SASL_PASSWORD", "hunter2")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        os.set_inheritable(listening.fileno(), True)
        async with pool_of() as pool:
            [process] = decoders(pool)
            assert "hunter2" not in str(process.environ())
            assert not process.net_connections("inet")
            assert process.num_fds() <= 5
            assert process.num_threads() == 1
            assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
            assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
            assert process.rlimit(psutil.RLIMIT_NOFILE) == (16, 16)
            assert process.rlimit(psutil.RLIMIT_AS)[0] < 2 * 1024 * MIB
            assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()


async def test_a_decoder_process_runs_one_thread(song: Path) -> None:
    async with pool_of(slots=2, slot_windows=3) as pool, pool.decode(song) as decoding:
        await anext(decoding)
        assert decoder_of(pool, song).num_threads() == 1


async def test_a_signal_to_the_whole_group_leaves_tracks_to_the_worker(song: Path) -> None:
    async with pool_of() as pool:
        [before] = decoders(pool)
        before.send_signal(signal.SIGINT)
        before.terminate()
        assert (await hear(pool, song)).facts.duration_s == 60.0
        assert decoders(pool) == [before]


async def test_a_pool_that_can_start_no_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DecoderCrashed, match="died while it started"):
        async with pool_of():
            pass
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(DecoderCrashed, match="can't be started"):
        async with pool_of():
            pass


async def test_processes_that_die_at_the_start_are_started_ever_more_slowly(
    song: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with pool_of() as pool:
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/bin/false")
            await kill_idle(pool)
            await asyncio.sleep(1.5)
            assert 1 <= len(caplog.records) <= 5
        assert (await hear(pool, song)).facts.duration_s == 60.0


async def test_restarts_leave_nothing_behind_and_do_not_hold_up_the_loop(song: Path) -> None:
    slowest_s = 0.0

    async def watch() -> None:
        nonlocal slowest_s
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(0.01)
            slowest_s = max(slowest_s, time.monotonic() - before_s)

    async with pool_of(slots=2, slot_windows=3) as pool:
        await hear(pool, song)
        fds = open_files()
        watching = asyncio.create_task(watch())
        for _ in range(5):
            await leave_half_way(pool, song)
        watching.cancel()
        await hear(pool, song)
        await until(lambda: open_files() == fds)
        assert slowest_s < 0.5
    assert not pool.pids


async def test_a_kept_error_keeps_nothing_of_the_decoder_that_died(song: Path) -> None:
    async def lose_the_decoder(pool: DecoderPool) -> None:
        async with pool.decode(song) as decoding:
            async for block in decoding:
                decoder_of(pool, song).kill()
                block.release()

    async with pool_of(slots=2, slot_windows=3) as pool:
        await hear(pool, song)
        fds = open_files()
        with pytest.raises(DecoderCrashed) as kept:
            await lose_the_decoder(pool)
        await hear(pool, song)
        await until(lambda: open_files() == fds, timeout_s=10)
    assert kept.value.retryable


async def test_a_killed_worker_leaves_no_process_and_no_memory_behind(song: Path) -> None:
    script = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from tests.integration.worker.test_decode import decoders, pool_of

        async def main():
            async with pool_of(processes=2, slots=2, slot_windows=3) as pool:
                async with pool.decode(Path(sys.argv[1])) as decoding:
                    await anext(decoding)
                    while len(decoders(pool)) < 2:
                        await asyncio.sleep(0.01)
                    decoders(pool)[0].suspend()
                    print(*(process.pid for process in decoders(pool)), flush=True)
                    await asyncio.sleep(60)

        asyncio.run(main())
        """
    )
    shared_memory = set(Path("/dev/shm").iterdir())
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(song), stdout=asyncio.subprocess.PIPE
    )
    assert worker.stdout is not None
    children = [psutil.Process(int(pid)) for pid in (await worker.stdout.readline()).split()]
    assert len(children) == 2

    worker.kill()
    await worker.communicate()

    _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=5)
    assert not alive
    assert set(Path("/dev/shm").iterdir()) <= shared_memory


@pytest.fixture
def taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], DecoderPool]:
    """Makes a pool of one decoder that runs a script of its input's when it is given a track."""

    def make(script: str) -> DecoderPool:
        (tmp_path / "captured.py").write_text(
            textwrap.dedent(
                """
                import json, socket, sys, time
                control = socket.socket(fileno=int(sys.argv[1]))
                def say(message):
                    if not isinstance(message, bytes):
                        message = json.dumps(message).encode()
                    control.send(message)
                control.recv(65536)
                say({"ready": True})
                control.recv(65536)
                """
            )
            + script
            + "\ntime.sleep(60)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(decoder_process, "__name__", "captured")
        return pool_of(slots=3, slot_windows=4)

    return make


BLOCK = {"slot": 0, "windows": 1, "silent": "0"}
FACTS = {
    "container": "wav", "codec": "pcm", "sample_rate_hz": 1, "channels": 1, "duration_s": 1.0,
    "damaged_packets": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "script",
    [
        "say({'slot': [0] * 20000, 'windows': 4, 'silent': '0000'})",  # each a copy of the slot
        "say({'slot': 3, 'windows': 4, 'silent': '0000'})",
        "say({'slot': -1, 'windows': 4, 'silent': '0000'})",
        "say({'slot': True, 'windows': 1, 'silent': '0'})",
        "say({'slot': 0, 'windows': 5, 'silent': '00000'})",
        "say({'slot': 0, 'windows': 0, 'silent': ''})",
        "say({'slot': 0, 'windows': 4, 'silent': '0' * 60000})",
        "say({'slot': 0, 'windows': 4})",
        "say({'facts': {'codec': 'flac'}})",
        f"say({{'facts': {FACTS}}})",  # and no window
        f"say({BLOCK}); say({{'facts': {FACTS | {'duration_s': '1'}}}})",
        "say({'error': {'code': 'audio_empty'}})",
        "say({'error': 'x'})",
        "say({'ready': True})",
        "say(5)",
        "say(b'[' * 60000)",
        "say(b'x' * 70000)",
        "while True: say({'slot': 0, 'windows': 4, 'silent': '0000'})",
        "for n in range(9999): say({'slot': n % 3, 'windows': 1, 'silent': '0'}); time.sleep(1e-3)",
    ],
)
async def test_a_decoder_that_says_what_none_of_ours_does_is_ended(
    taken_over: Callable[[str], DecoderPool], song: Path, script: str
) -> None:
    async with asyncio.timeout(20), taken_over(script) as pool:
        before = pool.pids
        with pytest.raises(DecoderCrashed, match="take it over"):
            await hear(pool, song)
        await until(lambda: pool.pids and before.isdisjoint(pool.pids))


async def test_a_decoder_that_speaks_without_a_track_is_ended(
    taken_over: Callable[[str], DecoderPool], song: Path
) -> None:
    script = f"say({BLOCK})\nwhile True: say({{'facts': {FACTS}}})"
    async with asyncio.timeout(20), taken_over(script) as pool:
        before = pool.pids
        async with pool.decode(song) as decoding:
            await drain(decoding)
        await until(lambda: pool.pids and before.isdisjoint(pool.pids))


async def test_uploads_go_before_backfill_which_leaves_them_one_decoder(song: Path) -> None:
    async with pool_of(processes=2) as pool:
        async with pool.decode(song, priority="backfill") as first:
            await anext(first)
            await hear(pool, song)  # on the second decoder, which is idle from then on
            second = asyncio.create_task(hear(pool, song, priority="backfill"))
            await asyncio.wait_for(hear(pool, song), 10)
            assert not second.done(), "it has no second decoder, though that is free"
        assert (await second).facts.duration_s == 60.0


async def test_backfill_has_its_turn_while_uploads_never_end(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(wav(tone(0.1, RATE_HZ), RATE_HZ))
    served: list[Priority] = []

    async def served_with(pool: DecoderPool, priority: Priority) -> None:
        await hear(pool, path, priority=priority)
        served.append(priority)

    async with pool_of() as pool:
        await asyncio.gather(
            served_with(pool, "backfill"), *(served_with(pool, "upload") for _ in range(30)),
            served_with(pool, "backfill"), served_with(pool, "backfill"),
        )  # fmt: skip
    turns = [place for place, priority in enumerate(served) if priority == "backfill"]
    assert turns == [0, 10, 20], "at the first nobody else had come"


async def test_a_short_track_waits_for_no_long_ones_that_hold_every_decoder(
    song: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LONG_WINDOWS", 6)
    async with pool_of(slots=2, slot_windows=3) as pool:
        async with pool.decode(song) as long:
            blocks = [await anext(long)]
            short = asyncio.create_task(hear(pool, song))
            await asyncio.sleep(0.5)
            assert len(pool.pids) == 1, "what it has given is not long yet"
            blocks.append(await anext(long))
            assert (await asyncio.wait_for(short, 10)).facts.duration_s == 60.0
            await until(lambda: len(pool.pids) == 1)
            for block in blocks:
                block.release()
            await drain(long)
        assert (await hear(pool, song)).facts.duration_s == 60.0


async def test_while_a_spare_decoder_starts_no_other_does(
    song: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[DecoderProcess] = []

    class Counted(DecoderProcess):
        def __init__(self, setup: Setup) -> None:
            super().__init__(setup)
            started.append(self)

    monkeypatch.setattr(pool_module, "DecoderProcess", Counted)
    monkeypatch.setattr(pool_module, "LONG_WINDOWS", 6)
    async with pool_of(slots=2, slot_windows=3) as pool, pool.decode(song) as long:
        short = asyncio.create_task(hear(pool, song))
        await asyncio.sleep(0)
        await drain(long)
        await asyncio.wait_for(short, 10)
    assert len(started) == 2


async def test_a_track_that_gives_up_its_place_in_the_line_takes_no_decoder_with_it(
    song: Path,
) -> None:
    async with pool_of() as pool:
        async with pool.decode(song) as holding:
            await anext(holding)
            given_up = [asyncio.create_task(hear(pool, song)) for _ in range(3)]
            await asyncio.sleep(0.1)
            given_up[0].cancel()
        await asyncio.sleep(0)
        given_up[1].cancel()  # it may have been served by now
        assert (await given_up[2]).facts.duration_s == 60.0


async def test_a_track_given_up_in_the_moment_a_decoder_is_free_is_passed_over(song: Path) -> None:
    async with pool_of() as pool:
        async with pool.decode(song, priority="backfill") as holding:
            waiting = [asyncio.create_task(hear(pool, song, priority="backfill")) for _ in range(3)]
            await drain(holding)
            waiting[0].cancel()
        waiting[1].cancel()  # it has been served, and doesn't know
        assert (await asyncio.wait_for(waiting[2], 10)).facts.duration_s == 60.0


async def test_a_spare_decoder_goes_on_with_the_backfill_that_waits(
    song: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LONG_WINDOWS", 6)
    async with pool_of(slots=2, slot_windows=3) as pool, pool.decode(song) as long:
        waiting = [asyncio.create_task(hear(pool, song, priority="backfill")) for _ in range(2)]
        await asyncio.sleep(0)
        for _ in range(2):
            await anext(long)
        await asyncio.wait_for(asyncio.gather(*waiting), 10)


async def test_a_spare_decoder_ends_where_the_track_it_was_given_is_given_up(
    song: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hear_and_give_up_the_next(pool: DecoderPool) -> None:
        async with pool.decode(song) as decoding:
            await drain(decoding)
            following = asyncio.create_task(hear(pool, song))
            await asyncio.sleep(0)
        following.cancel()  # it has been served, and doesn't know

    monkeypatch.setattr(pool_module, "LONG_WINDOWS", 6)
    async with pool_of(slots=2, slot_windows=3) as pool, pool.decode(song) as long:
        others = asyncio.create_task(hear_and_give_up_the_next(pool))
        await asyncio.sleep(0)
        for _ in range(2):
            await anext(long)
        await asyncio.wait_for(others, 10)
        await until(lambda: len(pool.pids) == 1)
