"""The command `timbre`. Thin and quick to load: a command's own module is imported when it runs."""

import errno
import io
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from model.cli import app as model_app
from worker.errors import SourceInvalid, TimbreError
from worker.printable import printable

if TYPE_CHECKING:
    from worker.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
services_app = typer.Typer(no_args_is_help=True, help="A local Kafka and Redis, without Docker.")
dead_letters_app = typer.Typer(no_args_is_help=True, help="Events that could not be tagged.")
app.add_typer(model_app, name="model")
app.add_typer(services_app, name="services")
app.add_typer(dead_letters_app, name="dead-letters")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
OURS = ("worker", "model", "schemas")
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


def main() -> None:
    """The entry point: an error that Timbre knows, or a path, is a sentence on standard error."""
    # What a client library would complain of comes as an error; only `worker` keeps a log.
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())
    # A shell may have closed them (`>&-`), and Python gives none then; nor may a file of ours be
    # what the processes that we start take for one of them.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    # What the output's encoding lacks, as a file's name may, is escaped, in JSON's own way.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except TimbreError as error:
        fault = error.message
    except OSError as error:
        if error.filename is not None:
            fault = f"{error.filename} can't be used: {error.strerror}"
        elif error.errno in UNWRITABLE:
            fault = f"The output can't be written: {error.strerror}"
            # What is left of it goes nowhere, or Python would fail on it once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            raise
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OURS:
            raise
        fault = f"This command needs the package {error.name}: pip install 'timbre[lab]'."
    else:
        return
    sys.stderr.write(f"timbre: {printable(fault, lines=True)}\n")
    sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(f"timbre {importlib.metadata.version('timbre')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Timbre tags tracks: new-track events in, genre tags out."""


@app.command()
def worker() -> None:
    """Tag the tracks of the event topics until SIGTERM.

    Configured by the environment: TIMBRE_KAFKA__BOOTSTRAP_SERVERS, TIMBRE_REDIS__URL and others;
    docs/configuration.md has them all.
    """
    # What is read and loaded from here on may take long, and leaves nothing to take down.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    from worker.app import run_worker

    raise typer.Exit(run_worker(_settings()))


@app.command()
def submit(
    sources: Annotated[
        list[str],
        typer.Argument(help="Audio files, folders, URLs, or CSV tables (uri, track_id, ...)."),
    ],
    backfill: Annotated[
        bool, typer.Option("--backfill", help="Send to the backfill topic, at lower priority.")
    ] = False,
) -> None:
    """Publish a new-track event for every track, and wait until Kafka has them all."""
    from worker.commands.submit import submit_tracks

    raise typer.Exit(submit_tracks(_settings(), sources, backfill=backfill))


@app.command()
def watch(
    from_beginning: Annotated[
        bool, typer.Option("--from-beginning", help="Begin with those there are, oldest first.")
    ] = False,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="Stop after that many results.")
    ] = None,
    failures: Annotated[
        bool, typer.Option("--failures", help="Show dead letters as well.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show results as they arrive, until Ctrl-C."""
    from worker.commands.watch import watch_results

    watch_results(
        _settings(), from_beginning=from_beginning, failures=failures, count=count, as_json=as_json
    )


@app.command()
def show(
    track: Annotated[str, typer.Argument(help="The track's id.")], as_json: AsJson = False
) -> None:
    """Show what Redis holds of a track."""
    from worker.commands.show import show_track

    show_track(_settings(), track, as_json=as_json)


@app.command()
def tag(
    files: Annotated[list[str], typer.Argument(help="Audio files, folders or URLs.")],
    as_csv: Annotated[bool, typer.Option("--csv", help="A CSV row for every tag.")] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="One JSON object a line and file, in the order given; tags are best first within "
            "each head.",
        ),
    ] = False,
    plot: Annotated[
        bool,
        typer.Option(
            "--plot",
            help="Draw the taggram as a picture: NAME.taggram.png here, or name a .png, .svg or "
            ".pdf beside the files.",
        ),
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="Path or name of a model bundle.")
    ] = None,
) -> None:
    """Tag files without Kafka or Redis. Exits with 1 when some could not be tagged."""
    from worker.commands.tag import tag_tracks

    if as_csv and as_json:
        raise SourceInvalid("Choose one of --csv and --json.")
    form = "csv" if as_csv else "json" if as_json else "table"
    raise typer.Exit(tag_tracks(_settings(), files, form=form, plot=plot, bundle=model))


@dead_letters_app.command("list")
def list_dead_letters(
    code: Annotated[str | None, typer.Option("--code", help="Only those of one reason.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="At most that many.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List dead letters, oldest first; the first column is the place that show and retry take."""
    from worker.commands import dead_letters

    dead_letters.list_all(_settings(), code=code, limit=limit, as_json=as_json)


@dead_letters_app.command("show")
def show_dead_letter(
    place: Annotated[str, typer.Argument(help="PARTITION:OFFSET, as listed.")],
    as_json: AsJson = False,
) -> None:
    """Show one dead letter whole: reason, origin, and the original message."""
    from worker.commands import dead_letters

    dead_letters.show_one(_settings(), place, as_json=as_json)


@dead_letters_app.command("retry")
def retry_dead_letters(
    places: Annotated[list[str] | None, typer.Argument(help="PARTITION:OFFSET, as listed.")] = None,
    code: Annotated[str | None, typer.Option("--code", help="All of one reason.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
) -> None:
    """Send the original events again, to the topic they came from."""
    from worker.commands import dead_letters

    dead_letters.retry_some(_settings(), places or [], code=code, everything=everything)


@services_app.command()
def up() -> None:
    """Start Kafka and Redis to stay, and print their addresses for the shell to export."""
    from worker.commands import services

    services.up(_settings())


@services_app.command()
def down() -> None:
    """Stop what `up` or a kept demo started, and remove its data."""
    from worker.commands import services

    services.down(_settings())


@app.command()
def demo(
    music: Annotated[
        Path | None, typer.Option("--music", help="A folder with music of your own.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave everything running, until `services down`.")
    ] = False,
) -> None:
    """The whole way on this machine: Kafka, Redis, a worker, and music to tag."""
    from worker.demo.run import run_demo

    raise typer.Exit(run_demo(_settings(), music=music, keep=keep))


def _settings() -> "Settings":
    from worker.settings import load

    return load()


if __name__ == "__main__":
    main()
