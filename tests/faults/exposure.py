"""What can be seen of a worker from outside: its port, and its secrets nowhere."""

import os
from pathlib import Path
from typing import Any

import psutil

from tests.faults.scenarios import Outcome, conclude, require, scenario
from tests.faults.stand import Lane, Stand
from tests.tls import Security, issue_security

USER, PASSWORD, WRONG = "alice", "correct-horse-battery", "wrong-password"
SECRETS = ("kafka__sasl_password", "redis__password", "fetch__s3_secret_access_key")
MECHANISMS = ("PLAIN", "SCRAM-SHA-512")
SERVED = ("/metrics", "/health/live", "/health/ready")
FAUST_SERVES = (
    "/", "/stats", "/stats/", "/router", "/router/", "/table", "/table/", "/graph", "/graph/",
    "/production_index", "/production_index/", "/livecheck/", "/static/", "/debug/",
    "/metrics/", "/health", "/docs",
)  # fmt: skip


@scenario
async def port(stand: Stand, quick: bool) -> Outcome:
    """The worker's port serves metrics and health, and nothing of faust's."""
    del quick
    async with stand.lane("port") as lane:
        (worker,) = await lane.ready()
        await lane.send(lane.tracks(range(3)))
        await lane.until_answered(3, 30)
        for path in SERVED:
            status, _ = await worker.get(path)
            require(status == 200, f"{path} is served, not {status}")
        for path in FAUST_SERVES:
            status, body = await worker.get(path)
            require(status == 404, f"{path} is not served: {status} {body[:80]}")
        listening = {
            connection.laddr.port
            for process in worker.tree()
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        require(listening == {worker.port}, f"it listens on one port: {listening}")
        return await conclude(lane, [])


@scenario
async def secrets(stand: Stand, quick: bool) -> Outcome:
    """Kafka over TLS and SASL, Redis over TLS, S3: no secret, of file or environment, is told."""
    del quick
    folder = stand.folder / f"tls-{os.urandom(4).hex()}"
    folder.mkdir()
    async with Stand(security=security(folder)) as secured, secured.lane("secrets") as lane:
        given: tuple[dict[str, Any], ...] = (
            {"secrets_dir": folder / "secrets"},
            dict.fromkeys(SECRETS, PASSWORD),
        )
        for mechanism, passwords in zip(MECHANISMS, given, strict=True):
            await lane.ready(**_options(secured, mechanism), **passwords)
        uris = ("http://127.0.0.1:1/x.mp3", "s3://status/404/1.wav")
        events = [*lane.tracks(range(5)), b"no event", *map(lane.event, uris)]
        await lane.send(events)
        await lane.until_answered(len(events), 60)
        await lane.until_stored(5, 10)
        await _untold(lane)
        outcome = await conclude(lane, [])
        require(outcome.verdict.tags == 5, f"tracks are tagged: {outcome.verdict}")
        for mechanism in MECHANISMS:
            stranger = lane.worker(**_options(secured, mechanism), kafka__sasl_password=WRONG)
            status = await stranger.ended("the end of a worker that is refused", 90)
            require(status == 1, f"a wrong password ends it: {stranger.tail()}")
            require("Traceback" not in stranger.text(), f"with a sentence: {stranger.text()}")
            require(WRONG not in stranger.text(), f"a wrong password is told nowhere: {mechanism}")
        return outcome


def security(folder: Path) -> Security:
    """A certificate of an authority of its own, a user and a password, and the secret files."""
    (files := folder / "secrets").mkdir()
    for name in SECRETS:
        (files / name).write_text(f"{PASSWORD}\n")
    return issue_security(folder, USER, PASSWORD)


def _options(stand: Stand, mechanism: str) -> dict[str, Any]:
    assert stand.security is not None
    ca_file = stand.security.ca_file
    return {
        "worker__log_level": "debug",
        "kafka__security_protocol": "SASL_SSL",
        "kafka__sasl_mechanism": mechanism,
        "kafka__sasl_username": USER,
        "kafka__ssl_ca_file": ca_file,
        "redis__ssl_ca_file": ca_file,
        "fetch__s3_endpoint": f"http://127.0.0.1:{stand.audio.port}",
        "fetch__s3_access_key_id": USER,
    }


async def _untold(lane: Lane) -> None:
    """No password in a log line, a metric, a command line, a dead letter or a result."""
    places = {"a dead letter": str(lane.checker.letters), "a result": str(lane.checker.tags)}
    for worker, mechanism in zip(lane.workers, MECHANISMS, strict=True):
        _, metrics = await worker.get("/metrics")
        decoders = [process.environ() for process in worker.decoders()]
        places |= {
            f"the log, by {mechanism}": worker.text(),
            f"the metrics, by {mechanism}": metrics,
            f"a command line, by {mechanism}": str([p.cmdline() for p in worker.tree()]),
            f"a decoder's environment, by {mechanism}": str(decoders),
        }
    for place, text in places.items():
        require(PASSWORD not in text, f"no password in {place}")
