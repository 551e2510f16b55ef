import os
import subprocess
import sys
from pathlib import Path

import pytest
from joblib.externals.loky.backend import context
from pydantic import ValidationError

from worker import settings_table
from worker.errors import SettingsInvalid
from worker.settings import (
    DecodeSettings,
    FetchSettings,
    HttpSettings,
    KafkaSettings,
    RedisSettings,
    load,
)

DOCS = Path(__file__).parents[3] / "docs"


def test_the_environment_sets_nested_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMBRE_KAFKA__GROUP", "taggers")
    monkeypatch.setenv("TIMBRE_FETCH__FILE_ROOTS", '["/music"]')

    settings = load()

    assert settings.kafka.group == "taggers"
    assert settings.fetch.file_roots == (Path("/music"),)


def test_without_a_home_or_a_temporary_folder_settings_are_read_all_the_same() -> None:
    """As a container's unknown user with nothing to write but the spool has none."""
    script = """
import pathlib, tempfile

def no_home():
    raise RuntimeError("Could not determine home directory.")

def no_folder():
    raise FileNotFoundError(2, "No usable temporary directory found")

pathlib.Path.home = no_home
tempfile.gettempdir = no_folder
from worker.settings import load
print(load().fetch.spool_dir)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": os.pathsep.join(sys.path), "TIMBRE_FETCH__SPOOL_DIR": "/spool"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "/spool\n", done.stderr


def test_a_decoder_is_started_for_each_core_that_a_containers_quota_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(context, "_cpu_count_cgroup", lambda _: 3)
    assert DecodeSettings().processes == 3


def test_secrets_come_from_files_and_are_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "redis__password").write_text("hunter2\n")
    monkeypatch.setenv("TIMBRE_SECRETS_DIR", str(tmp_path))

    settings = load()

    assert settings.redis.password is not None
    assert settings.redis.password.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in settings.model_dump_json()


def test_the_environment_wins_over_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kafka__group").write_text("from-file")
    monkeypatch.setenv("TIMBRE_SECRETS_DIR", str(tmp_path))
    assert load().kafka.group == "from-file"

    monkeypatch.setenv("TIMBRE_KAFKA__GROUP", "from-environment")
    assert load().kafka.group == "from-environment"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TIMBRE_HTTP__PORT", "many", "TIMBRE_HTTP__PORT"),
        ("TIMBRE_HTTP__POTR", "80", "TIMBRE_HTTP__POTR"),
        ("TIMBRE_FETHC__ATTEMPTS", "3", "TIMBRE_FETHC__ATTEMPTS belongs to no section.*FETCH"),
        ("TIMBRE_REDIS__SSL_CA_FILE", "/not/there", "TIMBRE_REDIS__SSL_CA_FILE: .*not point to a"),
        ("TIMBRE_REDIS__CACHE_TTL_S", "9" * 17, "TIMBRE_REDIS__CACHE_TTL_S"),
        ("TIMBRE_KAFKA__SESSION_TIMEOUT_S", "1", "greater than or equal to 6"),
        ("TIMBRE_KAFKA__SECURITY_PROTOCOL", "SASL_SSL", "sasl_username"),
        ("TIMBRE_SECRETS_DIR", "/does/not/exist", "TIMBRE_SECRETS_DIR: /does/not/exist is not a"),
        ("TIMBRE_FETCH__FILEROOTS", "[]", "no such setting; perhaps TIMBRE_FETCH__FILE_ROOTS is"),
        ("TIMBRE_FETCH__PARALLEL", "3", r"TIMBRE_FETCH__PARALLEL: there is no such setting\.$"),
        ("TIMBRE_FETCH__FILE_ROOTS", "/music", "TIMBRE_FETCH__FILE_ROOTS: must be a list in JSON"),
        ("TIMBRE_FETCH__ALLOWED_NETWORKS", '["10.0.0.1/8"]', "ALLOWED_NETWORKS__0: [^;]*$"),
        ("TIMBRE_FETCH__S3_ENDPOINT", "minio:9000", "S3_ENDPOINT: must be an address such as"),
        ("TIMBRE_FETCH__S3_ACCESS_KEY_ID", "key", "s3_access_key_id and s3_secret_access_key"),
        ("TIMBRE_FETCH__AZ_ENDPOINT", "http://minio:99999", "AZ_ENDPOINT: must be an address"),
        ("TIMBRE_WINDOWS__HOP_S", "inf", "TIMBRE_WINDOWS__HOP_S: Input should be a finite number"),
        ("TIMBRE_WINDOWS__HOP_S", "1e-9", "TIMBRE_WINDOWS__HOP_S"),
        ("TIMBRE_KAFKA__SESSION_TIMEOUT_S", "1e30", "SESSION_TIMEOUT_S: must be 604800 at most"),
        ("TIMBRE_DECODE__MAX_MEMORY_BYTES", "9" * 30, "TIMBRE_DECODE__MAX_MEMORY_BYTES"),
        ("TIMBRE_BATCH__THREADS", "100000", "TIMBRE_BATCH__THREADS"),
        ("TIMBRE_BATCH__MAX_WINDOWS", "1000000000", "TIMBRE_BATCH__MAX_WINDOWS"),
        ("TIMBRE_DECODE__PROCESSES", "1000000", "TIMBRE_DECODE__PROCESSES"),
        ("TIMBRE_KAFKA__BOOTSTRAP_SERVERS", "broker:port", "BOOTSTRAP_SERVERS: must be host:port"),
        ("TIMBRE_KAFKA__BOOTSTRAP_SERVERS", "", "BOOTSTRAP_SERVERS: must be host:port"),
        ("TIMBRE_KAFKA__BOOTSTRAP_SERVERS", "a:99999", "BOOTSTRAP_SERVERS: must be host:port"),
        ("timbre_kafak__group", "taggers", "timbre_kafak__group belongs to no section"),
        ("TIMBRE_KAFKA_SASL_PASSWORD", "key", "TIMBRE_KAFKA__SASL_PASSWORD is meant"),
        ("TIMBRE_KAFKA__GROUP", "", "TIMBRE_KAFKA__GROUP"),
        ("TIMBRE_KAFKA__TOPIC_TAGS", "", "TIMBRE_KAFKA__TOPIC_TAGS"),
        ("TIMBRE_KAFKA__TOPIC_TAGS", "tracks tags", "TIMBRE_KAFKA__TOPIC_TAGS"),
        ("TIMBRE_KAFKA__TOPIC_TAGS", "tracks.new", "each topic_. needs a name of its own"),
        ("TIMBRE_KAFKA__SASL_PASSWORD", "key", "security_protocol PLAINTEXT sends no sasl_"),
        ("TIMBRE_KAFKA__SSL_CA_FILE", __file__, "security_protocol PLAINTEXT uses none of ssl_"),
        ("TIMBRE_HTTP__HOST", "", "TIMBRE_HTTP__HOST"),
        ("TIMBRE_FETCH__FILE_ROOTS", '["/music", ""]', "FETCH__FILE_ROOTS__1: must name a folder"),
        ("TIMBRE_FETCH__SPOOL_DIR", "", "TIMBRE_FETCH__SPOOL_DIR: must name a folder"),
    ],
)
def test_what_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsInvalid, match=said):
        load()


@pytest.mark.parametrize("servers", ["broker", "a:9092, b:9093", "[::1]:9092", "10.0.0.1:1"])
def test_brokers_are_named_in_every_usual_form(
    monkeypatch: pytest.MonkeyPatch, servers: str
) -> None:
    monkeypatch.setenv("TIMBRE_KAFKA__BOOTSTRAP_SERVERS", servers)
    assert load().kafka.bootstrap_servers == servers


def test_lists_come_from_files_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fetch__allowed_networks").write_text('["10.0.0.0/8", "fd00::/8"]\n')
    monkeypatch.setenv("TIMBRE_SECRETS_DIR", str(tmp_path))
    assert list(map(str, load().fetch.allowed_networks)) == ["10.0.0.0/8", "fd00::/8"]


def test_an_error_does_not_show_the_value_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMBRE_REDIS__URL", "redis://user:hunter2@host")
    monkeypatch.setenv("TIMBRE_REDIS__TIMEOUT_S", "hunter2")
    with pytest.raises(SettingsInvalid) as caught:
        load()
    assert "hunter2" not in str(caught.value)


def test_every_user_has_a_spool_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = FetchSettings().spool_dir
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert FetchSettings().spool_dir != own


def test_the_page_of_settings_is_up_to_date() -> None:
    assert (DOCS / "configuration.md").read_text() == settings_table.table()


@pytest.mark.parametrize("kind", ["link out", "folder", "pipe", "link to nothing"])
def test_a_secret_that_is_no_file_of_the_folder_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    monkeypatch.setenv("TIMBRE_SECRETS_DIR", str(folder))
    secret, outside = folder / "redis__password", tmp_path / "password"
    outside.write_text("secret")
    if kind == "folder":
        secret.mkdir()
    elif kind == "pipe":
        os.mkfifo(secret)
    else:
        secret.symlink_to(outside if kind == "link out" else "nowhere")
    with pytest.raises(SettingsInvalid, match="redis__password is not read"):
        load()


def test_secrets_are_read_as_kubernetes_lays_them_out_beside_those_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIMBRE_SECRETS_DIR", str(tmp_path))
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026" / "redis__password").write_text("secret")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "redis__password").symlink_to("..data/redis__password")
    (tmp_path / "other__folder").mkdir()
    password = load().redis.password
    assert password is not None
    assert password.get_secret_value() == "secret"


@pytest.mark.parametrize("secret", [b"\xef\xbb\xbfkey", b"\xff\xfek\0"])
def test_a_secret_that_is_not_plain_utf_8_is_told_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: bytes
) -> None:
    monkeypatch.setenv("TIMBRE_SECRETS_DIR", str(tmp_path))
    (tmp_path / "redis__password").write_bytes(secret)
    with pytest.raises(SettingsInvalid, match="redis__password must be UTF-8 without"):
        load()


def test_a_client_key_without_its_certificate_is_refused() -> None:
    with pytest.raises(ValidationError, match="ssl_key_file needs ssl_cert_file"):
        KafkaSettings(security_protocol="SSL", ssl_key_file=Path(__file__))
    with pytest.raises(ValidationError, match="ssl_key_file needs ssl_cert_file"):
        RedisSettings(ssl_key_file=Path(__file__))


def test_what_kubernetes_tells_of_services_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMBRE_HTTP_PORT", "tcp://10.0.0.1:80")
    assert load().http.port == HttpSettings().port


def test_an_empty_name_of_the_secrets_folder_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMBRE_SECRETS_DIR", "")
    assert load().redis.password is None
