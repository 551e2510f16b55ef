"""The device engine: runs the network over a batch in threads of its own, beside the event loop."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from joblib import cpu_count
from numpy.typing import NDArray
from torch import Tensor, nn

from model.device import choose_device
from worker.batch.threads import Crew
from worker.errors import DeviceLost, DeviceOutOfMemory
from worker.malloc import keep_freed_memory
from worker.settings import BatchSettings

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]

# On a CPU a batch is cut into chunks that stay in its cache; docs/batching.md has the figures.
CPU_CHUNK_WINDOWS = 16
# A device's first use may load a driver and compile kernels.
START_TIMEOUT_S = 180.0
# Forward passes without running out of memory until a larger batch is tried again.
PASSES_BEFORE_GROWING = 100
KEPT_BYTES = 256 << 20  # of memory that passes freed
# What decoding 3 s of an MP3 takes of a core, to weigh the network against; docs/batching.md.
DECODE_S_PER_WINDOW = 0.0025
TIMED_PASSES = 3
OUT_OF_MEMORY_PHRASES = (
    "out of memory",
    "can't allocate memory",
    "_ALLOC_FAILED",
    "CUFFT_INTERNAL_ERROR",  # where PyTorch keeps the memory that it needs
)


@dataclass(frozen=True, slots=True)
class WindowOutputs:
    """What the network says of some windows, float32.

    `probabilities` has `(windows, labels)` by head, `embedding` is `(windows, embedding_dim)`.
    """

    probabilities: dict[str, Floats]
    embedding: Floats

    def rows(self, start: int, stop: int) -> "WindowOutputs":
        return WindowOutputs(
            {name: table[start:stop] for name, table in self.probabilities.items()},
            self.embedding[start:stop],
        )

    def finite(self) -> bool:
        tables = (*self.probabilities.values(), self.embedding)
        return all(bool(np.isfinite(table).all()) for table in tables)

    @staticmethod
    def join(parts: "Sequence[WindowOutputs]") -> "WindowOutputs":
        """One after another; at least one part."""
        return WindowOutputs(
            {
                name: np.concatenate([part.probabilities[name] for part in parts])
                for name in parts[0].probabilities
            },
            np.concatenate([part.embedding for part in parts]),
        )


def choose_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """The number type to autocast the network to; None is float32, always so on a CPU."""
    if device.type == "cpu" or precision == "float32":
        return None
    # float16 is the default: its finer steps keep the scores of `fast` within 0.005 of
    # float32's, where bfloat16 moved them by up to 0.065.
    return torch.bfloat16 if precision == "bfloat16" else torch.float16


class Buffer:
    """Room for one batch: on the host, where windows are copied together, and on the device.

    On CUDA the host's side is pinned, so that the copy to the device runs on a stream of its own
    beside the network's; `ready` tells that stream's progress. On a CPU both sides are the same.
    """

    def __init__(self, max_windows: int, window_samples: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.host = torch.zeros((max_windows, window_samples), pin_memory=pinned)
        self.samples = self.host.to(device)
        self.ready = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self.view: Floats = self.host.numpy()


class Engine:
    """The network on its device.

    Parameters
    ----------
    network : nn.Module
        `(windows, window_samples)` float32 to an output with `probabilities` and `embedding`, its
        front end in float32 whatever autocast says. It is moved to the device.
    window_samples : int
    settings : BatchSettings

    Raises
    ------
    SettingsInvalid
        CUDA is asked for and absent.
    """

    def __init__(self, network: nn.Module, window_samples: int, settings: BatchSettings) -> None:
        self._device = choose_device(settings.device)
        self._autocast = choose_autocast(settings.precision, self._device)
        self.lost = False
        self.out_of_memory_total = 0
        self._network = network
        self._window_samples = window_samples
        self._max_windows = settings.max_windows
        self._in_flight = settings.in_flight
        self._timeout_s = settings.timeout_s
        on_cpu = self._device.type == "cpu"
        self._threads = settings.threads if on_cpu else 1
        self._chunk = min(CPU_CHUNK_WINDOWS, self._max_windows) if on_cpu else self._max_windows
        self._buckets = buckets(self._chunk)
        self._fits = self._chunk
        self._passes = 0
        self._buffers: list[Buffer] = []
        self._copiers = Crew("timbre-copy", 1)
        self._runners = Crew("timbre-network", self._threads or 1)
        self._streams: Streams | None = None

    @property
    def stuck(self) -> int:
        """Threads that hang on the device."""
        return self._copiers.stuck + self._runners.stuck

    async def start(self) -> None:
        """Move the network to the device and run it once for every size of batch.

        Raises DeviceOutOfMemory, DeviceLost or DeviceHung where it can't run there.
        """
        if self._device.type == "cpu":
            # Chunks run side by side instead; docs/batching.md has the figures.
            torch.set_num_threads(1)
            keep_freed_memory(KEPT_BYTES)
        elif self._autocast is None:
            # Otherwise convolutions would round float32 to TF32.
            torch.backends.cudnn.allow_tf32 = False
        await self._runners.run([self._warm_up], START_TIMEOUT_S)
        if not self._threads:
            await self._choose_threads()
        # Each thread takes the memory that it needs now, and not with the first long track.
        full = partial(self._run, self._buffers[0], 0, self._chunk)
        await self._runners.run([full] * self._threads, START_TIMEOUT_S)

    def close(self) -> None:
        """Let the threads end; those that hang are left to the end of the process."""
        self._copiers.close()
        self._runners.close()

    async def stage(self, parts: Sequence[Floats]) -> tuple[Buffer, list[bool]]:
        """Copy parts `(windows, window_samples)` into one buffer, one after another.

        Returns the buffer, which `release` takes back, and which parts it holds: one with a sample
        that is not finite is left out. Raises DeviceLost and DeviceHung as `compute` does.
        """
        free = self._buffers.pop() if self._buffers else None
        ((buffer, held),) = await self._copiers.run(
            [partial(self._fill, free, parts)], self._timeout_s
        )
        return buffer, held

    def release(self, buffer: Buffer) -> None:
        """Give a buffer back for another batch."""
        self._buffers.append(buffer)

    async def compute(self, buffer: Buffer, start: int, stop: int) -> WindowOutputs:
        """Run the network over rows `start` to `stop` of a staged buffer.

        Raises
        ------
        DeviceOutOfMemory
            Not even a single window fits.
        DeviceHung
            It took longer than the time limit; other threads have taken over.
        DeviceLost
            The device broke; only another process can use it again.
        Exception
            Whatever else the network raises.
        """
        cuts = cut(start, stop, self._chunk, self._threads)
        calls = [partial(self._run, buffer, first, last) for first, last in pairwise(cuts)]
        return WindowOutputs.join(await self._runners.run(calls, self._timeout_s))

    async def _choose_threads(self) -> None:
        """As many as keep up with decoders on the other cores: more would only disturb them."""
        (window_s,) = await self._runners.run([self._time_a_window], START_TIMEOUT_S)
        cores = cpu_count()
        self._threads = threads_beside_decoders(window_s, cores)
        log.info(
            "The network takes %.2f ms a window and gets %d of %d cores",
            1000 * window_s,
            self._threads,
            cores,
        )
        self._runners.close()
        self._runners = Crew("timbre-network", self._threads)

    # From here on: in the engine's threads.

    def _warm_up(self) -> None:
        with self._faults_told():
            if self._device.type == "cuda":
                self._streams = Streams(self._device)
            self._network.eval().to(self._device)
            # Before the network has had what it can get: it makes do with less, a buffer can't.
            self._buffers = [self._new_buffer() for _ in range(self._in_flight)]
        # The largest first: the memory it takes serves the smaller ones.
        for windows in reversed(self._buckets):
            self._run(self._buffers[0], 0, windows)

    def _new_buffer(self) -> Buffer:
        return Buffer(self._max_windows, self._window_samples, self._device)

    def _time_a_window(self) -> float:
        """Seconds in the best of a few passes over as many windows as a pass takes."""
        buffer = self._buffers[0]
        taken_s = []
        for _ in range(TIMED_PASSES):
            begun_s = time.perf_counter()
            self._run(buffer, 0, self._chunk)
            taken_s.append(time.perf_counter() - begun_s)
        return min(taken_s) / self._chunk

    def _fill(self, buffer: Buffer | None, parts: Sequence[Floats]) -> tuple[Buffer, list[bool]]:
        held = [bool(np.isfinite(part).all()) for part in parts]
        with self._faults_told():
            buffer = buffer or self._new_buffer()
            rows = 0
            for part in (part for part, whole in zip(parts, held, strict=True) if whole):
                buffer.view[rows : rows + len(part)] = part
                rows += len(part)
            if self._streams is not None:
                self._streams.upload(buffer, rows)
        return buffer, held

    def _run(self, buffer: Buffer, start: int, stop: int) -> WindowOutputs:
        """Rows `start` to `stop` in as few passes as the device's memory allows."""
        parts: list[WindowOutputs] = []
        while start < stop:
            size = min(stop - start, self._fits)
            outputs = self._pass(buffer, start, start + size)
            if outputs is None:
                self._shrink(size)
            else:
                parts.append(outputs)
                start += size
                self._grow()
        return WindowOutputs.join(parts)

    def _pass(self, buffer: Buffer, start: int, stop: int) -> WindowOutputs | None:
        """One forward pass; None where memory does not hold it."""
        try:
            with self._faults_told():
                if self._streams is None:
                    return self._forward(buffer.samples[start:stop])
                with self._streams.computing(buffer):
                    padded = pad_to_bucket(buffer.samples, start, stop, self._buckets)
                    return self._forward(padded).rows(0, stop - start)
        except DeviceOutOfMemory as error:
            log.warning("%d windows at once are too many: %s", stop - start, error.message)
        # Outside `except`, for its traceback would keep the tensors of the pass alive.
        return None

    @contextmanager
    def _faults_told(self) -> Iterator[None]:
        """Raise `DeviceOutOfMemory` or `DeviceLost` where that is what happens inside; of a device
        that broke the first call to fail may be any."""
        try:
            yield
        except Exception as error:
            if _is_out_of_memory(error):
                # Its frames hold the tensors of the pass, and `contextlib` of Python 3.12 makes a
                # circle of them that lasts until it is collected.
                raise DeviceOutOfMemory(
                    f"{self._device} has too little free memory ({error}); free some, or use a "
                    "smaller model."
                ) from error.with_traceback(None)
            if isinstance(error, torch.AcceleratorError):
                self.lost = True
                raise DeviceLost(
                    f"{self._device} broke: {error}. Start the worker again."
                ) from error
            raise

    def _forward(self, samples: Tensor) -> WindowOutputs:
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None),
        ):
            output = self._network(samples)
            return WindowOutputs(
                {name: _to_host(table) for name, table in output.probabilities.items()},
                _to_host(output.embedding),
            )

    def _shrink(self, windows: int) -> None:
        self.out_of_memory_total += 1
        if self._streams is not None:
            with self._faults_told():
                torch.cuda.empty_cache()
        if windows == 1:
            raise DeviceOutOfMemory(
                f"A single window does not fit the free memory of {self._device}; free some, or "
                "use a smaller model."
            )
        self._fits, self._passes = windows // 2, 0

    def _grow(self) -> None:
        """After a while without running out, try twice as many again."""
        self._passes += 1
        if self._fits < self._chunk and self._passes >= PASSES_BEFORE_GROWING:
            self._fits, self._passes = 2 * self._fits, 0


class Streams:
    """Two CUDA streams: the copy of the next batch runs beside the network over the present one."""

    def __init__(self, device: torch.device) -> None:
        self._copy = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, buffer: Buffer, rows: int) -> None:
        """Start copying the first `rows` of a buffer to the device."""
        assert buffer.ready is not None
        with torch.cuda.stream(self._copy):
            buffer.samples[:rows].copy_(buffer.host[:rows], non_blocking=True)
            buffer.ready.record(self._copy)

    @contextmanager
    def computing(self, buffer: Buffer) -> Iterator[None]:
        """Run what is inside on the compute stream, once the buffer's samples are there."""
        assert buffer.ready is not None
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(buffer.ready)
            yield


def threads_beside_decoders(window_s: float, cores: int) -> int:
    """The network's share of the cores when a window takes it `window_s` of one, rounded up."""
    return math.ceil(cores * window_s / (window_s + DECODE_S_PER_WINDOW))


def buckets(most: int) -> list[int]:
    """Sizes of batches: powers of two below `most`, and `most`."""
    return [2**i for i in range((most - 1).bit_length())] + [most]


def cut(start: int, stop: int, chunk: int, threads: int) -> list[int]:
    """Where to cut rows into near-equal chunks of at most `chunk`, as many for every thread.

    Batches that don't fill one chunk stay whole: cutting them would cost more than it wins.
    """
    count = -(-(stop - start) // chunk)
    if count > 1:
        count = min(-(-count // threads) * threads, stop - start)
    return [start + (stop - start) * i // count for i in range(count + 1)]


def pad_to_bucket(samples: Tensor, start: int, stop: int, sizes: Sequence[int]) -> Tensor:
    """Rows from `start`, as many as the smallest bucket that holds those up to `stop`.

    The rows after `stop` are whatever the buffer holds or zeros; nobody reads their results.
    """
    bucket = next(size for size in sizes if size >= stop - start)
    rows = samples[start : start + bucket]
    return torch.nn.functional.pad(rows, (0, 0, 0, bucket - len(rows)))


def _to_host(table: Tensor) -> Floats:
    host: Floats = table.float().cpu().numpy()
    return host


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        phrase in str(error) for phrase in OUT_OF_MEMORY_PHRASES
    )
