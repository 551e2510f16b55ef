import json

import pytest

from worker.printable import printable

STEERING = "\x1b]0;title\x07\x9b31m\x7f\r\u2028\u202e\u2066\u2069\udfff\ud800"


def test_what_would_steer_a_terminal_is_escaped() -> None:
    shown = printable(f"a{STEERING}b")
    assert shown.isprintable()
    assert shown.startswith(r"a\u001b]0;title\u0007\u009b31m")


@pytest.mark.parametrize("text", ["Björk", "初音ミク", "می‌خواهم", "👩‍🎤", "a\u00a0b", "[red]"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_json_stays_the_same_json() -> None:
    value = {"name": STEERING}
    assert json.loads(printable(json.dumps(value, ensure_ascii=False))) == value


def test_lines_stay_where_they_are_wanted() -> None:
    assert printable("a\n\t\rb\x1b", lines=True) == "a\n\t\\u000db\\u001b"
    assert printable("a\nb") == "a\\u000ab"
