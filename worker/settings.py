"""All configuration: one typed object, read once.

Every value can be given in the environment as `TIMBRE_<SECTION>__<NAME>` (for example
`TIMBRE_KAFKA__BOOTSTRAP_SERVERS`), or as a file in the folder named by `TIMBRE_SECRETS_DIR`, which
is how passwords should arrive: `redis__password` holds TIMBRE_REDIS__PASSWORD. The environment
wins.
"""

import difflib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from joblib import cpu_count
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FilePath,
    HttpUrl,
    IPvAnyNetwork,
    SecretStr,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from worker.errors import SettingsInvalid

VoteMethod = Literal["mean", "majority", "weighted"]
MIB = 1024 * 1024
ENDPOINT = TypeAdapter(HttpUrl)
SERVER = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:,\[\]/@]+)(?::(\d{1,5}))?")
MAX_PORT = 65535
BYTE_ORDER_MARK = "\ufeff"


def _listed(value: Any) -> Any:
    """A list as it stands in the environment or in a file."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError('must be a list in JSON, such as ["a", "b"]') from None


def _named(value: Any) -> Any:
    """A path that is not empty, as one made of an unset variable is: that is where we happen to be,
    and its files would be open to whoever sends events.
    """
    if isinstance(value, str) and not value.strip():
        raise ValueError("must name a folder")
    return value


Folder = Annotated[Path, BeforeValidator(_named)]
Topic = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,249}$")]
# Redis refuses what does not fit into 63 bits as milliseconds, Kafka into 31.
Life = Annotated[int, Field(ge=0, le=10**12)]
LONGEST_WAIT_S = 7 * 86400

# Read here and not by pydantic-settings, whose complaint names the section and not the variable.
Listed = (NoDecode, BeforeValidator(_listed))


class Section(BaseModel):
    """A part of the settings: unknown names are refused, so a misspelling is noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _takes_no_longer_than_a_week(cls, value: object) -> object:
        if isinstance(value, float) and value > LONGEST_WAIT_S:
            raise ValueError(f"must be {LONGEST_WAIT_S} at most, which is a week")
        return value


class FetchSettings(Section):
    """Where audio may come from and how much of it."""

    file_roots: Annotated[tuple[Folder, ...], *Listed] = Field(
        (), description="Folders below which `file` URIs are read"
    )
    allowed_networks: Annotated[tuple[IPvAnyNetwork, ...], *Listed] = Field(
        (), description="Networks that may be fetched from although they are not public"
    )
    spool_dir: Folder = Field(
        default_factory=lambda: Path(tempfile.gettempdir()) / f"timbre-spool-{os.geteuid()}",
        description="Folder that holds audio between fetch and decode; this user's own or "
        "root's, no link. Default: timbre-spool-UID in the system's temporary folder",
    )
    spool_max_bytes: int = Field(
        8192 * MIB,
        gt=0,
        description="Bytes in the spool at any time; fetches wait for room. Several times "
        "MAX_BYTES, or the largest file holds up the others",
    )
    max_bytes: int = Field(1024 * MIB, gt=0, description="Bytes of one track's file")
    timeout_s: float = Field(300.0, gt=0, description="Seconds for one fetch, retries included")
    stall_timeout_s: float = Field(15.0, gt=0, description="Seconds without a byte")
    min_bytes_per_s: int = Field(
        8192,
        ge=0,
        description="Bytes a second that a server or store must send, once it has begun, on "
        "average over STALL_TIMEOUT_S; 0: no limit",
    )
    connect_timeout_s: float = Field(10.0, gt=0, description="Seconds to connect")
    max_redirects: int = Field(5, ge=0, description="Redirects followed")
    attempts: int = Field(
        8, ge=1, description="Attempts at one fetch; two at most where the server stalls"
    )
    backoff_initial_s: float = Field(0.25, gt=0, description="First wait between attempts")
    backoff_max_s: float = Field(
        20.0, gt=0, description="Longest wait between attempts, unless Retry-After asks for more"
    )
    max_wait_s: float = Field(
        60.0,
        gt=0,
        description="Seconds of waiting between the attempts at one fetch, all together; a server "
        "whose Retry-After asks for more is not tried again",
    )
    ambient_credentials: bool = Field(
        False, description="Without keys, use the machine's (an IAM role, a workload identity)"
    )
    s3_endpoint: str | None = Field(None, description="Endpoint of an S3-compatible store")
    s3_region: str | None = Field(None, description="Region of the S3 store; unset: us-east-1")
    s3_access_key_id: SecretStr | None = Field(None, description="S3 access key")
    s3_secret_access_key: SecretStr | None = Field(None, description="S3 secret key")
    gs_endpoint: str | None = Field(None, description="Endpoint in place of Google's own")
    gs_service_account_key: SecretStr | None = Field(
        None, description="Google service account key, as JSON"
    )
    az_endpoint: str | None = Field(None, description="Endpoint in place of the account's own")
    az_account_name: str | None = Field(None, description="Azure storage account")
    az_account_key: SecretStr | None = Field(None, description="Azure storage key")

    @property
    def answer_timeout_s(self) -> float:
        """Seconds until a server must have answered, before the body."""
        return self.connect_timeout_s + self.stall_timeout_s

    @field_validator("s3_endpoint", "gs_endpoint", "az_endpoint")
    @classmethod
    def _is_endpoint(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                ENDPOINT.validate_python(value)
            except ValueError:
                raise ValueError("must be an address such as https://store.example.com") from None
        return value

    @model_validator(mode="after")
    def _s3_keys_are_a_pair(self) -> Self:
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise ValueError("s3_access_key_id and s3_secret_access_key are given together or not")
        return self


class DecodeSettings(Section):
    """The decoder processes and their limits."""

    processes: int = Field(
        default_factory=lambda: max(2, cpu_count()),
        ge=1,
        le=256,
        description="Decoder processes, one track each at a time. Default: one for each core that "
        "affinity and the container's quota allow, and two at least, so that none waits for long",
    )
    timeout_s: float = Field(
        180.0, gt=0, description="Seconds of work for one track before its decoder is ended"
    )
    stall_timeout_s: float = Field(
        30.0, gt=0, description="Seconds of work without a block of windows before it is ended"
    )
    max_memory_bytes: int = Field(
        512 * MIB,
        gt=0,
        le=2**62,
        description="Address space of one decoder above what it needs at rest",
    )
    max_duration_s: float = Field(6 * 3600.0, gt=0, description="Seconds of audio in one track")
    slots: int = Field(3, ge=2, description="Shared-memory blocks of one decoder")
    slot_windows: int = Field(16, ge=1, description="Windows in one block")


class WindowSettings(Section):
    """How a track is cut."""

    hop_s: float = Field(3.0, ge=0.1, description="Seconds between the starts of two windows")
    min_tail_s: float = Field(
        1.0, ge=0, description="A tail shorter than this is dropped, unless it is the whole track"
    )
    silence_dbfs: float = Field(
        -60.0, le=0, description="A window whose RMS lies below this is silent and doesn't vote"
    )


class BatchSettings(Section):
    """The batcher and the device."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the network runs")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number type of the network; auto is float16 on CUDA, float32 on CPU"
    )
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of the network; 0: its share beside decoders"
    )
    max_windows: int = Field(64, ge=1, le=4096, description="Windows in a batch")
    max_delay_s: float = Field(0.05, ge=0, description="Seconds the oldest window waits")
    queue_windows: int = Field(512, ge=1, description="Most windows in the queue, of all tracks")
    in_flight: int = Field(2, ge=1, le=2, description="Batches at once: one copied, one computed")
    backfill_share: float = Field(
        0.1, ge=0, le=1, description="Share of a batch kept for backfill while uploads wait"
    )
    track_share: float = Field(
        0.25, gt=0, le=1, description="Share of the queue that the windows of one track may fill"
    )
    timeout_s: float = Field(
        60.0, gt=0, description="Seconds of a batch on the device until it counts as hung"
    )
    max_stuck: int = Field(
        7,
        ge=1,
        description="Hung device threads at which `/health/live` fails; a track that hangs the "
        "device leaves up to two at every attempt",
    )


class VoteSettings(Section):
    """How windows become tags."""

    method: VoteMethod = Field(
        "mean", description="How windows become one verdict; weighted is by confidence"
    )
    uncertain_below: float | None = Field(
        None, ge=0, le=1, description="Best score below which a track is uncertain; unset: bundle's"
    )
    max_tags: int | None = Field(
        None, ge=1, description="Best tags of a head that results carry; unset: all"
    )
    min_score: float = Field(
        0.0, ge=0, le=1, description="Tags below this are left out, but for the best of a head"
    )
    taggram: bool = Field(False, description="Whether results carry the windows x labels table")


class KafkaSettings(Section):
    """The broker, its topics and how it is spoken to."""

    bootstrap_servers: str = Field("localhost:9092", description="host:port, comma-separated")
    group: str = Field("timbre", min_length=1, description="Consumer group")
    topic_new: Topic = Field("tracks.new", description="New-track events")
    topic_backfill: Topic = Field("tracks.backfill", description="The same at lower priority")
    topic_tags: Topic = Field("tracks.tags", description="Results")
    topic_features: Topic = Field("tracks.features", description="Embeddings")
    topic_dead_letter: Topic = Field("tracks.dead-letter", description="Dead letters")
    max_event_bytes: int = Field(MIB, gt=0, description="Bytes of one event")
    session_timeout_s: float = Field(
        20.0, ge=6, description="Seconds until the group takes over a dead worker's partitions"
    )
    request_timeout_s: float = Field(30.0, gt=0, description="Seconds for one request to a broker")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="With TLS, with a password, or both"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="SASL mechanism"
    )
    sasl_username: str | None = Field(None, description="SASL user name")
    sasl_password: SecretStr | None = Field(None, description="SASL password")
    ssl_ca_file: FilePath | None = Field(None, description="CA certificates; unset: the system's")
    ssl_cert_file: FilePath | None = Field(None, description="Client certificate")
    ssl_key_file: FilePath | None = Field(None, description="Client key")

    @property
    def topics(self) -> list[str]:
        """The names of all topics."""
        return [getattr(self, name) for name in type(self).model_fields if "topic_" in name]

    @property
    def max_message_bytes(self) -> int:
        """An event with its key, its headers and what Kafka adds."""
        return self.max_event_bytes + 64 * 1024

    @field_validator("bootstrap_servers")
    @classmethod
    def _are_servers(cls, value: str) -> str:
        for server in value.split(","):
            found = SERVER.fullmatch(server.strip())
            if not found or int(found[1] or 0) > MAX_PORT:
                raise ValueError("must be host:port, or several with commas between")
        return value

    @model_validator(mode="after")
    def _topics_differ(self) -> Self:
        if len(set(self.topics)) < len(self.topics):
            raise ValueError("each topic_* needs a name of its own, or results come in as events")
        return self

    @model_validator(mode="after")
    def _credentials_go_with_the_protocol(self) -> Self:
        """What was given and is not used leaves its operator in the belief that it is."""
        protocol = self.security_protocol
        password = (self.sasl_username, self.sasl_password)
        if protocol.startswith("SASL"):
            if not all(password):
                raise ValueError(f"{protocol} needs sasl_username and sasl_password")
        elif any(password):
            raise ValueError(f"security_protocol {protocol} sends no sasl_username or _password")
        if "SSL" not in protocol and (self.ssl_ca_file or self.ssl_cert_file or self.ssl_key_file):
            raise ValueError(f"security_protocol {protocol} uses none of ssl_*: there is no TLS")
        if self.ssl_key_file and not self.ssl_cert_file:
            raise ValueError("ssl_key_file needs ssl_cert_file")
        return self


class RedisSettings(Section):
    """The store of results and the cache."""

    url: SecretStr = Field(
        SecretStr("redis://localhost:6379/0"), description="redis://, rediss:// or unix://"
    )
    password: SecretStr | None = Field(None, description="Password, when not in the URL")
    ssl_ca_file: FilePath | None = Field(
        None, description="CA certificates for rediss://; unset: the system's"
    )
    ssl_cert_file: FilePath | None = Field(None, description="Client certificate for rediss://")
    ssl_key_file: FilePath | None = Field(None, description="Client key for rediss://")
    prefix: str = Field("timbre:", description="Start of every key")
    track_ttl_s: Life = Field(30 * 86400, description="Life of a track's hash; 0: for ever")
    cache_ttl_s: Life = Field(30 * 86400, description="Life of a cached analysis; 0: for ever")
    genre_ttl_s: Life = Field(
        30 * 86400, description="Life of a track in its genre's sorted set; 0: for ever"
    )
    timeout_s: float = Field(2.0, gt=0, description="Seconds for one command")
    catch_up_max: int = Field(
        10_000, ge=0, description="Results kept to be stored once Redis is back, of 256 MiB at most"
    )

    @model_validator(mode="after")
    def _a_key_goes_with_its_certificate(self) -> Self:
        if self.ssl_key_file and not self.ssl_cert_file:
            raise ValueError("ssl_key_file needs ssl_cert_file")
        return self


def _user_dir(variable: str, default: str) -> Path:
    try:
        return Path(os.environ.get(variable) or Path.home() / default) / "timbre"
    except RuntimeError:  # no home, as of a container's unknown user; a worker needs none
        return Path("/nonexistent") / default / "timbre"


class ServicesSettings(Section):
    """Where the local Kafka and Redis keep what outlives them."""

    cache_dir: Folder = Field(
        default_factory=lambda: _user_dir("XDG_CACHE_HOME", ".cache"),
        description="Kafka's jars and the demo's music, fetched or rendered once. Default: "
        "~/.cache/timbre, or timbre in XDG_CACHE_HOME",
    )
    state_dir: Folder = Field(
        default_factory=lambda: _user_dir("XDG_STATE_HOME", ".local/state"),
        description="What `timbre services up` started, for `down` to find. Default: "
        "~/.local/state/timbre, or timbre in XDG_STATE_HOME",
    )


class HttpSettings(Section):
    """The worker's own port: metrics and health."""

    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 in a container"
    )
    port: int = Field(8080, ge=0, le=65535, description="Port; 0 takes a free one")


class WorkerSettings(Section):
    """How much a worker takes on, and how it stops."""

    bundle: str | None = Field(None, description="Path or name of a model bundle; unset: default")
    max_in_flight: int = Field(48, ge=1, description="Events being worked on at once")
    max_backfill_in_flight: int = Field(8, ge=1, description="Backfill events beside them")
    rebalance_grace_s: float = Field(
        5.0,
        ge=0,
        description="Seconds for what is in flight to finish before a rebalance; three fifths of "
        "STOP_DEADLINE_S at most",
    )
    max_ahead: int = Field(
        256, ge=1, description="Events of a partition finished ahead of its oldest, at most"
    )
    track_deadline_s: float = Field(
        600.0,
        gt=0,
        description="Seconds one attempt at a track may take, waiting for a decoder left out, "
        "and within which the last track of a message must begin",
    )
    attempts: int = Field(
        3, ge=1, description="Attempts at a track before its dead letter; fetches have their own"
    )
    backoff_initial_s: float = Field(
        0.5, gt=0, description="Longest first wait between attempts; waits are random"
    )
    backoff_max_s: float = Field(30.0, gt=0, description="Longest wait between attempts")
    stop_deadline_s: float = Field(25.0, gt=0, description="Most seconds from SIGTERM to the exit")
    stalled_after_s: float = Field(
        120.0,
        gt=0,
        description="Seconds without progress, while there is lag, until `/health/live` fails; "
        "with events in flight at least TRACK_DEADLINE_S and BACKOFF_MAX_S together. Also seconds "
        "without a word from Kafka of that lag, until `/health/ready` fails",
    )
    log_format: Literal["text", "json"] = Field("text", description="Form of the log's lines")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level that is logged"
    )


class Settings(BaseSettings):
    """Everything a process of Timbre can be told."""

    model_config = SettingsConfigDict(
        env_prefix="TIMBRE_", env_nested_delimiter="__", extra="ignore", frozen=True
    )

    fetch: FetchSettings = Field(default_factory=FetchSettings)
    decode: DecodeSettings = DecodeSettings()
    windows: WindowSettings = WindowSettings()
    batch: BatchSettings = BatchSettings()
    vote: VoteSettings = VoteSettings()
    kafka: KafkaSettings = KafkaSettings()
    redis: RedisSettings = RedisSettings()
    http: HttpSettings = HttpSettings()
    services: ServicesSettings = Field(default_factory=ServicesSettings)
    worker: WorkerSettings = WorkerSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, InitSettingsSource(settings_cls, _secrets())


def load(**sections: object) -> Settings:
    """Read the settings from the environment and secret files; `sections` win over both.

    Raises
    ------
    SettingsInvalid
        A value is of the wrong kind, or a variable of a section that there is not; the message
        names it without showing secrets.
    """
    _refuse_unknown_sections()
    try:
        return Settings(**sections)  # type: ignore[arg-type]  # pydantic checks what comes in
    except ValidationError as error:
        faults = "; ".join(
            f"TIMBRE_{'__'.join(str(part) for part in fault['loc']).upper()}: {_told(fault)}"
            for fault in error.errors(include_input=False, include_url=False)
        )
        raise SettingsInvalid(f"Settings can't be used. {faults}.") from None
    except SettingsError as error:
        raise SettingsInvalid(f"Settings can't be read: {error}") from None


def sections() -> dict[str, type[Section]]:
    """The models of the sections, by name."""
    fields = Settings.model_fields.items()
    return {name: cast(type[Section], field.annotation) for name, field in fields}


def _refuse_unknown_sections() -> None:
    """Pydantic refuses unknown names within a section; a misspelt section, or a single underscore
    behind it, it would pass over.
    """
    prefix, delimiter = "TIMBRE_", "__"
    meant = {
        f"{prefix}{section}_{key}".upper(): f"{prefix}{section}{delimiter}{key}".upper()
        for section, model in sections().items()
        for key in model.model_fields
    }
    for name, value in sorted(os.environ.items()):
        known_as = name.upper()
        section, found, _ = known_as.removeprefix(prefix).partition(delimiter)
        if known_as.startswith(prefix) and found and section.lower() not in Settings.model_fields:
            raise SettingsInvalid(
                f"{name} belongs to no section; those are "
                f"{', '.join(each.upper() for each in Settings.model_fields)}."
            )
        # Kubernetes tells every pod of a service `timbre-http` in such a way.
        if known_as in meant and not value.startswith("tcp://"):
            raise SettingsInvalid(f"{name} is not read: {meant[known_as]} is meant.")


def _told(fault: ErrorDetails) -> str:
    """What is wrong, for somebody who knows variables and not pydantic."""
    if fault["type"] != "extra_forbidden":
        return fault["msg"].removeprefix("Value error, ")
    section, *_, name = fault["loc"]
    near = difflib.get_close_matches(str(name), sections()[str(section)].model_fields, n=1)
    variable = f"TIMBRE_{section}__{near[0]}".upper() if near else ""
    return "there is no such setting" + (f"; perhaps {variable} is meant" if near else "")


def _secrets() -> dict[str, Any]:
    """What the files of TIMBRE_SECRETS_DIR hold, by section and name.

    What is no file of the folder itself, as where a link leads out of it, is not passed over: the
    worker would do without a password that its operator gave.
    """
    secrets: dict[str, Any] = {}
    if not (named := os.environ.get("TIMBRE_SECRETS_DIR")):
        return secrets
    if not (folder := Path(named)).is_dir():
        raise SettingsInvalid(f"TIMBRE_SECRETS_DIR: {named} is not a folder.")
    for path in sorted(folder.iterdir()):
        section, found, name = path.name.lower().partition("__")
        if not found or section not in Settings.model_fields:
            continue
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise SettingsInvalid(
                f"{path} is not read: a secret must be a file that lies in TIMBRE_SECRETS_DIR."
            )
        try:
            secret = path.read_text(encoding="utf-8")
        except OSError as error:
            raise SettingsInvalid(f"{path} can't be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            secret = BYTE_ORDER_MARK
        if secret.startswith(BYTE_ORDER_MARK):
            raise SettingsInvalid(f"{path} must be UTF-8 without a byte order mark.")
        secrets.setdefault(section, {})[name] = secret.strip()
    return secrets


def child_environment(values: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `values` added, for a process that is started."""
    return {**os.environ, **values}
