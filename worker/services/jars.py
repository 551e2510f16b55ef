"""Apache Kafka's jars: fetched from Maven Central by jgo, pinned with their hashes.

`kafka.toml` names what is wanted; `kafka.lock.toml` is jgo's lock file of it. After a change to the
first, `python -m worker.services.jars` writes the second anew.
"""

import hashlib
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from worker.errors import ServicesUnavailable
from worker.services.service import lacking

try:
    from jgo.env import (
        EnvironmentBuilder,
        EnvironmentSpec,
        LinkStrategy,
        LockedDependency,
        LockFile,
    )
    from jgo.maven import MavenContext
    from requests import RequestException
except ModuleNotFoundError as error:
    raise lacking(error.name) from error

SPEC = Path(__file__).with_name("kafka.toml")
LOCK = Path(__file__).with_name("kafka.lock.toml")
DOWNLOADS = 8
ATTEMPTS = 4
TIMEOUT_S = 30

Progress = Callable[[int, int], None]


def kafka_jars(cache_dir: Path, progress: Progress = lambda done, total: None) -> list[Path]:
    """The class path of Kafka, fetching what `cache_dir` doesn't hold.

    `progress(done, total)` is called before the first jar that has to be fetched and after each.

    Raises
    ------
    ServicesUnavailable
        A jar can't be fetched, or what came is not what the lock file names.
    """
    locked = LockFile.load(LOCK).dependencies
    paths = [cache_dir / f"{jar.artifactId}-{jar.version}.{jar.packaging}" for jar in locked]
    missing = [
        (jar, path)
        for jar, path in zip(locked, paths, strict=True)
        if not path.exists() or _sha256(path) != jar.sha256
    ]
    if not missing:
        return paths
    cache_dir.mkdir(parents=True, exist_ok=True)
    progress(0, len(missing))
    with (
        tempfile.TemporaryDirectory(prefix="fetching-", dir=cache_dir) as staging,
        ThreadPoolExecutor(DOWNLOADS, "jars") as pool,
    ):
        maven = MavenContext(repo_cache=Path(staging), timeout=TIMEOUT_S)
        fetched = pool.map(lambda item: _fetch(maven, *item), missing)
        for done, _ in enumerate(fetched, start=1):
            progress(done, len(missing))
    return paths


def _fetch(maven: MavenContext, jar: LockedDependency, path: Path) -> None:
    try:
        fetched = _download(maven, jar)
    except (RequestException, RuntimeError, OSError) as error:
        raise ServicesUnavailable(
            f"Kafka's {path.name} can't be fetched from Maven Central ({error}). Check the "
            "network, or name a running Kafka with TIMBRE_KAFKA__BOOTSTRAP_SERVERS."
        ) from error
    if _sha256(fetched) != jar.sha256:
        raise ServicesUnavailable(
            f"Kafka's {path.name} from Maven Central is not the file that {LOCK.name} names; "
            "something on the way changed it, so it is not used."
        )
    fetched.replace(path)


@retry(
    retry=retry_if_exception_type((RequestException, OSError)),
    stop=stop_after_attempt(ATTEMPTS),
    wait=wait_random_exponential(0.5, max=5),
    reraise=True,
)
def _download(maven: MavenContext, jar: LockedDependency) -> Path:
    artifact = (
        maven.project(jar.groupId, jar.artifactId)
        .at_version(jar.version)
        .artifact(packaging=jar.packaging)
    )
    assert artifact.cached_path is not None
    artifact.cached_path.unlink(missing_ok=True)  # a half of it, from the attempt before
    return Path(artifact.resolve())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def relock() -> None:
    """Resolve `kafka.toml` anew into `kafka.lock.toml`."""
    with tempfile.TemporaryDirectory() as folder:
        builder = EnvironmentBuilder(
            MavenContext(repo_cache=Path(folder) / "repository"),
            cache_dir=Path(folder) / "jgo",
            link_strategy=LinkStrategy.SOFT,
        )
        builder.resolve_lockfile(EnvironmentSpec.load(SPEC)).save(LOCK)


if __name__ == "__main__":
    relock()
