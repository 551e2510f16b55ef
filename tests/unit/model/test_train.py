"""Training: one seed one result, resuming, fine-tuning, both kinds of task, honest refusals."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from model import learnt
from model.bundle import Bundle
from model.datasets import load
from model.datasets.dataset import Clip, Dataset
from model.datasets.logmels import LogMelSource, open_source
from model.device import Precision
from model.heads import Head
from model.logmel_cnn import (
    ARCHIVE_FRONT_END,
    TALL_STRIDE,
    FilterMember,
    LogMelCnnConfig,
    MemberConfig,
    build_logmel_cnn,
    narrowed,
)
from model.measure import Voted
from model.train import (
    FINE_TUNING,
    Progress,
    Recipe,
    Validation,
    _batch_rows,
    _calibrated,
    _loss,
    _optimizer,
    _schedule,
    _with_splits,
    load_recipe,
    train,
)
from tests import collections_of_music as music
from tests.full_disk import full_disk
from tests.unit.model.test_bundle import Bomb
from worker.errors import (
    BundleInvalid,
    CheckpointInvalid,
    DatasetInvalid,
    SettingsInvalid,
    SplitLeaks,
)

SMALL = Recipe(
    passes=20,
    batch=8,
    learning_rate=5e-3,
    average=0.9,
    network=LogMelCnnConfig(
        channels=(8, 16),
        stem_stride=(4, 4),
        members=(MemberConfig(balance=0.0), MemberConfig(kind="filters")),
    ),
)
BRIEF = SMALL.model_copy(update={"passes": 2})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load(music.archive(tmp_path_factory.mktemp("archive") / "logmels.npz"))


def weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    return bundle.network.state_dict()


def test_a_bundle_learns_loads_and_tells_what_it_is(dataset: Dataset, tmp_path: Path) -> None:
    said: list[str] = []
    bundle = train(dataset, tmp_path / "b", recipe=SMALL, progress=Progress(say=said.append))
    loaded = Bundle.load(tmp_path / "b")
    assert loaded.version == bundle.version
    assert loaded.heads[0].labels == music.GENRES
    assert loaded.heads[0].calibration.temperature.keys() == {"mean", "majority", "weighted"}
    assert loaded.training["songs"] == 12
    assert loaded.training["fit"] == "all"
    assert (loaded.training["data"], loaded.training["licence"]) == (dataset.name, dataset.licence)
    assert learnt.marks(loaded.training) == {learnt.mark(clip.name) for clip in dataset.clips}
    assert loaded.figures["track_accuracy"]["mean"] == 1.0
    assert 0 < loaded.uncertain_threshold < 1
    assert any(line.startswith("rehearsal") and "valid" in line for line in said)
    assert any(line.startswith("final") for line in said)
    assert dataset.licence in (tmp_path / "b" / "README.md").read_text()
    assert not (tmp_path / "b.work" / "checkpoint.pt").exists()


def test_the_bundle_takes_audio(dataset: Dataset, tmp_path: Path) -> None:
    bundle = train(dataset, tmp_path / "b", recipe=BRIEF)
    output = bundle.network(torch.zeros(3, bundle.window_samples).uniform_(-0.1, 0.1))
    assert output.probabilities["genre"].shape == (3, 2)
    assert output.embedding.shape == (3, bundle.embedding_dim)
    torch.testing.assert_close(output.probabilities["genre"].sum(1), torch.ones(3))


def test_one_seed_gives_one_result(dataset: Dataset, tmp_path: Path) -> None:
    versions = [
        train(dataset, tmp_path / str(n), recipe=BRIEF, seed=seed, fit="train")
        for n, seed in enumerate((1, 1, 2))
    ]
    first, again, other = (weights(bundle)["heads.genre.weight"] for bundle in versions)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.backends.cudnn.deterministic  # or a GPU gives several


def test_the_average_of_the_weights_is_kept(dataset: Dataset, tmp_path: Path) -> None:
    recipes = [BRIEF.model_copy(update={"average": decay}) for decay in (0.0, 0.9)]
    last, average = (
        train(dataset, tmp_path / str(recipe.average), recipe=recipe, fit="train")
        for recipe in recipes
    )
    name = "heads.genre.weight"
    assert not torch.equal(weights(last)[name], weights(average)[name])


def test_every_step_cuts_its_windows_elsewhere(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []
    excerpts = LogMelSource.excerpts

    def noted(self: LogMelSource, rows: Tensor, span: int, places: Tensor) -> Tensor:
        drawn.extend(places.tolist())
        return excerpts(self, rows, span, places)

    monkeypatch.setattr(LogMelSource, "excerpts", noted)
    train(dataset, tmp_path / "b", recipe=BRIEF, fit="train")
    assert len(set(drawn)) == len(drawn) == 2 * 8, "two passes of eight songs"


class Interrupted(Exception):
    """What a test ends a run with."""


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    dataset: Dataset, tmp_path: Path
) -> None:
    recipe = SMALL.model_copy(update={"passes": 6})
    steps: list[tuple[str, int]] = []
    progress = Progress(step=lambda part, done, *_: steps.append((part, done)))
    whole = train(dataset, tmp_path / "whole", recipe=recipe, progress=progress)
    assert steps[0] == ("rehearsal", 1)

    def stop(part: str, done: int, _total: int, _loss: float) -> None:
        if part == "final" and done == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(dataset, tmp_path / "cut", recipe=recipe, progress=Progress(step=stop))
    left = steps[steps.index(("final", 5)) :]
    steps.clear()
    resumed = train(dataset, tmp_path / "cut", recipe=recipe, resume=True, progress=progress)
    assert steps == left
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(
    dataset: Dataset, tmp_path: Path
) -> None:
    asked = []

    def second(part: str, done: int, *_: object) -> None:
        if (part, done) == ("final", 1):
            with pytest.raises(SettingsInvalid, match="another run is at work"):
                train(dataset, tmp_path / "b", recipe=BRIEF, seed=1)
            asked.append(part)

    train(dataset, tmp_path / "b", recipe=BRIEF, progress=Progress(step=second))
    assert asked == ["final"]
    train(dataset, tmp_path / "b", recipe=BRIEF, fit="train")  # and afterwards anyone may


def test_a_full_disk_is_told_and_takes_nothing_of_what_is_there(
    dataset: Dataset, tmp_path: Path
) -> None:
    def stop(part: str, *_: object) -> None:
        if part == "final":
            raise Interrupted

    whole = train(dataset, tmp_path / "b", recipe=BRIEF)
    with pytest.raises(Interrupted):
        train(dataset, tmp_path / "b", recipe=BRIEF, progress=Progress(step=stop))
    kept = tmp_path / "b.work" / "checkpoint.pt"
    with full_disk(10_000), pytest.raises(SettingsInvalid, match=r"checkpoint\.pt can't be wr"):
        train(dataset, tmp_path / "b", recipe=BRIEF, resume=True)
    assert not list(kept.parent.glob("*.partial"))
    with full_disk(10_000), pytest.raises(SettingsInvalid, match=r"model\.safetensors can't be wr"):
        whole.save(tmp_path / "b", card="")
    assert Bundle.load(tmp_path / "b").version == whole.version
    resumed = train(dataset, tmp_path / "b", recipe=BRIEF, resume=True)
    assert resumed.version == whole.version


def test_log_mels_that_the_disk_has_no_room_for_end_the_run(tmp_path: Path) -> None:
    audio = load(music.folders(tmp_path / "music", 3))
    with full_disk(10_000), pytest.raises(SettingsInvalid, match=r"npy can't be written: File too"):
        train(audio, tmp_path / "b", recipe=BRIEF)
    assert not list((tmp_path / "b.work" / "logmels").iterdir())


def test_resuming_needs_the_checkpoint_of_the_same_run(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="resume"):
        train(dataset, tmp_path / "b", recipe=SMALL, resume=True)

    (tmp_path / "b.work" / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointInvalid, match="damaged"):
        train(dataset, tmp_path / "b", recipe=SMALL, resume=True)
    torch.save({"run": "another", "parts": Bomb()}, tmp_path / "b.work" / "checkpoint.pt")
    with pytest.raises(CheckpointInvalid, match="damaged"):
        train(dataset, tmp_path / "b", recipe=SMALL, resume=True)
    torch.save({"run": "another", "parts": {}}, tmp_path / "b.work" / "checkpoint.pt")
    with pytest.raises(CheckpointInvalid, match="another data set, recipe or seed"):
        train(dataset, tmp_path / "b", recipe=SMALL, resume=True)
    train(dataset, tmp_path / "b", recipe=BRIEF, fit="train")  # from the start, as the errors say


def test_fine_tuning_starts_at_the_bundle_with_a_new_head_for_other_labels(
    dataset: Dataset, tmp_path: Path
) -> None:
    train(dataset, tmp_path / "start", recipe=BRIEF, fit="train")
    start = Bundle.load(tmp_path / "start")
    other = dataclasses.replace(
        dataset,
        labels=("calm", "loud"),
        clips=tuple(
            dataclasses.replace(clip, labels=("calm" if clip.labels == ("blues",) else "loud",))
            for clip in dataset.clips
        ),
    )
    recipe = FINE_TUNING.model_copy(update={"passes": 2, "batch": 8, "learning_rate": 1e-5})
    tuned = train(other, tmp_path / "tuned", recipe=recipe, start=start, fit="train")
    assert tuned.heads[0].labels == ("calm", "loud")
    assert tuned.training["start"] == f"{start.name} {start.version}"
    again = train(dataset, tmp_path / "again", recipe=recipe, start=start, fit="train")
    stem, head = "trunk.members.0.stem.0.weight", "heads.genre.weight"
    for bundle, name in ((tuned, stem), (again, stem), (again, head)):
        torch.testing.assert_close(weights(bundle)[name], weights(start)[name], atol=1e-3, rtol=0)
        assert not torch.equal(weights(bundle)[name], weights(start)[name]), "it goes on learning"


def test_a_pass_draws_every_song_once_at_a_rate_that_warms_up_and_falls() -> None:
    passes = torch.cat([_batch_rows(step, 4, 6, 0) for step in range(6)]).view(4, 6)
    assert torch.equal(passes.sort(1).values, torch.arange(6).expand(4, 6))
    assert len({tuple(one) for one in passes.tolist()}) > 1
    rates = [_schedule(step, 105, 0.05) for step in range(105)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert rates[55] == pytest.approx(0.5)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 1e-3


def test_every_step_is_as_large_as_recipe_and_schedule_say(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = Precision.step

    def noted(
        self: Precision, loss: Tensor, network: nn.Module, by: torch.optim.Optimizer, most: float
    ) -> None:
        step(self, 1e6 * loss, network, by, most)
        norms = [part.grad.norm() for part in network.parameters() if part.grad is not None]
        assert float(torch.stack(norms).norm()) == pytest.approx(most, rel=1e-3)
        rates.extend(group["lr"] for group in by.param_groups)

    monkeypatch.setattr(Precision, "step", noted)
    train(dataset, tmp_path / "b", recipe=SMALL.model_copy(update={"passes": 5}), fit="train")
    wanted = [SMALL.learning_rate * _schedule(done, 5, SMALL.warm_up) for done in range(5)]
    assert rates == pytest.approx(np.repeat(wanted, 2))


def test_scores_are_calibrated_after_the_vote_and_most_tracks_reach_the_threshold() -> None:
    head = Head(name="genre", kind="single", labels=music.GENRES, categories=music.GENRES)
    generator = np.random.default_rng(0)
    right = generator.random(1_000) < 0.75
    sure = generator.uniform(0.9, 0.999, 1_000)
    said = np.where(right, sure, 1 - sure)
    songs = [np.tile([[p, 1 - p]], (3, 1)) for p in said]
    targets = np.tile([[1.0, 0.0]], (1_000, 1)).astype(np.float32)
    calibration, threshold, figures = _calibrated(head, songs, targets)
    voted = Voted.of(songs, head.model_copy(update={"calibration": calibration}), "mean")
    assert voted.confidence.mean() == pytest.approx(0.75, abs=0.05), "0.95 before"
    assert (voted.confidence >= threshold).mean() == pytest.approx(0.7, abs=0.01)
    assert figures["track_accuracy"]["mean"] == pytest.approx(0.75, abs=0.03)


def test_labels_that_are_not_learnt_or_alike_are_told(tmp_path: Path) -> None:
    for number, label in enumerate(("Rock", "rock", "jazz")):
        for count in range(3):
            music.song(tmp_path / label / f"{count}.wav", "metal", 10 * number + count)
    for file in (tmp_path / "jazz").iterdir():
        file.write_bytes(b"no audio, " + file.name.encode())
    said: list[str] = []
    bundle = train(
        load(tmp_path),
        tmp_path / "b",
        recipe=BRIEF,
        fit="train",
        progress=Progress(say=said.append),
        work=tmp_path / "work",
    )
    assert bundle.heads[0].labels == ("Rock", "jazz", "rock")
    assert "no clip in train has the label jazz" in said
    assert "Rock, rock are taken for 2 labels, and differ in case alone" in said


def test_biases_and_norms_do_not_decay() -> None:
    network = build_logmel_cnn(SMALL.network.model_dump(mode="json"), [])
    before = [parameter.clone() for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    _optimizer(network, SMALL).step()
    for old, new in zip(before, network.parameters(), strict=True):
        assert torch.equal(old, new) == (new.ndim <= 1)


def test_several_labels_a_clip_are_learnt_from_audio(tmp_path: Path) -> None:
    dataset = load(music.manifest(tmp_path, several=True))
    bundle = train(dataset, tmp_path / "b", recipe=SMALL.model_copy(update={"passes": 3}))
    assert bundle.heads[0].kind == "multi"
    assert bundle.heads[0].name == "tags"
    assert bundle.heads[0].labels == ("blues", "loud", "metal")
    assert set(bundle.heads[0].calibration.temperature) == {"mean", "majority", "weighted"}
    card = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    assert f"| mean | {bundle.figures['track_accuracy']['mean']:.1%} |" in card


@pytest.mark.parametrize("layout", ["gtzan", "fma", "fma-all", "msd", "folders"])
def test_every_layout_of_audio_can_be_trained_on(tmp_path: Path, layout: str) -> None:
    make = {"fma-all": music.fma}.get(layout) or getattr(music, layout)
    dataset = load(make(tmp_path / "music"), layout)
    recipe = SMALL.model_copy(update={"passes": 1})
    said: list[str] = []
    bundle = train(dataset, tmp_path / "b", recipe=recipe, progress=Progress(say=said.append))
    assert bundle.heads[0].labels == dataset.labels
    told = [line for line in said if line.startswith("skipped")]
    assert len(told) == len({skipped.reason for skipped in dataset.skipped})


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    dataset = load(music.archive(tmp_path / "a.npz", split="test"))
    with pytest.raises(DatasetInvalid, match="only test"):
        train(dataset, tmp_path / "b", recipe=SMALL)
    with np.load(music.archive(tmp_path / "few.npz", clips=2, optional=False)) as stored:
        np.savez(tmp_path / "few.npz", **(dict(stored) | {"names": np.array(["a", "b"])}))
    with pytest.raises(DatasetInvalid, match="three recordings of a label are enough"):
        train(load(tmp_path / "few.npz"), tmp_path / "b", recipe=SMALL)
    broken = music.folders(tmp_path / "valid", 1)
    for file in broken.glob("*/*"):
        file.write_bytes(b"no audio")
    music.folders(tmp_path / "train", 2)
    with pytest.raises(DatasetInvalid, match="no readable clip is in split 'valid'"):
        train(load(tmp_path, "folders"), tmp_path / "b", recipe=SMALL)


def test_where_only_validation_is_missing_a_fifth_of_train_is_dealt_to_it() -> None:
    sides = ["train"] * 100 + ["test"] * 10
    clips = tuple(Clip(f"{n}", ("ab"[n % 2],), f"{n // 5}", side) for n, side in enumerate(sides))
    dataset = Dataset("x", "folders", "single", ("a", "b"), clips, "artist", "none")
    dealt = _with_splits(dataset, 0).check_split()
    assert Counter(clip.split for clip in dealt.clips) == {"train": 80, "valid": 20, "test": 10}
    assert [clip.split for clip in dealt.clips[100:]] == ["test"] * 10
    torn = tuple(dataclasses.replace(clip, group="one") for clip in dealt.clips)
    with pytest.raises(SplitLeaks):
        _with_splits(dataclasses.replace(dealt, clips=torn), 0)


def test_songs_held_back_are_not_all_in_memory_at_once(dataset: Dataset) -> None:
    told: list[str] = []

    class Source(LogMelSource):
        def windows(self, row: int, hop: int | None = None) -> torch.Tensor:
            told.append("song")
            return super().windows(row, hop)

    head = Head(name="genre", kind="single", labels=dataset.labels, categories=dataset.labels)
    network = build_logmel_cnn(SMALL.network.model_dump(mode="json"), [head]).eval()
    source, _ = open_source(dataset, ARCHIVE_FRONT_END, Path())
    source = Source(source.clips, source.front_end)
    rows = np.tile(np.arange(12), 8)
    validate = Validation(source, dataset.targets(), rows, head, torch.device("cpu"))
    network.trunk.register_forward_hook(lambda *_: told.append("batch"))
    songs = validate.probabilities(network)
    assert told.index("batch") == 22, "64 windows are those of 21 songs, three each, and one more"
    assert told.count("batch") == -(-8 * 36 // 64)
    with torch.inference_mode():
        alone = network.from_logmel(source.windows(5)).probabilities["genre"].numpy()
    np.testing.assert_allclose(songs[5 + 12], alone, atol=1e-6)


@pytest.mark.parametrize("device", ["tpu", "cuda:1"])
def test_a_device_that_is_none_is_refused(dataset: Dataset, tmp_path: Path, device: str) -> None:
    with pytest.raises(SettingsInvalid, match="none of auto, cpu and cuda"):
        train(dataset, tmp_path / "b", recipe=SMALL, device=device)


def test_members_together_say_the_mean_of_what_each_says_and_learn_each_on_its_own() -> None:
    torch.manual_seed(0)
    head = Head(name="genre", kind="single", labels=music.GENRES, categories=music.GENRES)
    members = SMALL.network.members
    both, *alone = (
        build_logmel_cnn(
            SMALL.network.model_copy(update={"members": some}).model_dump(mode="json"), [head]
        ).eval()
        for some in (members, members[:1], members[1:])
    )
    layers = [network.get_submodule("heads.genre").state_dict() for network in alone]
    joint = {"weight": torch.cat([layer["weight"] for layer in layers], 1), "bias": torch.zeros(2)}
    both.get_submodule("heads.genre").load_state_dict(joint)
    for number, network in enumerate(alone):
        network.get_parameter("heads.genre.bias").data.zero_()
        one = network.get_submodule("trunk.members.0").state_dict()
        both.get_submodule(f"trunk.members.{number}").load_state_dict(one)
    windows, targets = torch.randn(4, 72, 128), torch.eye(2).repeat(2, 1)
    said = torch.stack([network.logits(windows)[0]["genre"] for network in alone])
    torch.testing.assert_close(both.logits(windows)[0]["genre"], said.mean(0))
    losses = torch.stack([_loss(network, head, windows, targets, 0.1) for network in alone])
    torch.testing.assert_close(_loss(both, head, windows, targets, 0.1), losses.mean())


WIDE = LogMelCnnConfig(
    channels=(8, 72),
    stem_stride=(8, 8),
    members=(MemberConfig(), MemberConfig(kind="filters", balance=1.0)),
)


@pytest.mark.parametrize("labels", [3, 300])
def test_an_embedding_narrowed_to_what_bundles_may_have_says_the_same(labels: int) -> None:
    torch.manual_seed(0)
    names = tuple(str(number) for number in range(labels))
    head = Head(name="genre", kind="single", labels=names, categories=names)
    wide = build_logmel_cnn(WIDE.model_dump(mode="json"), [head]).eval()
    windows = torch.randn(400, 72, 128) * torch.rand(400, 1, 128)
    narrow, config = narrowed(wide, WIDE, head, windows)
    assert (wide.embedding_dim, narrow.embedding_dim, config.embedding_dim) == (288, 256, 256)
    with torch.inference_mode():
        before, after = wide.from_logmel(windows), narrow.from_logmel(windows)
        targets = torch.eye(labels)[torch.arange(400) % labels]
        loss = _loss(narrow, head, windows, targets, 0.1)
        said = narrow.logits(windows)[0]["genre"]
    torch.testing.assert_close(loss, cross_entropy(said, targets, label_smoothing=0.1))
    exact = labels <= narrow.embedding_dim
    torch.testing.assert_close(
        after.probabilities["genre"], before.probabilities["genre"],
        atol=1e-5 if exact else 1e-3, rtol=0,
    )  # fmt: skip
    if exact:
        apart = [torch.pdist(output.embedding) for output in (before, after)]
        torch.testing.assert_close(apart[1], apart[0], atol=1e-3, rtol=1e-2)
    basis = narrow.state_dict()["trunk.narrow.weight"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(256), atol=1e-5, rtol=0)


def test_a_wide_network_ends_as_a_bundle_and_can_be_tuned(dataset: Dataset, tmp_path: Path) -> None:
    recipe = BRIEF.model_copy(update={"network": WIDE})
    bundle = train(dataset, tmp_path / "wide", recipe=recipe, fit="train")
    assert bundle.embedding_dim == 256
    brief = FINE_TUNING.model_copy(update={"passes": 1, "batch": 8})
    tuned = train(dataset, tmp_path / "tuned", recipe=brief, start=bundle, fit="train")
    assert tuned.embedding_dim == 256


def test_balanced_members_hear_no_difference_in_gain_or_equalisation() -> None:
    samples = torch.randn(2, 66_150, generator=torch.Generator().manual_seed(0)) * 0.1
    for balance in (0.0, 1.0):
        members = (MemberConfig(balance=balance), MemberConfig(kind="filters", balance=balance))
        config = LogMelCnnConfig(members=members).model_dump(mode="json")
        network = build_logmel_cnn(config, []).eval()
        with torch.inference_mode():
            loud, quiet = network.front_end(samples), network.front_end(samples * 0.1)
            shaped = loud + torch.linspace(-1, 1, 128)
            said, of_quiet, of_shaped = (
                network.from_logmel(logmel).embedding for logmel in (loud, quiet, shaped)
            )
        torch.testing.assert_close(of_quiet, said, atol=1e-3, rtol=0)
        assert torch.allclose(of_shaped, said, atol=1e-3) == (balance == 1.0)


def test_filters_hear_the_same_timbre_at_another_pitch() -> None:
    torch.manual_seed(0)
    member = FilterMember(LogMelCnnConfig()).eval()
    low = torch.zeros(1, 1, 72, 128)
    low[..., 40:50] = torch.randn(72, 10)
    high = low.roll(3 * TALL_STRIDE[1], 3)
    heard, heard_higher = (member.tall[0](sound).amax(3) for sound in (low, high))
    torch.testing.assert_close(heard, heard_higher)
    assert heard.std() > 0.01


@pytest.mark.parametrize(("frames", "bands"), [(1, 8), (71, 100), (187, 96)])
def test_members_fit_any_front_end(frames: int, bands: int) -> None:
    front_end = ARCHIVE_FRONT_END.model_copy(update={"frames": frames, "n_mels": bands})
    config = LogMelCnnConfig(front_end=front_end)
    network = build_logmel_cnn(config.model_dump(mode="json"), []).eval()
    with torch.inference_mode():
        embedding = network.from_logmel(torch.randn(3, frames, bands)).embedding
    assert embedding.shape == (3, config.embedding_dim)


def test_recipes_from_json_change_only_what_they_name(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"batch": 16, "augmentation": {"pitch": 0.0}}')
    recipe = load_recipe(path, 3.0, fine_tuning=False)
    assert (recipe.batch, recipe.passes, recipe.augmentation.pitch) == (16, 3.0, 0.0)
    assert recipe.augmentation.tempo == Recipe().augmentation.tempo
    path.write_text('{"network": {"front_end": {"range_db": 60}}}', encoding="utf-8-sig")
    front_end = load_recipe(path, None, fine_tuning=False).network.front_end
    assert front_end == ARCHIVE_FRONT_END.model_copy(update={"range_db": 60.0})
    assert load_recipe(None, None, fine_tuning=True) == FINE_TUNING
    for content, told in (
        ('{"bacth": 16}', "^the recipe can't be used: bacth: Extra inputs"),
        ('{"augmentation": {"pitch": "high"}}', "augmentation.pitch: Input should be a valid"),
        ('{"network": {"members": [{"balance": 2.0}]}}', "network.members.0.balance: Input should"),
        ('{"network": {"channels": [0]}}', "network.channels.0: Input should"),
        ('{"network": {"stem_stride": [0, 4]}}', "network.stem_stride.0: Input should"),
        ('{"augmentation": {"gain": Infinity}}', "augmentation.gain: Input should be a finite"),
        ("[1]", "must be a JSON object"),
        ("{", "can't be read as JSON"),
    ):
        path.write_text(content)
        with pytest.raises(SettingsInvalid, match=told):
            load_recipe(path, 3.0, fine_tuning=False)
    with pytest.raises(SettingsInvalid, match="passes: Input should be a finite"):
        load_recipe(None, math.inf, fine_tuning=False)


def test_what_would_fail_in_the_end_fails_at_once(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsInvalid, match="folder"):
        train(dataset, tmp_path / "file", recipe=SMALL)
    blank = tuple(dataclasses.replace(clip, labels=("",)) for clip in dataset.clips)
    with pytest.raises(DatasetInvalid, match="labels"):
        train(dataclasses.replace(dataset, labels=("",), clips=blank), tmp_path / "b", recipe=SMALL)
    blues = tuple(dataclasses.replace(clip, labels=("blues",)) for clip in dataset.clips)
    with pytest.raises(DatasetInvalid, match=r"one label, 'blues'.+ right above those"):
        train(
            dataclasses.replace(dataset, labels=("blues",), clips=blues),
            tmp_path / "b",
            recipe=SMALL,
        )
    instant = LogMelCnnConfig(front_end=ARCHIVE_FRONT_END.model_copy(update={"frames": 1}))
    with pytest.raises(SettingsInvalid, match=r"hears 0.0 s at a time"):
        train(dataset, tmp_path / "b", recipe=SMALL.model_copy(update={"network": instant}))
    bundle = train(dataset, tmp_path / "my model!", recipe=BRIEF, fit="train")
    assert bundle.name == "my-model"


def test_a_network_that_no_bundle_may_have_is_refused_before_it_learns(
    dataset: Dataset, tmp_path: Path
) -> None:
    def stop(*_: object) -> None:
        raise Interrupted

    wide = LogMelCnnConfig(channels=(2_048,), stem_stride=(1, 1), members=(MemberConfig(),))
    with pytest.raises(BundleInvalid, match="18,874,368 values at once for one window"):
        train(
            dataset,
            tmp_path / "b",
            recipe=SMALL.model_copy(update={"batch": 2, "network": wide}),
            progress=Progress(step=stop),
        )


def test_weights_that_grow_without_bounds_end_the_run(dataset: Dataset, tmp_path: Path) -> None:
    steep = SMALL.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(
        SettingsInvalid, match=r"rehearsal: weights .* lower the recipe's learning_"
    ):
        train(dataset, tmp_path / "b", recipe=steep)


def test_a_bundle_may_be_made_where_one_stands(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert train(dataset, Path(), recipe=BRIEF, fit="train").name == "here"
    assert (tmp_path / "here.work").is_dir()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_cuda_learns_in_mixed_precision_and_to_one_result(
    dataset: Dataset, tmp_path: Path
) -> None:
    bundle = train(dataset, tmp_path / "b", recipe=SMALL, device="cuda")
    again = train(dataset, tmp_path / "again", recipe=SMALL, device="cuda")
    assert bundle.figures["track_accuracy"]["mean"] == 1.0
    assert again.version == bundle.version
