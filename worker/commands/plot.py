"""Pictures of taggrams: what the model heard, window by window."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.text import Text

from model.bundle import Bundle
from worker.analysis import Analysis
from worker.commands.console import clock
from worker.errors import SourceInvalid
from worker.printable import printable

LABELS_SHOWN = 12
WIDTH_INCHES = 10.0
LABEL_INCHES = 0.24
MARGIN_INCHES = 1.1
SILENT_COLOUR = "0.8"
TITLE_CELLS = 80
TICK_STEPS = (1, 1.5, 2, 3, 6, 10)
MARK = "Taggram drawn by Timbre"
MARK_FIELDS = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}


def check_place(path: Path) -> None:
    """Make sure that a picture can be drawn at `path`.

    Raises
    ------
    SourceInvalid
        Its folder takes no file, or a file is there that is no taggram drawn before.
    """
    if not os.access(path.parent, os.W_OK) or not path.parent.is_dir():
        raise SourceInvalid(f"The picture {path} can't be drawn: nothing can be put there.")
    if path.exists() and not (path.is_file() and MARK.encode() in path.read_bytes()):
        raise SourceInvalid(
            f"{path} is there and is no taggram of Timbre's: give the picture another name, or "
            "leave that file out."
        )


def draw_taggrams(
    path: Path, tracks: Sequence[tuple[str, Analysis]], bundle: Bundle, *, hop_s: float
) -> None:
    """Draw the taggrams of `tracks` (name and analysis) below one another into a picture.

    Every head has a panel, time along it and its labels up it, the strongest on top; a head with
    many labels shows the `LABELS_SHOWN` that were heard most. The suffix of `path` gives the form.

    Raises
    ------
    SourceInvalid
        The picture can't be written there.
    """
    panels = [
        (
            f"{head.name}: {_short(name)}",
            analysis,
            np.asarray(analysis.taggram[head.name]),
            head.labels,
        )
        for name, analysis in tracks
        if analysis.taggram is not None
        for head in bundle.heads
    ]
    heights = [
        min(len(labels), LABELS_SHOWN) * LABEL_INCHES + MARGIN_INCHES for *_, labels in panels
    ]
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
        for panel, (title, analysis, table, labels) in zip(axes, panels, strict=True):
            panel.set_title(title, loc="left", fontweight="bold")
            duration_s = analysis.audio.duration_s
            _draw_panel(panel, table, labels, hop_s=hop_s, duration_s=duration_s)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing")  # it is drawn as a box
                figure.savefig(path, dpi=120, metadata={MARK_FIELDS[path.suffix.lower()]: MARK})
        except OSError as error:
            raise SourceInvalid(f"The picture {path} can't be written: {error}.") from error


def _short(source: str) -> str:
    """The file's name, as long as a title may be."""
    name = Text(printable(Path(source).name or source))
    name.truncate(TITLE_CELLS, overflow="ellipsis")
    return name.plain


def _draw_panel(
    panel: Axes, table: np.ndarray, labels: Sequence[str], *, hop_s: float, duration_s: float
) -> None:
    """One head: `table` is (windows, labels); a silent window, a row of zeros, is grey.

    A tail that no window reached stays blank.
    """
    strongest = np.argsort(table.mean(axis=0))[-LABELS_SHOWN:]  # the last row is drawn on top
    heard = np.where(table.any(axis=1, keepdims=True), table, np.nan)
    picture = panel.imshow(
        heard[:, strongest].T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap=mpl.colormaps["magma"].with_extremes(bad=SILENT_COLOUR),
        vmin=0.0,
        vmax=1.0,
        extent=(0.0, len(table) * hop_s, -0.5, len(strongest) - 0.5),
    )
    panel.set_yticks(range(len(strongest)), [labels[index] for index in strongest])
    panel.set_xlim(0, duration_s)  # the last window begins early, so as to end with the track
    panel.xaxis.set_major_locator(MaxNLocator(steps=TICK_STEPS, integer=True))
    panel.xaxis.set_major_formatter(lambda seconds, _: clock(seconds))
    panel.set_xlabel("time" if np.isfinite(heard).all() else "time (grey: silent)")
    assert panel.figure is not None
    panel.figure.colorbar(picture, ax=panel, pad=0.01, fraction=0.03, label="probability")
