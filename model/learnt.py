"""Which clips a bundle has learnt from, in short, so that it is noticed where they are measured."""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

MOST = 50_000  # marks that are kept, in 0.3 MB
KEY = "learnt"  # in a bundle's `training`


def sides(fit: object) -> frozenset[str]:
    """The sides of a split that weights learn from, by how they are fitted in the end."""
    return frozenset({"train"} if fit == "train" else {"train", "valid"})


def mark(name: str) -> int:
    """Four bytes of a hash: of a million pairs of names, none is likely to share one."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:4], "big")


def record(names: Iterable[str], start: Mapping[str, Any]) -> str:
    """The marks of clips of these names, and of those in `start`'s `training`, as text.

    Of more than `MOST` the lowest stay, which are as good as drawn by chance.
    """
    found = sorted({*map(mark, names), *marks(start)})[:MOST]
    return base64.b64encode(np.array(found, ">u4").tobytes()).decode()


def marks(training: Mapping[str, Any]) -> frozenset[int]:
    """The marks in a bundle's `training`; none where it keeps none, or nothing that can be read."""
    try:
        raw = base64.b64decode(training.get(KEY, ""), validate=True)
        return frozenset(np.frombuffer(raw, ">u4").tolist())
    except (TypeError, ValueError):
        return frozenset()
