"""The list of faults: a name, what it does, and what came of it."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass

from tests.faults.checker import Verdict
from tests.faults.stand import Failed, Lane, Stand


@dataclass(frozen=True, slots=True)
class Outcome:
    """A line of the table.

    `recovery_s` is the longest time from a fault (of a service: from its end) to the next answer on
    a partition that had something to answer.
    """

    verdict: Verdict
    recovery_s: float

    def line(self, fault: str) -> dict[str, object]:
        return {"fault": fault, **asdict(self.verdict), "recovery_s": self.recovery_s}


Run = Callable[[Stand, bool], Awaitable[Outcome]]


SCENARIOS: dict[str, Run] = {}
"""By name; `run(stand, quick)` raises `Failed` where a promise is broken."""


def named(run: Run) -> str:
    """The name of a fault, from its function's."""
    return run.__name__.replace("_", "-")


def scenario(run: Run) -> Run:
    """Enter a function in the list, under its own name."""
    SCENARIOS[named(run)] = run
    return run


def require(condition: bool, promise: str) -> None:
    """Raise `Failed` with the promise that was broken."""
    if not condition:
        raise Failed(promise)


def require_letters(lane: Lane, promise: str, **codes: int) -> None:
    """Raise `Failed` unless there are so many dead letters of each reason code, and no others."""
    reasons = lane.checker.reasons()
    require(reasons == codes, f"{promise}: {reasons}")


async def conclude(lane: Lane, moments: list[float], *, duplicates_at_most: int = 0) -> Outcome:
    """Stop the workers and judge: nothing lost, nothing contradicted.

    Parameters
    ----------
    moments
        When workers were killed, services were back (`time.monotonic`).
    duplicates_at_most
        What was in flight when it had to be done again.
    """
    verdict = await lane.verdict()
    require(verdict.lost == 0, f"nothing is lost: {verdict} {lane.checker.unanswered[:5]}")
    require(verdict.differing == 0, f"answers don't contradict each other: {verdict}")
    require(
        verdict.duplicates <= duplicates_at_most,
        f"at most {duplicates_at_most} duplicates: {verdict}",
    )
    require(not lane.spool.exists() or not spooled(lane), f"the spool is empty: {spooled(lane)}")
    return Outcome(verdict, lane.checker.recovery_s(moments))


def spooled(lane: Lane) -> list[str]:
    """Audio that lies in the spool."""
    return [str(path) for path in lane.spool.glob("*/*")]


def now_s() -> float:
    return time.monotonic()
