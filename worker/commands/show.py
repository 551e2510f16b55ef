"""`timbre show`: what Redis holds of one track."""

import asyncio
import json
from typing import cast

from pydantic import ValidationError
from rich.text import Text

from schemas.events import TrackTags
from worker.cache import Keys, connect, reason
from worker.commands import console
from worker.errors import ServicesUnavailable, TrackUnknown
from worker.settings import RedisSettings, Settings

DAY_S = 86_400


def show_track(settings: Settings, track_id: str, *, as_json: bool) -> None:
    """Print a track's result: for people, or the event as it went out."""
    result, expires_in_s = asyncio.run(stored(settings.redis, track_id))
    if as_json:
        console.json_line(result.to_bytes().decode())
        return
    out = console.out()
    out.print(Text(result.track_id, style="bold"), Text(result.audio.uri, style="dim"))
    out.print(console.facts(result))
    out.print(console.tag_table(result))
    timings = " · ".join(f"{s} {t:.3f} s" for s, t in result.processing.timings_s.items())
    origin = "from the cache" if result.processing.cached else timings
    out.print(Text(f"  {result.processing.processed_at:%Y-%m-%d %H:%M:%S} UTC · {origin}", "dim"))
    if result.metadata:
        out.print(Text(f"  {json.dumps(result.metadata, ensure_ascii=False)}", "dim"))
    if expires_in_s >= 0:
        out.print(Text(f"  kept for {_span(expires_in_s)}", "dim"))


def _span(seconds: int) -> str:
    """A time to live, in days, or below one day as a clock shows it."""
    return f"{seconds / DAY_S:.1f} days" if seconds >= DAY_S else f"{console.clock(seconds)} more"


async def stored(settings: RedisSettings, track_id: str) -> tuple[TrackTags, int]:
    """The result of a track, and the seconds until it expires; below 0 where it never does.

    Raises
    ------
    TrackUnknown
        There is none, it expired, or it can't be read.
    ServicesUnavailable
        Redis can't be used.
    """
    key = Keys(settings.prefix).track(track_id).encode(errors="surrogateescape")
    async with connect(settings) as redis:
        try:
            value = cast(bytes | None, await redis.hget(key, "result"))
            ttl_s = await redis.ttl(key)
        except Exception as error:
            raise ServicesUnavailable(
                f"Redis can't be used ({reason(error)}); check that it runs, TIMBRE_REDIS__URL and "
                "TIMBRE_REDIS__PASSWORD."
            ) from error
    if value is None:
        raise TrackUnknown(
            f"Redis holds no result of {track_id}. It may be on its way (timbre watch), may have "
            "failed (timbre dead-letters list), or the id is another (timbre watch tells ids, "
            "into a pipe or a file whole ones)."
        )
    try:
        result = TrackTags.from_bytes(value)
    except ValidationError as error:
        raise TrackUnknown(
            f"What Redis holds of {track_id} is no result of this version of Timbre; have the "
            "track tagged again."
        ) from error
    return result, ttl_s
