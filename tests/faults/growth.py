"""What a worker holds: over many tracks, and over one that is very long."""

import asyncio

from tests.faults.scenarios import Outcome, conclude, now_s, require, require_letters, scenario
from tests.faults.soak import soak as soaked
from tests.faults.stand import Lane, Stand

LONG_TRACK_S = 2 * 3600
PATIENCE_S = 180
MAX_MEMORY_RATIO = 1.2


@scenario
async def soak(stand: Stand, quick: bool) -> Outcome:
    """Many tracks through one worker: no growth, nothing left behind."""
    async with stand.lane("soak") as lane:
        result = await soaked(lane, 300 if quick else 5000)
        result.require_no_growth()
        return await conclude(lane, [])


@scenario
async def long_track(stand: Stand, quick: bool) -> Outcome:
    """A track of two hours among a hundred short ones: they don't wait, memory doesn't grow."""
    del quick
    async with stand.lane("long-track") as lane:
        (worker,) = await lane.ready(
            decode__processes=2, worker__track_deadline_s=300, fetch__timeout_s=60
        )
        await lane.send(lane.tracks(range(20)))
        await lane.until_answered(20, 60)
        alone_s, alone_bytes = await _pass(lane, lane.tracks(range(100, 200)))
        long = lane.event(stand.audio.url(0, "large", LONG_TRACK_S), track_id="long")
        events = [long, *lane.tracks(range(200, 300))]
        both_s, most_bytes = await _pass(lane, events, waiting=1)
        require("long" not in lane.checker.seen_s, "short tracks overtake the long one")
        require(both_s < 3 * alone_s + 2, f"short ones don't wait: {both_s:.1f}, {alone_s:.1f} s")
        end_s = now_s() + PATIENCE_S
        while "long" not in lane.checker.seen_s:
            require(now_s() < end_s, f"the long track is tagged within {PATIENCE_S} s")
            most_bytes = max(most_bytes, await asyncio.to_thread(worker.memory_bytes))
            require_letters(lane, "it is tagged")
            await lane.checker.poll()
        require(
            most_bytes < MAX_MEMORY_RATIO * alone_bytes,
            f"memory: {most_bytes >> 20} MiB with it, {alone_bytes >> 20} MiB without",
        )
        return await conclude(lane, [])


async def _pass(lane: Lane, events: list[bytes], *, waiting: int = 0) -> tuple[float, int]:
    """Send events, until all but `waiting` are answered: seconds, and the most memory."""
    (worker,) = lane.workers
    started_s, most_bytes = now_s(), 0
    total = len(lane.checker.events) + len(events)
    await lane.send(events)
    while len(lane.checker.events) < total or len(lane.checker.unanswered) > waiting:
        require(now_s() - started_s < 90, "tracks pass")
        most_bytes = max(most_bytes, await asyncio.to_thread(worker.memory_bytes))
        await lane.checker.poll()
    return now_s() - started_s, most_bytes
