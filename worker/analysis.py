"""What is found out about a track's audio, whoever asked for it."""

from typing import Annotated

import numpy as np
from pydantic import BeforeValidator, FailFast

from model.bundle import Bundle
from schemas.events import AudioFacts, Finite, ModelRef, Part, Tag, WindowCounts
from worker.settings import VoteMethod

UNIT = 1e-3  # how far from 1 the length of an embedding may be, rounded as it is
MAX_HEADS = 16
MAX_FACTS_CHARS = 512  # of the audio's facts but its address; as FFmpeg tells them they have 250


class _FirstFault(FailFast):
    """Ends at the first wrong item: the errors of a few MiB of them take minutes and gigabytes."""

    __hash__ = object.__hash__  # which a type that may be None needs


def _few_heads(taggram: object) -> object:
    if isinstance(taggram, dict) and len(taggram) > MAX_HEADS:
        raise ValueError("more heads than a model has")
    return taggram


Numbers = Annotated[list[Finite], _FirstFault()]
Taggram = Annotated[dict[str, Annotated[list[Numbers], _FirstFault()]], BeforeValidator(_few_heads)]


class Analysis(Part):
    """All that is known of a track's audio: what the events say of it, and what the cache keeps."""

    audio: AudioFacts
    """The audio that was tagged"""
    tags: Annotated[list[Tag], _FirstFault()]
    """Tags, head by head in the model's order, best first within each"""
    uncertain: bool
    """Whether no genre is clear enough to rely on"""
    windows: WindowCounts
    """Windows counted"""
    vote: VoteMethod
    """How windows became tags"""
    model: ModelRef
    """The model that tagged"""
    taggram: Taggram | None
    """By head, a table (windows, labels) of probabilities; present only where configured"""
    embedding: Numbers
    """The track as a vector of length 1 (L2)"""

    def may_be_of(self, bundle: Bundle) -> bool:
        """Whether it is such as `bundle` makes them: its labels, shapes and windows that voted."""
        labels = {
            (head.name, label, category)
            for head in bundle.heads
            for label, category in zip(head.labels, head.categories, strict=True)
        }
        tags = [(tag.head, tag.label, tag.category) for tag in self.tags]
        widths = {head.name: len(head.labels) for head in bundle.heads}
        tables = self.taggram or {}
        return (
            self.model == ModelRef(name=bundle.name, version=bundle.version)
            and len(self.audio.model_dump_json(exclude={"uri"})) <= MAX_FACTS_CHARS
            and {tag.head for tag in self.tags} == widths.keys()
            and labels.issuperset(tags)
            and len(set(tags)) == len(tags)
            and len(self.embedding) == bundle.embedding_dim
            and abs(float(np.linalg.norm(self.embedding)) - 1) < UNIT
            and self.windows.silent < self.windows.total
            and (self.taggram is None or tables.keys() == widths.keys())
            and all(len(table) == self.windows.total for table in tables.values())
            and all(len(row) == widths[name] for name, rows in tables.items() for row in rows)
        )
