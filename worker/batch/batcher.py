"""The batcher: windows of many tracks become batches, batches go through the device, and every
track gets its own outputs back, or its own error.

Which windows go into a batch is the queue's business (`fair_queue`), how a batch is run the
engine's (`device`). docs/batching.md tells the rules to operators.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Self

from model.bundle import Bundle
from schemas.events import Priority
from worker.batch.device import Buffer, Engine, WindowOutputs
from worker.batch.fair_queue import FairQueue, Piece, Request, Ticket
from worker.errors import (
    DeadlineExceeded,
    DeviceHung,
    DeviceLost,
    DeviceOutOfMemory,
    InferenceFailed,
    TimbreError,
    TrackCancelled,
    WorkerStopping,
)
from worker.settings import BatchSettings
from worker.windows import Windows

__all__ = ["BatchObserver", "Batcher", "Fault", "Ticket", "WindowOutputs"]

log = logging.getLogger(__name__)

END_GRACE_S = 1.0
Fault = Literal["failed", "not_finite", "out_of_memory", "hung", "lost"]


class BatchObserver:
    """Is told what the batcher does, on the event loop; this one heeds nothing of it."""

    def on_batch(self, windows: int, fill: float, wait_s: float, compute_s: float) -> None:
        """A batch was computed: `fill` of the most it may hold, its oldest window `wait_s` old."""

    def on_queue(self, depth: int) -> None:
        """So many windows wait."""

    def on_fault(self, kind: Fault) -> None:
        """A batch failed, or a track run alone."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A piece and the row of the batch's buffer at which it starts."""

    piece: Piece
    row: int

    @property
    def stop(self) -> int:
        return self.row + len(self.piece)


class Batcher:
    """Fills batches with windows of many tracks and runs them on the device.

    Parameters
    ----------
    bundle : Bundle
        The model.
    settings : BatchSettings
    observer : BatchObserver, optional
    drain_s : float
        Seconds that leaving the context waits for what is queued; then it is given back.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: BatchSettings,
        *,
        observer: BatchObserver | None = None,
        drain_s: float = 15.0,
    ) -> None:
        self._settings = settings
        self._window_samples = bundle.window_samples
        self._observer = observer or BatchObserver()
        self._drain_s = drain_s
        self._engine = Engine(bundle.network, bundle.window_samples, settings)
        self._queue = FairQueue(
            settings.queue_windows,
            max(1, int(settings.queue_windows * settings.track_share)),
            settings.backfill_share,
        )
        self._max_windows = min(settings.max_windows, settings.queue_windows)
        # What has come back of each request so far, by first window.
        self._requests: dict[Request, dict[int, WindowOutputs]] = {}
        self._queued = asyncio.Event()
        self._in_flight = asyncio.Semaphore(settings.in_flight)
        self._turn = asyncio.Lock()
        self._batches: set[asyncio.Task[None]] = set()
        self._filler: asyncio.Task[None] | None = None
        self._stopping = False
        self._last_batch_hung = False

    @property
    def live(self) -> bool:
        """False once only a new process can help: the device broke or its threads keep hanging."""
        return (
            self._filler is not None
            and not self._filler.done()
            and not self._engine.lost
            and self._engine.stuck < self._settings.max_stuck
        )

    @property
    def healthy(self) -> bool:
        """Whether batches get through: live, and the last batch did not hang."""
        return self.live and not self._last_batch_hung

    async def __aenter__(self) -> Self:
        try:
            await self._engine.start()
        except BaseException:
            self._engine.close()
            raise
        self._filler = asyncio.create_task(self._fill_batches())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Refuse new windows and finish what is queued; give back what isn't done in `drain_s`."""
        self._stopping = True
        self._queued.set()
        try:
            if self._requests:
                await asyncio.wait([r.answer for r in self._requests], timeout=self._drain_s)
        finally:
            await self._give_up()
            self._engine.close()

    async def _give_up(self) -> None:
        """Give back what is left, which is nothing after a drain in time."""
        for request in self._requests:
            request.fail(WorkerStopping("The worker stops and gives the track back."))
        assert self._filler is not None
        self._filler.cancel()
        if self._batches:
            # Nobody waits for these any more, but a process that ends while a thread is inside
            # PyTorch is aborted.
            await asyncio.wait(self._batches, timeout=END_GRACE_S)
        for task in self._batches:
            task.cancel()
        await asyncio.gather(self._filler, *self._batches, return_exceptions=True)

    async def predict(
        self, windows: Windows, *, priority: Priority = "upload", ticket: Ticket
    ) -> WindowOutputs:
        """Outputs of a track's windows; waits for its turn, and longer when the queue is full.

        Parameters
        ----------
        windows : np.ndarray [shape=(n, window_samples), dtype=float32]
            At least one, of mono samples in [-1, 1]. They are read in place, maybe still after
            this raised, so they must not change.
        ticket : Ticket
            Whose windows these are and until when they are wanted.

        Raises
        ------
        DeadlineExceeded, TrackCancelled
            The ticket ran out or was cancelled; what was still queued has cost no compute.
        InferenceFailed
            The network failed on these windows even alone, or they or its outputs aren't finite.
        DeviceOutOfMemory, DeviceHung, DeviceLost
            The device failed; retryable.
        WorkerStopping
            The batcher stops.
        ValueError
            There are no `windows`, or they have another shape or type.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[WindowOutputs] = loop.create_future()
        request = Request(windows, ticket, priority, answer, loop.time())
        try:
            self._admit(request)
            async with asyncio.timeout_at(ticket.deadline):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded(
                f"{ticket.track_key} was not through the network by its deadline; if the worker is "
                "loaded, raise TIMBRE_WORKER__TRACK_DEADLINE_S."
            ) from None
        finally:
            self._dismiss(request)

    def _admit(self, request: Request) -> None:
        shape, dtype = request.windows.shape, request.windows.dtype
        if shape[1:] != (self._window_samples,) or dtype != "float32" or shape[0] == 0:
            raise ValueError(
                f"windows are float32 (n, {self._window_samples}), these are {dtype} {shape}"
            )
        if self._stopping:
            raise WorkerStopping("The worker stops and takes no more windows.")
        if request.ticket.cancelled:
            raise TrackCancelled(f"Tagging of {request.ticket.track_key} was cancelled.")
        self._requests[request] = {}
        request.ticket.requests.add(request)
        self._queue.put(request)
        self._queue_changed()

    def _dismiss(self, request: Request) -> None:
        """Nobody waits for the answer any more, whatever it was."""
        request.answer.cancel()
        self._requests.pop(request, None)
        request.ticket.requests.discard(request)
        self._queue.discard(request)
        self._queue_changed()

    def _queue_changed(self) -> None:
        self._queued.set()
        self._observer.on_queue(self._queue.depth)

    async def _fill_batches(self) -> None:
        """Send batch after batch on its way, a few at a time."""
        loop = asyncio.get_running_loop()
        while True:
            await self._in_flight.acquire()
            await self._until_due()
            now = loop.time()
            pieces = self._queue.take(self._max_windows, now)
            self._observer.on_queue(self._queue.depth)
            if not pieces:
                self._in_flight.release()
                continue
            wait_s = now - min(piece.request.since for piece in pieces)
            task = asyncio.create_task(self._process(pieces, wait_s))
            self._batches.add(task)
            task.add_done_callback(self._batches.discard)

    async def _until_due(self) -> None:
        """Wait until a batch is full or the oldest window has waited long enough."""
        loop = asyncio.get_running_loop()
        while True:
            self._queued.clear()
            oldest_since = self._queue.oldest_since
            patience_s = None
            if oldest_since is not None:
                patience_s = oldest_since + self._settings.max_delay_s - loop.time()
                if self._stopping or patience_s <= 0 or self._queue.depth >= self._max_windows:
                    return
            with suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self._queued.wait()

    async def _process(self, pieces: list[Piece], wait_s: float) -> None:
        """One batch from the queue to its answers."""
        try:
            buffer, placed = await self._stage(pieces)
            async with self._turn:
                await self._compute(buffer, placed, wait_s)
            self._engine.release(buffer)
        except (DeviceHung, DeviceLost) as error:
            self._last_batch_hung = isinstance(error, DeviceHung)  # also as it was copied
            self._fail_all(pieces, "hung" if self._last_batch_hung else "lost", error)
        except DeviceOutOfMemory as error:  # for the buffer; the network makes do with less
            self._fail_all(pieces, "out_of_memory", error)
        except Exception as error:
            told = InferenceFailed(f"The batch could not be run: {type(error).__name__}: {error}")
            self._fail_all(pieces, "failed", told)
            log.exception("A batch failed outside the network")
        finally:
            self._in_flight.release()

    async def _stage(self, pieces: list[Piece]) -> tuple[Buffer, list[_Placed]]:
        """Copy the pieces into a buffer; a piece that can't be computed fails here."""
        buffer, held = await self._engine.stage([piece.windows for piece in pieces])
        placed: list[_Placed] = []
        row = 0
        for piece, whole in zip(pieces, held, strict=True):
            if whole:
                placed.append(_Placed(piece, row))
                row += len(piece)
            else:
                self._fail(piece, "not_finite", "The track's samples are not finite numbers.")
        return buffer, placed

    async def _compute(self, buffer: Buffer, placed: list[_Placed], wait_s: float) -> None:
        loop = asyncio.get_running_loop()
        wanted = [p for p in placed if not p.piece.request.over(loop.time())]
        if not wanted:
            return
        started = loop.time()
        start, stop = wanted[0].row, wanted[-1].stop
        try:
            outputs = await self._run(buffer, start, stop)
        except DeviceLost:
            raise
        except DeviceHung:
            if len({p.piece.request.ticket for p in wanted}) == 1:
                raise
            self._observer.on_fault("hung")
            log.warning("A batch hung; its tracks are run one by one")
            await self._compute_each(buffer, wanted)
        except Exception as error:
            log.warning("A batch failed; its tracks are run one by one", exc_info=error)
            if not isinstance(error, TimbreError):  # memory that runs out is counted by itself
                self._observer.on_fault("failed")
            await self._compute_each(buffer, wanted)
        else:
            for p in wanted:
                self._answer(p.piece, outputs.rows(p.row - start, p.stop - start))
        self._observer.on_batch(
            stop - start, (stop - start) / self._max_windows, wait_s, loop.time() - started
        )

    async def _compute_each(self, buffer: Buffer, placed: list[_Placed]) -> None:
        """Each track alone, so that one whose windows break the network harms no other.

        Where a second one hangs it is the device that does, and nobody is tried any more.
        """
        loop = asyncio.get_running_loop()
        one_hung = False
        for p in placed:
            request = p.piece.request
            if request.over(loop.time()):
                continue
            try:
                self._answer(p.piece, await self._run(buffer, p.row, p.stop))
            except DeviceLost:
                raise
            except DeviceHung as error:
                if one_hung:
                    raise
                one_hung = True
                self._observer.on_fault("hung")
                for each in tuple(request.ticket.requests):
                    each.fail(error)
            except TimbreError as error:
                request.fail(error)
            except Exception as error:
                log.warning("The network failed on a track", exc_info=error)
                self._fail(
                    p.piece,
                    "failed",
                    f"The network failed on the track's windows: {type(error).__name__}: {error}",
                )

    async def _run(self, buffer: Buffer, start: int, stop: int) -> WindowOutputs:
        """One run on the device, with what there is to tell of it."""
        halved = self._engine.out_of_memory_total
        try:
            outputs = await self._engine.compute(buffer, start, stop)
        except DeviceHung:
            self._last_batch_hung = True
            raise
        finally:
            for _ in range(self._engine.out_of_memory_total - halved):
                self._observer.on_fault("out_of_memory")
        self._last_batch_hung = False
        return outputs

    def _answer(self, piece: Piece, rows: WindowOutputs) -> None:
        request = piece.request
        parts = self._requests.get(request)
        if parts is None or request.answer.done():  # nobody waits any more
            return
        if not rows.finite():
            self._fail(piece, "not_finite", "The network's outputs are not finite numbers.")
            return
        parts[piece.start] = rows
        if sum(len(part.embedding) for part in parts.values()) == len(request.windows):
            request.answer.set_result(WindowOutputs.join([parts[key] for key in sorted(parts)]))

    def _fail(self, piece: Piece, kind: Fault, message: str) -> None:
        self._observer.on_fault(kind)
        piece.request.fail(InferenceFailed(message))

    def _fail_all(self, pieces: list[Piece], kind: Fault, error: TimbreError) -> None:
        self._observer.on_fault(kind)
        log.error("A batch of %d pieces of tracks is lost: %s", len(pieces), error.message)
        for piece in pieces:
            piece.request.fail(type(error)(error.message))
