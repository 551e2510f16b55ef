"""Pictures in a folder, with an HTML page that shows them. Needs no display and no network."""

import warnings
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

mpl.rcParams["text.parse_math"] = False  # names and labels may have a "$"

MOST_NAMED = 20  # classes of a picture
MOST_POINTS = 1_000  # of which t-SNE is drawn

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #222; background: #fff; }}
figure {{ margin: 2.5rem 0; }} img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #555; max-width: 48rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


@dataclass
class Gallery:
    """A folder of pictures; `write` makes `index.html`."""

    folder: Path
    title: str
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def picture(self, name: str, figure: Figure, title: str, caption: str) -> None:
        """Save `figure` as `name`.png."""
        with warnings.catch_warnings():
            # A box stands for a letter that the font lacks.
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
            figure.savefig(self.folder / f"{name}.png", dpi=110, bbox_inches="tight")
        self.parts.append(
            f'<figure><h2>{escape(title)}</h2><img src="{name}.png" alt="{escape(title)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def note(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(f"<p>{escape(text)}</p>")

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        """A table of texts."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
        )
        self.parts.append(f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>")

    def write(self) -> Path:
        """The page, and its path."""
        page = self.folder / "index.html"
        page.write_text(
            PAGE.format(title=escape(self.title), body="\n".join(self.parts)), encoding="utf-8"
        )
        return page


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, outside of matplotlib's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def scatter_by_class(
    points: NDArray[np.floating], classes: NDArray[np.integer], labels: tuple[str, ...]
) -> Figure:
    """Points `(n, 2)` in the colour and shape of their class, named beside the picture.

    Of more than `MOST_NAMED` classes the others than the commonest are grey.
    """
    figure, axes = canvas(8, 6)
    named = commonest(np.bincount(classes, minlength=len(labels)), MOST_NAMED)
    others = points[~np.isin(classes, named)]
    if len(others):
        axes.scatter(others[:, 0], others[:, 1], s=10, c="lightgrey", label="other")
    for place, index in enumerate(named):
        mine = points[classes == index]
        if len(mine):
            colour, marker = f"C{place % 10}", "osD^v"[(place + place // 10) % 5]
            axes.scatter(mine[:, 0], mine[:, 1], s=18, c=colour, marker=marker, label=labels[index])
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def commonest(counts: NDArray[np.integer], most: int) -> NDArray[np.intp]:
    """Positions of the `most` largest of `counts`, in their order."""
    return np.sort(np.argsort(-counts, kind="stable")[:most])


def drawn_by_chance(count: int, most: int = MOST_POINTS, seed: int = 0) -> NDArray[np.intp]:
    """At most `most` of `count` positions, in their order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def tsne(vectors: NDArray[np.floating], seed: int = 0) -> NDArray[np.float64]:
    """Two dimensions of `(n, dims)` by t-SNE (van der Maaten and Hinton, 2008).

    Zeros where there is nothing to lay out: few vectors, one dimension, or all vectors the same,
    over which scikit-learn's crashes.
    """
    from sklearn.manifold import TSNE  # noqa: PLC0415  (slow to import, and only pictures need it)

    if len(vectors) < 4 or vectors.shape[1] < 2 or np.ptp(vectors, 0).max() < 1e-12:
        return np.zeros((len(vectors), 2))
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    projection = TSNE(perplexity=perplexity, random_state=seed, init="pca")
    return np.asarray(projection.fit_transform(np.asarray(vectors, dtype=np.float64)))
