"""Which files in a folder are audio, told by their names; what is in them only decoding tells."""

from pathlib import Path

# fmt: off
AUDIO_SUFFIXES = frozenset({
    ".8svx", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".alac", ".amr", ".ape", ".au", ".awb",
    ".caf", ".dsf", ".dts", ".dtshd", ".eac3", ".ec3", ".flac", ".m4a", ".m4b", ".mka", ".mlp",
    ".mp1", ".mp2", ".mp3", ".mp4", ".mpc", ".oga", ".ogg", ".oma", ".opus", ".qoa", ".ra", ".shn",
    ".sox", ".spx", ".tak", ".thd", ".tta", ".voc", ".w64", ".wav", ".wave", ".weba", ".webm",
    ".wma", ".wsd", ".wv", ".xwma",
})
# fmt: on


def is_audio(path: Path) -> bool:
    """Whether the name is one that audio files have; hidden files, as macOS adds them, are none."""
    return path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".")
