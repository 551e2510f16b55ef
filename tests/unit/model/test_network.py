from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from model.bundle import Bundle
from model.heads import Head
from model.logmel_cnn import LogMelCnnConfig
from model.network import Branch, FrontFilters, build
from tests.unit.model.music import WINDOW, chords


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load()


def test_the_output_has_what_the_bundle_promises(bundle: Bundle) -> None:
    with torch.inference_mode():
        output = bundle.network(chords(2))

    assert set(output.probabilities) == {"genre", "tags"}
    assert output.probabilities["genre"].shape == (2, 10)
    assert output.probabilities["tags"].shape == (2, 50)
    assert output.embedding.shape == (2, bundle.embedding_dim)
    torch.testing.assert_close(output.probabilities["genre"].sum(1), torch.ones(2))


@pytest.mark.parametrize("name", ["default", "fast", "from scratch"])
def test_networks_compute_where_their_weights_are(name: str) -> None:
    """Told by PyTorch's fake tensors, which need no GPU."""
    if name == "from scratch":
        head = Head(name="genre", kind="single", labels=("a", "b"), categories=("genre",) * 2)
        network = build("logmel_cnn", LogMelCnnConfig().model_dump(), [head])
    else:
        network = Bundle.load(name).network
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    with FakeTensorMode():
        there = {key: torch.empty(kept.shape, device="cuda") for key, kept in tensors.items()}
        samples = torch.empty(2, WINDOW, device="cuda")
        output = functional_call(network.eval(), there, (samples,))
    assert {table.device.type for table in output.probabilities.values()} == {"cuda"}
    assert output.embedding.device.type == "cuda"


@pytest.mark.parametrize(
    ("name", "frames", "most_gflop"), [("fast", 94, 0.0384), ("default", 187, 0.314)]
)
def test_the_shipped_networks_cost_no_more_than_their_cards_say(
    name: str, frames: int, most_gflop: float
) -> None:
    network = Bundle.load(name).network
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, WINDOW))
    # The counter leaves out the Fourier transform: 2.5 n log2 n for each real frame.
    transform = frames * 2.5 * 512 * 9

    assert (counter.get_total_flops() + transform) / 1e9 <= most_gflop


def test_a_windows_scores_do_not_depend_on_its_batch(bundle: Bundle) -> None:
    windows = chords(7)
    with torch.inference_mode():
        together = bundle.network(windows)
        for index in range(len(windows)):
            alone = bundle.network(windows[index : index + 1])
            for head, scores in together.probabilities.items():
                torch.testing.assert_close(
                    alone.probabilities[head][0], scores[index], atol=1e-5, rtol=0
                )
            torch.testing.assert_close(
                alone.embedding[0], together.embedding[index], atol=1e-3, rtol=1e-4
            )


def test_threads_share_one_network(bundle: Bundle) -> None:
    batches = [chords(3, seed=seed) for seed in range(8)]

    def answer(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            genres: torch.Tensor = bundle.network(batch).probabilities["genre"]
            return genres

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, batches))

    for batch, scores in zip(batches, together, strict=True):
        torch.testing.assert_close(scores, answer(batch), atol=1e-6, rtol=0)


def test_half_precision_gives_nearly_the_same_genres_as_float32(bundle: Bundle) -> None:
    windows = chords(4)
    with torch.inference_mode():
        exact = bundle.network(windows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = bundle.network(windows)

    assert rough.embedding.dtype == torch.float32
    torch.testing.assert_close(
        rough.probabilities["genre"], exact.probabilities["genre"], atol=0.1, rtol=0
    )


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("frames", [7, 64, 93])
@pytest.mark.parametrize(("filters", "height"), [(4, 1), (4, 5), (4, 8), (7, 5), (8, 5)])
def test_filters_give_the_highest_that_they_would_give_one_by_one(
    monkeypatch: pytest.MonkeyPatch, filters: int, height: int, frames: int, lanes: int
) -> None:
    monkeypatch.setattr("model.network.LANES", lanes)
    torch.manual_seed(0)
    layer = FrontFilters(Branch(filters=filters, taps=6, height=height, band_stride=3))
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    layer.sign = torch.where(torch.arange(filters) % 2 == 0, 1.0, -1.0).unsqueeze(1)
    logmel = torch.rand(2, 16, frames)

    sign = layer.sign.unsqueeze(-1)
    padded = functional.pad(logmel.transpose(1, 2).unsqueeze(1), (0, 0, 2, 3))
    activated = functional.relu(sign * functional.conv2d(padded, layer.weight, layer.bias, (1, 3)))

    torch.testing.assert_close(layer(logmel), (sign * activated).amax(-1))


def test_an_unknown_kind_of_network_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown network kind"):
        build("os.system", {}, [])
