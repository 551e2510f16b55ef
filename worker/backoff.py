"""Waits between tries that go on for as long as it takes; tries that give up are tenacity's."""

import random


class Backoff:
    """Seconds to wait: twice as many each time, from `first_s` to `longest_s`, with jitter."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = self._next_s = first_s
        self._longest_s = longest_s

    def next_s(self) -> float:
        """The next wait: between half of what is due and one and a half times that."""
        due_s, self._next_s = self._next_s, min(2 * self._next_s, self._longest_s)
        return due_s * random.uniform(0.5, 1.5)

    def reset(self) -> None:
        """Begin again with the shortest: something has succeeded."""
        self._next_s = self._first_s
