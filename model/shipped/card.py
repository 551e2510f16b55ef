"""The shipped bundles' model cards, with the figures of the run that made them."""

import json

from model.bundle import Bundle


def card(bundle: Bundle) -> str:
    """The card as Markdown."""
    validation = bundle.figures["validation"]
    rows = [
        f"| {way} | {100 * row['unheard_artists']:.1f} % | {100 * row['folds_by_song']:.1f} % |"
        for way, row in bundle.figures["tried"].items()
    ]
    tags = bundle.figures.get("tags_against_reference")
    return _TEXT.format(
        name=bundle.name,
        what=_WHAT[bundle.name],
        lessons=_LESSONS.format(**bundle.training) if "windows" in bundle.training else "",
        origin=bundle.training["origin"],
        labels_licence=bundle.training["labels_licence"],
        music=bundle.training["music"],
        seed=bundle.training["seed"],
        tried="\n".join(rows),
        excerpts=validation["excerpts"],
        accuracy=100 * validation["accuracy"]["mean"],
        ece=validation["ece"],
        chance=validation["ece_by_chance"],
        covered=100 * validation["accuracy_at_70_percent_coverage"],
        threshold=bundle.uncertain_threshold,
        neighbours=100 * validation["nearest_neighbour_shares_genre"],
        archive=100 * validation["archive_accuracy"],
        clips=validation["archive_clips"],
        tags=_TAGS.format(**tags) if tags else "",
        minutes=bundle.figures["recipe_s"] / 60,
        at_hand=_AT_HAND
        if bundle.figures["log_mels_at_hand"]
        else "downloads and decoding included",
        figures=json.dumps(bundle.figures, indent=1),
    )


_TAGS = """| mean tags of {tracks} whole tracks not learnt from, correlation with the reference's \
| {correlation:.3f} |
| of the reference's five best tags, among this model's five best | {of_five_best:.2f} |
"""

_AT_HAND = "with downloads and log-mels of an earlier run at hand, longer without them"

_WHAT = {
    "timbre-default": """musicnn's network for the Million Song Dataset (Pons and Serra, 2019),
freed of its dead filters, which changes no answer by more than 1e-5: its fifty tags are the
reference's own. The genre head is one linear layer over its embedding. 0.31 GFLOP a window, front
end included, where the reference as published takes 2.8.

`fast`, beside it, is a student of it at an eighth of that, for processors that are to keep up with
decoding.""",
    "timbre-fast": """A student of musicnn's network for the Million Song Dataset (Pons and Serra,
2019), which is `default`, beside it: the same filters, freed of the dead ones, at half the frame
rate and at every third position over frequency. It was taught to give the reference's
embedding and fifty tags; the genre head is one linear layer over that embedding. 0.04 GFLOP a
window, front end included, where the reference as published takes 2.8.""",
}

_LESSONS = """
- The reference was asked about {windows} windows: of that music, GTZAN's excerpts and its log-mel
  archive."""

_TEXT = """# {name}

Ten genres and fifty tags (genre, mood, instrument, era, voice) for every 3 s of music, and an
embedding of 200 numbers by which similar music lies close.

## What it is

{what}

## Origin and licences

- Weights begin as {origin}. Its text lies beside this card.
- Genre labels are GTZAN's (fault-filtered split, training and validation songs): {labels_licence}.
  Train on your own music (`timbre model train`) where that matters.
- Music without labels: {music}.{lessons}
- No audio is part of this project.

## Figures

Measured by the recipe on validation songs whose artists the measured head had not heard; the
network itself has seen no GTZAN label. The head that ships is fitted on all songs afterwards.

| what | figure |
|---|---|
| best genre of {excerpts} excerpts of audio, most of them 2 to 3 s | {accuracy:.1f} % |
| the same for {clips} clips of 30 s from the log-mel archive | {archive:.1f} % |
| expected calibration error, temperature from the other half of the songs | {ece:.3f} |
| what chance alone gives in so few excerpts, where scores are right | {chance:.3f} |
| right among the surest 70 % (`uncertain` below {threshold}) | {covered:.1f} % |
| nearest neighbour of an excerpt, other song, shares its genre | {neighbours:.1f} % |
{tags}
GTZAN is small, with few artists a genre. Expect less on other music, and read `uncertain` as what
it says.

## What was tried

Best genre on validation excerpts of unheard artists after fitting on training songs, and over ten
folds by song of all excerpts, where artists are on both sides. Choices were made by the first.
The first four rows are the recipe's own, the others from trials before it; nothing was tuned on a
test.

| way | unheard artists | folds by song |
|---|---|---|
{tried}
| the reference's own embedding, logistic regression, audio alone | 64.1 % | 83.7 % |
| its 512 pooled features instead | 56.9 % | - |
| its embedding, archive too, blurred embeddings taken as they are | 68.6 % | - |
| its embedding, archive too, sharpened by ridge regression | 75.8 % | - |
| the same with a small perceptron | 73.9 % | - |
| embeddings as shipped, support vectors with a Gaussian kernel, best of four | 76.5 % | - |
| the same, nearest neighbours by cosine, all weighted by nearness | 75.2 % | - |
| either beside the shipped head, at any of four weights | at most 78.4 % | - |
| five CNNs learnt from the archive's training songs alone (`timbre model train`) | 67.3 % | - |
| these beside the shipped head, at any of eight weights | at most 79.1 % | - |
| the reference's embedding, and beside it the last layer of MSD_vgg | 73.2 % | - |
| student trained with a genre loss of its own on excerpts and archive, stopped early | 64.7 % | - |

The archive's songs, brought to embeddings through blurred log-mels, are worth more than anything
else that was tried; equalised copies of the excerpts added nothing.

The student's tags: averaging four bands for the flat filters, a learning rate of 1e-3 and mostly
game music gave a correlation of 0.86 with the reference on full-length tracks; every third band, a
rate of 3e-4 and mixed, retuned and equalised excerpts gave what stands above.

For a front end at half the cost, four students of the same lessons, one run each. Tags against
the reference's as above, genre on unheard artists:

| the student hears | correlation | of five best | genre |
|---|---|---|---|
| pairs of frames, averaged | 0.979 | 4.31 | 73.9 % |
| every second frame | 0.980 | 4.38 | 71.9 % |
| pairs averaged, every third position for filters over many bands | 0.970 | 4.06 | 72.5 % |
| every second frame, every third position for them | 0.973 | 4.19 | 72.5 % |

Every second frame, which halves the front end's cost, and every third position, which takes an
eighth off a window's time, are what ships: three excerpts of 153 are less than so few can tell.

Students that would be cheaper still, again one run each, beside what ships:

| the student hears | steps | correlation | of five best | genre |
|---|---|---|---|---|
| as shipped | 1,400 | 0.972 | 4.12 | 74.5 % |
| the same, taught for twice as long | 2,800 | 0.975 | 4.12 | 74.5 % |
| bands averaged in pairs, every second position of those | 1,400 | 0.945 | 3.81 | 72.5 % |
| every third frame | 2,800 | 0.951 | 3.94 | 68.0 % |
| every fourth frame | 1,400 | 0.925 | 3.44 | 63.4 % |

They would take three quarters to half of a window's time, and lose more than that is worth.

What the student loses against the reference on genres was to come back by a guide: a genre head
over the reference's embedding, fitted on training songs, of which the student learns to give what
it reads. One run each; accuracy, and negative log-likelihood behind it. In the reverse, guide and
head are fitted on validation songs and measured on training songs:

| | excerpts | archive | reverse: excerpts | archive |
|---|---|---|---|---|
| no guide | 71.9 %, 0.887 | 69.5 %, 0.834 | 62.0 %, 1.377 | 69.7 %, 0.923 |
| guide | 73.9 %, 0.855 | 70.6 %, 0.834 | 63.6 %, 1.278 | 68.6 %, 0.905 |
| the same in the recipe | 71.9 % | 69.5 % | - | - |
| four times its weight | 69.9 %, 0.887 | 70.6 %, 0.875 | - | - |
| twice, filters at every band (0.1 GFLOP) | 74.5 %, 0.843 | 72.1 %, 0.799 | - | - |
| the reference | 77.1 %, 0.817 | 72.6 %, 0.807 | 62.6 %, 1.271 | 69.5 %, 0.910 |

Where the recipe gave 72.5 % of excerpts without it, that is no gain to be sure of, so it was left.

For the head, the archive made audible (`model/datasets/resynthesis.py`) in place of the blurred
log-mels, on embeddings of students that heard pairs averaged. The reverse fits on validation songs
and measures on the 313 training excerpts:

| the archive's songs | unheard artists | reverse |
|---|---|---|
| blurred, then sharpened, as above | 73.9 % | 62.6 % |
| made audible, over twelve weightings | 71.2 to 78.4 % | 47 to 58 % |
| the same, mean and deviation matched to those of audio | 73.2 to 77.1 % | 53 to 60 % |
| made audible, then sharpened by ridge regression | 70 to 73 % | 59 to 63 % |

No better on the whole, so it was left.

## How to make it again

`timbre model recipe --out DIR` (seed {seed}) fetches all it needs but the shared data, and writes
these figures into `model.json`. The run that made this took {minutes:.0f} minutes on two shared
cores, {at_hand}.

```json
{figures}
```
"""
