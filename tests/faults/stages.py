"""One track that hangs or fails in each stage, a disk that is full, a bundle that is damaged.

A track hangs while its neighbours finish; the worker is killed, and the track delivered again to a
worker with short deadlines, where it hangs again: it meets its own deadline and leaves its
partition.
"""

import asyncio
import hashlib
import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.faults.audio_server import track
from tests.faults.launcher import BREAKS, HANGS
from tests.faults.scenarios import Outcome, conclude, now_s, require, require_letters, scenario
from tests.faults.stand import ROOT, Lane, Stand, Worker, until
from tests.proxy import proxy
from worker.services.service import HOST

PATIENT: dict[str, Any] = {
    "fetch__stall_timeout_s": 60,
    "fetch__timeout_s": 60,
    "decode__timeout_s": 60,
    "decode__stall_timeout_s": 60,
    "batch__timeout_s": 60,
    "redis__timeout_s": 60,
    "worker__track_deadline_s": 60,
}
SHORT: dict[str, Any] = {
    "fetch__attempts": 1,
    "decode__stall_timeout_s": 2,
    "batch__timeout_s": 2,
    "redis__timeout_s": 0.5,
}


async def _killed_and_left(
    lane: Lane,
    hung: list[bytes],
    *,
    tracks: int,
    waiting: int,
    prepare: Callable[[Worker], Awaitable[None]] | None = None,
    processes: int = 1,
) -> float:
    """Up to the second worker's start; when the first was killed."""
    (patient,) = await lane.ready(decode__processes=processes, **PATIENT)
    if prepare is not None:
        await prepare(patient)
    await lane.send([*hung, *lane.tracks(range(tracks))])
    events = tracks + len(hung)
    await lane.until_answered(events, 60, unanswered=waiting)
    await _held(lane, waiting)
    patient.kill()
    killed_s = now_s()
    (short,) = await lane.ready(decode__processes=processes, **SHORT)
    if prepare is not None:
        await prepare(short)
    return killed_s


async def _held(lane: Lane, waiting: int) -> None:
    """So many events wait on, and none of them is acknowledged."""
    await lane.watch(1)
    left = lane.checker.unanswered
    require(len(left) == waiting, f"what hangs has no answer: {len(left)} of {waiting}")
    offsets = await lane.offsets()
    passed = [place for place in left if offsets[place[1]] > place[2]]
    require(not passed, f"nothing is acknowledged past what hangs: {passed[:5]}")


async def _moved_on(lane: Lane, events: int) -> None:
    """Every event has its answer and all offsets are committed."""
    await lane.until_answered(events, 60)
    end_s = now_s() + 10
    while (committed := await lane.committed()) < events and now_s() < end_s:
        await lane.watch(0.5)
    require(committed == events, f"the partition moves on: {committed} of {events} committed")


@scenario
async def hang_fetch(stand: Stand, quick: bool) -> Outcome:
    """A server that stalls, kill -9, then the fetch's own deadline."""
    tracks = 30 if quick else 200
    async with stand.lane("hang-fetch", partitions=2) as lane:
        hung = [lane.event(stand.audio.url(0, "stall", 1000), track_id="stalled")]
        at_s = await _killed_and_left(lane, hung, tracks=tracks, waiting=1)
        await _moved_on(lane, tracks + 1)
        require_letters(lane, "only the track that stalls is given up", fetch_timeout=1)
        _, second = lane.workers
        known = await second.metric("timbre_cache_lookups_total", result="hit")
        require(known > 0, "what was done before the kill is answered from the cache")
        return await conclude(lane, [at_s], duplicates_at_most=tracks)


@scenario
async def hang_decode(stand: Stand, quick: bool) -> Outcome:
    """A decoder that is frozen, kill -9, then the decoder's own deadline."""
    tracks = 30 if quick else 200
    async with stand.lane("hang-decode", partitions=2) as lane:

        async def freeze_one(worker: Worker) -> None:
            await until(lambda: len(worker.decoders()) == 2, "two decoders", 30)
            await asyncio.sleep(1)
            worker.decoders()[0].suspend()

        at_s = await _killed_and_left(
            lane, [], tracks=tracks, waiting=1, prepare=freeze_one, processes=2
        )
        await lane.until_answered(tracks, 60)
        await lane.send(lane.tracks(range(tracks, tracks + 10)))
        await _moved_on(lane, tracks + 10)
        require_letters(lane, "only the track of the frozen decoder is given up", decode_timeout=1)
        _, second = lane.workers
        replaced = await second.metric("timbre_decoder_restarts_total")
        require(replaced > 0, "another decoder takes the place of the one that hung")
        return await conclude(lane, [at_s], duplicates_at_most=tracks)


@scenario
async def hang_device(stand: Stand, quick: bool) -> Outcome:
    """A device that hangs on one track, kill -9, then the batch's own deadline.

    Neighbours that the cache answers don't need the device and finish; the others wait for it.
    """
    known, new = (15, 15) if quick else (100, 100)
    events = 2 * known + new + 1
    async with stand.lane("hang-device", partitions=2) as lane:
        url = stand.audio.url
        (patient,) = await lane.ready(launcher="hang", **PATIENT)
        await lane.send(lane.tracks(range(known)))
        await lane.until_answered(known, 60)
        await lane.send([lane.event(url(0, "marked"), track_id="marked")])
        await until(lambda: HANGS in patient.text(), "a device that hangs", 30)
        await lane.send(lane.event(url(n), track_id=f"again-{n}") for n in range(known))
        await lane.until_answered(2 * known + 1, 60, unanswered=1)
        require("marked" not in lane.checker.seen_s, "only the marked track has no answer")
        await lane.send(lane.tracks(range(known, known + new)))
        await lane.until_answered(events, 60, unanswered=new + 1)
        await _held(lane, new + 1)
        patient.kill()
        at_s = now_s()
        (short,) = await lane.ready(launcher="hang", **SHORT)
        await _moved_on(lane, events)
        require_letters(lane, "only the track that hangs the device is given up", device_hung=1)
        require(await short.metric("timbre_batch_faults_total", kind="hung") > 0, "it is told")
        return await conclude(lane, [at_s], duplicates_at_most=known)


@scenario
async def hang_redis(stand: Stand, quick: bool) -> Outcome:
    """A question to Redis that gets no answer, kill -9, then Redis's own deadline."""
    tracks = 30 if quick else 200
    sha256 = hashlib.sha256(track(tracks)).hexdigest().encode()

    def asks(command: bytes) -> bool:
        return b"GETRANGE" in command and sha256 in command

    async with (
        stand.lane("hang-redis", partitions=2) as lane,
        proxy(stand.redis.port, stalls=asks) as port,
    ):
        lane.settings["TIMBRE_REDIS__URL"] = f"redis://{HOST}:{port}/0"
        hung = [lane.event(stand.audio.url(tracks), track_id="unanswered")]
        at_s = await _killed_and_left(lane, hung, tracks=tracks, waiting=1)
        await _moved_on(lane, tracks + 1)
        require_letters(lane, "tags flow without it")
        _, second = lane.workers
        missed = await second.metric("timbre_cache_lookups_total", result="error")
        require(missed > 0, "that it does not answer is told")
        await lane.until_stored(tracks + 1, 30)
        return await conclude(lane, [at_s], duplicates_at_most=tracks)


@scenario
async def redis_frozen(stand: Stand, quick: bool) -> Outcome:
    """A Redis that is frozen for every track, kill -9, then Redis's own deadline."""
    tracks = 30 if quick else 200
    async with stand.lane("redis-frozen", partitions=2) as lane:
        stand.redis.pause()
        at_s = await _killed_and_left(lane, [], tracks=tracks, waiting=tracks)
        await _moved_on(lane, tracks)
        stand.redis.resume()
        await lane.until_stored(tracks, 30)
        return await conclude(lane, [at_s], duplicates_at_most=tracks)


@scenario
async def hang_produce(stand: Stand, quick: bool) -> Outcome:
    """A dead letter that Kafka does not take, kill -9, and again until it does."""
    tracks = 30 if quick else 200
    async with stand.lane("hang-produce", partitions=2, missing=("dead-letter",)) as lane:
        hung = [lane.event(stand.audio.url(0, "status", 404), track_id="absent")]
        await _killed_and_left(lane, hung, tracks=tracks, waiting=1)
        more = lane.tracks(range(tracks, tracks + 10))
        await lane.send(more)
        await lane.until_answered(tracks + 11, 60, unanswered=1)
        _, second = lane.workers
        end_s = now_s() + 30
        while not await second.metric("timbre_retries_total", code="publish_failed"):
            require(now_s() < end_s, "what Kafka does not take is sent again")
            await lane.watch(0.5)
        await _held(lane, 1)
        await lane.make_topics()
        at_s = now_s()
        await _moved_on(lane, tracks + 11)
        require_letters(lane, "only the track that is not there is given up", audio_not_found=1)
        return await conclude(lane, [at_s], duplicates_at_most=tracks)


@scenario
async def device_failing(stand: Stand, quick: bool) -> Outcome:
    """Batches that fail on the device: the others of the batch are tagged."""
    tracks = 40 if quick else 200
    async with stand.lane("device-failing") as lane:
        # Several decoders and some patience, for batches of several tracks.
        (worker,) = await lane.ready(launcher="fail", decode__processes=4, batch__max_delay_s=0.5)
        events = lane.tracks(range(tracks))
        marked = [lane.event(stand.audio.url(n, "marked")) for n in range(tracks // 10)]
        await lane.send(random.sample(events + marked, tracks + len(marked)))
        await lane.until_answered(tracks + len(marked), 60)
        failed = "only tracks on which the network fails are given up"
        require_letters(lane, failed, inference_failed=len(marked))
        require(await worker.metric("timbre_batch_faults_total", kind="failed") > 0, "it is told")
        return await conclude(lane, [])


@scenario
async def device_hanging_once(stand: Stand, quick: bool) -> Outcome:
    """A batch that hangs once on the device: all its tracks are tagged at the second attempt."""
    tracks = 30 if quick else 100
    async with stand.lane("device-hanging-once") as lane:
        await lane.ready(launcher="hang-once", **SHORT)
        marked = lane.event(stand.audio.url(0, "marked"))
        await lane.send([marked, *lane.tracks(range(tracks))])
        await lane.until_answered(tracks + 1, 60)
        require_letters(lane, "no track is given up")
        return await conclude(lane, [])


@scenario
async def device_lost(stand: Stand, quick: bool) -> Outcome:
    """A device that breaks for good: the worker ends, and another one does what it had."""
    tracks = 40 if quick else 200
    async with stand.lane("device-lost") as lane:
        (broken,) = await lane.ready(launcher="break")
        events = lane.tracks(range(tracks))
        events.insert(tracks // 2, lane.event(stand.audio.url(0, "marked")))
        await lane.send(events)
        status = await broken.ended("the end of a worker without its device", 60)
        at_s = now_s()
        require(status == 1, f"it ends with {status}")
        require(BREAKS in broken.text(), f"the log says what the device said: {broken.tail()}")
        await lane.ready()
        await lane.until_answered(len(events), 60)
        require_letters(lane, "no track is given up")
        return await conclude(lane, [at_s], duplicates_at_most=tracks)


@scenario
async def decoder_killed(stand: Stand, quick: bool) -> Outcome:
    """Decoder processes killed (-9) at random moments."""
    kills, tracks = (5, 100) if quick else (20, 400)
    async with stand.lane("decoder-killed") as lane:
        # On a slow machine chance may hit one track several times.
        (worker,) = await lane.ready(decode__processes=2, worker__attempts=kills + 1)
        sending = asyncio.create_task(
            lane.send(lane.tracks(range(tracks)), per_s=tracks / kills * 2)
        )
        moments = []
        for _ in range(kills):
            await lane.watch(random.uniform(0.2, 0.8))
            await until(lambda: bool(worker.decoders()), "a decoder", 10)
            moments.append(now_s())
            random.choice(worker.decoders()).kill()
        await sending
        await lane.until_answered(tracks, 60)
        require(worker.running, "the worker lives on")
        require_letters(lane, "no track is given up")
        counted = await worker.metric("timbre_decoder_restarts_total")
        require(0 < counted <= kills, f"restarts are counted: {counted:g} after {kills} kills")
        return await conclude(lane, moments)


@scenario
async def disk_full(stand: Stand, quick: bool) -> Outcome:
    """No room left on the disk of the spool for a while, and then for good."""
    full_s, tracks = (2, 60) if quick else (10, 300)
    async with stand.lane("disk-full") as lane:
        (worker,) = await lane.ready(
            wrapper=small_disk(lane.spool),
            fetch__attempts=50,
            fetch__timeout_s=20,
            worker__track_deadline_s=30,
        )
        disk = Path(f"/proc/{worker.process.pid}/root{lane.spool}")
        half = tracks // 2
        await lane.send(lane.tracks(range(half)))
        await lane.watch(1)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
        await lane.send(lane.tracks(range(half, tracks)))
        await lane.watch(full_s)
        ballast.unlink()
        moment_s = now_s()
        await lane.until_answered(tracks, 90)
        require_letters(lane, "it waits for room")
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
        await lane.send([lane.event(stand.audio.url(tracks), track_id="no-room")])
        await lane.until_answered(tracks + 1, 30)
        require_letters(lane, "it waits no longer than a fetch may", spool_full=1)
        require(worker.running, "the worker lives on")
        left = list(disk.glob("*/*"))
        require(not left, f"what could not be completed is removed: {left[:5]}")
        require(await worker.metric("timbre_retries_total", code="spool_full") > 0, "it was full")
        return await conclude(lane, [moment_s])


@scenario
async def spool_small(stand: Stand, quick: bool) -> Outcome:
    """A spool with room for ten tracks, and sixteen in flight, some half there without a length."""
    tracks = 40 if quick else 200
    async with stand.lane("spool-small") as lane:
        (worker,) = await lane.ready(fetch__spool_max_bytes=1_000_000, fetch__max_bytes=400_000)
        url = stand.audio.url
        unannounced = [
            lane.event(url(number, "no-length"), track_id=f"unannounced-{number}")
            for number in range(tracks, 2 * tracks)
        ]
        too_large = lane.event(url(0, "large", 60), track_id="too-large")
        events = [*unannounced, too_large, *lane.tracks(range(tracks))]
        await lane.send(events)
        await lane.until_answered(len(events), 90)
        require_letters(lane, "who finds no room waits for it", audio_too_large=1)
        require(
            await worker.metric("timbre_retries_total", code="spool_full") == 0,
            "waiting for room takes no attempts",
        )
        return await conclude(lane, [])


@scenario
async def corrupt_bundle(stand: Stand, quick: bool) -> Outcome:
    """A damaged model bundle at start: a sentence, a status, and nothing taken."""
    async with stand.lane("corrupt-bundle") as lane:
        bundle = lane.folder / "bundle"
        shutil.copytree(ROOT / "model" / "bundles" / "default", bundle)
        weights = bundle / "model.safetensors"
        damaged = bytearray(weights.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        weights.write_bytes(damaged)
        await lane.send(lane.tracks(range(5)))
        worker = lane.worker(worker__bundle=bundle)
        status = await worker.ended("the worker's exit", 60)
        require(status == 1, f"exit status {status}")
        said = worker.text()
        require("Traceback" not in said and str(bundle) in said, f"a sentence, not:\n{said}")
        moment_s = now_s()
        await lane.ready()
        await lane.until_answered(5, 60)
        return await conclude(lane, [moment_s])


def small_disk(folder: Path) -> list[str]:
    """A command before another, which then has a disk of 4 MiB of its own at `folder`."""
    mount = f'mkdir -p "{folder}" && mount -t tmpfs -o size=4m none "{folder}"'
    return [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        f'{mount} && exec "$@"',
        "sh",
    ]
