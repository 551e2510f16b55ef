"""Messages that are no new-track events, in every way that property-based testing thinks of."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.faults.stand import Message

KEY = "track"
PRIORITIES = ("upload", "backfill", None)
EXAMPLES_A_RUN = 500

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
documents = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5)
    ),
    max_leaves=20,
)
not_text = documents.filter(lambda value: not isinstance(value, str))
not_object = documents.filter(lambda value: not isinstance(value, dict))


def _event(**parts: Any) -> dict[str, Any]:
    return {"track_id": KEY, "audio": {"uri": "https://music.example/track.mp3"}, **parts}


def _text(document: Any) -> bytes:
    return json.dumps(document).encode()


wrong_types = st.one_of(
    st.builds(lambda v: _event(track_id=v), not_text),
    st.builds(lambda v: _event(audio=v), not_object),
    st.builds(lambda v: _event(audio={"uri": v}), not_text),
    st.builds(lambda v: _event(metadata=v), not_object.filter(lambda v: v is not None)),
    st.builds(lambda v: _event(priority=v), documents.filter(lambda v: v not in PRIORITIES)),
    st.builds(lambda v: _event(uploaded_at=v), st.lists(scalars, min_size=1, max_size=3)),
).map(_text)
incomplete: list[dict[str, Any]] = [
    {},
    {"track_id": KEY},
    {"audio": {"uri": "https://music.example/a.mp3"}},
    _event(audio={}),
]
missing_keys = st.builds(
    lambda partial, more: _text({**partial, "more": more}), st.sampled_from(incomplete), documents
)
no_objects = not_object.map(_text)
no_json = st.binary(max_size=200).filter(lambda value: not value.strip().startswith(b"{"))
cut_short = st.integers(1, len(_text(_event())) - 1).map(lambda end: _text(_event())[:end])
encodings = st.sampled_from(["utf-16", "utf-16-le", "utf-32", "cp500"]).map(
    lambda name: json.dumps(_event(metadata={"note": "Grüße"}), ensure_ascii=False).encode(name)
)
latin = st.text(st.characters(min_codepoint=128, max_codepoint=255), min_size=1, max_size=20).map(
    lambda text: json.dumps(_event(metadata={"note": text + "ÿ"}), ensure_ascii=False).encode(
        "latin-1"
    )
)
deep = st.tuples(st.integers(300, 20_000), st.sampled_from(["[", '{"a":'])).map(
    lambda shape: f'{{"track_id": "{KEY}", "metadata": '.encode() + shape[1].encode() * shape[0]
)
versions = st.text(max_size=5).filter(lambda version: version != "1.0")
unknown_versions = st.builds(
    lambda version: Message(
        _text({"specversion": version, "id": "1", "source": "/x", "type": "new", "data": _event()}),
        KEY.encode(),
    ),
    versions,
)
binary_mode = st.builds(
    lambda version, attribute: Message(
        _text(_event()),
        KEY.encode(),
        (("ce_specversion", version.encode(errors="replace")), (f"ce_{attribute}", b"\xff\xfe")),
    ),
    versions,
    st.sampled_from(["id", "source", "type"]),
)
wrong_key = st.builds(
    lambda key: Message(_text(_event()), key),
    st.binary(min_size=1, max_size=300).filter(lambda key: key != KEY.encode()),
)
no_value = st.builds(lambda key: Message(None, key), st.binary(max_size=10))
values = st.one_of(
    wrong_types, missing_keys, no_objects, no_json, cut_short, encodings, latin, deep
).map(lambda value: Message(value, KEY.encode()))
malformed = st.one_of(values, values, unknown_versions, binary_mode, wrong_key, no_value)


def enormous() -> list[Message]:
    """Events larger than any may be, than fetches are, and than Kafka takes back with a reason."""
    values = [
        Message(_text(_event(metadata={"note": "x" * size})), KEY.encode())
        for size in (1_100_000, 3_000_000, 11_500_000)
    ]
    keys = [Message(_text(_event()), b"k" * size) for size in (1_000_000, 11_500_000)]
    return values + keys


def messages(count: int) -> list[Message]:
    """So many malformed messages."""
    found: list[Message] = []
    while len(found) < count:
        _examples(found.append)
    return found[:count]


def _examples(collect: Callable[[Message], None]) -> None:
    @settings(
        max_examples=EXAMPLES_A_RUN,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(malformed)
    def run(message: Message) -> None:
        collect(message)

    run()
