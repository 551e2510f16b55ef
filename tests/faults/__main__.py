"""Run faults by name, or all of them: a table, and `build/faults.json`."""

import argparse
import asyncio
import json
import logging
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.faults import (  # noqa: F401  # they enter the list
    delivery,
    exposure,
    growth,
    inputs,
    services,
    stages,
)
from tests.faults.scenarios import SCENARIOS
from tests.faults.stand import Failed, Stand

FILE = Path("build/faults.json")
COLUMNS = ("events", "tags", "dead_letters", "lost", "duplicates", "differing", "recovery_s")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCENARIOS))
    parser.add_argument("--quick", action="store_true", help="Fewer tracks and fewer faults.")
    options = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # its broker is stopped all the time
    if unknown := set(options.names) - SCENARIOS.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    return asyncio.run(_run(options.names or list(SCENARIOS), options.quick))


async def _run(names: list[str], quick: bool) -> int:
    console = Console(width=120) if not sys.stdout.isatty() else Console()
    table = Table("fault", *(column.replace("_", " ") for column in COLUMNS), "took")
    lines: list[dict[str, object]] = []
    _write(lines)  # or a run that comes to nothing would leave another's
    async with Stand() as stand:
        for name in names:
            started_s = time.monotonic()
            summary, *_ = (SCENARIOS[name].__doc__ or "").split("\n")
            console.print(f"[bold]{name}[/]: {summary}")
            line = await _try(stand, name, quick)
            lines.append(line)
            _write(lines)
            took = f"{time.monotonic() - started_s:.0f} s"
            if "failed" in line:
                console.print("  [red]failed:[/]", Text(str(line["failed"])))
                took = "[red]failed[/]"
            table.add_row(name, *(str(line.get(column, "")) for column in COLUMNS), took)
    console.print(table)
    console.print(f"Written to {FILE}.")
    return 1 if any("failed" in line for line in lines) else 0


async def _try(stand: Stand, name: str, quick: bool) -> dict[str, object]:
    """A fault's line; of one that failed the reason, and the counts as far as they are known."""
    stand.counted = None
    try:
        outcome = await SCENARIOS[name](stand, quick)
    except Exception as error:
        counts: dict[str, object] = asdict(stand.counted) if stand.counted is not None else {}
        what = str(error) if isinstance(error, Failed) else traceback.format_exc()
        return {"fault": name, **counts, "failed": what}
    return outcome.line(name)


def _write(lines: list[dict[str, object]]) -> None:
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
