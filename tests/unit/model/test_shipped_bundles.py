"""What the shipped bundles, and a network of `timbre model train`, answer to fixed inputs; a silent
change in the numbers fails here.

After a wanted change: `python -m tests.unit.model.test_shipped_bundles` stores the answers anew.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import Bundle, shipped
from model.heads import Head
from model.logmel_cnn import ARCHIVE_FRONT_END, LogMelCnnConfig, build_logmel_cnn
from model.network import Tagger
from model.shipped.card import card
from tests.unit.model.music import RATE_HZ, chords

STORED = Path(__file__).with_name("shipped_answers.json")
FROM_SCRATCH = "from scratch"
BUNDLES = Path(__file__).parents[3] / "model" / "bundles"


def from_scratch() -> Tagger:
    """All kinds of members, with weights that any release of PyTorch gives."""
    head = Head(name="genre", kind="single", labels=("a", "b"), categories=("genre", "genre"))
    at_16_khz = {"sample_rate_hz": RATE_HZ, "hop": 663, "f_max_hz": RATE_HZ / 2}
    config = LogMelCnnConfig(
        front_end=ARCHIVE_FRONT_END.model_copy(update=at_16_khz), channels=(4, 8)
    )
    network = build_logmel_cnn(config.model_dump(mode="json"), [head]).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for weight in network.parameters():
            spread = weight[0].numel() ** -0.5
            weight.copy_(torch.from_numpy(rng.normal(0, spread, weight.shape)))
    return network


def answers(name: str) -> dict[str, list[list[float]]]:
    """Probabilities and L2-normalised embeddings of three windows."""
    network = from_scratch() if name == FROM_SCRATCH else Bundle.load(name).network
    with torch.inference_mode():
        output = network(chords(3, seed=7))
    unit = torch.nn.functional.normalize(output.embedding, dim=1)
    numbers = {**output.probabilities, "embedding": unit}
    return {name: np.round(value.numpy(), 6).tolist() for name, value in numbers.items()}


def test_the_default_is_the_larger_of_two() -> None:
    assert shipped() == ["default", "fast"]
    assert Bundle.load().name == "timbre-default"


@pytest.mark.parametrize("name", [*shipped(), FROM_SCRATCH])
def test_a_network_answers_as_it_did(name: str) -> None:
    stored = json.loads(STORED.read_text())[name]

    for output, numbers in answers(name).items():
        np.testing.assert_allclose(numbers, stored[output], atol=1e-4, err_msg=output)


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_bundle_says_where_it_comes_from(name: str) -> None:
    bundle = Bundle.load(name)

    genre, tags = bundle.heads
    assert (genre.name, genre.kind, tags.name) == ("genre", "single", "tags")
    assert len(tags.labels) == 50
    assert set(tags.categories) == {"genre", "mood", "instrument", "era", "voice"}
    assert 0 < bundle.uncertain_threshold < 1
    assert "musicnn" in bundle.training["origin"]


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_bundle_carries_its_card_and_licence(name: str) -> None:
    assert (BUNDLES / name / "README.md").read_text() == card(Bundle.load(name))
    assert "Universitat Pompeu Fabra" in (BUNDLES / name / "LICENSE.musicnn.md").read_text()


def test_the_card_says_whether_the_recipe_began_from_nothing() -> None:
    bundle = Bundle.load()

    afresh, again = (
        card(dataclasses.replace(bundle, figures={**bundle.figures, "log_mels_at_hand": at_hand}))
        for at_hand in (False, True)
    )

    assert "downloads and decoding included" in afresh
    assert "log-mels of an earlier run at hand" in again


if __name__ == "__main__":
    STORED.write_text(
        json.dumps({name: answers(name) for name in [*shipped(), FROM_SCRATCH]}) + "\n"
    )
