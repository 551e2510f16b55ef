"""Workers that die, freeze, stop, join and leave; events that come again."""

import asyncio
import random
import signal
from functools import partial
from typing import Any

from tests.faults.scenarios import Outcome, conclude, now_s, require, scenario
from tests.faults.stand import IN_FLIGHT, Lane, Stand, Worker, until

TAKEOVER_S = 15.0
"""The session timeout, the grace before a rebalance, and some time to join."""
LATE_S = 6.0
"""Longer than the grace before a rebalance."""
LATE = 8
"""Tracks that are being fetched when a worker freezes."""


@scenario
async def kill9(stand: Stand, quick: bool) -> Outcome:
    """Workers killed (-9) at random moments while uploads and backfill pass."""
    kills, tracks = (2, 240) if quick else (20, 1000)
    places: dict[str, Any] = {
        "worker__max_in_flight": IN_FLIGHT - 4,
        "worker__max_backfill_in_flight": 4,
    }
    async with stand.lane("kill9") as lane:
        workers = await lane.ready(2, **places)
        await lane.send(lane.tracks(range(tracks // 5)), topic=lane.backfill)
        await lane.send(lane.tracks(range(tracks // 5, tracks)))
        moments = []
        for number in range(kills):
            await lane.until_more(tracks // kills // 2, 60)  # or the group would never come to work
            await lane.watch(random.uniform(0, 1))
            moments.append(now_s())
            other = workers[1 - number % 2]
            before = other.text().count("Assigned")
            workers[number % 2].kill()
            workers[number % 2] = lane.worker(**places)
            if not number:  # later ones may come before the group has settled
                await until(partial(_assigned, other, before), "the other's takeover", TAKEOVER_S)
        await lane.until_answered(tracks, 120)
        outcome = await conclude(lane, moments, duplicates_at_most=kills * IN_FLIGHT)
        require(outcome.verdict.tags == tracks, f"every track is tagged: {outcome.verdict}")
        return outcome


@scenario
async def redelivery(stand: Stand, quick: bool) -> Outcome:
    """The same events again, answered from the cache, and again with the cache emptied."""
    tracks = 20 if quick else 200
    async with stand.lane("redelivery") as lane:
        await lane.ready()
        events = lane.tracks(range(tracks))
        tags, features = lane.checker.tags, lane.checker.features
        for times in (1, 2, 3):
            if times == 3:
                async with lane.redis() as client:
                    await client.flushall()
            await lane.send(events)
            await lane.until_answered(times * tracks, 60)
            if times == 2:
                answers = [*tags.values(), *features.values()]
                require(
                    all(first == second for first, second in answers),
                    "from the cache an answer is the same to the last digit",
                )
        return await conclude(lane, [], duplicates_at_most=2 * tracks)


@scenario
async def rebalance(stand: Stand, quick: bool) -> Outcome:
    """Workers join and leave every few seconds: three workers, twelve partitions, slow tracks."""
    rounds, tracks = (2, 120) if quick else (8, 800)
    patient: dict[str, Any] = {
        "fetch__stall_timeout_s": 10,
        "fetch__timeout_s": 20,
        "worker__track_deadline_s": 30,
    }
    async with stand.lane("rebalance", partitions=12) as lane:
        await lane.ready(2, **patient)
        events = lane.tracks(range(tracks))
        for number in range(0, tracks, 4):  # unfinished while those behind them are done
            uri = stand.audio.url(number, "late", LATE_S)
            events[number] = lane.event(uri, track_id=f"track-{number}")
        sending = asyncio.create_task(lane.send(events, per_s=tracks / rounds / 8))
        before, moments = lane.checker.answered(), []
        for number in range(rounds):
            third = await lane.worker(**patient).ready()
            await lane.watch(random.uniform(1, 4))
            moments.append(now_s())
            if number % 2:
                third.kill()
            else:
                require(await third.stop() == 0, "a worker that leaves exits with 0")
            await lane.watch(random.uniform(0, 2))
        moved = lane.checker.answered() - before
        require(len(moved) == lane.partitions, f"each partition moves on meanwhile: {moved}")
        await sending
        await lane.until_answered(tracks, 90)
        # Two rebalances a round, three workers. The quick form's are over sooner.
        most = rounds * IN_FLIGHT * (2 if quick else 6)
        return await conclude(lane, moments, duplicates_at_most=most)


@scenario
async def freeze(stand: Stand, quick: bool) -> Outcome:
    """A worker frozen (SIGSTOP) past its session timeout and woken."""
    freezes, tracks = (1, 100) if quick else (4, 400)
    async with stand.lane("freeze") as lane:
        workers = await lane.ready(
            2, fetch__stall_timeout_s=8, fetch__timeout_s=8, worker__track_deadline_s=60
        )
        sending = asyncio.create_task(
            lane.send(lane.tracks(range(tracks)), per_s=tracks / freezes / 14)
        )
        moments = []
        for number in range(freezes):
            await lane.watch(2)
            late = range(LATE * number, LATE * (number + 1))
            await lane.send(lane.event(stand.audio.url(n, "late", 5)) for n in late)
            await until(partial(_asked, stand, late.stop), "late tracks' fetches", 20)
            frozen = workers[number % 2]
            frozen.signal(signal.SIGSTOP)
            await lane.watch(1)
            await _until_taken_over(lane, 25)
            await lane.watch(5)
            moments.append(now_s())
            await _wake(frozen)
        await sending
        await lane.until_answered(tracks + LATE * freezes, 90)
        return await conclude(lane, moments, duplicates_at_most=2 * freezes * 2 * IN_FLIGHT)


def _asked(stand: Stand, late: int) -> bool:
    """Whether so many late tracks have been asked for."""
    return sum(path.startswith("/late") for path in stand.audio.requests) >= late


async def _until_taken_over(lane: Lane, timeout_s: float) -> None:
    """Read until all that has no answer now has one."""
    waiting, end_s = set(lane.checker.unanswered), now_s() + timeout_s
    while waiting.intersection(lane.checker.unanswered):
        require(now_s() < end_s, "the others take over what a frozen worker had")
        await lane.checker.poll()


async def _wake(frozen: Worker) -> None:
    """Wake a worker and wait until it has partitions again."""
    before = frozen.text().count("Assigned")
    frozen.signal(signal.SIGCONT)
    await until(partial(_assigned, frozen, before), "the woken one's return", 30)


def _assigned(worker: Worker, before: int) -> bool:
    """Whether it has been given partitions once more."""
    return worker.text().count("Assigned") > before


@scenario
async def sigterm(stand: Stand, quick: bool) -> Outcome:
    """SIGTERM under load: what is in flight finishes, one that hangs is given back, exit 0."""
    stops, tracks = (1, 100) if quick else (4, 400)
    async with stand.lane("sigterm") as lane:
        await lane.send(lane.tracks(range(tracks)))
        moments = []
        for number in range(stops):
            (worker,) = await lane.ready()
            await lane.until_more(10, 60)
            asked_s = now_s()
            require(await worker.stop() == 0, "SIGTERM ends with 0")
            moments.append(now_s())
            require(moments[-1] - asked_s < 15, "SIGTERM ends inside the deadline")
            await lane.checker.read_to_end()
            answered = len(lane.checker.events) - len(lane.checker.unanswered)
            require(answered < tracks or bool(number), "the stop comes under load")
            committed = await lane.committed()
            require(
                committed == answered,
                f"all that is finished is committed: {committed} of {answered}",
            )
        await lane.send([lane.event(stand.audio.url(0, "stall", 1000), track_id="stalled")])
        worker = lane.worker(
            fetch__stall_timeout_s=60, fetch__timeout_s=60, worker__stop_deadline_s=6
        )
        await lane.until_answered(tracks + 1, 60, unanswered=1)
        asked_s = now_s()
        require(await worker.stop() == 0, "SIGTERM ends with 0, though a track hangs")
        took_s = now_s() - asked_s
        require(took_s < 6 + 4, f"a track that hangs does not hold up the end: {took_s:.1f} s")
        await lane.ready()
        await lane.until_answered(tracks + 1, 60)
        return await conclude(lane, moments)
