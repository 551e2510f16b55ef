import tomllib
from pathlib import Path

import pytest
from jgo.env import LockedDependency
from jgo.maven import MavenContext

from worker.errors import ServicesUnavailable
from worker.services import jars

LOCKED = tomllib.loads(jars.LOCK.read_text())["dependencies"]
KAFKA_CLIENTS = LockedDependency("org.apache.kafka", "kafka-clients", "4.1.0", sha256="0" * 64)


def test_every_jar_is_pinned_with_its_hash() -> None:
    assert {len(jar["sha256"]) for jar in LOCKED} == {64}
    assert {"kafka_2.13", "kafka-clients"} <= {jar["artifactId"] for jar in LOCKED}


def test_the_lock_file_names_no_host() -> None:
    assert "://" not in jars.LOCK.read_text()
    assert "://" not in jars.SPEC.read_text()


def test_a_jar_that_is_not_what_the_lock_names_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    cache.mkdir()
    other = repository / "org/apache/kafka/kafka-clients/4.1.0/kafka-clients-4.1.0.jar"
    other.parent.mkdir(parents=True)

    def download(maven: MavenContext, jar: LockedDependency) -> Path:
        other.write_bytes(b"something else")
        return other

    monkeypatch.setattr(jars, "_download", download)
    with pytest.raises(ServicesUnavailable, match=r"kafka\.lock\.toml"):
        jars._fetch(MavenContext(repo_cache=repository), KAFKA_CLIENTS, cache / "clients.jar")
    assert not list(cache.iterdir())


def test_a_jar_that_cant_be_fetched_says_what_to_check(tmp_path: Path) -> None:
    offline = MavenContext(repo_cache=tmp_path, offline=True)
    with pytest.raises(ServicesUnavailable, match="TIMBRE_KAFKA__BOOTSTRAP_SERVERS"):
        jars._fetch(offline, KAFKA_CLIENTS, tmp_path / "clients.jar")
