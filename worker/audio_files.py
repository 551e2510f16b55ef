"""Which files in a folder are audio, told by their names; what is in them only decoding tells."""

from pathlib import Path

# fmt: off
AUDIO_SUFFIXES = frozenset({
    ".aac", ".aif", ".aiff", ".alac", ".amr", ".ape", ".au", ".caf", ".flac", ".m4a", ".m4b",
    ".mka", ".mp2", ".mp3", ".mp4", ".mpc", ".oga", ".ogg", ".opus", ".ra", ".tta", ".wav",
    ".weba", ".webm", ".wma", ".wv",
})
# fmt: on


def is_audio(path: Path) -> bool:
    """Whether the name is one that audio files have; hidden files, as macOS adds them, are none."""
    return path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".")
