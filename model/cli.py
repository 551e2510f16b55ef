"""`timbre model`: train, evaluate, compare, explore, and bundles in and out.

A command imports what it needs when it runs, so that `timbre --help` stays quick.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

    from model.evaluate import Evaluation

app = typer.Typer(no_args_is_help=True, help="Models: train, evaluate, compare, explore, export.")
import_app = typer.Typer(no_args_is_help=True, help="Bundles out of published networks.")
app.add_typer(import_app, name="import")

MAX_COUNTED_LABELS = 25  # whose confusion a terminal's table has room for

BundlePath = Annotated[
    str | None,
    typer.Argument(help="A bundle's folder, or the name of a shipped one; the default if none."),
]
DatasetPath = Annotated[
    Path, typer.Option("--dataset", "-d", help="A folder, a CSV manifest, or a log-mel archive.")
]
LayoutName = Annotated[
    str | None,
    typer.Option(
        "--layout",
        help="archive, manifest, fma, fma-all, msd, gtzan or folders; found out if not given.",
    ),
]
SplitName = Annotated[
    str | None, typer.Option("--split", help="Only the clips of this split; all if none.")
]
Seed = Annotated[
    int,
    typer.Option("--seed", min=0, max=2**32 - 1, help="One seed, one result."),  # scikit-learn's
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="Few clips and short training: to see that it works.")
]


@app.command()
def train(  # noqa: PLR0917
    dataset: DatasetPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the bundle to write.")],
    layout: LayoutName = None,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Fine-tune this bundle (or `default`); else from scratch."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="JSON with what differs from the defaults.")
    ] = None,
    passes: Annotated[
        float | None, typer.Option("--passes", min=0.01, help="Passes over the clips.")
    ] = None,
    fit: Annotated[
        Literal["all", "train"],
        typer.Option("--fit", help="all: learn from validation songs too at last; train: never."),
    ] = "all",
    seed: Seed = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Log-mels of audio and the checkpoint; OUT.work if none."),
    ] = None,
) -> None:
    """Train a bundle on a data set.

    First a rehearsal on the training songs, measured on the validation songs;
    then, with --fit all, the same on both. The validation songs are never learnt from before
    they have been measured on.
    """
    from model.bundle import Bundle
    from model.datasets import load
    from model.train import Progress, load_recipe
    from model.train import train as run

    told = load_recipe(recipe, passes, fine_tuning=start is not None)
    begin = Bundle.load(None if start == "default" else start) if start else None
    data = load(dataset, layout)
    console, bar = _console(), _bar(training=True)
    tasks: dict[str, Any] = {}

    def step(part: str, done: int, total: int, loss: float) -> None:
        if part not in tasks:
            tasks[part] = bar.add_task(part, total=total, loss="")
        bar.update(tasks[part], completed=done, loss=f"loss {loss:.3f}" if loss else "")

    console.print(f"{data.name}: {len(data.clips)} clips, {len(data.labels)} labels")
    with bar:
        bundle = run(
            data,
            out,
            recipe=told,
            start=begin,
            fit=fit,
            seed=seed,
            device=device,
            resume=resume,
            work=work,
            progress=Progress(step=step, say=bar.console.print),
        )
    console.print(f"{out}: {bundle.name}, version {bundle.version}")


@app.command()
def evaluate(  # noqa: PLR0917
    dataset: DatasetPath,
    bundle: BundlePath = None,
    split: SplitName = None,
    layout: LayoutName = None,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for report.json and pictures.")
    ] = None,
    hop_s: Annotated[
        float | None,
        typer.Option(
            "--hop",
            min=0.1,
            max=3_600,
            help="Seconds between the starts of two windows; 3 if none.",
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Measure a bundle: by window, by track and vote, with intervals and calibration."""
    from model.bundle import Bundle
    from model.datasets import load
    from model.evaluate import draw
    from model.evaluate import evaluate as run
    from model.folder import make_folder
    from model.predict import HOP_S

    if out is not None:
        make_folder(out)
    bar = _bar()
    with bar:
        task = bar.add_task("clips", total=None)
        evaluation = run(
            Bundle.load(bundle),
            load(dataset, layout),
            split,
            hop_s=HOP_S if hop_s is None else hop_s,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if out is not None:
        page = draw(evaluation, out)
        text = json.dumps(evaluation.report, indent=1, ensure_ascii=False)
        (out / "report.json").write_text(text + "\n", encoding="utf-8")
        _console().print(f"pictures: {page}")
    if as_json:
        _print_json(evaluation.report)
    else:
        _show(evaluation)


@app.command()
def compare(  # noqa: PLR0917
    dataset: DatasetPath,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the page, pictures and tables.")
    ] = Path("compare"),
    layout: LayoutName = None,
    table: Annotated[
        Path | None,
        typer.Option("--features", help="Save handcrafted features as .csv or .parquet."),
    ] = None,
    quick: Quick = False,
    seed: Seed = 0,
) -> None:
    """Lay side by side, on one split, the approaches that people try first."""
    from model.compare import compare as run
    from model.datasets import load
    from model.folder import make_folder

    make_folder(out)
    page = run(load(dataset, layout), out, table=table, quick=quick, seed=seed, say=_say)
    _console().print(f"page: {page}")


@app.command()
def explore(
    dataset: DatasetPath,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the page and pictures.")
    ] = Path("explore"),
    layout: LayoutName = None,
    quick: Quick = False,
    seed: Seed = 0,
) -> None:
    """Draw what is in a data set: waveforms, spectrograms, balance, durations, t-SNE."""
    from model.datasets import load
    from model.explore import explore as run
    from model.folder import make_folder

    make_folder(out)
    page = run(load(dataset, layout), out, quick=quick, seed=seed, say=_say)
    _console().print(f"page: {page}")


@app.command()
def info(bundle: BundlePath = None, as_json: AsJson = False) -> None:
    """What a bundle is: version, heads, window, network, training data, figures."""
    from model import learnt
    from model.bundle import Bundle
    from worker.commands.console import out

    loaded = Bundle.load(bundle)
    told: dict[str, Any] = {
        "name": loaded.name,
        "version": loaded.version,
        "heads": [head.model_dump(mode="json") for head in loaded.heads],
        "sample_rate_hz": loaded.sample_rate_hz,
        "window_s": loaded.window_s,
        "embedding_dim": loaded.embedding_dim,
        "uncertain_threshold": loaded.uncertain_threshold,
        "parameters": sum(tensor.numel() for tensor in loaded.network.parameters()),
        "network": {"kind": loaded.kind, "config": loaded.config},
        "training": loaded.training,
        "figures": loaded.figures,
    }
    if as_json:
        _print_json(told)
        return
    console = out()
    console.print(f"{loaded.name}, version {loaded.version}", style="bold")
    console.print(
        f"{loaded.window_s} s windows of {loaded.sample_rate_hz} Hz audio, "
        f"{told['parameters']:,} parameters, embeddings of {loaded.embedding_dim} numbers"
    )
    for head in loaded.heads:
        console.print(f"{head.name} ({head.kind}-label): {', '.join(head.labels)}")
    console.print(f"uncertain below a score of {loaded.uncertain_threshold:.3f}")
    for section in ("training", "figures"):
        for key, value in told[section].items():
            if key == learnt.KEY:  # hashes, which tell people nothing
                continue
            for name, text in _leaves(f"{section}.{key}", value):
                console.print(f"{name}: {text}", soft_wrap=True)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """What stands in nested figures, a line each, by the path to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@import_app.command("musicnn")
def import_musicnn_command(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of the bundle to write."),
    ] = Path("musicnn"),
) -> None:
    """Fetch the musicnn wheel (version and hash pinned) and make a bundle of its network."""
    from model.musicnn import import_musicnn

    bundle = import_musicnn(out)
    _console().print(f"{out}: {bundle.name}, version {bundle.version}")


@app.command()
def export(
    onnx: Annotated[Path, typer.Option("--onnx", help="The ONNX file to write.")],
    bundle: BundlePath = None,
) -> None:
    """Write a bundle's network, front end included, as ONNX."""
    from model.bundle import Bundle
    from model.export import export_onnx

    export_onnx(Bundle.load(bundle), onnx)
    _console().print(str(onnx))


@app.command()
def recipe(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the bundles, default and fast.")
    ],
    data: Annotated[
        Path, typer.Option("--data", help="The shared data: gtzan/ and audio/ in it.")
    ] = Path("../shared"),
    work: Annotated[
        Path, typer.Option("--work", help="Keeps downloads and log-mels for the next time.")
    ] = Path("build/recipe"),
    seed: Seed = 0,
) -> None:
    """Make the shipped bundles anew from published weights, game music and GTZAN."""
    import logging

    from model.shipped import build_shipped
    from worker.errors import DatasetInvalid

    needed = ("gtzan/logmel30s.npz", "gtzan/manifest.csv")
    if missing := [name for name in needed if not (data / name).is_file()]:
        raise DatasetInvalid(
            f"{data} has no {' and no '.join(missing)}: --data names the folder with gtzan/ in it"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for bundle in build_shipped(out, data=data, work=work, seed=seed):
        _console().print(f"{out}: {bundle.name}, version {bundle.version}")


# What people see -----------------------------------------------------------------------------


def _console() -> "Console":
    """Standard error: standard output is for what a program may read."""
    from worker.commands.console import err

    return err()


def _print_json(told: dict[str, Any]) -> None:
    from worker.commands.console import json_line

    json_line(json.dumps(told, ensure_ascii=False))


def _say(line: str) -> None:
    _console().print(line, soft_wrap=True)


def _bar(*, training: bool = False) -> "Bar":
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns: list[Any] = ["{task.description}", BarColumn()]
    columns += [MofNCompleteColumn(), TimeRemainingColumn()]
    if training:
        columns.append(TextColumn("{task.fields[loss]}"))
    console = _console()
    return Bar(*columns, console=console, disable=not console.is_terminal)


def _show(evaluation: "Evaluation") -> None:
    """The report as tables."""
    from rich.table import Table

    from model.datasets.dataset import left_out
    from model.evaluate import (
        FIGURES,
        PAIRED,
        VOTES,
        curves,
        figure_rows,
        label_cells,
        measured,
        paired_rows,
        vote_rows,
    )
    from worker.commands.console import out

    console, report = out(), evaluation.report
    console.print(measured(report))
    for caveat in report["caveats"]:
        console.print(caveat, style="bold")
    for names, reason in left_out(evaluation.predictions.skipped):
        console.print(f"skipped {names}: {reason}")
    for heads, rows in (
        (VOTES, vote_rows(report)),
        (PAIRED, paired_rows(report)),
        (FIGURES, figure_rows(report)),
    ):
        table = Table(*heads)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    wide = len(report["labels"]) > MAX_COUNTED_LABELS
    counts = [] if wide else report.get("confusion", [])
    columns = map(str, range(len(counts)))
    by_label = Table("", "label", "F1", *curves(report).values(), *columns)
    for number, label in enumerate(report["labels"]):
        if counts or label in report["f1"]:  # a column of counts is named by its row
            said = map(str, counts[number]) if counts else ()
            by_label.add_row(str(number), label, *label_cells(report, label), *said)
    console.print(by_label)
