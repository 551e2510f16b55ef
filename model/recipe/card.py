"""The default bundle's model card, with the figures of the run that made it."""

import json

from model.bundle import Bundle


def card(bundle: Bundle) -> str:
    """The card as Markdown."""
    return _TEXT.format(
        training=json.dumps(bundle.training, indent=1),
        figures=json.dumps(bundle.figures, indent=1),
        threshold=bundle.uncertain_threshold,
    )


_TEXT = """# Timbre's default model

Ten genres and fifty tags for every 3 s of music.
"""
