"""Pictures of taggrams: what the model heard, window by window."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
            f"{printable(name)}: {head.name}",
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
            figure.savefig(path, dpi=120)
        except OSError as error:
            raise SourceInvalid(f"The picture {path} can't be written: {error}.") from error


def _draw_panel(
    panel: Axes, table: np.ndarray, labels: Sequence[str], *, hop_s: float, duration_s: float
) -> None:
    """One head: `table` is (windows, labels); a silent window, a row of zeros, stays grey."""
    strongest = np.argsort(table.mean(axis=0))[-LABELS_SHOWN:]  # the last row is drawn on top
    heard = np.where(table.any(axis=1, keepdims=True), table, np.nan)
    panel.set_facecolor(SILENT_COLOUR)
    picture = panel.imshow(
        heard[:, strongest].T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=0.0,
        vmax=1.0,
        extent=(0.0, len(table) * hop_s, -0.5, len(strongest) - 0.5),
    )
    panel.set_yticks(range(len(strongest)), [labels[index] for index in strongest])
    panel.set_xlim(0, max(duration_s, len(table) * hop_s))
    panel.xaxis.set_major_formatter(lambda seconds, _: clock(seconds))
    panel.set_xlabel("time" if np.isfinite(heard).all() else "time (grey: silent)")
    assert panel.figure is not None
    panel.figure.colorbar(picture, ax=panel, pad=0.01, fraction=0.03, label="probability")
