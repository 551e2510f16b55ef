"""Each promise on the page of guarantees, and each line of its tables, names what shows it."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import tests.faults.__main__  # noqa: F401  # all faults enter the list
from tests.end_to_end import test_delivery, test_hostile
from tests.faults.scenarios import SCENARIOS, named

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()
NUMBERED = re.compile(r"^\d+\. .*\n(?: +.*\n)*", re.MULTILINE)
TEST = re.compile(r"`([^`\s]+::[^`\s]+)`")


def claims() -> Iterator[tuple[str, list[str]]]:
    """What the page claims, and the names of what shows it."""
    for text in NUMBERED.findall(PAGE):
        claim, _, shown_by = text.partition("Shown by")
        yield claim, names(shown_by.strip().removesuffix("."))
    for line in PAGE.splitlines():
        if line.startswith("| "):
            claim, *_, shown_by = cells(line)
            if shown_by != "shown by":
                yield claim, names(shown_by)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run_in_make_test() -> set[str]:
    """The faults that tests are made of."""
    marks = [
        mark
        for module in (test_delivery, test_hostile)
        for test in vars(module).values()
        for mark in getattr(test, "pytestmark", ())
    ]
    return {named(run) for mark in marks if mark.name == "parametrize" for run in mark.args[1]}


def existing_tests() -> Iterator[str]:
    """`file::function` and `file::class::function` of all tests."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            inside = node.body if isinstance(node, ast.ClassDef) else [node]
            group = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
            for test in inside:
                if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{path.name}::{group}{test.name}"


def test_every_claim_names_what_shows_it() -> None:
    assert len(dict(claims())) > 40, "the page is read"
    assert [claim for claim, shown_by in claims() if not shown_by] == []


def test_every_fault_says_what_happens_and_what_an_operator_sees_and_does() -> None:
    head = "| fault | what happens | what an operator sees and does | shown by |"
    tables = [table.split("\n\n")[0].splitlines()[2:] for table in PAGE.split(head)[1:]]
    rows = [cells(line) for table in tables for line in table]
    assert len(rows) > 40, "the tables are read"
    assert [row for row in rows if len(row) != 4 or not all(row)] == []


def test_every_test_named_is_there_once() -> None:
    exist = Counter(existing_tests())
    assert {test: exist[test] for test in TEST.findall(PAGE) if exist[test] != 1} == {}


def test_every_fault_is_named_and_bold_where_it_runs_in_make_test() -> None:
    faults = {name for _, shown_by in claims() for name in shown_by if not TEST.fullmatch(name)}
    bold = run_in_make_test()
    assert faults == {f"**{name}**" if name in bold else name for name in SCENARIOS}
