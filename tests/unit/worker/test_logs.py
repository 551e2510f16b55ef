import logging
from collections.abc import Iterator
from typing import Literal

import pytest

from worker import logs
from worker.settings import WorkerSettings


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in (*logs.QUIET, *logs.SECRETIVE)}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def test_fausts_false_alarm_is_left_out_and_its_errors_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure(WorkerSettings())
    faust = logging.getLogger("faust.transport.drivers.aiokafka")
    faust.error("%s Aiokafka has not sent fetch request for %r since start", "[x]", ("t", 0))
    faust.error("Committing raised exception: %r", ValueError())
    told = capsys.readouterr().err
    assert "fetch request" not in told
    assert "Committing raised" in told


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_others_wrote_steers_no_terminal(
    form: Literal["text", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(WorkerSettings(log_format=form))
    logging.getLogger("worker").error("Unexpected", exc_info=ValueError("\x1b[2J\u202e"))
    told = capsys.readouterr().err
    assert r"\u001b[2J\u202e" in told
    assert all(line.isprintable() for line in told.split("\n"))


@pytest.mark.parametrize("level", ["debug", "info"])
def test_what_connections_to_a_broker_send_is_never_told(
    level: Literal["debug", "info"], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(WorkerSettings(log_level=level))
    logging.getLogger("aiokafka.conn").debug("Request to %s: %s", "broker:9092", b"the password")
    logging.getLogger("worker").warning("The rest is.")
    told = capsys.readouterr().err
    assert "the password" not in told
    assert "The rest is." in told
