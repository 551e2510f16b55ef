from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from worker.demo import synth
from worker.demo.music import CODECS, Codec, Sample, encode
from worker.demo.styles import STYLES, Song, Style
from worker.demo.synth import RATE, Sound

SHORT_S = 1.0


def pitch_hz(sound: Sound) -> float:
    """The strongest frequency after the attack."""
    settled = sound[RATE // 10 : RATE // 10 + RATE // 2]
    spectrum = np.abs(np.fft.rfft(settled * np.hanning(len(settled)), 8 * len(settled)))
    return float(np.argmax(spectrum) * RATE / (8 * len(settled)))


@pytest.mark.parametrize("note", [45, 57, 69, 81])
def test_a_plucked_string_is_in_tune(note: int) -> None:
    heard = pitch_hz(synth.pluck(note, SHORT_S, 0.2, 0.999))
    partial = max(1, round(heard / synth.hertz(note)))
    assert 1200 * abs(np.log2(heard / partial / synth.hertz(note))) < 10  # cents


@pytest.mark.parametrize(
    "instrument", [synth.piano, synth.electric_piano, synth.flute, synth.organ, synth.sub_bass]
)
def test_an_instrument_sounds_the_note_and_stays_finite(
    instrument: Callable[[float, float], Sound],
) -> None:
    sound = instrument(57, SHORT_S)
    assert sound.dtype == np.float32
    assert len(sound) == RATE
    assert np.isfinite(sound).all()
    ratio = pitch_hz(sound) / synth.hertz(57)
    assert min(abs(ratio * 2 - octave) for octave in (1, 2, 3, 4, 6, 8)) < 0.05


def test_a_long_sound_is_filtered_as_a_short_one_is() -> None:
    short = synth.noise(4000)
    silent = np.zeros(3 * synth.FILTER_TAPS, np.float32)
    long = np.concatenate([silent, short, silent])
    heard = synth.lowpass(long, 1000)[len(silent) : len(silent) + len(short)]
    assert np.abs(heard - synth.lowpass(short, 1000))[500:-500].max() < 0.02


def test_a_lowpass_keeps_what_lies_below() -> None:
    times = np.arange(RATE) / RATE
    low, high = np.sin(2 * np.pi * 200 * times), np.sin(2 * np.pi * 8000 * times)
    heard = synth.lowpass((low + high).astype(np.float32), 1000, 4)
    assert np.abs(heard - low)[2000:-2000].max() < 0.01


def test_swing_moves_the_second_half_of_the_beat_only() -> None:
    click = np.ones(1, np.float32)
    song = Song(bpm=60, beats=4, swing=0.66, seed=0)
    for beat in (0, 0.5, 1):
        song.add(click, beat)
    [places] = np.nonzero(song.buses["dry"][:, 0])
    assert places / RATE == pytest.approx([0, 0.66, 1], abs=0.03)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.genre)
def test_a_composition_lasts_and_is_neither_silent_nor_clipped(style: Style) -> None:
    sound = style.compose()
    assert 20 < len(sound) / RATE < 40
    assert np.abs(sound).max() < 1
    each_second = sound[: len(sound) // RATE * RATE].reshape(-1, RATE * 2)
    assert np.sqrt((each_second**2).mean(axis=1))[:-1].min() > 0.01


def test_a_composition_is_the_same_each_time() -> None:
    style = STYLES[2]
    assert np.array_equal(style.compose(), style.compose())


def test_sample_tracks_carry_their_titles_in_four_codecs(music_files: list[Sample]) -> None:
    assert len(music_files) == len(STYLES) >= 8
    assert {sample.path.suffix for sample in music_files} == {".mp3", ".flac", ".ogg", ".m4a"}
    for sample in music_files:
        with av.open(sample.path) as container:
            container_tags = container.metadata
            tags = container_tags | container.streams.audio[0].metadata
            assert {name.lower(): value for name, value in tags.items()}["title"] == sample.title
            assert container.duration is not None
            assert 20 < container.duration / av.time_base < 40


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.suffix)
def test_what_is_encoded_is_heard_again(tmp_path: Path, codec: Codec) -> None:
    times = np.arange(RATE) / RATE
    sine = (0.5 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
    path = tmp_path / f"sine.{codec.suffix}"
    encode(np.stack([sine, sine], axis=1), path, codec, {"title": "A"})
    with av.open(path) as container:
        resampler = av.AudioResampler("fltp", "mono", RATE)
        parts = [
            part.to_ndarray()[0]
            for frame in container.decode(audio=0)
            for part in resampler.resample(frame)
        ]
    heard = np.concatenate(parts)
    assert abs(len(heard) / RATE - 1) < 0.1
    assert pitch_hz(heard.astype(np.float32)) == pytest.approx(440, abs=2)
