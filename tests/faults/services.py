"""Kafka and Redis stopped, frozen, refusing and emptied, while tracks pass."""

import asyncio
import secrets

import psutil

from tests.broker import limit_messages
from tests.faults.scenarios import Outcome, conclude, now_s, require, require_letters, scenario
from tests.faults.stand import IN_FLIGHT, Stand, Worker

MAX_LOAD = 0.15
"""Of a core, while the broker is down."""
LOAD_S = 2.0
"""Over which it is measured."""


@scenario
async def broker_restart(stand: Stand, quick: bool) -> Outcome:
    """The broker stopped, and killed, and started again."""
    down_s, tracks = (3, 80) if quick else (15, 300)
    async with stand.lane("broker-restart") as lane:
        (worker,) = await lane.ready()
        await lane.send(lane.tracks(range(tracks)))
        moments = []
        for end in (stand.kafka.stop, stand.kafka.kill):
            await lane.watch(1)
            await asyncio.to_thread(end)
            await asyncio.sleep(down_s)
            load = await _load(worker)
            require(load < MAX_LOAD, f"the worker waits for the broker: it takes {load:.0%} CPU")
            await asyncio.to_thread(stand.kafka.start)
            moments.append(now_s())
            if end == stand.kafka.stop:
                await lane.send(lane.tracks(range(tracks, 2 * tracks)))
        await lane.until_answered(2 * tracks, 120)
        return await conclude(lane, moments, duplicates_at_most=4 * IN_FLIGHT)


@scenario
async def broker_frozen(stand: Stand, quick: bool) -> Outcome:
    """The broker frozen (SIGSTOP) past all timeouts and woken."""
    freezes, tracks = (1, 80) if quick else (3, 300)
    async with stand.lane("broker-frozen") as lane:
        (worker,) = await lane.ready()
        moments = []
        for number in range(freezes):
            part = tracks // freezes
            await lane.send(lane.tracks(range(number * part, (number + 1) * part)))
            await lane.watch(0.5)
            stand.kafka.pause()
            await asyncio.sleep(15)
            stand.kafka.resume()
            moments.append(now_s())
        await lane.until_answered(part * freezes, 120)
        retries = await worker.metric("timbre_retries_total", code="publish_failed")
        require(retries > 0, "the worker's own timeouts notice it")
        return await conclude(lane, moments, duplicates_at_most=4 * freezes * IN_FLIGHT)


@scenario
async def kafka_refusing(stand: Stand, quick: bool) -> Outcome:
    """Kafka refuses results for a while: their topics are not there yet."""
    refusing_s, tracks = (20, 40) if quick else (60, 200)
    async with stand.lane("kafka-refusing", missing=("tags", "dead-letter")) as lane:
        (worker,) = await lane.ready(worker__stalled_after_s=5)
        events = lane.tracks(range(tracks))
        events += [lane.event(stand.audio.url(n, "status", 404)) for n in range(5)]
        await lane.send(events)
        await lane.watch(refusing_s)
        require(await lane.committed() == 0, "what Kafka has not confirmed is not acknowledged")
        taken = await worker.metric("timbre_in_flight")
        require(taken == IN_FLIGHT, f"no more is taken than may be in flight: {taken:g}")
        status, why = await worker.get("/health/live")
        require(status == 503, f"the worker tells that it is stalled: {status} {why}")
        await lane.make_topics()
        moment_s = now_s()
        await lane.until_answered(len(events), 90)
        outcome = await conclude(lane, [moment_s], duplicates_at_most=IN_FLIGHT)
        require(outcome.verdict.tags == tracks, f"every track is tagged: {outcome.verdict}")
        return outcome


@scenario
async def result_too_large(stand: Stand, quick: bool) -> Outcome:
    """Results that Kafka never takes, between others on the same partition."""
    tracks = 20 if quick else 100
    async with stand.lane("result-too-large", partitions=1) as lane:
        await limit_messages(stand.kafka_settings, lane.checker.topics.tags, 20_000)
        await lane.ready()
        url, noise = stand.audio.url, secrets.token_urlsafe(45_000)  # does not compress well
        for number in range(tracks):
            more = {"metadata": {"note": noise}} if number % 5 == 2 else {}
            await lane.send([lane.event(url(number), track_id=f"track-{number}", **more)])
            await lane.watch(0.05)
        await lane.until_answered(tracks, 60)
        too_large = "only what is too large becomes a dead letter"
        require_letters(lane, too_large, result_too_large=tracks // 5)
        return await conclude(lane, [])


@scenario
async def redis_stopped(stand: Stand, quick: bool) -> Outcome:
    """Redis stopped for a minute: tags still flow, the cache is filled in afterwards."""
    down_s, tracks = (4, 60) if quick else (60, 600)
    async with stand.lane("redis-stopped") as lane:
        (worker,) = await lane.ready()
        half = tracks // 2
        await lane.send(lane.tracks(range(half)))
        await lane.watch(1)
        await asyncio.to_thread(stand.redis.stop)
        moments = [now_s()]
        await lane.send(lane.tracks(range(half, tracks)))
        await lane.until_answered(tracks, 120)  # tags flow meanwhile
        require(await worker.metric("timbre_redis_backlog") > 0, "the backlog is told")
        errors = await worker.metric("timbre_cache_lookups_total", result="error")
        require(errors > 0, "lookups that fail are counted")
        await asyncio.sleep(max(0.0, moments[0] + down_s - now_s()))
        await asyncio.to_thread(stand.redis.start)
        moment_s = now_s()
        await lane.until_stored(tracks, 30)
        filled_s = now_s() - moment_s
        outcome = await conclude(lane, moments)
        return Outcome(outcome.verdict, round(max(filled_s, outcome.recovery_s), 2))


@scenario
async def redis_emptied(stand: Stand, quick: bool) -> Outcome:
    """Redis emptied while tracks pass, some of them again."""
    tracks = 60 if quick else 300
    async with stand.lane("redis-emptied") as lane:
        (worker,) = await lane.ready()
        events = lane.tracks(range(tracks))
        await lane.send(events)
        await lane.until_answered(tracks, 90, unanswered=tracks // 2)
        async with lane.redis() as client:
            await client.flushall()
        moment_s = now_s()
        await lane.send(events[: tracks // 2])
        await lane.until_answered(tracks * 3 // 2, 90)
        misses = await worker.metric("timbre_cache_lookups_total", result="miss")
        require(misses > tracks, f"what comes again is computed again: {misses:g} misses")
        outcome = await conclude(lane, [moment_s], duplicates_at_most=tracks // 2)
        require(
            outcome.verdict.tags == tracks and outcome.verdict.duplicates == tracks // 2,
            f"what comes again has the same event id: {outcome.verdict}",
        )
        return outcome


async def _load(worker: Worker) -> float:
    """Share of a core that the worker takes, without its decoders."""
    process = psutil.Process(worker.process.pid)
    before = process.cpu_times()
    await asyncio.sleep(LOAD_S)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / LOAD_S
