"""The engine: chunks, buffers, memory that runs out, threads that hang, devices that break."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.unit.worker.small_network import Answer, SmallNet
from tests.waiting import until
from worker.batch import device
from worker.batch.device import (
    CPU_CHUNK_WINDOWS,
    DECODE_S_PER_WINDOW,
    TIMED_PASSES,
    Engine,
    WindowOutputs,
    buckets,
    choose_autocast,
    cut,
    pad_to_bucket,
    threads_beside_decoders,
)
from worker.batch.threads import Crew
from worker.errors import DeviceHung, DeviceLost, DeviceOutOfMemory, TimbreError
from worker.settings import BatchSettings

SAMPLES = 64
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Cramped(SmallNet):
    """Runs out of memory above `room` windows, as a crowded GPU does."""

    room = 1

    def forward(self, samples: Tensor) -> Answer:
        if len(samples) > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory at {len(samples)} windows")
        return super().forward(samples)


@asynccontextmanager
async def engine_of(network: nn.Module, **settings: object) -> AsyncIterator[Engine]:
    options = {"device": "cpu", "threads": 1, **settings}
    engine = Engine(network, SAMPLES, BatchSettings.model_validate(options))
    await engine.start()
    try:
        yield engine
    finally:
        engine.close()


def noise(windows: int, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal((windows, SAMPLES))
    return samples.astype(np.float32)


def expected(windows: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        answer = SmallNet()(torch.from_numpy(windows))
    table: np.ndarray = answer.probabilities["genre"].numpy()
    return table


async def outputs_of(engine: Engine, *parts: np.ndarray) -> WindowOutputs:
    buffer, held = await engine.stage(parts)
    try:
        rows = sum(len(part) for part, whole in zip(parts, held, strict=True) if whole)
        return await engine.compute(buffer, 0, rows)
    finally:
        engine.release(buffer)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("windows", [1, 8, 9, 40])
async def test_outputs_come_in_the_order_of_the_windows(threads: int, windows: int) -> None:
    samples = noise(windows)
    async with engine_of(SmallNet(), threads=threads) as engine:
        outputs = await outputs_of(engine, samples[:1], samples[1:])
    np.testing.assert_allclose(outputs.probabilities["genre"], expected(samples), atol=1e-5)
    assert outputs.embedding.shape == (windows, 16)


async def test_on_a_cpu_batches_are_cut_into_chunks_and_never_padded() -> None:
    network = SmallNet()
    async with engine_of(network, threads=2) as engine:
        network.order.clear()
        await outputs_of(engine, noise(21))
    assert sum(network.sizes) == 21
    assert max(network.sizes) <= CPU_CHUNK_WINDOWS


async def test_the_network_is_warm_for_every_size_once_started() -> None:
    network = SmallNet()
    async with engine_of(network):
        assert network.sizes == [16, 8, 4, 2, 1, 16]


@pytest.mark.parametrize(("threads", "chosen"), [(0, 1), (3, 3)])
async def test_each_thread_has_run_a_full_chunk_once_started(threads: int, chosen: int) -> None:
    """Or its memory would come with the first long track."""
    network = SmallNet()
    async with engine_of(network, threads=threads):
        timed = 0 if threads else TIMED_PASSES
        assert network.sizes.count(16) == 1 + timed + chosen


async def test_a_part_that_is_not_finite_is_left_out_of_the_buffer() -> None:
    good, bad = noise(3), noise(2, seed=1)
    bad[1, 7] = np.inf
    async with engine_of(SmallNet()) as engine:
        buffer, held = await engine.stage([good[:1], bad, good[1:]])
        assert held == [True, False, True]
        outputs = await engine.compute(buffer, 0, 3)
    np.testing.assert_allclose(outputs.probabilities["genre"], expected(good), atol=1e-5)


async def test_running_out_of_memory_halves_the_batch_and_goes_on() -> None:
    network = Cramped()
    samples = noise(16)
    async with engine_of(network) as engine:
        assert engine.out_of_memory_total == 4  # 16, 8, 4 and 2 windows, when warming up
        network.order.clear()
        outputs = await outputs_of(engine, samples)
        assert set(network.sizes) == {1}
        assert engine.out_of_memory_total == 4  # it remembers
    np.testing.assert_allclose(outputs.probabilities["genre"], expected(samples), atol=1e-5)


async def test_larger_batches_are_tried_again_after_a_while() -> None:
    network = Cramped()
    async with engine_of(network) as engine:
        network.room = 8
        for _ in range(60):
            await outputs_of(engine, noise(16))
        network.order.clear()
        await outputs_of(engine, noise(16))
        assert set(network.sizes) == {8}
        assert engine.out_of_memory_total == 4  # when warming up


async def test_a_single_window_that_does_not_fit_is_device_out_of_memory() -> None:
    network = Cramped()
    network.room = 0
    with pytest.raises(DeviceOutOfMemory, match="single window"):
        async with engine_of(network):
            pass


@pytest.mark.parametrize(
    "error",
    [
        None,
        MemoryError(),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"),
    ],
)
async def test_every_allocation_that_fails_counts_as_out_of_memory(error: Exception | None) -> None:
    class Greedy(SmallNet):
        def forward(self, samples: Tensor) -> Answer:
            if len(samples) > 2:
                if error is not None:
                    raise error
                torch.empty(2**50)
            return super().forward(samples)

    async with engine_of(Greedy()) as engine:
        outputs = await outputs_of(engine, noise(5))
        assert engine.out_of_memory_total == 3
    np.testing.assert_allclose(outputs.probabilities["genre"], expected(noise(5)), atol=1e-5)


async def test_what_a_pass_held_is_freed_before_a_smaller_one_is_tried() -> None:
    class Hoarding(SmallNet):
        def forward(self, samples: Tensor) -> Answer:
            assert all(held() is None for held in given), "held on to by the error"
            if len(samples) > 2:
                features = samples * 2
                given.append(weakref.ref(features))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(samples)

    given: list[weakref.ref[Tensor]] = []
    gc.disable()  # which might free it in time
    try:
        async with engine_of(Hoarding()):
            assert len(given) == 3
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), DeviceOutOfMemory),
        (torch.AcceleratorError("CUDA error: the device is busy or unavailable"), DeviceLost),
    ],
)
async def test_a_device_that_cannot_take_the_network_is_told_by_type(
    fault: Exception, told: type[TimbreError]
) -> None:
    class Homeless(SmallNet):
        def to(self, *_: object, **__: object) -> "Homeless":
            raise fault

    with pytest.raises(told, match=f"cpu .+{fault}"):
        async with engine_of(Homeless()):
            pass


async def test_a_hung_thread_is_left_behind_and_others_go_on() -> None:
    network = SmallNet()
    async with engine_of(network, timeout_s=0.5, threads=2) as engine:
        network.go.clear()
        with pytest.raises(DeviceHung, match=r"0\.5 s"):
            await outputs_of(engine, noise(4))
        await until(lambda: engine.stuck == 1)  # once its idle neighbour has ended
        network.go.set()
        outputs = await outputs_of(engine, noise(4))
        np.testing.assert_allclose(outputs.probabilities["genre"], expected(noise(4)), atol=1e-5)
        await until(lambda: engine.stuck == 0)  # it came back after all


def test_a_hung_thread_does_not_hold_up_the_end_of_the_process() -> None:
    program = """
import asyncio, threading
from worker.batch.threads import Crew
from worker.errors import DeviceHung

async def main():
    crew = Crew("test", 1)
    try:
        await crew.run([threading.Event().wait], 0.1)
    except DeviceHung:
        print("hung", crew.stuck)

asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout == "hung 1\n"


@pytest.mark.parametrize(("threads", "started"), [(0, 1), (3, 3)])
async def test_the_threads_end_with_the_engine(threads: int, started: int) -> None:
    before = set(threading.enumerate())
    async with engine_of(SmallNet(), threads=threads) as engine:
        await outputs_of(engine, noise(20))
        await until(lambda: len(set(threading.enumerate()) - before) == 1 + started)
    await until(lambda: not set(threading.enumerate()) - before)


async def test_a_broken_device_is_lost_for_good() -> None:
    class Breaking(SmallNet):
        def forward(self, samples: Tensor) -> Answer:
            if len(samples) == 5:
                raise torch.AcceleratorError("CUDA error: device-side assert triggered")
            return super().forward(samples)

    async with engine_of(Breaking()) as engine:
        with pytest.raises(DeviceLost, match="device-side assert"):
            await outputs_of(engine, noise(5))
        assert engine.lost


async def test_a_device_that_breaks_as_windows_are_copied_is_lost_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def upload(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    async with engine_of(SmallNet()) as engine:
        monkeypatch.setattr(engine, "_streams", SimpleNamespace(upload=upload))
        with pytest.raises(DeviceLost, match="unspecified launch failure"):
            await engine.stage([noise(1)])
        assert engine.lost


async def test_batches_in_flight_take_their_memory_before_the_network_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    async with engine_of(SmallNet(), in_flight=2) as engine:
        monkeypatch.setattr(device, "Buffer", run_out)
        buffer, _ = await engine.stage([noise(1)])
        await engine.stage([noise(1)])
        engine.release(buffer)
        await engine.stage([noise(1)])


async def test_calls_of_a_crew_run_side_by_side_and_the_first_error_is_told() -> None:
    crew = Crew("test", 2)
    meet = threading.Barrier(2, timeout=5)
    try:
        assert sorted(await crew.run([meet.wait, meet.wait], 10)) == [0, 1]

        def fail() -> int:
            raise KeyError("here")

        with pytest.raises(KeyError, match="here"):
            await crew.run([lambda: 1, fail, lambda: int("x")], 10)
        assert await crew.run([lambda: 3], 10) == [3]
    finally:
        crew.close()


async def test_calls_behind_one_that_hangs_are_not_made_when_it_comes_back() -> None:
    crew = Crew("test", 1)
    go, made = threading.Event(), threading.Event()
    calls: list[Callable[[], object]] = [go.wait, made.set]
    with pytest.raises(DeviceHung):
        await crew.run(calls, 0.1)
    await asyncio.sleep(0)
    go.set()
    await until(lambda: crew.stuck == 0)
    assert not made.is_set()
    crew.close()


def test_buckets_are_powers_of_two_up_to_the_most() -> None:
    assert buckets(1) == [1]
    assert buckets(8) == [1, 2, 4, 8]
    assert buckets(48) == [1, 2, 4, 8, 16, 32, 48]


def test_the_network_gets_its_share_of_the_cores_beside_decoders() -> None:
    light_s, heavy_s = 0.2 * DECODE_S_PER_WINDOW, 5 * DECODE_S_PER_WINDOW
    assert [threads_beside_decoders(light_s, cores) for cores in (1, 2, 6, 16)] == [1, 1, 1, 3]
    assert [threads_beside_decoders(heavy_s, cores) for cores in (1, 2, 6, 16)] == [1, 2, 5, 14]


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, 64, 100])
@pytest.mark.parametrize("threads", [1, 2, 7, 64])
def test_cuts_cover_all_rows_in_near_equal_chunks(rows: int, threads: int) -> None:
    cuts = cut(5, 5 + rows, 8, threads)
    sizes = np.diff(cuts)
    assert (cuts[0], cuts[-1]) == (5, 5 + rows)
    assert 0 < sizes.min() <= sizes.max() <= 8
    assert sizes.max() - sizes.min() <= 1
    assert rows <= 8 or len(sizes) % threads == 0 or len(sizes) == rows


def test_padding_reaches_the_bucket_also_at_the_buffers_end() -> None:
    samples = torch.arange(8.0).unsqueeze(1)
    assert pad_to_bucket(samples, 0, 3, [1, 2, 4, 8])[:, 0].tolist() == [0, 1, 2, 3]
    assert pad_to_bucket(samples, 5, 8, [1, 2, 4, 8])[:, 0].tolist() == [5, 6, 7, 0]


def test_a_cpu_computes_in_float32_whatever_the_precision() -> None:
    for precision in ("auto", "bfloat16", "float16", "float32"):
        assert choose_autocast(precision, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("auto", torch.float16),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float32", None),
    ],
)
def test_cuda_computes_in_the_precision_asked_for(
    precision: str, dtype: torch.dtype | None
) -> None:
    assert choose_autocast(precision, torch.device("cuda")) is dtype


@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
async def test_cuda_answers_as_a_cpu_does(precision: str) -> None:
    network, samples = SmallNet(), noise(37)
    async with engine_of(
        network, device="cuda", precision=precision, max_windows=64, threads=0
    ) as engine:
        network.order.clear()
        outputs = await outputs_of(engine, samples)
        assert network.sizes == [64]  # padded to its bucket
    atol = 1e-5 if precision == "float32" else 2e-2
    np.testing.assert_allclose(outputs.probabilities["genre"], expected(samples), atol=atol)
    assert outputs.embedding.dtype == np.float32
    assert network.dtypes == {getattr(torch, precision)}


@needs_cuda
async def test_on_cuda_batches_in_flight_do_not_mix() -> None:
    parts = [noise(16, seed) for seed in range(12)]
    async with engine_of(SmallNet(), device="cuda", precision="float32") as engine:
        outputs = await asyncio.gather(*(outputs_of(engine, part) for part in parts))
    for part, got in zip(parts, outputs, strict=True):
        np.testing.assert_allclose(got.probabilities["genre"], expected(part), atol=1e-5)
