"""Figures behind the batcher's defaults on a CPU: `python -m tests.performance.batching`.

Two tables for the bundle `fast`. CPU seconds a window by chunk, on one thread: they hardly depend
on what else the machine does. Windows a second by threads, alone and beside one decoder a core
that never rests, once as the engine does it (chunks side by side) and once with PyTorch's own
threads inside each operation.
"""

import asyncio
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import av
import numpy as np
import torch

from model.bundle import Bundle
from tests.audio import encode_as
from worker.batch.device import Engine
from worker.settings import BatchSettings

CORES = len(os.sched_getaffinity(0))
BATCH = 64
MEASURE_S = 6.0


def main() -> None:
    bundle = Bundle.load("fast")
    print(f"{bundle.name} {bundle.version}, {CORES} cores, batches of {BATCH} windows\n")
    print("| windows in a chunk | CPU ms a window |\n|---|---|")
    for chunk in (1, 2, 4, 8, 16, 32, 64):
        print(f"| {chunk} | {cpu_ms_a_window(bundle, chunk):.2f} |")
    print("\n| threads | how | windows/s alone | windows/s beside decoders | s/s decoded beside |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        track = encode_as(Path(folder) / "tone.mp3", 60.0)
        for threads in sorted({1, 2, CORES}):
            report(bundle, track, threads, inside=False)
            if threads > 1:
                report(bundle, track, threads, inside=True)


def report(bundle: Bundle, track: Path, threads: int, *, inside: bool) -> None:
    alone = asyncio.run(windows_per_s(bundle, threads, inside=inside))
    with decoders(track) as decoded_s:
        before, started = decoded_s.value, time.monotonic()
        beside = asyncio.run(windows_per_s(bundle, threads, inside=inside))
        rate = (decoded_s.value - before) / (time.monotonic() - started)
    how = "inside operations" if inside else "side by side"
    print(f"| {threads} | {how} | {alone:.0f} | {beside:.0f} | {rate:.0f} |")


def cpu_ms_a_window(bundle: Bundle, chunk: int) -> float:
    """The best of a few rounds over a batch."""
    torch.set_num_threads(1)
    samples = torch.from_numpy(noise(bundle))
    rounds = []
    with torch.inference_mode():
        for _ in range(6):
            started = time.thread_time()
            for start in range(0, BATCH, chunk):
                bundle.network(samples[start : start + chunk])
            rounds.append(time.thread_time() - started)
    return min(rounds) / BATCH * 1e3


async def windows_per_s(bundle: Bundle, threads: int, *, inside: bool) -> float:
    """Rate of the engine; `inside` gives each operation the threads and the engine only one."""
    engine = Engine(
        bundle.network,
        bundle.window_samples,
        BatchSettings(device="cpu", max_windows=BATCH, threads=1 if inside else threads),
    )
    await engine.start()
    torch.set_num_threads(threads if inside else 1)
    try:
        buffer, _ = await engine.stage([noise(bundle)])
        started, windows = time.monotonic(), 0
        while time.monotonic() - started < MEASURE_S:
            await engine.compute(buffer, 0, BATCH)
            windows += BATCH
        return windows / (time.monotonic() - started)
    finally:
        engine.close()


def noise(bundle: Bundle) -> np.ndarray:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (BATCH, bundle.window_samples))
    return samples.astype(np.float32)


@contextmanager
def decoders(track: Path) -> "Iterator[Synchronized[float]]":
    """One process a core that decodes `track` again and again, and how many seconds of it."""
    context = multiprocessing.get_context("spawn")
    decoded_s = context.Value("d", 0.0)
    processes = [
        context.Process(target=decode_for_ever, args=(track, decoded_s), daemon=True)
        for _ in range(CORES)
    ]
    for process in processes:
        process.start()
    try:
        while not decoded_s.value:
            time.sleep(0.05)
        yield decoded_s
    finally:
        for process in processes:
            process.terminate()
            process.join()


def decode_for_ever(track: Path, decoded_s: "Synchronized[float]") -> None:
    while True:
        with av.open(str(track)) as container:
            for frame in container.decode(audio=0):
                with decoded_s.get_lock():
                    decoded_s.value += frame.samples / frame.sample_rate


if __name__ == "__main__":
    main()
