"""One track's way from its address to its tags: fetch, decode, batch, vote. No Kafka, no Redis.

Windows are cut and told from silence where a track is decoded, in the decoder's own process.
"""

import asyncio
import hashlib
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from model.bundle import Bundle
from schemas.events import AudioFacts, ModelRef, Priority, Tag, WindowCounts
from worker.analysis import Analysis
from worker.batch.batcher import Batcher, BatchObserver, Ticket, WindowOutputs
from worker.decode.decoder import DecodedFacts
from worker.decode.handle import Block
from worker.decode.pool import DecoderPool
from worker.errors import DeadlineExceeded
from worker.fetch.fetcher import Fetcher, Sleep
from worker.fetch.spool import SpooledAudio
from worker.settings import Settings
from worker.vote import mean_embedding, vote

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

# In the time of a batch's delay and its pass a decoder makes some four: with fewer it would wait.
BLOCKS_AHEAD = 4
TAGGRAM_DECIMALS = 4
EMBEDDING_DECIMALS = 6


@dataclass
class Timings:
    """Seconds spent by stage; a stage entered again adds up."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started_s)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


Lookup = Callable[[str], Awaitable[Analysis | None]]


class Tagger:
    """The stages of one process, shared by all its tracks.

    Parameters
    ----------
    settings
        Sections fetch, decode, windows, batch, vote and worker.
    bundle
        The model; its sample rate and window decide how tracks are decoded and cut.
    """

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        *,
        batch_observer: BatchObserver | None = None,
        on_retry: Callable[[str], None] = lambda code: None,
        on_bytes: Callable[[int], None] = lambda size_bytes: None,
        on_decoder_restart: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._bundle = bundle
        self.model = ModelRef(name=bundle.name, version=bundle.version)
        self.fetcher = Fetcher(settings.fetch, on_retry=on_retry, on_bytes=on_bytes)
        self.decoders = DecoderPool(
            settings.decode,
            settings.windows,
            sample_rate_hz=bundle.sample_rate_hz,
            window_samples=bundle.window_samples,
            on_restart=on_decoder_restart,
        )
        self.batcher = Batcher(bundle, settings.batch, observer=batch_observer)
        self._stack = AsyncExitStack()
        self._uncertain_below = (
            bundle.uncertain_threshold
            if settings.vote.uncertain_below is None
            else settings.vote.uncertain_below
        )
        decisive = repr((bundle.name, bundle.version, settings.windows, settings.vote))
        self.analysis_key = hashlib.sha256(decisive.encode()).hexdigest()[:16]
        """Changes whenever the same audio would be analysed to another result."""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for stage in (self.fetcher, self.batcher, self.decoders):
                await stack.enter_async_context(stage)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def tag(
        self,
        uri: str,
        *,
        priority: Priority = "upload",
        expected_sha256: str | None = None,
        timings: Timings | None = None,
        lookup: Lookup | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> Analysis:
        """Tag the audio at `uri`.

        Parameters
        ----------
        expected_sha256
            Other bytes are refused.
        timings
            Seconds by stage are added to it, also where the track fails.
        lookup
            Asked for an earlier analysis once the audio's SHA-256 is known; it is returned as it
            is, with the address that the audio was fetched from then.
        sleep
            Waits so many seconds, before another attempt at a fetch.

        Raises
        ------
        TimbreError
            What went wrong in any stage, or DeadlineExceeded after `worker.track_deadline_s`.
        """
        deadline_s = self._settings.worker.track_deadline_s
        timings = timings or Timings()
        try:
            async with asyncio.timeout(deadline_s) as scope:
                async with AsyncExitStack() as stack:
                    with timings.measure("fetch"):
                        spooled = await stack.enter_async_context(
                            self.fetcher.fetch(uri, expected_sha256=expected_sha256, sleep=sleep)
                        )
                    if lookup is not None and (known := await lookup(spooled.sha256)):
                        return known
                    heard = await self._listen(spooled.path, uri, scope, priority, timings)
                with timings.measure("vote"):
                    return self._conclude(uri, spooled, heard)
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded(
                f"The track was not done within {deadline_s:g} s; if tracks are long or the worker "
                "is loaded, raise TIMBRE_WORKER__TRACK_DEADLINE_S."
            ) from None

    async def _listen(
        self, path: Path, uri: str, scope: asyncio.Timeout, priority: Priority, timings: Timings
    ) -> "_Heard":
        """Decode and predict block by block, so that memory doesn't grow with the track.

        The deadline in `scope` stands still while others hold the decoders: a worker with much to
        do is late, and no reason to give a track up.
        """
        loop = asyncio.get_running_loop()
        left_s = (scope.when() or loop.time()) - loop.time()
        pending: deque[asyncio.Task[_BlockOutputs]] = deque()
        outputs: list[_BlockOutputs] = []
        try:
            async with AsyncExitStack() as stack:
                scope.reschedule(None)
                with timings.measure("wait"):  # for a free decoder
                    decoding = await stack.enter_async_context(
                        self.decoders.decode(path, priority=priority)
                    )
                deadline = loop.time() + left_s
                scope.reschedule(deadline)
                ticket = Ticket(uri, deadline)
                blocks = aiter(decoding)
                while True:
                    with timings.measure("decode"):
                        block = await anext(blocks, None)
                    if block is None:
                        break
                    pending.append(asyncio.create_task(self._predict(block, ticket, priority)))
                    if len(pending) > BLOCKS_AHEAD:
                        with timings.measure("batch"):
                            outputs.append(await pending.popleft())
            with timings.measure("batch"):
                while pending:
                    outputs.append(await pending.popleft())
        finally:
            if pending:
                ticket.cancel()
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)
        return _Heard(outputs, decoding.facts)

    async def _predict(self, block: Block, ticket: Ticket, priority: Priority) -> "_BlockOutputs":
        """Outputs of a block's windows that are not silent; the others cost no compute.

        The windows are copied out at once: it costs little, and a decoder whose blocks are free
        goes on to the next track while the network still works on this one.
        """
        silent = block.silent
        windows = block.windows[~silent]
        block.release()
        if not len(windows):
            return _BlockOutputs(silent, None)
        outputs = await self.batcher.predict(windows, priority=priority, ticket=ticket)
        return _BlockOutputs(silent, outputs)

    def _conclude(self, uri: str, spooled: SpooledAudio, heard: "_Heard") -> Analysis:
        options = self._settings.vote
        probabilities = {
            head.name: heard.probabilities(head.name, len(head.labels))
            for head in self._bundle.heads
        }
        verdict = vote(
            probabilities,
            ~heard.silent,
            self._bundle.heads,
            method=options.method,
            uncertain_below=self._uncertain_below,
        )
        tags, counts = list[Tag](), Counter[str]()
        for voted in verdict.tags:
            counts[voted.head] += 1
            # The best tag of a head always stands, however low its score.
            if counts[voted.head] == 1 or (
                voted.score >= options.min_score
                and (options.max_tags is None or counts[voted.head] <= options.max_tags)
            ):
                tags.append(Tag.model_validate(voted, from_attributes=True))
        return Analysis(
            audio=AudioFacts(
                uri=uri,
                sha256=spooled.sha256,
                size_bytes=spooled.size_bytes,
                **asdict(heard.facts) | {"duration_s": round(heard.facts.duration_s, 3)},
            ),
            tags=tags,
            uncertain=verdict.uncertain,
            windows=WindowCounts(total=len(heard.silent), silent=int(heard.silent.sum())),
            vote=options.method,
            model=self.model,
            taggram=_taggram(probabilities) if options.taggram else None,
            embedding=heard.embedding(),
        )


@dataclass(frozen=True)
class _BlockOutputs:
    """`silent` has a flag for every window, `outputs` rows for those that are not silent."""

    silent: Flags
    outputs: WindowOutputs | None


class _Heard:
    """The outputs of a whole track."""

    def __init__(self, blocks: list[_BlockOutputs], facts: DecodedFacts) -> None:
        self.facts = facts
        self.silent: Flags = np.concatenate([block.silent for block in blocks])
        self._outputs = [block.outputs for block in blocks if block.outputs is not None]

    def probabilities(self, head: str, labels: int) -> Floats:
        """(windows, labels); rows of silent windows are zero."""
        table = np.zeros((len(self.silent), labels), np.float32)
        if self._outputs:
            table[~self.silent] = np.concatenate([o.probabilities[head] for o in self._outputs])
        return table

    def embedding(self) -> list[float]:
        """Mean of the voting windows' embeddings."""
        windows = np.concatenate([o.embedding for o in self._outputs]).astype(np.float64)
        numbers: list[float] = mean_embedding(windows).round(EMBEDDING_DECIMALS).tolist()
        return numbers


def _taggram(probabilities: dict[str, Floats]) -> dict[str, list[list[float]]]:
    return {
        head: table.astype(np.float64).round(TAGGRAM_DECIMALS).tolist()
        for head, table in probabilities.items()
    }
