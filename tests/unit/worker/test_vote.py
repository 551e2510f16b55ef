"""Voting: by hand-computed numbers, by head kind, and what happens on ties and silence."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from worker.errors import TrackSilent
from worker.settings import VoteMethod
from worker.vote import Floats, Verdict, VotedTag, confidence, mean_embedding, vote


@dataclass(frozen=True)
class PlainHead:
    """A head whose calibration raises the mean to a power, so that it can be told apart."""

    name: str = "genre"
    kind: Literal["single", "multi"] = "single"
    labels: tuple[str, ...] = ("blues", "jazz", "rock")
    power: float = 1.0

    @property
    def categories(self) -> tuple[str, ...]:
        return ("genre" if self.kind == "single" else "mood",) * len(self.labels)

    def calibrate(self, voted: Floats, method: str) -> Floats:
        return voted**self.power if method == "mean" else voted


GENRE = PlainHead()
MOODS = PlainHead(name="tags", kind="multi", labels=("calm", "dark", "happy"))
WINDOWS = np.array([[0.5, 0.4, 0.1], [0.2, 0.5, 0.3], [0.4, 0.35, 0.25]], np.float32)
ALL = np.ones(3, dtype=np.bool_)


def genre_vote(
    probabilities: Floats,
    method: VoteMethod = "mean",
    uncertain_below: float = 0.0,
    head: PlainHead = GENRE,
) -> Verdict:
    voting = np.ones(len(probabilities), dtype=np.bool_)
    return vote(
        {head.name: probabilities}, voting, [head], method=method, uncertain_below=uncertain_below
    )


def scores(verdict: Verdict) -> dict[str, float]:
    return {tag.label: tag.score for tag in verdict.tags}


def shares(verdict: Verdict) -> dict[str, float]:
    return {tag.label: tag.share for tag in verdict.tags}


def test_mean_averages_the_probabilities_and_counts_votes_beside_them() -> None:
    verdict = genre_vote(WINDOWS)
    assert [tag.label for tag in verdict.tags] == ["jazz", "blues", "rock"]
    assert scores(verdict) == pytest.approx({"jazz": 1.25 / 3, "blues": 1.1 / 3, "rock": 0.65 / 3})
    assert shares(verdict) == pytest.approx({"jazz": 1 / 3, "blues": 2 / 3, "rock": 0.0})


def test_majority_scores_by_votes() -> None:
    verdict = genre_vote(WINDOWS, "majority")
    assert [tag.label for tag in verdict.tags] == ["blues", "jazz", "rock"]
    assert (
        scores(verdict)
        == shares(verdict)
        == pytest.approx({"blues": 2 / 3, "jazz": 1 / 3, "rock": 0.0})
    )


def test_weighted_listens_to_the_window_that_is_sure() -> None:
    probabilities = np.array([[0.98, 0.01, 0.01], [0.3, 0.4, 0.3], [0.3, 0.4, 0.3]])
    assert scores(genre_vote(probabilities, "weighted"))["blues"] > 0.95
    assert scores(genre_vote(probabilities))["blues"] == pytest.approx(1.58 / 3)
    moods = np.array([[1.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    assert scores(genre_vote(moods, "weighted", head=MOODS)) == pytest.approx(
        {"calm": 1.0, "dark": 0.0, "happy": 1.0}
    )


def test_weighted_is_the_mean_where_no_window_is_sure_of_anything() -> None:
    probabilities = np.full((4, 4), 0.25)
    head = PlainHead(labels=("a", "b", "c", "d"))
    assert scores(genre_vote(probabilities, "weighted", head=head)) == pytest.approx(
        dict.fromkeys("abcd", 0.25)
    )


def test_confidence_is_none_for_a_uniform_window_and_full_for_a_certain_one() -> None:
    single = np.array([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert confidence(single, "single") == pytest.approx([0.0, 1.0, 0.5])
    multi = np.array([[0.5] * 4, [1.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.0, 1.0]])
    assert confidence(multi, "multi") == pytest.approx([0.0, 1.0, 0.5])
    assert confidence(np.full((1, 2), 0.5), "single") == pytest.approx([0.0])
    assert confidence(np.ones((2, 1)), "single") == pytest.approx([1.0, 1.0])
    assert confidence(np.full((1, 5), 0.2), "single") >= 0, "however it is rounded"


def test_a_multi_label_window_votes_for_every_label_over_a_half() -> None:
    probabilities = np.array([[0.9, 0.8, 0.5], [0.7, 0.2, 0.1]])
    verdict = genre_vote(probabilities, "majority", head=MOODS)
    assert shares(verdict) == pytest.approx({"calm": 1.0, "dark": 0.5, "happy": 0.0})
    assert scores(genre_vote(probabilities, head=MOODS)) == pytest.approx(
        {"calm": 0.8, "dark": 0.5, "happy": 0.3}
    )


def test_silent_windows_do_not_vote() -> None:
    voting = np.array([True, False, True])
    verdict = vote({"genre": WINDOWS}, voting, [GENRE], uncertain_below=0.0)
    assert verdict == genre_vote(WINDOWS[voting])
    assert shares(verdict) == {"blues": 1.0, "jazz": 0.0, "rock": 0.0}


@pytest.mark.parametrize("windows", [0, 2])
def test_a_track_without_a_voting_window_is_silent(windows: int) -> None:
    with pytest.raises(TrackSilent, match="Every window of the track is silent"):
        vote(
            {"genre": WINDOWS[:windows]},
            np.zeros(windows, dtype=np.bool_),
            [GENRE],
            uncertain_below=0.0,
        )


def test_scores_are_calibrated_after_the_vote() -> None:
    plain, squared = genre_vote(WINDOWS), genre_vote(WINDOWS, head=PlainHead(power=2.0))
    assert scores(squared) == pytest.approx({k: v**2 for k, v in scores(plain).items()})
    assert shares(squared) == shares(plain)
    for method in ("majority", "weighted"):
        assert genre_vote(WINDOWS, method, head=PlainHead(power=2.0)) == genre_vote(WINDOWS, method)


def test_uncertain_compares_the_calibrated_best_score_with_the_threshold() -> None:
    best = 1.25 / 3
    assert genre_vote(WINDOWS, uncertain_below=best + 0.01).uncertain
    assert not genre_vote(WINDOWS, uncertain_below=best - 0.01).uncertain
    assert not genre_vote(np.eye(3)[:1], uncertain_below=1.0).uncertain, "not below"
    assert genre_vote(WINDOWS, uncertain_below=best - 0.01, head=PlainHead(power=2.0)).uncertain


def test_the_first_single_label_head_decides_what_is_uncertain() -> None:
    second = PlainHead(name="era", labels=("old", "new", "newer"))
    probabilities = {
        "tags": np.full((3, 3), 0.99),
        "genre": WINDOWS,
        "era": np.tile([1.0, 0.0, 0.0], (3, 1)),
    }
    assert vote(probabilities, ALL, [MOODS, GENRE, second], uncertain_below=0.6).uncertain
    assert not vote(probabilities, ALL, [MOODS, second, GENRE], uncertain_below=0.6).uncertain


def test_without_a_single_label_head_the_best_tag_decides_what_is_uncertain() -> None:
    eras = PlainHead(name="eras", kind="multi", labels=("old", "new", "newer"))
    probabilities = {"tags": np.tile([0.2, 0.7, 0.1], (3, 1)), "eras": np.full((3, 3), 0.1)}
    assert not vote(probabilities, ALL, [MOODS, eras], uncertain_below=0.6).uncertain
    assert vote(probabilities, ALL, [MOODS, eras], uncertain_below=0.8).uncertain


def test_every_tag_names_its_head_and_heads_keep_their_order() -> None:
    probabilities = {"genre": WINDOWS[1:2], "tags": np.array([[0.2, 0.7, 0.1]])}
    tags = vote(probabilities, np.ones(1, dtype=np.bool_), [GENRE, MOODS], uncertain_below=0.0).tags
    assert [(tag.head, tag.label) for tag in tags] == [
        ("genre", "jazz"),
        ("genre", "rock"),
        ("genre", "blues"),
        ("tags", "dark"),
        ("tags", "calm"),
        ("tags", "happy"),
    ]
    assert tags[3] == VotedTag("tags", "dark", "mood", score=0.7, share=1.0)


def test_a_window_that_ties_votes_for_the_earlier_label() -> None:
    verdict = genre_vote(np.array([[0.2, 0.4, 0.4]]), "majority")
    assert shares(verdict) == {"jazz": 1.0, "blues": 0.0, "rock": 0.0}


def test_equal_votes_are_ordered_by_mean_probability_then_by_the_heads_order() -> None:
    by_mean = genre_vote(np.array([[0.6, 0.4, 0.0], [0.0, 0.9, 0.1]]), "majority")
    assert [tag.label for tag in by_mean.tags] == ["jazz", "blues", "rock"]
    by_order = genre_vote(np.array([[0.5, 0.0, 0.5], [0.0, 0.5, 0.5]]))
    assert [tag.label for tag in by_order.tags] == ["rock", "blues", "jazz"]


@pytest.mark.parametrize("method", ["mean", "majority", "weighted"])
def test_the_order_of_windows_does_not_matter(method: VoteMethod) -> None:
    rng = np.random.default_rng(7)
    probabilities = rng.dirichlet(np.ones(3), size=40)
    forward, backward = genre_vote(probabilities, method), genre_vote(probabilities[::-1], method)
    assert [tag.label for tag in forward.tags] == [tag.label for tag in backward.tags]
    assert scores(forward) == pytest.approx(scores(backward), abs=1e-12)


def test_windows_count_alike_in_an_embedding_however_long_theirs_are() -> None:
    embedding = mean_embedding(np.array([[8.0, 0.0], [0.0, 0.5]], np.float32))
    assert embedding.tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    assert embedding.dtype == np.float32
    assert mean_embedding(np.zeros((2, 3))).tolist() == [0, 0, 0]


def test_voting_needs_no_torch() -> None:
    program = "import sys, worker.vote; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
