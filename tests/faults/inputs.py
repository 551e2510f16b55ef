"""What outsiders send: faults of HTTP, addresses that lead inward, odd audio, malformed events."""

import asyncio
import json
import random
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.audio import encode_as, noise, wav
from tests.faults import hostile
from tests.faults.audio_server import track
from tests.faults.scenarios import Outcome, conclude, now_s, require, require_letters, scenario
from tests.faults.stand import ROOT, Lane, Message, Stand, Worker, until
from tests.memory import peak_bytes

ODD = ROOT.parent / "shared" / "audio" / "odd"
EVENT_CODES = {"event_malformed", "event_too_large", "event_version_unknown"}
IN_TIME_S = 20.0
PATIENT: dict[str, Any] = {
    "fetch__stall_timeout_s": 20,
    "fetch__timeout_s": 30,
    "worker__track_deadline_s": 60,
}
"""Where no server is slow but ours, while this process packs bombs or a large file is copied."""
BOMB_BYTES = 200 << 20
LARGE, LARGE_BYTES = 100, 1000 << 10
"""Messages of one batch, each as large as an event may be."""
CROWD = 60
MAX_DECODER_BYTES = 160 << 20
FLAC_INFO_END = 42
"""Of a FLAC file's marker and its first block of metadata."""


def _neighbours_tagged(lane: Lane, names: Iterable[str]) -> None:
    """Sound tracks between the others have tags."""
    missing = set(names) - lane.checker.seen_s.keys()
    require(not missing, f"sound tracks between them are tagged; not so {sorted(missing)[:5]}")


def _neighbours_in_time(lane: Lane, sent_s: dict[str, float]) -> None:
    """They do, and had them soon."""
    _neighbours_tagged(lane, sent_s)
    slowest_s = max(lane.checker.seen_s[name] - at_s for name, at_s in sent_s.items())
    require(slowest_s < IN_TIME_S, f"sound tracks are tagged in time; one took {slowest_s:.1f} s")


@scenario
async def http_faults(stand: Stand, quick: bool) -> Outcome:
    """Servers that stall at each byte, reset, lie, never end, redirect in circles, drip."""
    size = len(track(0))
    stalls = (-1, 0, 1, 43, 44, 1000, size - 1) if quick else (-1, *range(48), 1000, size - 1)
    resets = (0, 1, 44, 1000, size - 1)
    expected: list[tuple[str, object, str]] = [
        *(("stall", at, "fetch_timeout") for at in stalls),
        *(("reset", at, "fetch_unavailable") for at in resets),
        *(("reset-once", at, "tags") for at in resets),
        ("status", 404, "audio_not_found"),
        ("status", 410, "audio_not_found"),
        ("status", 403, "fetch_forbidden"),
        ("status", 500, "fetch_unavailable"),
        ("status", 503, "fetch_unavailable"),
        ("busy", 429, "tags"),
        ("busy", 503, "tags"),
        ("no-length", None, "tags"),
        ("false-length", 1000, "fetch_unavailable"),
        ("false-length", -1000, "tags"),
        ("endless", None, "audio_too_large"),
        ("loop", None, "redirect_limit"),
        ("inward", None, "address_refused"),
        ("bomb", 100, "audio_too_large"),
        ("drip", None, "fetch_too_slow"),
    ]
    async with stand.lane("http-faults") as lane:
        await lane.ready(
            worker__max_in_flight=96,
            worker__track_deadline_s=60,
            fetch__max_bytes=5_000_000,
            fetch__timeout_s=30,
            fetch__stall_timeout_s=5,  # a slow machine may take two to answer so many at once
        )
        events, wanted, sent_s = [], {}, {}
        for number, (fault, argument, end) in enumerate(expected):
            name = f"{fault}-{argument}"
            wanted[name] = end
            uri = stand.audio.url(number, fault, argument)
            events += [lane.event(uri, track_id=name), *lane.tracks([1000 + number])]
            sent_s[f"track-{1000 + number}"] = now_s()
        await lane.send(events)
        await lane.until_answered(len(events), 90)
        _neighbours_in_time(lane, sent_s)
        got = _ends(lane)
        wrong = {name: got[name] for name, end in wanted.items() if got[name] != end}
        require(not wrong, f"each fault ends as documented; not so {wrong}")
        return await conclude(lane, [])


@scenario
async def slow_drips(stand: Stand, quick: bool) -> Outcome:
    """More servers that drip than tracks may be in flight: those behind them hardly wait."""
    return await _crowd(stand, "slow-drips", ("drip", None), "fetch_too_slow", 1, quick)


@scenario
async def many_stalls(stand: Stand, quick: bool) -> Outcome:
    """More servers that stall than tracks may be in flight: those behind wait for two stalls."""
    return await _crowd(stand, "many-stalls", ("stall", 1000), "fetch_timeout", 2, quick)


@scenario
async def come_back_later(stand: Stand, quick: bool) -> Outcome:
    """More servers that ask to come back in 20 s than tracks may be in flight: nobody waits."""
    return await _crowd(stand, "come-back-later", ("later", 20), "fetch_unavailable", 2, quick)


async def _crowd(
    stand: Stand, name: str, fault: tuple[str, object], code: str, attempts: int, quick: bool
) -> Outcome:
    """One fault takes all places in flight, more of it waits, and behind it sound tracks do."""
    tracks = 20 if quick else 100
    async with stand.lane(name) as lane:
        (worker,) = await lane.ready(
            worker__max_in_flight=CROWD - 12, fetch__timeout_s=35, worker__track_deadline_s=60
        )
        await lane.send(
            lane.event(stand.audio.url(number, *fault), track_id=f"{name}-{number}")
            for number in range(CROWD)
        )
        await until(lambda: len(stand.audio.requests) >= CROWD - 12, "all places taken", 10)
        sound = lane.tracks(range(1000, 1000 + tracks))
        sent_s = dict.fromkeys((f"track-{1000 + number}" for number in range(tracks)), now_s())
        await lane.send(sound)
        await lane.until_answered(CROWD + tracks, 90)
        _neighbours_in_time(lane, sent_s)
        require_letters(lane, "only those tracks are given up", **{code: CROWD})
        asked = [
            path for path in stand.audio.requests.elements() if path.startswith(f"/{fault[0]}")
        ]
        require(len(asked) == attempts * CROWD, f"{len(asked)} requests of {attempts * CROWD}")
        retries = await worker.metric("timbre_retries_total", code=code)
        require(retries == len(asked) - CROWD, f"retries are counted: {retries:g}")
        return await conclude(lane, [])


@scenario
async def addresses(stand: Stand, quick: bool) -> Outcome:
    """Addresses that lead inward, in every spelling: refused without a connection."""
    del quick  # it takes a second
    async with stand.lane("addresses") as lane:
        inside, secret = lane.folder / "music", lane.folder / "secret.wav"
        inside.mkdir()
        for path in (inside / "sound.wav", secret):
            path.write_bytes(track(1))
        (inside / "link.wav").symlink_to(secret)
        port = stand.audio.port
        hosts = [
            "127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0",
            "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[::]",
            "user:secret@127.0.0.1", "10.0.0.1", "192.168.0.1", "172.16.0.1", "169.254.169.254",
            "[fe80::1]", "[fd00::1]", "[fd00:ec2::254]", "100.64.0.1",
        ]  # fmt: skip
        uris = [f"http://{host}:{port}/track/1.wav" for host in hosts]
        uris += [f"file://{path}" for path in (secret, inside / "link.wav", "/etc/passwd")]
        uris += [
            f"file://{inside}/../secret.wav",
            f"file://{inside}/%2e%2e/secret.wav",
            f"file://elsewhere{inside}/sound.wav",
            "gopher://127.0.0.1/1",
            "data:audio/wav;base64,UklGRg==",
            "concat:/etc/passwd|/etc/hosts",
        ]
        await lane.ready(fetch__allowed_networks="[]", fetch__file_roots=f'["{inside}"]')
        connections = stand.audio.connections
        sound = lane.event(f"file://{inside}/sound.wav", track_id="sound")
        events = [lane.event(uri, track_id=f"{n}") for n, uri in enumerate(uris)]
        await lane.send([*events, sound])
        await lane.until_answered(len(uris) + 1, 60)
        got = _ends(lane)
        require(got.pop("sound") == "tags", "a file below the roots is tagged")
        refused = {"address_refused", "uri_unsupported"}
        wrong = {uris[int(name)]: code for name, code in got.items() if code not in refused}
        require(not wrong, f"refused is every address that leads inward; not so {wrong}")
        require(stand.audio.connections == connections, "no connection is made")
        require("secret@" not in lane.workers[0].text(), "credentials in an address stay unsaid")
        return await conclude(lane, [])


@scenario
async def odd_audio(stand: Stand, quick: bool) -> Outcome:
    """Audio that is cut, fuzzed, extreme, lying, or leads elsewhere: a result or a reason."""
    async with stand.lane("odd-audio") as lane:
        folder = lane.folder / "odd"
        folder.mkdir()
        await asyncio.to_thread(_write_odd, folder, stand.audio.port, 10 if quick else 100)
        files = sorted(folder.iterdir())
        roots = [folder]
        if ODD.is_dir():
            found = sorted(path for path in ODD.rglob("*") if path.is_file())
            files += found[:: 10 if quick else 1]
            roots.append(ODD)
        (worker,) = await lane.ready(
            fetch__file_roots=json.dumps([str(root) for root in roots]),
            decode__timeout_s=10,
            decode__max_memory_bytes=MAX_DECODER_BYTES,
            **PATIENT,
        )
        events = list[bytes]()
        for number, path in enumerate(files):
            events += [
                lane.event(path.as_uri(), track_id=f"{number} {path.name}"),
                *lane.tracks([number]),
            ]
        await lane.send(events)
        most_bytes = 0
        started_s = now_s()
        while len(lane.checker.events) < len(events) or lane.checker.unanswered:
            require(now_s() - started_s < 30 + len(files), "every file comes to an end")
            require(worker.running, "the worker lives on")
            await lane.watch(0.5)
            most_bytes = max(most_bytes, worker.memory_bytes())
        _neighbours_tagged(lane, (f"track-{number}" for number in range(len(files))))
        require(most_bytes < 2 << 30, f"memory is bounded: {most_bytes >> 20} MiB")
        hungry = {name: end for name, end in _ends(lane).items() if name.endswith(" hungry.flac")}
        require(set(hungry.values()) == {"decoder_crashed"}, f"a decoder has its limit: {hungry}")
        canary = [path for path in stand.audio.requests if path.startswith("/status/404")]
        require(not canary, f"no file makes the decoder fetch another: {canary}")
        require(
            "internal_error" not in lane.checker.reasons(),
            f"known reasons: {lane.checker.reasons()}",
        )
        return await conclude(lane, [])


@scenario
async def hostile_events(stand: Stand, quick: bool) -> Outcome:
    """Ten thousand malformed events, and sound ones between them."""
    count = 500 if quick else 10_000
    malformed = hostile.messages(count) + hostile.enormous()
    random.shuffle(malformed)
    async with stand.lane("hostile-events", partitions=1) as lane:
        (worker,) = await lane.ready(**PATIENT)
        sent_s: dict[str, float] = {}
        step = len(malformed) // 20 + 1
        for number, start in enumerate(range(0, len(malformed), step)):
            (sound,) = lane.tracks([number])
            part: list[bytes | Message] = [*malformed[start : start + step]]
            part.insert(len(part) // 2, sound)
            await lane.send(part)
            sent_s[f"track-{number}"] = now_s()
            await lane.until_answered(start, 60, unanswered=step)
        await lane.until_answered(len(malformed) + len(sent_s), 120)
        _neighbours_in_time(lane, sent_s)
        reasons = lane.checker.reasons()
        require(reasons.keys() == EVENT_CODES, f"they have the reasons of events: {reasons}")
        require(len(lane.checker.letters) == len(malformed), "each is one dead letter")
        end_s = now_s() + 10
        while (told := await _counted(worker, reasons)) != reasons and now_s() < end_s:
            await asyncio.sleep(0.1)  # each once Kafka has answered, maybe after it was read there
        require(told == reasons, f"they are counted by reason: {told}, and not {reasons}")
        return await conclude(lane, [])


@scenario
async def unpack_bombs(stand: Stand, quick: bool) -> Outcome:
    """Messages that unpack to up to thirty thousand times their size, and sound ones behind."""
    del quick  # it takes some seconds
    async with stand.lane("unpack-bombs") as lane:
        (worker,) = await lane.ready(**PATIENT)
        await lane.send(lane.tracks(range(20)))
        await lane.until_answered(20, 60)
        before_bytes = peak_bytes(worker.process.pid)
        sent_s: dict[str, float] = {}
        for number, codec in enumerate(("gzip", "lz4", "zstd"), 20):
            await lane.send([Message(bytes(BOMB_BYTES), b"bomb")], compression=codec)
            await lane.send(lane.tracks([number]))
            sent_s[f"track-{number}"] = now_s()
        await lane.until_answered(26, 60)
        await lane.send_batch([bytes(LARGE_BYTES)] * LARGE, compression="zstd")
        await lane.send(lane.tracks([23]))
        sent_s["track-23"] = now_s()
        await lane.until_answered(27 + LARGE, 60)
        _neighbours_in_time(lane, sent_s)
        grown_bytes = peak_bytes(worker.process.pid) - before_bytes
        require(grown_bytes < 3 * BOMB_BYTES // 4, f"memory grew by {grown_bytes >> 20} MiB")
        ends = {"event_too_large": 3, "event_malformed": LARGE}
        require_letters(lane, "each bomb ends with its reason, and nothing else does", **ends)
        sizes = [
            int(letter["value-omitted-bytes"])
            for letter, *_ in lane.checker.letters.values()
            if letter["reason-code"] == "event_too_large"
        ]
        require(
            all(0 <= size - BOMB_BYTES < 100 for size in sizes),
            f"a message's size stands in place of its value: {sizes}",
        )
        return await conclude(lane, [])


async def _counted(worker: Worker, codes: Iterable[str]) -> dict[str, float]:
    """Dead letters by the reason code, as the worker tells them."""
    return {code: await worker.metric("timbre_dead_letters_total", code=code) for code in codes}


def _ends(lane: Lane) -> dict[str, str]:
    """By track id: `tags`, or the reason code of the dead letter."""
    ends = dict.fromkeys(lane.checker.seen_s, "tags")
    for group in lane.checker.letters.values():
        ends[group[0]["track-id"]] = group[0]["reason-code"]
    return ends


def _write_odd(folder: Path, port: int, fuzzed: int) -> None:
    """Files that a decoder must survive; those that name others name our server."""
    chance = random.Random(1)
    sources = [
        encode_as(folder / f"whole.{suffix}") for suffix in ("mp3", "flac", "ogg", "m4a", "wav")
    ]
    for path in sources:
        data = path.read_bytes()
        for end in (0, 1, 4, 44, 100, len(data) // 4, len(data) // 2, len(data) - 1):
            (folder / f"cut-{end}{path.suffix}").write_bytes(data[:end])
        for number in range(fuzzed // len(sources) + 1):
            damaged = bytearray(data)
            for _ in range(chance.randint(1, 20)):
                damaged[chance.randrange(min(400, len(damaged)))] = chance.randrange(256)
            (folder / f"fuzzed-{number}{path.suffix}").write_bytes(damaged)
    for rate_hz in (8, 768_000):
        (folder / f"rate-{rate_hz}.wav").write_bytes(wav(noise(4, rate_hz), rate_hz))
    (folder / "channels-64.wav").write_bytes(wav(noise(3, 16_000, channels=64), 16_000))
    (folder / "one-sample.wav").write_bytes(wav(noise(1 / 16_000, 16_000), 16_000))
    (folder / "silence.wav").write_bytes(wav(0 * noise(600, 8_000), 8_000))
    lying = bytearray(track(2))
    lying[40:44] = struct.pack("<I", 0xFFFFFFF0)
    (folder / "lying-duration.wav").write_bytes(lying)
    whole = (folder / "whole.mp3").read_bytes()
    (folder / "picture-50-mib.mp3").write_bytes(_id3_picture(50 << 20) + whole)
    flac = (folder / "whole.flac").read_bytes()
    pictures = _flac_picture(15 << 20) * (MAX_DECODER_BYTES // (15 << 20) + 1)
    (folder / "hungry.flac").write_bytes(flac[:FLAC_INFO_END] + pictures + flac[FLAC_INFO_END:])
    url = f"http://127.0.0.1:{port}/status/404/1.wav"
    for name, text in {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{url}\n#EXT-X-ENDLIST\n",
        "list.m3u": f"{url}\n",
        "list.pls": f"[playlist]\nFile1={url}\nNumberOfEntries=1\n",
        "list.ffconcat": f"ffconcat version 1.0\nfile '{url}'\n",
        "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=audio 5004 RTP/AVP 0\n",
        "list.asx": f'<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
        "list.mpd": f"<MPD><Period><AdaptationSet><BaseURL>{url}</BaseURL></AdaptationSet></Period>"
        "</MPD>",
    }.items():
        (folder / name).write_text(text)
        (folder / f"{name}.mp3").write_text(text)


def _id3_picture(size: int) -> bytes:
    """An ID3v2.4 tag with a picture of so many bytes."""

    def syncsafe(number: int) -> bytes:
        return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))

    body = b"\x00image/png\x00\x03\x00" + bytes(size)
    frame = b"APIC" + syncsafe(len(body)) + b"\x00\x00" + body
    return b"ID3\x04\x00\x00" + syncsafe(len(frame)) + frame


def _flac_picture(size: int) -> bytes:
    """A block of FLAC's metadata with a picture of so many bytes."""
    mime = b"image/png"
    head = struct.pack(">II", 3, len(mime)) + mime + struct.pack(">6I", 0, 1, 1, 24, 0, size)
    return b"\x06" + (len(head) + size).to_bytes(3, "big") + head + bytes(size)
