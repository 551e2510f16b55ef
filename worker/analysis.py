"""What is found out about a track's audio, whoever asked for it."""

from typing import Annotated

from pydantic import Field

from schemas.events import AudioFacts, Finite, ModelRef, Part, Tag, WindowCounts


class Analysis(Part):
    """All that is known of a track's audio: what the events say of it, and what the cache keeps."""

    audio: AudioFacts
    """The audio that was tagged"""
    tags: list[Tag]
    """Tags, head by head in the model's order, best first within each"""
    uncertain: bool
    """Whether no genre is clear enough to rely on"""
    windows: WindowCounts
    """Windows counted"""
    vote: str
    """How windows became tags"""
    model: ModelRef
    """The model that tagged"""
    taggram: dict[str, list[list[Finite]]] | None
    """By head, a table (windows, labels) of probabilities; present only where configured"""
    embedding: Annotated[list[Finite], Field(min_length=1)]
    """The track as a vector of length 1 (L2)"""
