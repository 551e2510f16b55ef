"""Every failure Timbre knows: a stable code, a sentence to act on, and whether a retry helps.

Codes are public: they stand in dead letters, metrics and `timbre tag --json`. Never rename one.
"""

from typing import ClassVar


class TimbreError(Exception):
    """A failure with a stable `code`; `retryable` says whether the same input may pass later."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class TrackFailed(TimbreError):
    """A failure that makes a dead letter of a track or its event; `stage` is where it happens."""

    stage: ClassVar[str] = "track"


def track_failures() -> list[type[TrackFailed]]:
    """Every kind of failure that a dead letter may have."""
    kinds = [TrackFailed]
    for kind in kinds:  # grows while it is walked
        kinds += kind.__subclasses__()
    return kinds[1:]


class Unexpected(TrackFailed):
    """A fault in Timbre itself: the message carries the exception's type, the log its traceback."""

    code = "internal_error"


class SettingsInvalid(TimbreError):
    """Configuration that can't be used."""

    code = "settings_invalid"


# Intake -------------------------------------------------------------------------------------


class EventMalformed(TrackFailed):
    """The message is not a new-track event in any accepted form."""

    code = "event_malformed"
    stage = "intake"


class EventTooLarge(TrackFailed):
    """The message is larger than an event may be."""

    code = "event_too_large"
    stage = "intake"


class EventVersionUnknown(TrackFailed):
    """The event names a specification version this worker doesn't read."""

    code = "event_version_unknown"
    stage = "intake"


# Fetch --------------------------------------------------------------------------------------


class FetchFailed(TrackFailed):
    """The audio could not be fetched, in so many `attempts`."""

    code = "fetch_failed"
    stage = "fetch"
    attempts: int = 1


class FetchUnavailable(FetchFailed):
    """The server was unreachable, reset the connection, or answered with a passing error.

    `retry_after_s` is the wait that the server asked for, if it did.
    """

    code = "fetch_unavailable"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class FetchTimeout(FetchFailed):
    """The audio did not arrive in time.

    Tried once more and no further: each attempt holds a place in flight until the time is up. It
    may pass later, when an operator has it tried again.
    """

    code = "fetch_timeout"
    retryable = True


class FetchTooSlow(FetchFailed):
    """The server sends, but slower than it must.

    Not tried again by itself: each attempt would hold a place in flight for as long as it takes to
    tell. Like a timeout it may pass later.
    """

    code = "fetch_too_slow"
    retryable = True


class AudioNotFound(FetchFailed):
    """There is nothing at the address (404, 410, no such object, no such file)."""

    code = "audio_not_found"


class FetchForbidden(FetchFailed):
    """The server refused access (401, 403, or another permanent client error)."""

    code = "fetch_forbidden"


class AddressRefused(FetchFailed):
    """The address is private, loopback, link-local, or otherwise not allowed by configuration."""

    code = "address_refused"


class UriUnsupported(FetchFailed):
    """The URI's scheme or form is not one that Timbre fetches."""

    code = "uri_unsupported"


class AudioTooLarge(FetchFailed):
    """The audio has more bytes than the configured limit."""

    code = "audio_too_large"


class RedirectLimit(FetchFailed):
    """More redirects than allowed, or a redirect without a usable address."""

    code = "redirect_limit"


class ChecksumMismatch(FetchFailed):
    """The bytes fetched are not those that the event names by SHA-256."""

    code = "checksum_mismatch"


class SpoolFull(FetchFailed):
    """The spool has no room left, or can't be written."""

    code = "spool_full"
    retryable = True


# Decode -------------------------------------------------------------------------------------


class DecodeFailed(TrackFailed):
    """The audio could not be decoded."""

    code = "decode_failed"
    stage = "decode"


class AudioUnreadable(DecodeFailed):
    """No accepted audio container or codec, or damage from the first byte on."""

    code = "audio_unreadable"


class AudioEmpty(DecodeFailed):
    """The file decodes to no samples at all."""

    code = "audio_empty"


class AudioTooLong(DecodeFailed):
    """The track lasts longer than the configured limit."""

    code = "audio_too_long"


class DecodeTimeout(DecodeFailed):
    """The decoder ran into its hard time limit and was ended."""

    code = "decode_timeout"


class DecoderCrashed(DecodeFailed):
    """The decoder process died, or was ended for the memory it took."""

    code = "decoder_crashed"


class DecoderKilled(DecoderCrashed):
    """The decoder process was killed from outside, as the kernel does when memory runs out."""

    code = "decoder_killed"
    retryable = True


# Batch and vote -----------------------------------------------------------------------------


class InferenceFailed(TrackFailed):
    """The network could not be run over the track's windows, not even alone."""

    code = "inference_failed"
    stage = "batch"


class DeviceOutOfMemory(InferenceFailed):
    """The network, a batch's buffer or a single window does not fit the device's free memory."""

    code = "device_out_of_memory"
    retryable = True


class DeviceHung(InferenceFailed):
    """The batch did not come back from the device within its time limit."""

    code = "device_hung"
    retryable = True


class DeviceLost(InferenceFailed):
    """The device broke, and nothing runs on it until the worker is started again."""

    code = "device_lost"
    retryable = True


class TrackCancelled(TimbreError):
    """Whoever wanted the track tagged took it back."""

    code = "track_cancelled"
    retryable = True


class TrackSilent(TrackFailed):
    """Every window is silent, so none votes."""

    code = "track_silent"
    stage = "vote"


class DeadlineExceeded(TrackFailed):
    """The track did not meet its own deadline."""

    code = "deadline_exceeded"
    retryable = True


class WorkerStopping(TimbreError):
    """The worker stops and gives the event back unacknowledged."""

    code = "worker_stopping"
    retryable = True


# Bundles ------------------------------------------------------------------------------------


class BundleInvalid(TimbreError):
    """The model bundle is missing, damaged, or of a form this version doesn't read."""

    code = "bundle_invalid"


# Delivery -----------------------------------------------------------------------------------


class PublishFailed(TimbreError):
    """Kafka did not take the result."""

    code = "publish_failed"
    retryable = True


class ConsumerLost(TimbreError):
    """The Kafka consumer died and could not be taken down cleanly."""

    code = "consumer_lost"
    retryable = True


class ResultTooLarge(TrackFailed):
    """Kafka takes no message of the result's size."""

    code = "result_too_large"
    stage = "publish"


class DeadLetterNotFound(TimbreError):
    """No dead letter stands at the place asked for."""

    code = "dead_letter_not_found"


class ServicesUnavailable(TimbreError):
    """The local Kafka or Redis could not be started or reached."""

    code = "services_unavailable"


# Commands -----------------------------------------------------------------------------------


class SourceInvalid(TimbreError):
    """What was to be submitted or tagged is not there, or not in a form that is read."""

    code = "source_invalid"


class TrackUnknown(TimbreError):
    """Redis holds no result of the track."""

    code = "track_unknown"


class DemoFailed(TimbreError):
    """The demo could not go on."""

    code = "demo_failed"


# Data sets and training ----------------------------------------------------------------------


class DatasetInvalid(TimbreError):
    """The data set is missing, damaged, empty, or of a layout that this version doesn't read."""

    code = "dataset_invalid"


class SplitLeaks(DatasetInvalid):
    """A split puts one artist, or one recording, on both sides."""

    code = "split_leaks"


class CheckpointInvalid(TimbreError):
    """The checkpoint to resume from is missing, damaged, or of another training run."""

    code = "checkpoint_invalid"
