"""The batcher: fair, bounded, late never by more than it may, and no track harms another."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.bundle import Bundle
from model.heads import Head
from model.network import Tagger
from schemas.events import Priority
from tests.unit.worker.small_network import Answer, SmallNet
from tests.waiting import until
from worker.batch.batcher import Batcher, BatchObserver, Ticket, WindowOutputs
from worker.batch.device import Buffer
from worker.errors import (
    DeadlineExceeded,
    DeviceHung,
    DeviceLost,
    DeviceOutOfMemory,
    InferenceFailed,
    TrackCancelled,
    WorkerStopping,
)
from worker.settings import BatchSettings

SAMPLES = 400
MARK = 7.0  # a first sample like this tells the networks below to misbehave
LABELS = ("blues", "jazz", "rock")


class Choking(SmallNet):
    """Raises over a marked window."""

    def misbehave(self, samples: Tensor) -> None:
        if (samples[:, 0] == MARK).any():
            raise ValueError("can't take this")


class Stumbling(SmallNet):
    """Raises once over a marked window."""

    stumbled = False

    def misbehave(self, samples: Tensor) -> None:
        if not self.stumbled and (samples[:, 0] == MARK).any():
            self.stumbled = True
            raise RuntimeError("a passing fault")


class Overflowing(SmallNet):
    """Answers a marked window with numbers that are not finite, in one of its tables."""

    def __init__(self, table: str) -> None:
        super().__init__()
        self.table = table

    def forward(self, samples: Tensor) -> Answer:
        answer = super().forward(samples)
        tables = answer.probabilities | {"embedding": answer.embedding}
        tables[self.table][samples[:, 0] == MARK] = torch.nan
        return answer


class Hanging(SmallNet):
    """Waits for `go` only over a marked window."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def misbehave(self, samples: Tensor) -> None:
        if (samples[:, 0] == MARK).any():
            assert self.release.wait(60)


class Cramped(SmallNet):
    """Runs out of memory above two windows, and over a marked one always."""

    def misbehave(self, samples: Tensor) -> None:
        if len(samples) > 2 or (samples[:, 0] == MARK).any():
            raise torch.OutOfMemoryError("CUDA out of memory")


class Breaking(SmallNet):
    """Takes the device down with it over a marked window."""

    def misbehave(self, samples: Tensor) -> None:
        if (samples[:, 0] == MARK).any():
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")


def bundle_of(network: nn.Module) -> Bundle:
    head = Head(name="genre", kind="single", labels=LABELS, categories=("genre",) * 3)
    return Bundle(
        name="small",
        heads=(head,),
        sample_rate_hz=4000,
        window_s=0.1,
        embedding_dim=16,
        uncertain_threshold=0.5,
        kind="small",
        config={},
        network=cast(Tagger, network),
    )


@dataclass
class Told(BatchObserver):
    """An observer that keeps what it was told."""

    batches: list[int] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def on_batch(self, windows: int, fill: float, wait_s: float, compute_s: float) -> None:
        assert 0.0 < fill <= 1.0
        assert compute_s > 0.0
        self.batches.append(windows)
        self.waits_s.append(wait_s)

    def on_queue(self, depth: int) -> None:
        self.depths.append(depth)

    def on_fault(self, kind: str) -> None:
        self.faults.append(kind)


class Tracks:
    """Sends tracks to a batcher; the keys of their pieces once staged, and of those finished."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.sent: list[tuple[str, np.ndarray]] = []
        self.staged: list[str] = []
        self.finished: list[str] = []
        stage = batcher._engine.stage

        async def watched(parts: Sequence[np.ndarray]) -> tuple[Buffer, list[bool]]:
            staged = await stage(parts)
            self.staged += [key for part in parts for key, w in self.sent if part.base is w]
            return staged

        batcher._engine.stage = watched  # type: ignore[method-assign]

    def send(
        self,
        key: str,
        windows: np.ndarray,
        *,
        priority: Priority = "upload",
        deadline_s: float = 60.0,
        ticket: Ticket | None = None,
    ) -> "asyncio.Task[WindowOutputs]":
        ticket = ticket or Ticket(key, asyncio.get_running_loop().time() + deadline_s)
        return asyncio.create_task(self._predict(key, windows, priority, ticket))

    async def _predict(
        self, key: str, windows: np.ndarray, priority: Priority, ticket: Ticket
    ) -> WindowOutputs:
        self.sent.append((key, windows))
        outputs = await self.batcher.predict(windows, priority=priority, ticket=ticket)
        self.finished.append(key)
        return outputs


def batcher_of(network: nn.Module, observer: Told | None = None, **settings: object) -> Batcher:
    options = {"device": "cpu", "threads": 1, "max_delay_s": 0.01, **settings}
    drain_s = float(str(options.pop("drain_s", 10.0)))
    batch = BatchSettings.model_validate(options)
    return Batcher(bundle_of(network), batch, observer=observer, drain_s=drain_s)


def noise(windows: int, seed: int = 0, *, first: float | None = None) -> np.ndarray:
    """Windows of noise, (windows, SAMPLES) float32; `first` is the first sample of each."""
    samples = np.random.default_rng(seed).uniform(-1, 1, (windows, SAMPLES)).astype(np.float32)
    if first is not None:
        samples[:, 0] = first
    return samples


def alone(windows: np.ndarray) -> WindowOutputs:
    with torch.inference_mode():
        answer = SmallNet()(torch.from_numpy(windows))
    return WindowOutputs({"genre": answer.probabilities["genre"].numpy()}, answer.embedding.numpy())


def same(got: WindowOutputs, windows: np.ndarray) -> bool:
    want = alone(windows)
    return np.allclose(got.probabilities["genre"], want.probabilities["genre"], atol=1e-5) and (
        np.allclose(got.embedding, want.embedding, atol=1e-5)
    )


async def held_up(network: SmallNet, tracks: Tracks) -> "list[asyncio.Task[WindowOutputs]]":
    """Fill both places in flight with a track each and hold the device up, so that others queue."""
    network.go.clear()
    seen = len(network.order)
    first = tracks.send("first", noise(1))
    await until(lambda: len(network.order) > seen)
    second = tracks.send("second", noise(1))
    await until(lambda: "second" in tracks.staged)
    return [first, second]


async def test_every_track_gets_what_it_would_get_alone() -> None:
    told = Told()
    async with batcher_of(SmallNet(), told, max_windows=16, threads=2) as batcher:
        tracks = Tracks(batcher)
        sent = {f"t{i}": noise(1 + 7 * i % 23, seed=i) for i in range(40)}
        tasks = {
            key: tracks.send(key, windows, priority="backfill" if i % 3 else "upload")
            for i, (key, windows) in enumerate(sent.items())
        }
        for key, task in tasks.items():
            assert same(await task, sent[key]), key
    assert set(tracks.staged) == set(sent)
    assert sum(told.batches) == sum(len(windows) for windows in sent.values())
    assert max(told.batches) == 16
    assert told.depths[-1] == 0
    assert not told.faults


async def test_the_default_model_answers_in_a_batch_as_it_does_alone() -> None:
    bundle = Bundle.load()
    rng = np.random.default_rng(1)
    sent = [
        rng.uniform(-1, 1, (windows, bundle.window_samples)).astype(np.float32)
        for windows in (1, 5, 2, 11, 3)
    ]
    async with Batcher(bundle, BatchSettings(device="cpu", max_windows=16)) as batcher:
        tracks = Tracks(batcher)
        got = await asyncio.gather(*(tracks.send(f"t{i}", w) for i, w in enumerate(sent)))
    with torch.inference_mode():
        for windows, outputs in zip(sent, got, strict=True):
            want = bundle.network(torch.from_numpy(windows))
            for head in bundle.heads:
                np.testing.assert_allclose(
                    outputs.probabilities[head.name], want.probabilities[head.name], atol=1e-5
                )
            np.testing.assert_allclose(outputs.embedding, want.embedding, atol=1e-4)


async def test_a_batch_is_filled_with_windows_of_many_tracks() -> None:
    told = Told()
    async with batcher_of(SmallNet(), told, max_windows=20, max_delay_s=5) as batcher:
        tracks = Tracks(batcher)
        async with asyncio.timeout(3):  # full, so nobody waits for the delay
            await asyncio.gather(*(tracks.send(f"t{i}", noise(2, i)) for i in range(10)))
    assert told.batches == [20]


async def test_a_batch_leaves_when_its_oldest_window_has_waited_long_enough() -> None:
    told = Told()
    async with batcher_of(SmallNet(), told, max_windows=20, max_delay_s=2) as batcher:
        tracks = Tracks(batcher)
        first = tracks.send("first", noise(1))
        await asyncio.sleep(1)
        second = tracks.send("second", noise(1))
        await asyncio.gather(first, second)
    assert told.batches == [2]
    assert 2 <= told.waits_s[0] < 3


async def test_a_hundred_short_tracks_do_not_wait_for_a_long_one() -> None:
    network = SmallNet()
    async with batcher_of(network, max_windows=16, queue_windows=64) as batcher:
        tracks = Tracks(batcher)
        blocking = await held_up(network, tracks)
        long = tracks.send("long", noise(2400))
        await asyncio.sleep(0)
        short = [tracks.send(f"short-{i}", noise(1, i)) for i in range(100)]
        await asyncio.sleep(0)
        network.go.set()
        await asyncio.gather(*blocking, *short)
        assert not long.done()
        network.order.clear()
        await long
        # 100 short windows took 8 batches or so, in which the long track had its turns.
        assert sum(len(batch) for batch in network.order) > 2400 - 10 * 16


async def test_uploads_go_before_backfill_that_waits_longer() -> None:
    network, told = SmallNet(), Told()
    async with batcher_of(network, told, max_windows=4, backfill_share=0) as batcher:
        tracks = Tracks(batcher)
        blocking = await held_up(network, tracks)
        old = [tracks.send("old", noise(4, i), priority="backfill") for i in range(5)]
        await asyncio.sleep(1)
        new = [tracks.send("new", noise(4, i)) for i in range(5)]
        await asyncio.sleep(0)
        network.go.set()
        await asyncio.gather(*blocking, *old, *new)
    assert tracks.finished[2:] == ["new"] * 5 + ["old"] * 5
    assert max(told.waits_s[2:7]) < 1 <= min(told.waits_s[7:])


async def test_backfill_gets_its_share_beside_uploads() -> None:
    network = SmallNet()
    async with batcher_of(network, max_windows=4, backfill_share=0.25) as batcher:
        tracks = Tracks(batcher)
        blocking = await held_up(network, tracks)
        old = [tracks.send("old", noise(1, i), priority="backfill") for i in range(4)]
        new = [tracks.send("new", noise(1, i)) for i in range(40)]
        await asyncio.sleep(0)
        network.go.set()
        await asyncio.gather(*blocking, *old, *new)
    assert tracks.finished[2:].index("old") < 4
    assert "old" not in tracks.finished[-20:]


async def test_a_full_queue_makes_tracks_wait_and_then_takes_them() -> None:
    network, told = SmallNet(), Told()
    async with batcher_of(network, told, max_windows=4, queue_windows=8) as batcher:
        tracks = Tracks(batcher)
        blocking = await held_up(network, tracks)
        more = [tracks.send(f"t{i}", noise(3, i)) for i in range(20)]
        await asyncio.sleep(0.05)
        assert told.depths[-1] == 8
        network.go.set()
        for i, outputs in enumerate((await asyncio.gather(*blocking, *more))[2:]):
            assert same(outputs, noise(3, i))
    assert max(told.depths) == 8


async def test_a_long_track_fills_only_its_share_of_the_queue() -> None:
    network, told = SmallNet(), Told()
    async with batcher_of(network, told, queue_windows=40, track_share=0.25) as batcher:
        tracks = Tracks(batcher)
        blocking = await held_up(network, tracks)
        long = [tracks.send("long", noise(16)) for _ in range(10)]
        await asyncio.sleep(0.05)
        assert told.depths[-1] == 10
        short = tracks.send("short", noise(1))
        await asyncio.sleep(0.05)
        assert told.depths[-1] == 11
        network.go.set()
        await asyncio.gather(*blocking, *long, short)


async def test_two_batches_are_in_flight_at_most_and_the_second_is_staged_meanwhile() -> None:
    network, told = SmallNet(), Told()
    async with batcher_of(network, told, max_windows=4) as batcher:
        tracks = Tracks(batcher)
        blocking = await held_up(network, tracks)
        third = tracks.send("third", noise(4))
        await asyncio.sleep(0.1)
        assert tracks.staged == ["first", "second"]
        assert not told.batches  # the first is still being computed
        network.go.set()
        await asyncio.gather(*blocking, third)
    assert tracks.staged == ["first", "second", "third"]


async def test_an_expired_track_is_dropped_before_it_costs_compute() -> None:
    network, told = SmallNet(), Told()
    async with batcher_of(network, told) as batcher:
        tracks = Tracks(batcher)
        blocking = await held_up(network, tracks)
        expired = tracks.send("expired", noise(3, first=0.5), deadline_s=0.1)
        with pytest.raises(DeadlineExceeded, match="expired"):
            await expired
        assert told.depths[-2:] == [3, 0]
        network.go.set()
        await asyncio.gather(*blocking)
        assert same(await tracks.send("next", noise(2)), noise(2))
    assert tracks.staged == ["first", "second", "next"]
    assert not any(0.5 in batch for batch in network.order)


async def test_a_deadline_holds_also_while_the_batch_is_on_the_device() -> None:
    network = SmallNet()
    async with batcher_of(network) as batcher:
        tracks = Tracks(batcher)
        network.go.clear()
        with pytest.raises(DeadlineExceeded):
            await tracks.send("late", noise(1), deadline_s=0.2)
        network.go.set()
        assert same(await tracks.send("next", noise(2)), noise(2))
    assert tracks.staged == ["late", "next"]


async def test_a_deadline_already_past_costs_nothing() -> None:
    network = SmallNet()
    async with batcher_of(network) as batcher:
        tracks = Tracks(batcher)
        network.order.clear()
        with pytest.raises(DeadlineExceeded):
            await tracks.send("past", noise(1), deadline_s=-1.0)
        await asyncio.sleep(0.05)
    assert not network.order
    assert not tracks.staged


async def test_a_cancelled_ticket_drops_all_its_windows() -> None:
    network, told = SmallNet(), Told()
    async with batcher_of(network, told) as batcher:
        tracks = Tracks(batcher)
        blocking = await held_up(network, tracks)
        ticket = Ticket("taken-back", asyncio.get_running_loop().time() + 60)
        taken_back = [
            tracks.send("taken-back", noise(3, first=0.5), ticket=ticket) for _ in range(3)
        ]
        await asyncio.sleep(0)
        assert told.depths[-1] == 9
        ticket.cancel()
        for task in taken_back:
            with pytest.raises(TrackCancelled):
                await task
        assert told.depths[-1] == 0
        with pytest.raises(TrackCancelled):
            await tracks.send("taken-back", noise(1, first=0.5), ticket=ticket)
        network.go.set()
        await asyncio.gather(*blocking)
    assert tracks.staged == ["first", "second"]
    assert not any(0.5 in batch for batch in network.order)


async def test_a_cancelled_caller_drops_its_windows_and_harms_nobody() -> None:
    network, told = SmallNet(), Told()
    async with batcher_of(network, told) as batcher:
        tracks = Tracks(batcher)
        blocking = await held_up(network, tracks)
        gone, stays = tracks.send("gone", noise(3, first=0.5)), tracks.send("stays", noise(3))
        await asyncio.sleep(0)
        gone.cancel()
        blocking[0].cancel()  # this one is on the device
        await asyncio.wait([gone, blocking[0]])
        assert gone.cancelled()
        assert told.depths[-1] == 3
        network.go.set()
        assert same(await stays, noise(3))
        await blocking[1]
    assert tracks.staged == ["first", "second", "stays"]
    assert not any(0.5 in batch for batch in network.order)


@pytest.mark.parametrize("poisoned", [1, 3])
async def test_a_track_that_breaks_the_network_fails_alone(poisoned: int) -> None:
    told = Told()
    async with batcher_of(Choking(), told, max_windows=32) as batcher:
        tracks = Tracks(batcher)
        good = [tracks.send(f"good-{i}", noise(3, i)) for i in range(6)]
        bad = [tracks.send(f"bad-{i}", noise(2, first=MARK)) for i in range(poisoned)]
        for i, task in enumerate(good):
            assert same(await task, noise(3, i))
        for task in bad:
            with pytest.raises(InferenceFailed, match="ValueError: can't take this"):
                await task
        assert batcher.healthy
    assert len(tracks.staged) == 6 + poisoned
    assert set(told.faults) == {"failed"}
    assert len(told.faults) > poisoned  # and the batches that they were in


async def test_of_a_failed_batch_nobody_is_run_alone_who_waits_no_more() -> None:
    network = Choking()
    async with batcher_of(network, max_windows=3, max_delay_s=5) as batcher:
        tracks = Tracks(batcher)
        network.order.clear()
        network.go.clear()
        first, bad, gone = (
            tracks.send("first", noise(1)),
            tracks.send("bad", noise(1, first=MARK)),
            tracks.send("gone", noise(1, first=0.5)),
        )
        await until(lambda: network.sizes == [3, 1])
        gone.cancel()
        await asyncio.wait([gone])
        network.go.set()
        assert same(await first, noise(1))
        with pytest.raises(InferenceFailed):
            await bad
    assert network.sizes == [3, 1, 1]


async def test_a_fault_that_passes_is_told_and_harms_no_track() -> None:
    told = Told()
    async with batcher_of(Stumbling(), told) as batcher:
        tracks = Tracks(batcher)
        marked = noise(3, first=MARK)
        got, other = await asyncio.gather(tracks.send("a", marked), tracks.send("b", noise(2)))
        assert same(got, marked)
        assert same(other, noise(2))
    assert told.faults == ["failed"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_samples_that_are_not_finite_fail_their_track_alone(value: float) -> None:
    told = Told()
    async with batcher_of(SmallNet(), told) as batcher:
        tracks = Tracks(batcher)
        broken = noise(3)
        broken[1, 200] = value
        good, bad, fine = (
            tracks.send("good", noise(2, 1)),
            tracks.send("bad", broken),
            tracks.send("fine", noise(2, 2)),
        )
        assert same(await good, noise(2, 1))
        assert same(await fine, noise(2, 2))
        with pytest.raises(InferenceFailed, match="samples are not finite"):
            await bad
    assert sorted(tracks.staged) == ["bad", "fine", "good"]
    assert told.faults == ["not_finite"]


@pytest.mark.parametrize("table", ["genre", "embedding"])
async def test_outputs_that_are_not_finite_fail_their_track_alone(table: str) -> None:
    told = Told()
    async with batcher_of(Overflowing(table), told) as batcher:
        tracks = Tracks(batcher)
        good, bad = tracks.send("good", noise(2)), tracks.send("bad", noise(2, first=MARK))
        assert same(await good, noise(2))
        with pytest.raises(InferenceFailed, match="outputs are not finite"):
            await bad
    assert told.faults == ["not_finite"]


async def test_out_of_memory_halves_the_batch_and_every_track_is_answered() -> None:
    told = Told()
    async with batcher_of(Cramped(), told, max_windows=32) as batcher:
        tracks = Tracks(batcher)
        tasks = [tracks.send(f"t{i}", noise(5, i)) for i in range(8)]
        for i, task in enumerate(tasks):
            assert same(await task, noise(5, i))
        assert not told.faults  # what fits was found out when warming up
        with pytest.raises(DeviceOutOfMemory) as caught:
            await tracks.send("huge", noise(1, first=MARK))
        assert caught.value.retryable
        assert batcher.healthy
        assert same(await tracks.send("next", noise(3)), noise(3))
    assert set(told.faults) == {"out_of_memory"}


async def test_a_buffer_that_finds_no_memory_fails_its_tracks_retryably(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    told = Told()
    async with batcher_of(SmallNet(), told) as batcher:
        batcher._engine._buffers.clear()  # as batches that hung have left it
        with monkeypatch.context() as full:
            full.setattr(batcher._engine, "_new_buffer", run_out)
            with pytest.raises(DeviceOutOfMemory):
                await Tracks(batcher).send("a", noise(1))
        assert same(await Tracks(batcher).send("b", noise(2)), noise(2))
    assert told.faults == ["out_of_memory"]


async def test_a_hung_batch_fails_retryably_and_the_next_goes_on() -> None:
    network, told = Hanging(), Told()
    async with batcher_of(network, told, timeout_s=0.5, max_stuck=2) as batcher:
        tracks = Tracks(batcher)
        hung = tracks.send("hung", noise(1, first=MARK))
        await until(lambda: "hung" in tracks.staged)
        behind = tracks.send("behind", noise(3))
        with pytest.raises(DeviceHung) as caught:
            await hung
        assert caught.value.retryable
        assert not batcher.healthy
        assert batcher.live
        assert same(await behind, noise(3))
        await until(lambda: batcher.healthy)
        network.release.set()
    assert told.faults == ["hung"]
    assert tracks.staged == ["hung", "behind"]


async def test_a_batch_that_hangs_as_it_is_copied_counts_as_hung(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with batcher_of(SmallNet(), timeout_s=0.2, max_stuck=1) as batcher:
        go = threading.Event()
        with monkeypatch.context() as hanging:
            hanging.setattr(batcher._engine, "_fill", lambda *_: go.wait())
            with pytest.raises(DeviceHung):
                await Tracks(batcher).send("hung", noise(1))
        assert not batcher.healthy
        assert not batcher.live
        go.set()
        await Tracks(batcher).send("next", noise(1))
        assert batcher.healthy


async def test_of_a_hung_batch_only_the_track_that_hangs_alone_fails() -> None:
    network, told = Hanging(), Told()
    async with batcher_of(network, told, timeout_s=0.5, max_delay_s=0.1) as batcher:
        tracks = Tracks(batcher)
        good, hung, fine = (
            tracks.send("good", noise(2, 1)),
            tracks.send("hung", noise(3, first=MARK)),
            tracks.send("fine", noise(2, 2)),
        )
        with pytest.raises(DeviceHung):
            await hung
        assert same(await good, noise(2, 1))
        assert same(await fine, noise(2, 2))
        assert batcher.healthy
        network.release.set()
    assert told.faults == ["hung", "hung"]


async def test_where_a_second_track_hangs_alone_the_rest_of_the_batch_fails_at_once() -> None:
    network, told = Hanging(), Told()
    async with batcher_of(network, told, timeout_s=0.5, max_delay_s=0.1) as batcher:
        tracks = Tracks(batcher)
        tasks = [tracks.send(f"t{i}", noise(1, i, first=MARK)) for i in range(4)]
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, DeviceHung) for error in ended)
        network.release.set()
    assert told.faults == ["hung", "hung", "hung"]


async def test_after_too_many_hung_batches_the_batcher_is_not_live() -> None:
    network = Hanging()
    async with batcher_of(network, timeout_s=0.5, max_stuck=2) as batcher:
        tracks = Tracks(batcher)
        for _ in range(2):
            with pytest.raises(DeviceHung):
                await tracks.send("hung", noise(1, first=MARK))
        assert not batcher.live
        assert not batcher.healthy
        network.release.set()
        await until(lambda: batcher.live)


async def test_a_lost_device_is_told_and_retryable() -> None:
    told = Told()
    async with batcher_of(Breaking(), told) as batcher:
        tracks = Tracks(batcher)
        with pytest.raises(DeviceLost) as caught:
            await tracks.send("a", noise(1, first=MARK))
        assert caught.value.retryable
        assert not batcher.live
    assert told.faults == ["lost"]


async def test_stopping_finishes_what_is_queued_and_refuses_the_rest() -> None:
    network = SmallNet()
    batcher = batcher_of(network, max_windows=4, max_delay_s=30, queue_windows=8)
    await batcher.__aenter__()
    tracks = Tracks(batcher)
    queued = [tracks.send(f"t{i}", noise(3, i)) for i in range(9)]
    await asyncio.sleep(0)
    stopping = asyncio.create_task(batcher.__aexit__(None, None, None))
    await asyncio.sleep(0)
    with pytest.raises(WorkerStopping):
        await tracks.send("refused", noise(1))
    async with asyncio.timeout(5):
        await stopping
    for i, task in enumerate(queued):
        assert same(await task, noise(3, i))
    assert set(tracks.staged) == {f"t{i}" for i in range(9)}


async def test_stopping_gives_back_what_is_not_done_in_time() -> None:
    network, told = SmallNet(), Told()
    batcher = batcher_of(network, told, max_windows=4, drain_s=0.2)
    await batcher.__aenter__()
    tracks = Tracks(batcher)
    network.go.clear()
    tasks = [tracks.send(f"t{i}", noise(4, i)) for i in range(4)]
    await until(lambda: len(network.order) > 4)  # the warm-up's four, and the first batch
    async with asyncio.timeout(5):
        await batcher.__aexit__(None, None, None)
    for task in tasks:
        with pytest.raises(WorkerStopping):
            await task
    assert told.depths[-1] == 0
    assert tracks.staged == ["t0", "t1", "t2", "t3"] * 2  # two batches of four
    network.go.set()


async def test_the_batch_on_the_device_ends_before_the_batcher_is_left() -> None:
    network, told = SmallNet(), Told()
    async with batcher_of(network, told) as batcher:
        tracks = Tracks(batcher)
        for task in await held_up(network, tracks):
            task.cancel()
        asyncio.get_running_loop().call_later(0.3, network.go.set)
    assert told.batches == [1]


@pytest.mark.parametrize(
    "windows",
    [
        np.zeros((2, SAMPLES)),
        np.zeros((2, SAMPLES + 1), np.float32),
        np.zeros(SAMPLES, np.float32),
        np.zeros((0, SAMPLES), np.float32),
    ],
    ids=["float64", "longer", "flat", "none"],
)
async def test_windows_of_another_shape_or_type_are_refused(windows: np.ndarray) -> None:
    async with batcher_of(SmallNet()) as batcher:
        tracks = Tracks(batcher)
        with pytest.raises(ValueError, match=r"windows are float32 \(n, 400\)"):
            await tracks.send("odd", windows)
    assert not tracks.staged
