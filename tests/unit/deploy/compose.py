"""The compose files as the tests read them."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
BASE = ROOT / "docker-compose.yml"
OVERRIDES = tuple(sorted((ROOT / "deploy").glob("docker-compose.*.yml")))
DEFAULTS = {"MUSIC": "/srv/music"}
"""Values of variables that have no default in the files themselves."""

VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::[-?](?P<default>[^}]*))?\}")


def read(path: Path) -> dict[str, Any]:
    """A compose file with its variables at their defaults."""

    def value(found: re.Match[str]) -> str:
        return DEFAULTS.get(found["name"], found["default"] or "")

    loaded: dict[str, Any] = yaml.safe_load(VARIABLE.sub(value, path.read_text()))
    return loaded


def services(path: Path = BASE) -> dict[str, Any]:
    """The services of a compose file by name."""
    found: dict[str, Any] = read(path)["services"]
    return found
