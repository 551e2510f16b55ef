"""docker-compose.yml and its overrides: what they name exists, and the numbers agree."""

import re
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from tests.unit.deploy.compose import BASE, DEFAULTS, OVERRIDES, ROOT, read, services
from worker.settings import Settings, load

ONE_SHOT = {"topics"}
UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
SERVICES = services()
FILES = (BASE, *OVERRIDES)
DOCS = (ROOT / "docs/deploy.md").read_text()


def seconds(text: str) -> float:
    return timedelta(seconds=int(text.removesuffix("s"))).total_seconds()


def bytes_of(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([kmg])b?", text, re.I).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit.lower()]


def settings_of(*paths: Path) -> dict[str, str]:
    merged: dict[str, Any] = {}
    for path in paths:
        merged |= services(path).get("worker", {}).get("environment", {})
    return {name: str(value) for name, value in merged.items() if name.startswith("TIMBRE_")}


@pytest.fixture
def worker_settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings of the compose file's worker."""
    for name, value in settings_of(BASE).items():
        monkeypatch.setenv(name, value)
    return load()


@pytest.mark.parametrize("override", [None, *OVERRIDES], ids=lambda path: path and path.name)
def test_compose_accepts_the_files(override: Path | None) -> None:
    command = next(
        (
            words
            for words in (["docker", "compose"], ["docker-compose"])
            if shutil.which(words[0])
            and not subprocess.run([*words, "version"], capture_output=True, check=False).returncode
        ),
        None,
    )
    if command is None:
        pytest.skip("neither docker compose nor docker-compose is installed")
    files = [f"--file={path}" for path in (BASE, override) if path is not None]
    done = subprocess.run(
        [*command, *files, "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", **DEFAULTS},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_pinned_restarted_and_checked(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[\w./-]+:(v?\d+\.\d+\.\d+[\w.-]*|cpu)", service["image"])
    assert service["restart"] in {"unless-stopped", "on-failure:5"}
    assert service["healthcheck"].get("disable", False) is (name in ONE_SHOT)
    assert "no-new-privileges:true" in service["security_opt"]


@pytest.mark.parametrize("name", set(SERVICES) - ONE_SHOT - {"worker"})
def test_what_a_service_keeps_is_in_a_volume_of_its_own(name: str) -> None:
    volumes = [mount.split(":")[0] for mount in SERVICES[name]["volumes"]]
    assert name in volumes
    assert name in read(BASE)["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_listens_beyond_this_machine(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


@pytest.mark.parametrize("name", SERVICES)
def test_mounted_files_exist(name: str) -> None:
    mounts = [mount.split(":")[0] for mount in SERVICES[name].get("volumes", [])]
    for source in mounts:
        if source.startswith("."):
            assert (ROOT / source).exists(), source


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_setting_of_the_worker_exists(path: Path) -> None:
    for name in settings_of(path).keys() - {"TIMBRE_SECRETS_DIR"}:
        section, setting = name.removeprefix("TIMBRE_").lower().split("__")
        kind = Settings.model_fields[section].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        assert setting in kind.model_fields, name


@pytest.mark.parametrize(
    "override",
    [path for path in OVERRIDES if "secrets" not in path.name],
    ids=lambda path: path.name,
)
def test_the_worker_reads_its_settings(override: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings_of(BASE, override).items():
        monkeypatch.setenv(name, value)
    load()


def test_a_secret_is_named_as_the_settings_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = read(ROOT / "deploy/docker-compose.secrets.yml")["secrets"]
    for name in secrets:
        (tmp_path / name).write_text("open sesame\n")
    monkeypatch.setenv("TIMBRE_SECRETS_DIR", str(tmp_path))
    password = load().redis.password
    assert password is not None
    assert password.get_secret_value() == "open sesame"


def test_the_override_that_the_docs_show_reaches_a_kafka_with_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.S)
    override = yaml.safe_load(shown)
    for name, value in override["services"]["worker"]["environment"].items():
        monkeypatch.setenv(name, value)
    for name in override["secrets"]:
        (tmp_path / name).write_text("open sesame\n")
    monkeypatch.setenv("TIMBRE_SECRETS_DIR", str(tmp_path))
    kafka = load().kafka
    assert kafka.security_protocol == "SASL_SSL"
    assert kafka.sasl_password is not None
    assert kafka.sasl_password.get_secret_value() == "open sesame"


@pytest.mark.parametrize("name", SERVICES)
def test_the_docs_name_every_image(name: str) -> None:
    assert f"`{SERVICES[name]['image']}`" in DOCS


def test_the_worker_may_take_its_time_to_stop(worker_settings: Settings) -> None:
    assert seconds(SERVICES["worker"]["stop_grace_period"]) > worker_settings.worker.stop_deadline_s


def test_the_spool_fits_in_its_file_system(worker_settings: Settings) -> None:
    fetch = worker_settings.fetch
    (spool,) = (
        mount
        for mount in SERVICES["worker"]["tmpfs"]
        if mount.startswith(f"{fetch.spool_dir}:size=")
    )
    size = spool.partition("size=")[2].partition(",")[0]
    assert bytes_of(size) > fetch.spool_max_bytes >= 2 * fetch.max_bytes


def test_the_worker_can_write_nothing_but_its_temporary_file_systems() -> None:
    worker = SERVICES["worker"]
    assert worker["read_only"] is True
    assert worker["cap_drop"] == ["ALL"]
    assert "volumes" not in worker
