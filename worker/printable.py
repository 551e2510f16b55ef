"""Foreign text before it is shown: a name or a reason must not steer the terminal it stands in."""

import re

# Control characters, line ends of Unicode's own, what turns the direction of writing, and, which no
# output takes, bytes of a file's name that are no UTF-8.
STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
WITHIN_A_LINE = re.compile(rf"(?![\n\t]){STEERING.pattern}")


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with what would steer a terminal as JSON escapes it, so that JSON stays the same.

    Line breaks and tabs stay where `lines` is set.
    """
    steering = WITHIN_A_LINE if lines else STEERING
    return steering.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
