"""`timbre submit`."""

import asyncio
from collections.abc import Sequence

from rich.progress import TimeRemainingColumn
from rich.text import Text

from worker import console
from worker.errors import SourceInvalid
from worker.settings import Settings
from worker.sources import tracks
from worker.submit import submit

IDS_SHOWN = 20


def submit_tracks(settings: Settings, sources: Sequence[str], *, backfill: bool) -> int:
    """Publish every track that `sources` name; 0 when Kafka has them all, 1 when some failed.

    Their ids are printed, in a terminal only where they are few.
    """
    found = list(tracks(sources, "backfill" if backfill else "upload"))
    if not found:
        raise SourceInvalid("There is nothing to submit: the tables are empty.")
    remarks = console.err()
    with console.progress(remarks, "Submitting", TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=len(found))
        submission = asyncio.run(
            submit(settings.kafka, found, lambda track: progress.advance(task))
        )
    out = console.out()
    if len(found) <= IDS_SHOWN or not out.is_terminal:
        for track in found:
            out.print(Text.assemble(track.track_id, "  ", (track.audio.uri, "dim")))
    for topic, count in submission.delivered.items():
        out.print(f"Submitted {console.counted(count, 'track')} to {topic}", markup=False)
    for track_id, reason in submission.failed:
        remarks.print(Text.assemble(("Not submitted", "red"), f" {track_id}: {reason}"))
    return 1 if submission.failed else 0
