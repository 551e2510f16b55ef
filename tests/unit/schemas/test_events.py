import json
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from schemas import generate
from schemas.asyncapi import EXAMPLE_CLOUD_EVENT, EXAMPLE_NOTIFICATION, EXAMPLE_TRACK, document
from schemas.compatibility import breaks
from schemas.events import (
    AudioRef,
    DeadLetterHeaders,
    ModelRef,
    NewTrack,
    Processing,
    Tag,
    TrackFeatures,
    TrackTags,
    WindowCounts,
)
from tests.audio import audio_facts
from worker.errors import AudioNotFound, EventMalformed, ResultTooLarge
from worker.intake import read
from worker.publish import Failure, Headers, Publisher
from worker.record import Record
from worker.settings import KafkaSettings

MODEL = ModelRef(name="default", version="0a1b")
PROCESSING = Processing(
    processed_at=datetime(2026, 1, 31, tzinfo=UTC),
    timings_s={"fetch": 0.1},
    cached=False,
    attempt=1,
)
VALIDATORS = {
    name: Draft202012Validator(
        generate.json_schema(name), format_checker=Draft202012Validator.FORMAT_CHECKER
    )
    for name in generate.EVENT_TYPES
}


def tags(**changes: Any) -> TrackTags:
    fields: dict[str, Any] = {
        "event_id": "e",
        "track_id": "t",
        "audio": audio_facts(uri="http://h/t", sha256="ab" * 32, codec="mp3float", duration_s=1.5),
        "tags": [Tag(head="genre", label="jazz", category="genre", score=0.9, share=1.0)],
        "uncertain": False,
        "windows": WindowCounts(total=2, silent=1),
        "vote": "mean",
        "model": MODEL,
        "processing": PROCESSING,
    }
    return TrackTags(**{**fields, **changes})


FEATURES = TrackFeatures(
    event_id="e", track_id="t", model=MODEL, embedding=[0.6, 0.8], dims=2, processing=PROCESSING
)


class TestModels:
    @pytest.mark.parametrize(
        ("name", "event"),
        [
            ("track-tags", tags()),
            ("track-tags", tags(taggram={"genre": [[0.5, 0.5]]}, metadata={"a": [None, {"b": 1}]})),
            ("track-features", FEATURES),
        ],
    )
    def test_what_is_written_fits_its_schema_and_is_read_back(
        self, name: str, event: TrackTags | TrackFeatures
    ) -> None:
        value = event.to_bytes()
        VALIDATORS[name].validate(json.loads(value))
        assert type(event).from_bytes(value) == event
        assert type(event).from_bytes(value).to_bytes() == value

    def test_the_taggram_is_there_only_where_asked_for_and_never_null(self) -> None:
        value = tags().to_bytes()
        assert b"taggram" not in value
        assert not VALIDATORS["track-tags"].is_valid(json.loads(value) | {"taggram": None})

    def test_only_the_processing_may_differ_between_deliveries(self) -> None:
        again = PROCESSING.model_copy(update={"cached": True, "attempt": 2})
        first, second = (json.loads(event.to_bytes()) for event in (tags(), tags(processing=again)))
        assert first.pop("processing") != second.pop("processing")
        assert first == second

    def test_scores_carry_no_noise_of_float32(self) -> None:
        tag = Tag(head="genre", label="a", category="genre", score=1.0000001, share=-1e-9)
        assert (tag.score, tag.share) == (1.0, 0.0)

    @pytest.mark.parametrize("score", [1.1, -0.1, float("nan"), float("inf"), "high", None])
    def test_scores_are_probabilities(self, score: Any) -> None:
        with pytest.raises(ValidationError):
            Tag(head="genre", label="a", category="genre", score=score, share=0.5)

    def test_readers_ignore_what_later_versions_add(self) -> None:
        value = json.loads(tags().to_bytes()) | {"mood": "blue"}
        assert TrackTags.from_bytes(json.dumps(value).encode()) == tags()

    @pytest.mark.parametrize(
        ("metadata", "reason"),
        [
            ({"a": "x" * 200_000}, "bytes"),
            ({"a": float("nan")}, "finite"),
            ({"a": [[float("inf")]]}, "finite"),
            ({"a": {1, 2}}, None),
            ({"a": "\ud800"}, "surrogates"),
        ],
    )
    def test_metadata_is_bounded_json(self, metadata: dict[str, Any], reason: str) -> None:
        with pytest.raises(ValidationError, match=reason):
            tags(metadata=metadata)

    def test_metadata_is_bounded_in_depth(self) -> None:
        nested: Any = {}
        for _ in range(15):
            nested = {"a": [nested]} if len(str(nested)) % 2 else {"a": nested}
        with pytest.raises(ValidationError, match="levels"):
            tags(metadata={"a": {"b": nested}})

    def test_large_metadata_is_refused_before_it_is_looked_into(self) -> None:
        deep: list[Any] = []
        for _ in range(50):
            deep = [deep]
        before_s = time.process_time()
        with pytest.raises(ValidationError, match="bytes as JSON"):
            tags(metadata={"a": [deep] * 10_000})
        assert time.process_time() - before_s < 1.0

    @settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
                lambda inner: (
                    st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3)
                ),
                max_leaves=8,
            ),
            max_size=4,
        )
    )
    def test_any_metadata_passes_through_untouched(self, metadata: dict[str, Any]) -> None:
        assert json.loads(tags(metadata=metadata).to_bytes())["metadata"] == metadata


class TestNewTrackSchema:
    """The schema that producers check against says what intake says."""

    @pytest.mark.parametrize(
        "event",
        [
            {"track_id": "t", "audio": {"uri": "http://h/t"}},
            {"track_id": "t\u2028", "audio": {"uri": "http://h/t"}},
            {"track_id": "t" * 257, "audio": {"uri": "http://h/t"}},
            {"track_id": "t\nt", "audio": {"uri": "http://h/t"}},
            {"track_id": "ü🎷 t", "audio": {"uri": "http://h/t", "more": 1}, "more": 2},
            {"track_id": "t", "audio": {"uri": "http://h/t", "sha256": "AB" * 32}},
            {"track_id": "t", "audio": {"uri": "http://h/t", "sha256": "AB" * 31}},
            {"track_id": "t", "audio": {"uri": "http://h/t", "sha256": None, "etag": None}},
            {"track_id": "t", "audio": {"uri": "http://h/t"}, "priority": "soon"},
            {
                "track_id": "t",
                "audio": {"uri": "http://h/t"},
                "uploaded_at": "2026-01-31T12:00:00Z",
            },
            {"track_id": "t", "audio": {"uri": "http://h/t"}, "uploaded_at": "then"},
            {"track_id": "t", "audio": {"uri": "http://h/t"}, "uploaded_at": 5},
            {"track_id": "t", "audio": {"uri": "http://h/t"}, "metadata": None, "priority": None},
            {"track_id": "t", "audio": {"uri": "http://h/t"}, "metadata": []},
            {"track_id": 5, "audio": {"uri": "http://h/t"}},
            {"audio": {"uri": "http://h/t"}},
        ],
    )
    def test_agrees_with_the_model(self, event: dict[str, Any]) -> None:
        try:
            NewTrack.model_validate(event)
            accepted = True
        except ValidationError:
            accepted = False
        assert VALIDATORS["new-track"].is_valid(event) == accepted


class Captured(Publisher):
    """A publisher whose messages stay here."""

    def __init__(self, refused: int = 0) -> None:
        self._settings = KafkaSettings()
        self.sent: list[tuple[bytes | None, Headers]] = []
        self._refused = refused

    async def _send(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Headers | None = None
    ) -> None:
        if self._refused:
            self._refused -= 1
            raise ResultTooLarge("too large")
        self.sent.append((value, headers or []))


@pytest.mark.parametrize("refused", [0, 1])
@pytest.mark.parametrize("track_id", ["t", None])
async def test_dead_letters_carry_the_headers_that_the_schema_names(
    refused: int, track_id: str | None
) -> None:
    publisher = Captured(refused)
    record = Record("tracks.new", 3, 4, 1.5, b"t", b"value", (("trace", b"x"),))
    audio = AudioRef(uri="https://a.example/b")
    track = NewTrack(track_id=track_id, audio=audio) if track_id else None
    failure = Failure(AudioNotFound("There is nothing."), track=track)
    await publisher.dead_letter(record, [failure], MODEL)
    ((_, headers),) = publisher.sent
    added = {name: (value or b"").decode() for name, value in headers if name.startswith("timbre-")}
    VALIDATORS["dead-letter-headers"].validate(added)
    assert not VALIDATORS["dead-letter-headers"].is_valid({**added, "timbre-track-id": None})
    assert set(added) <= set(DeadLetterHeaders.model_json_schema()["properties"])
    parsed = DeadLetterHeaders.model_validate(added)
    assert (parsed.reason_code, parsed.origin_offset) == ("audio_not_found", "4")


class TestGeneratedFiles:
    def test_are_up_to_date_and_break_nobody(self) -> None:
        assert generate.faults() == []
        assert generate.main(["--check"]) == 0

    @pytest.mark.parametrize("name", generate.EVENT_TYPES)
    def test_are_json_schemas(self, name: str) -> None:
        Draft202012Validator.check_schema(generate.json_schema(name))
        assert (generate.RELEASED / f"{name}.json").exists()

    def test_their_patterns_use_only_what_regular_expressions_of_all_languages_know(self) -> None:
        text = "".join(generate.files().values())
        patterns = [json.loads(pattern) for pattern in re.findall(r'"pattern": (".*")', text)]
        assert {escape for pattern in patterns for escape in re.findall(r"\\.", pattern)} == {r"\x"}

    @pytest.mark.parametrize("name", generate.EVENT_TYPES)
    def test_only_types_have_titles_of_which_generators_make_types(self, name: str) -> None:
        schema = generate.json_schema(name)
        model, _ = generate.EVENT_TYPES[name]
        titles = re.findall(r'"title": "(.*?)"', json.dumps(schema))
        assert sorted(titles) == sorted({model.__name__, *schema.get("$defs", {})} - {"JsonValue"})

    def test_a_stale_or_breaking_file_fails_the_check(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(generate, "HERE", tmp_path)
        monkeypatch.setattr(generate, "RELEASED", tmp_path / "released")
        assert generate.main([]) == 0
        assert not (tmp_path / "released").exists()
        assert generate.main(["--release"]) == 0
        assert generate.main(["--check"]) == 0
        old = generate.json_schema("track-tags")
        old["properties"]["label"] = {"type": "string"}
        (tmp_path / "released" / "track-tags.json").write_text(json.dumps(old))
        (tmp_path / "asyncapi.json").write_text("{}")
        assert generate.main(["--check"]) == 1
        stale, gone = capsys.readouterr().err.splitlines()
        assert "asyncapi.json is not up to date" in stale
        assert gone == "track-tags.label is gone"


def changed(schema: dict[str, Any], path: str, **fields: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(schema))
    part: Any = copy
    for name in path.split("/"):
        part = part[int(name) if isinstance(part, list) else name] if name else part
    part.update(fields)
    return copy


class TestCompatibility:
    TAGS = generate.json_schema("track-tags")
    NEW = generate.json_schema("new-track")
    DEAD_LETTER = generate.json_schema("dead-letter")

    def test_no_change_breaks_nobody(self) -> None:
        for name, (_, direction) in generate.EVENT_TYPES.items():
            schema = generate.json_schema(name)
            assert breaks(schema, schema, direction) == []

    def test_what_may_change_in_results(self) -> None:
        more = changed(self.TAGS, "properties", mood={"type": "string"})
        more = changed(more, "", required=[*more["required"], "mood"])
        narrower = changed(self.TAGS, "properties/vote", maxLength=10)
        smaller = changed(self.TAGS, "properties/audio", maxProperties=20)
        closed = changed(self.TAGS, "", additionalProperties=False)
        reworded = changed(self.TAGS, "properties/audio", description="The sound", title="S")
        surer = changed(self.TAGS, "$defs/Tag/properties/score", minimum=0.1)
        whole = changed(self.TAGS, "$defs/Tag/properties/score", type="integer")
        for new in (more, narrower, smaller, closed, reworded, surer, whole):
            assert breaks(self.TAGS, new, "out") == []

    def test_what_may_change_in_what_comes_in(self) -> None:
        more = changed(self.NEW, "properties", mood={"type": "string"})
        wider = changed(self.NEW, "properties/track_id", minLength=0, maxLength=1000)
        option = changed(
            self.NEW, "properties/priority/anyOf/0", enum=["upload", "backfill", "now"]
        )
        for new in (more, wider, option):
            assert breaks(self.NEW, new, "in") == []

    @pytest.mark.parametrize(
        ("path", "fields"),
        [
            ("", {"required": ["event_id"]}),
            ("properties", {"windows": {"type": "integer"}}),
            ("properties/uncertain", {"type": "string"}),
            ("properties/schema_version", {"const": 2}),
            ("properties", {"schema_version": {"type": "integer"}}),
            ("properties/tags", {"items": {"type": "string"}}),
            ("properties/track_id", {"maxLength": 1000}),
            ("$defs/Tag/properties/score", {"maximum": 100}),
            ("$defs/Tag", {"required": ["head"]}),
            ("$defs/Processing/properties/timings_s", {"additionalProperties": {"type": "string"}}),
            ("$defs/AudioFacts/properties/sample_rate_hz", {"type": "number"}),
            ("$defs/Tag/properties/score", {"type": "integer", "maximum": 100}),
            ("$defs/AudioFacts/properties/sha256", {"pattern": ".*"}),
            ("$defs/Tag", {"unevaluatedProperties": {"type": "string"}}),
            ("properties/track_id", {"contentEncoding": "base64"}),
        ],
    )
    def test_what_breaks_readers_of_results(self, path: str, fields: dict[str, Any]) -> None:
        assert breaks(self.TAGS, changed(self.TAGS, path, **fields), "out")

    @pytest.mark.parametrize(
        ("path", "fields"),
        [
            ("", {"required": ["track_id", "audio", "uploaded_at"]}),
            ("properties/track_id", {"maxLength": 10}),
            ("properties/priority/anyOf/0", {"enum": ["upload"]}),
            ("properties/metadata/anyOf/0", {"additionalProperties": {"type": "string"}}),
            ("$defs/AudioRef/properties/uri", {"pattern": "^https:"}),
            ("$defs/AudioRef/properties", {"sha256": {"type": "string"}}),
            ("$defs/AudioRef/properties/uri", {"type": "object"}),
            ("", {"additionalProperties": False}),
            ("", {"additionalProperties": {"type": "string"}}),
            ("$defs/AudioRef", {"additionalProperties": False}),
            ("properties/audio", {"additionalProperties": False}),
            ("properties/metadata/anyOf/0", {"additionalProperties": False}),
            ("properties/metadata/anyOf/0", {"maxProperties": 3}),
            ("properties/metadata/anyOf/0", {"properties": {"title": {"type": "string"}}}),
            ("properties/metadata/anyOf/0", {"propertyNames": {"maxLength": 3}}),
            ("properties/track_id", {"allOf": [{"maxLength": 3}]}),
            ("properties/track_id", {"not": {"const": "t"}}),
            ("properties/uploaded_at", {"not": {"type": "null"}}),
            ("properties", {"track_id": False}),
        ],
    )
    def test_what_breaks_producers(self, path: str, fields: dict[str, Any]) -> None:
        assert breaks(self.NEW, changed(self.NEW, path, **fields), "in")

    @pytest.mark.parametrize(
        ("fields", "fault"),
        [
            (
                {"prefixItems": [{"type": "string"}, {"type": "integer"}]},
                ".original.headers[][1] is integer, read as string",
            ),
            (
                {"prefixItems": [{"type": "string"}]},
                ".original.headers[][1] is None, read as string",
            ),
            ({"maxItems": 3}, ".original.headers[] has maxItems 3, read with 2"),
        ],
    )
    def test_each_place_of_a_list_with_places_counts(
        self, fields: dict[str, Any], fault: str
    ) -> None:
        path = "$defs/OriginalMessage/properties/headers/items"
        new = changed(self.DEAD_LETTER, path, **fields)
        assert breaks(self.DEAD_LETTER, new, "out") == [fault]

    @pytest.mark.parametrize("direction", ["in", "out"])
    def test_an_unknown_keyword_is_a_fault_where_what_it_refers_to_differs(
        self, direction: Any
    ) -> None:
        old = changed(self.NEW, "properties/audio", allOf=[{"$ref": "#/$defs/AudioRef"}])
        assert breaks(old, old, direction) == []
        new = changed(old, "$defs/AudioRef/properties/uri", maxLength=10)
        assert ".audio differs in allOf, which can't be judged" in breaks(old, new, direction)

    @pytest.mark.parametrize("direction", ["in", "out"])
    @pytest.mark.parametrize(
        ("path", "fields"),
        [
            ("properties/audio", {"required": ["uri", "etag"]}),
            ("$defs/AudioRef/properties/etag", {"maxLength": 5}),
        ],
    )
    def test_what_stands_beside_a_reference_or_alternatives_counts_with_what_stands_in_them(
        self, path: str, fields: dict[str, Any], direction: Any
    ) -> None:
        new = changed(self.NEW, path, **fields)
        assert breaks(self.NEW, new, direction)
        assert breaks(new, new, direction) == []

    def test_fields_that_the_reader_refuses_are_named(self) -> None:
        closed = changed(self.TAGS, "", additionalProperties=False)
        more = changed(closed, "properties", mood={"type": "string"})
        assert breaks(closed, more, "out") == [".mood may be there, but is refused"]

    @pytest.mark.parametrize("direction", ["in", "out"])
    def test_a_field_that_is_gone_breaks_both(self, direction: Any) -> None:
        new = changed(self.NEW, "")
        del new["properties"]["priority"], new["$defs"]["AudioRef"]["properties"]["etag"]
        found = breaks(self.NEW, new, direction)
        assert ".priority is gone" in found
        assert ".audio.etag is gone" in found
        tags = changed(self.TAGS, "")
        del tags["$defs"]["Tag"]["properties"]["share"]
        assert ".tags[].share is gone" in breaks(self.TAGS, tags, direction)


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


class TestAsyncApi:
    DOCUMENT = document()

    def test_every_reference_leads_somewhere(self) -> None:
        for reference in references(self.DOCUMENT):
            part: Any = self.DOCUMENT
            for name in reference.removeprefix("#/").split("/"):
                part = part[name]

    def test_every_topic_is_described_and_used(self) -> None:
        configured = {
            field.default
            for name, field in KafkaSettings.model_fields.items()
            if name.startswith("topic_")
        }
        assert {channel["address"] for channel in self.DOCUMENT["channels"].values()} == configured
        used = {operation["channel"]["$ref"] for operation in self.DOCUMENT["operations"].values()}
        assert used == {f"#/channels/{name}" for name in self.DOCUMENT["channels"]}

    def test_the_examples_are_events(self) -> None:
        messages = self.DOCUMENT["components"]["messages"].values()
        examples = [
            entry["payload"] for message in messages for entry in message.get("examples", [])
        ]
        assert EXAMPLE_CLOUD_EVENT in examples
        assert EXAMPLE_NOTIFICATION in examples
        for example in examples:
            value = json.dumps(example).encode()
            tracks, fault = read(Record("tracks.new", 0, 0, 0.0, None, value))
            assert (len(tracks), fault) == (1, None)

    @pytest.mark.parametrize(
        ("data", "valid"), [(EXAMPLE_TRACK, True), (EXAMPLE_NOTIFICATION, True), ({}, False)]
    )
    def test_a_cloud_event_carries_what_intake_reads(self, data: Any, valid: bool) -> None:
        event = {**EXAMPLE_CLOUD_EVENT, "data": data}
        schema = {**self.DOCUMENT, "$ref": "#/components/schemas/NewTrackCloudEvent"}
        assert Draft202012Validator(schema).is_valid(event) == valid
        record = Record("tracks.new", 0, 0, 0.0, None, json.dumps(event).encode())
        with nullcontext() if valid else pytest.raises(EventMalformed):
            assert len(read(record).tracks) == 1

    def test_the_payloads_are_schemas(self) -> None:
        for schema in self.DOCUMENT["components"]["schemas"].values():
            Draft202012Validator.check_schema(schema)
