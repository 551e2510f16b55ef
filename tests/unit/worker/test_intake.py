import base64
import json
from typing import Any
from urllib.parse import quote_plus

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from schemas.events import MAX_METADATA_BYTES, NewTrack
from worker.errors import EventMalformed, EventTooLarge, EventVersionUnknown
from worker.intake import Announcement, read
from worker.record import Record

TRACK: dict[str, Any] = {
    "track_id": "t-1",
    "audio": {"uri": "https://cdn.example/t-1.mp3", "sha256": "AB" * 32, "etag": '"x"'},
    "uploaded_at": "2026-01-31T12:00:00+02:00",
    "priority": "backfill",
    "metadata": {"title": "Żółw", "nested": {"list": [1, 2.5, None, True, "\0"]}},
}
CLOUD = {"specversion": "1.0", "id": "e-1", "source": "/uploads", "type": "track.new"}
MAX_MESSAGE_CHARS = 700


def record(
    value: object, *, key: bytes | None = None, headers: dict[str, str] | None = None
) -> Record:
    raw = value if isinstance(value, bytes | None) else json.dumps(value).encode()
    pairs = tuple((name, text.encode()) for name, text in (headers or {}).items())
    return Record("tracks.new", 0, 0, 0.0, key, raw, pairs)


def only(announced: Announcement) -> NewTrack:
    (track,) = announced.tracks
    assert announced.fault is None
    return track


def changed(**fields: object) -> dict[str, Any]:
    return {**TRACK, **fields}


class TestPlainEvents:
    def test_every_field_arrives(self) -> None:
        track = only(read(record(TRACK, key=b"t-1")))
        assert track.track_id == "t-1"
        assert track.audio.uri == "https://cdn.example/t-1.mp3"
        assert track.audio.sha256 == "ab" * 32
        assert track.audio.etag == '"x"'
        assert track.uploaded_at is not None
        assert track.uploaded_at.isoformat() == "2026-01-31T10:00:00+00:00"
        assert track.priority == "backfill"
        assert track.metadata == TRACK["metadata"]
        assert track.source_event_id is None

    def test_id_and_address_are_enough(self) -> None:
        track = only(read(record({"track_id": "t", "audio": {"uri": "file:///t.mp3"}})))
        assert (track.priority, track.metadata, track.uploaded_at) == ("upload", {}, None)

    def test_null_is_the_default_of_what_may_be_absent(self) -> None:
        nothing = {"uploaded_at": None, "priority": None, "metadata": None, "source_event_id": None}
        audio = {"uri": "file:///t.mp3"}
        absent = {"sha256": None, "etag": None, "size_bytes": None}
        track = only(read(record({"track_id": "t", "audio": {**audio, **absent}, **nothing})))
        assert track == only(read(record({"track_id": "t", "audio": audio})))
        assert (track.priority, track.metadata) == ("upload", {})

    def test_unknown_fields_of_a_newer_producer_are_ignored(self) -> None:
        track = only(read(record(changed(audio={"uri": "http://h/t", "loudness": 1}, mood="blue"))))
        assert track.audio.uri == "http://h/t"

    def test_metadata_survives_a_round_trip_untouched(self) -> None:
        metadata = {"big": 10**30, "deep": [[[{"a": -0.5}]]], "nul": "\0", "emoji": "🎷"}
        track = only(read(record(changed(metadata=metadata))))
        assert NewTrack.from_bytes(track.to_bytes()).metadata == metadata

    def test_the_last_of_two_equal_names_counts(self) -> None:
        raw = b'{"track_id": "a", "track_id": "b", "audio": {"uri": "http://h/t"}}'
        assert only(read(record(raw))).track_id == "b"

    @pytest.mark.parametrize("key", [None, b"", b"t-1"])
    def test_key_agrees_or_is_absent(self, key: bytes | None) -> None:
        assert only(read(record(TRACK, key=key))).track_id == "t-1"

    @pytest.mark.parametrize("key", [b"t-2", b'"t-1"', b"\xff\xfe"])
    def test_another_key_is_malformed(self, key: bytes) -> None:
        with pytest.raises(EventMalformed, match="key"):
            read(record(TRACK, key=key))


class TestHostileBytes:
    @pytest.mark.parametrize(
        "value",
        [
            None,
            b"",
            b"\x00" * 100,
            b"null",
            b"[]",
            b'"track"',
            b"17",
            b"{",
            b"{} trailing",
            json.dumps(TRACK).encode("utf-16"),
            json.dumps(TRACK).encode("utf-32"),
            b"\xef\xbb\xbf" + json.dumps(TRACK).encode(),
            json.dumps(TRACK).encode().replace(b"t-1", b"t-\xff"),
            json.dumps(TRACK).encode().replace(b"t-1", b"t-\\ud800"),
            json.dumps(changed(metadata={"\udc00": "\ud800"})).encode(),
            json.dumps(changed(metadata={"n": float("nan")})).encode(),
            json.dumps(changed(metadata={"n": float("inf")})).encode(),
            json.dumps(changed(metadata={"n": 1})).encode().replace(b'"n": 1', b'"n": 1e999'),
            json.dumps(changed(metadata={"n": 1}))
            .encode()
            .replace(b'"n": 1', b'"n": ' + b"9" * 5000),
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b'{"track_id": "t", "audio": {"uri": "http://h"}, "metadata": {"a": '
            + b"[" * 150
            + b"]" * 150
            + b"}}",
        ],
    )
    def test_is_malformed(self, value: bytes | None) -> None:
        with pytest.raises(EventMalformed) as failure:
            read(record(value))
        assert len(failure.value.message) < MAX_MESSAGE_CHARS

    @pytest.mark.parametrize(
        "event",
        [
            {},
            {"track_id": "t"},
            {"audio": {"uri": "http://h/t"}},
            changed(track_id=""),
            changed(track_id=7),
            changed(track_id="x" * 257),
            changed(track_id="a\nb"),
            changed(track_id="a\0b"),
            changed(track_id=["t"]),
            changed(audio="http://h/t"),
            changed(audio={}),
            changed(audio={"uri": ""}),
            changed(audio={"uri": None}),
            changed(audio={"uri": "http://h/" + "x" * 9000}),
            changed(audio={"uri": "http://h/\r\nHost: x"}),
            changed(audio={"uri": "http://h/t", "sha256": "ab"}),
            changed(audio={"uri": "http://h/t", "sha256": "z" * 64}),
            changed(audio={"uri": "http://h/t", "size_bytes": 10**40}),
            changed(uploaded_at=1767225600),
            changed(uploaded_at="1767225600"),
            changed(uploaded_at="yesterday"),
            changed(uploaded_at="0001-01-01T00:00:00+14:00"),
            changed(priority="now"),
            changed(metadata=[]),
            changed(metadata={"a": "x" * (MAX_METADATA_BYTES + 1)}),
            changed(source_event_id="x" * 5000),
            changed(**{f"k{i}": i for i in range(2000)}, track_id=None),
        ],
    )
    def test_wrong_fields_are_malformed(self, event: dict[str, Any]) -> None:
        with pytest.raises(EventMalformed) as failure:
            read(record(event))
        assert len(failure.value.message) < MAX_MESSAGE_CHARS
        assert "Value error" not in failure.value.message

    def test_an_enormous_message_is_refused_before_it_is_parsed(self) -> None:
        with pytest.raises(EventTooLarge, match="MAX_EVENT_BYTES"):
            read(record(b"[" * 5000), max_bytes=4096)

    def test_the_sentence_never_carries_the_input_along(self) -> None:
        for event in (changed(priority="x" * 100_000), changed(metadata={"y" * 100_000: 1.0})):
            raw = json.dumps(event).encode().replace(b"1.0", b"1e999")
            with pytest.raises(EventMalformed) as failure:
                read(record(raw))
            assert len(failure.value.message) < MAX_MESSAGE_CHARS


class TestCloudEvents:
    def binary(self, **attributes: str) -> dict[str, str]:
        headers = {f"ce_{name}": value for name, value in {**CLOUD, **attributes}.items()}
        return {"content-type": "application/json; charset=utf-8", **headers}

    def test_binary_mode(self) -> None:
        track = only(read(record(TRACK, key=b"t-1", headers=self.binary())))
        assert (track.track_id, track.source_event_id) == ("t-1", "/uploads e-1")

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"content-type": "application/cloudevents+json; charset=UTF-8"},
            {"Content-Type": "application/cloudevents+json", "ce_traceparent": "00-1"},
        ],
    )
    def test_structured_mode(self, headers: dict[str, str]) -> None:
        event = {**CLOUD, "datacontenttype": "application/json", "data": TRACK}
        track = only(read(record(event, key=b"t-1", headers=headers)))
        assert (track.track_id, track.source_event_id) == ("t-1", "/uploads e-1")

    def test_structured_mode_with_data_in_base64(self) -> None:
        event = {**CLOUD, "data_base64": base64.b64encode(json.dumps(TRACK).encode()).decode()}
        assert only(read(record(event))).track_id == "t-1"

    @pytest.mark.parametrize("other", ["data", "data_base64"])
    def test_what_is_null_is_as_good_as_absent(self, other: str) -> None:
        packed = base64.b64encode(json.dumps(TRACK).encode()).decode()
        event = {**CLOUD, "data": TRACK, "data_base64": packed, other: None}
        assert only(read(record(event))).track_id == "t-1"

    def test_the_envelope_and_not_the_data_names_the_event(self) -> None:
        event = {**CLOUD, "data": changed(source_event_id="forged")}
        assert only(read(record(event))).source_event_id == "/uploads e-1"

    def test_unknown_version(self) -> None:
        with pytest.raises(EventVersionUnknown, match=r"1\.0"):
            read(record({**CLOUD, "specversion": "0.3", "data": TRACK}))
        with pytest.raises(EventVersionUnknown):
            read(record(TRACK, headers=self.binary(specversion="2.0")))

    @pytest.mark.parametrize("name", ["id", "source", "type"])
    def test_missing_attribute(self, name: str) -> None:
        with pytest.raises(EventMalformed, match=name):
            read(record({**CLOUD, "data": TRACK, name: None}))
        headers = self.binary()
        del headers[f"ce_{name}"]
        with pytest.raises(EventMalformed, match=name):
            read(record(TRACK, headers=headers))

    @pytest.mark.parametrize(
        "extra",
        [
            {},
            {"data": TRACK, "data_base64": ""},
            {"data": "text"},
            {"data": TRACK, "datacontenttype": "application/xml"},
            {"data": TRACK, "datacontenttype": 3},
            {"data_base64": "not base64!"},
            {"data_base64": "!" + base64.b64encode(json.dumps(TRACK).encode()).decode()},
            {"data_base64": "żółw"},
            {"data_base64": 5},
            {"data": TRACK, "id": "x" * 5000},
            {"data": TRACK, "specversion": 1.0},
        ],
    )
    def test_wrong_envelopes_are_malformed(self, extra: dict[str, Any]) -> None:
        with pytest.raises(EventMalformed):
            read(record({**CLOUD, **extra}))

    def test_batches_are_refused(self) -> None:
        headers = {"content-type": "application/cloudevents-batch+json"}
        with pytest.raises(EventMalformed, match="one event"):
            read(record([{**CLOUD, "data": TRACK}], headers=headers))

    def test_binary_data_of_another_type_is_refused(self) -> None:
        headers = {**self.binary(), "content-type": "text/plain"}
        with pytest.raises(EventMalformed, match="application/json"):
            read(record(TRACK, headers=headers))

    def test_a_header_that_is_not_utf8_is_malformed(self) -> None:
        value = json.dumps(TRACK).encode()
        with pytest.raises(EventMalformed, match="UTF-8"):
            read(Record("t", 0, 0, 0.0, None, value, (("ce_id", b"\xff"),)))


def notification(
    key: str, *, name: str = "ObjectCreated:Put", source: str = "aws:s3", **fields: object
) -> dict[str, Any]:
    return {
        "eventVersion": "2.1",
        "eventSource": source,
        "awsRegion": "eu-central-1",
        "eventTime": "2026-01-31T12:00:00.123Z",
        "eventName": name,
        "s3": {
            "s3SchemaVersion": "1.0",
            "bucket": {"name": "music", "arn": "arn:aws:s3:::music"},
            "object": {"key": key, "size": 5, "eTag": "abc", "sequencer": "0055", **fields},
        },
    }


WRONG_RECORDS: list[Any] = [
    None,
    [],
    "a.mp3",
    {},
    {"eventName": 5},
    {"eventName": "ObjectCreated:Put"},
    notification(""),
    notification("%FF.mp3"),
    notification("x" * 1025),
    notification("a.mp3", size=-1),
    notification("a.mp3", versionId="x" * 9000),
    {**notification("a.mp3"), "eventTime": "noon"},
    {**notification("a.mp3"), "s3": {"bucket": {"name": "a/b"}, "object": {"key": "k"}}},
]


class TestBucketNotifications:
    def test_each_record_is_a_track(self) -> None:
        message = {"Records": [notification("a.mp3"), notification("b/c.flac")]}
        (first, second), fault = read(record(message, key=b"whatever"))
        assert fault is None
        assert (first.track_id, first.audio.uri) == ("music/a.mp3", "s3://music/a.mp3")
        assert (first.audio.etag, first.audio.size_bytes) == ("abc", 5)
        assert second.track_id == "music/b/c.flac"
        assert first.uploaded_at is not None
        assert first.source_event_id == "aws:s3 music/a.mp3 0055"

    def test_minio_form(self) -> None:
        entry = notification(
            "in%2Ftwo+words%2B%C3%BC.mp3", name="s3:ObjectCreated:Put", source="minio:s3"
        )
        message = {"EventName": "s3:ObjectCreated:Put", "Key": "music/in", "Records": [entry]}
        track = only(read(record(message, key="music/in/two words+ü.mp3".encode())))
        assert track.track_id == "music/in/two words+ü.mp3"
        assert track.audio.uri == "s3://music/in/two%20words%2B%C3%BC.mp3"

    def test_ceph_form(self) -> None:
        entry = notification("a+b%20c.mp3", source="ceph:s3", size="1024", versionId="")
        track = only(read(record({"Records": [entry]})))
        assert track.track_id == "music/a+b%20c.mp3"
        assert track.audio.uri == "s3://music/a%2Bb%2520c.mp3"
        assert track.audio.size_bytes == 1024

    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=250))
    def test_any_key_comes_out_as_it_went_in(self, key: str) -> None:
        key = f"{key}."
        track = only(read(record({"Records": [notification(quote_plus(key))]})))
        if key.isprintable() and len(key) < 200:
            assert track.track_id == f"music/{key}"
        assert len(track.track_id) <= 256

    def test_long_and_unprintable_keys_get_a_stable_id(self) -> None:
        message = {"Records": [notification("x" * 500), notification("a%0Ab.mp3")]}
        ids = [track.track_id for track in read(record(message)).tracks]
        assert ids == [track.track_id for track in read(record(message)).tracks]
        assert all(name.startswith("music/sha256:") for name in ids)
        assert len(set(ids)) == 2

    def test_the_version_stands_in_the_address(self) -> None:
        entry = notification("a.mp3", versionId="3/L4kq+x")
        track = only(read(record({"Records": [entry]})))
        assert track.audio.uri == "s3://music/a.mp3?versionId=3%2FL4kq%2Bx"
        assert track.track_id == "music/a.mp3"
        unversioned = notification("a.mp3", versionId="null")
        assert only(read(record({"Records": [unversioned]}))).audio.uri == "s3://music/a.mp3"

    def test_without_a_sequencer_version_or_etag_tell_one_write_from_another(self) -> None:
        entries = [
            notification("a.mp3", sequencer=None, versionId="7"),
            notification("a.mp3", sequencer=None),
            {**notification("a.mp3", sequencer=None, eTag=""), "eventTime": ""},
        ]
        tracks = read(record({"Records": entries})).tracks
        assert [track.source_event_id for track in tracks] == [
            "aws:s3 music/a.mp3 7",
            "aws:s3 music/a.mp3 abc",
            None,
        ]
        assert (tracks[2].audio.etag, tracks[2].uploaded_at) == (None, None)

    @pytest.mark.parametrize(
        "message",
        [
            {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "music"},
            {"Records": []},
            {"Records": [{"eventName": "ObjectRemoved:Delete"}]},
            {"Records": [notification("a.mp3", name="s3:ObjectAccessed:Get")]},
            {"Records": [notification("folder/")]},
            {"Records": [{"eventName": "s3:ObjectCreated:PutTagging"}]},
        ],
    )
    def test_what_creates_no_object_announces_no_track(self, message: dict[str, Any]) -> None:
        assert read(record(message)) == Announcement([])

    @pytest.mark.parametrize("prefix", ["", "s3:"])
    @pytest.mark.parametrize("kind", ["Put", "Post", "Copy", "CompleteMultipartUpload"])
    def test_every_way_to_write_an_object_announces_a_track(self, prefix: str, kind: str) -> None:
        entry = notification("a.mp3", name=f"{prefix}ObjectCreated:{kind}")
        assert only(read(record({"Records": [entry]}))).track_id == "music/a.mp3"

    @pytest.mark.parametrize("prefix", ["", "s3:"])
    @pytest.mark.parametrize(
        "kind", ["PutTagging", "DeleteTagging", "PutRetention", "PutLegalHold"]
    )
    def test_a_change_of_what_stands_beside_the_audio_announces_none(
        self, prefix: str, kind: str
    ) -> None:
        beside = notification("a.mp3", name=f"{prefix}ObjectCreated:{kind}")
        assert read(record({"Records": [beside]})) == Announcement([])
        both = {"Records": [beside, notification("b.mp3")]}
        assert only(read(record(both))).track_id == "music/b.mp3"

    @pytest.mark.parametrize(
        "message",
        [
            {"Type": "Notification", "Message": json.dumps({"Records": [notification("a.mp3")]})},
            {
                "version": "0",
                "detail-type": "Object Created",
                "source": "aws.s3",
                "detail": {"bucket": {"name": "music"}, "object": {"key": "a.mp3", "size": 5}},
            },
        ],
        ids=["SNS", "EventBridge"],
    )
    def test_what_other_services_make_of_one_is_malformed(self, message: dict[str, Any]) -> None:
        with pytest.raises(EventMalformed, match="track_id"):
            read(record(message))

    def test_inside_a_cloud_event(self) -> None:
        event = {**CLOUD, "data": {"Records": [notification("a.mp3")]}}
        assert only(read(record(event))).track_id == "music/a.mp3"

    @pytest.mark.parametrize(
        "records", [None, {}, "a", [notification(f"{number}.mp3") for number in range(101)]]
    )
    def test_wrong_records_are_malformed_as_a_whole(self, records: object) -> None:
        with pytest.raises(EventMalformed, match="Records"):
            read(record({"Records": records}))

    @pytest.mark.parametrize("entry", WRONG_RECORDS)
    def test_a_wrong_record_is_malformed_and_those_beside_it_are_tracks(
        self, entry: object
    ) -> None:
        message = {"Records": [notification("a.mp3"), entry, notification("b.mp3")]}
        tracks, fault = read(record(message))
        assert [track.track_id for track in tracks] == ["music/a.mp3", "music/b.mp3"]
        assert fault is not None
        assert fault.message.startswith("Record 2 of 3 in the bucket notification can't be read: ")
        assert "more" not in fault.message
        assert len(fault.message) < MAX_MESSAGE_CHARS

    def test_the_first_of_many_wrong_records_stands_for_all(self) -> None:
        removed = {"eventName": "s3:ObjectRemoved:Delete"}
        records = [removed, {}, notification("a.mp3"), *[None] * 40, *WRONG_RECORDS]
        tracks, fault = read(record({"Records": records}))
        assert [track.track_id for track in tracks] == ["music/a.mp3"]
        assert fault is not None
        assert fault.message == (
            f"Record 2 of {len(records)} in the bucket notification can't be read: "
            f"It lacks its eventName. Nor can {len(records) - 3} more."
        )

    @pytest.mark.parametrize("entry", WRONG_RECORDS)
    def test_where_none_can_be_read_there_is_one_fault_and_no_track(self, entry: object) -> None:
        tracks, fault = read(record({"Records": [entry] * 100}))
        assert tracks == []
        assert fault is not None
        assert "Record 1 of 100" in fault.message
        assert fault.message.endswith("Nor can 99 more.")

    def test_a_wrong_record_harms_none_inside_a_cloud_event(self) -> None:
        event = {**CLOUD, "data": {"Records": [notification("a.mp3"), None]}}
        tracks, fault = read(record(event))
        assert [track.track_id for track in tracks] == ["music/a.mp3"]
        assert fault is not None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
IN_TRACKS = ["track_id", "audio", "uri", "sha256", "metadata", "priority", "uploaded_at"]
IN_ENVELOPES = ["specversion", "id", "source", "type", "data", "data_base64"]
IN_NOTIFICATIONS = ["Records", "Event", "eventName", "s3", "bucket", "name", "object", "key"]
FIELD = st.sampled_from([*IN_TRACKS, *IN_ENVELOPES, *IN_NOTIFICATIONS])
ALMOST = st.recursive(
    JSON | st.sampled_from(["t-1", "1.0", "http://h/t", "ObjectCreated:Put", "s3:TestEvent"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELD, inner, max_size=6),
    max_leaves=12,
)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["ce_specversion", "ce_id", "ce_source", "ce_type", "content-type"])
        | st.text(),
        st.sampled_from([b"1.0", b"application/json", b"application/cloudevents+json"])
        | st.binary(max_size=20),
    ),
    max_size=6,
).map(tuple)


def attempt(value: bytes, headers: Any, key: bytes | None) -> None:
    """Tracks or a typed error with a bounded sentence; anything else fails the test."""
    tracks = list[NewTrack]()
    failure: EventMalformed | EventTooLarge | EventVersionUnknown | None
    try:
        tracks, failure = read(Record("tracks.new", 0, 0, 0.0, key, value, headers))
    except (EventMalformed, EventTooLarge, EventVersionUnknown) as error:
        failure = error
    assert failure is None or len(failure.message.encode()) < MAX_MESSAGE_CHARS
    for track in tracks:
        assert NewTrack.from_bytes(track.to_bytes()) == track


class TestAnyInput:
    @settings(max_examples=800)
    @given(st.binary(max_size=300), HEADERS, st.none() | st.binary(max_size=10))
    def test_any_bytes_are_read_or_refused_by_a_typed_error(
        self, value: bytes, headers: Any, key: bytes | None
    ) -> None:
        attempt(value, headers, key)

    @settings(max_examples=1000)
    @given(JSON | ALMOST, HEADERS)
    @example({"specversion": "1.0"}, ())
    def test_any_json_is_read_or_refused_by_a_typed_error(
        self, value: object, headers: Any
    ) -> None:
        attempt(json.dumps(value).encode(), headers, None)

    @settings(max_examples=800)
    @given(st.dictionaries(st.sampled_from(sorted(TRACK)), ALMOST), HEADERS)
    def test_events_with_fields_of_another_kind(self, fields: dict[str, Any], headers: Any) -> None:
        attempt(json.dumps(changed(**fields)).encode(), headers, b"t-1")

    @settings(max_examples=400)
    @given(st.lists(JSON | ALMOST, max_size=6), st.integers(0, 6))
    def test_records_of_any_kind_harm_none_among_them(
        self, records: list[object], place: int
    ) -> None:
        records.insert(place, notification("a.mp3"))
        raw = json.dumps({"Records": records}).encode()
        assume(b"NaN" not in raw and b"Infinity" not in raw)
        tracks, _ = read(Record("tracks.new", 0, 0, 0.0, None, raw))
        assert "music/a.mp3" in [track.track_id for track in tracks]
        attempt(raw, (), None)

    @settings(max_examples=800)
    @given(st.integers(0, 400), st.binary(min_size=1, max_size=4), st.booleans())
    def test_events_with_bytes_overwritten(self, at: int, noise: bytes, cut: bool) -> None:
        raw = json.dumps({**CLOUD, "data": TRACK, "Records": [notification("a")]}).encode()
        attempt(raw[:at] + noise + (b"" if cut else raw[at + len(noise) :]), (), None)
