"""Instruments, drums and effects in numpy: what the demo's music is played on.

Sounds are mono float32 arrays at `RATE`, mixes are stereo ones of shape (samples, 2). Notes are
MIDI numbers: 60 is middle C, 69 the A of 440 Hz.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATE = 44_100
NYQUIST = RATE / 2
NOISE_SEED = 7
FILTER_TAPS = 4096
COMPRESSOR_S = 0.08

Sound = NDArray[np.float32]

VOWELS = {
    # Formants of a singing voice: centre and width in Hz, gain.
    "a": ((800, 120, 1.0), (1150, 140, 0.6), (2900, 220, 0.25), (3900, 260, 0.12)),
    "e": ((450, 100, 1.0), (1800, 160, 0.45), (2600, 200, 0.3), (3500, 260, 0.12)),
    "o": ((450, 100, 1.0), (800, 120, 0.5), (2830, 220, 0.1), (3800, 260, 0.05)),
    "u": ((325, 80, 1.0), (700, 100, 0.3), (2700, 200, 0.06), (3800, 260, 0.03)),
}


def hertz(note: float) -> float:
    """The frequency of a MIDI note."""
    return float(440.0 * 2 ** ((note - 69) / 12))


def seconds(duration_s: float) -> NDArray[np.float64]:
    """The times of the samples of a sound."""
    return np.arange(round(duration_s * RATE)) / RATE


@lru_cache(maxsize=64)
def noise(samples: int, seed: int = NOISE_SEED) -> Sound:
    """White noise, the same each time."""
    return np.random.default_rng(seed).standard_normal(samples, dtype=np.float32)


def fade(sound: NDArray[np.floating], attack_s: float = 0.004, release_s: float = 0.02) -> Sound:
    """Let a sound begin and end softly, so that it doesn't click."""
    envelope = np.ones(len(sound), np.float32)
    attack = min(max(1, round(attack_s * RATE)), len(sound))
    release = min(max(1, round(release_s * RATE)), len(sound))
    envelope[:attack] *= np.linspace(0, 1, attack, dtype=np.float32)
    envelope[-release:] *= np.linspace(1, 0, release, dtype=np.float32)
    return (sound * envelope).astype(np.float32)


# Filters and effects ------------------------------------------------------------------------


Gain = Callable[[NDArray[Any]], NDArray[Any]]
"""Factors of the frequencies, in Hz, that it is given."""


def equalise(sound: Sound, gain: Gain) -> Sound:
    """Weight a sound's spectrum by `gain`; a mix, (samples, 2), has both its sides weighted."""
    if len(sound) > FILTER_TAPS:
        response = np.fft.irfft(gain(np.fft.rfftfreq(FILTER_TAPS, 1 / RATE)))
        centred = np.roll(response, FILTER_TAPS // 2) * np.hanning(FILTER_TAPS)
        return convolve(sound, centred, FILTER_TAPS // 2)
    size = 1 << (len(sound) - 1).bit_length()
    spectrum = np.fft.rfft(sound, size) * gain(np.fft.rfftfreq(size, 1 / RATE))
    return np.fft.irfft(spectrum, size)[: len(sound)].astype(np.float32)


def convolve(sound: Sound, impulse: NDArray[Any], delay: int = 0) -> Sound:
    """Convolve, (samples,) or (samples, 2), block by block, and drop the first `delay` samples.

    `impulse` may have two sides as well, each for its own.
    """
    size = 4 << (len(impulse) - 1).bit_length()
    step = size - len(impulse) + 1
    response = np.fft.rfft(np.asarray(impulse.T, np.float32), size)
    sides = np.atleast_2d(np.ascontiguousarray(sound.T))
    result = np.zeros((len(sides), len(sound) + size), np.float32)
    for start in range(0, len(sound), step):
        block = np.fft.irfft(np.fft.rfft(sides[:, start : start + step], size) * response, size)
        result[:, start : start + size] += block
    heard = result[:, delay : delay + len(sound)]
    return np.ascontiguousarray(heard.T if sound.ndim == 2 else heard[0])


def lowpass(sound: Sound, cutoff_hz: float, order: int = 2) -> Sound:
    """Keep what lies below `cutoff_hz`."""
    return equalise(sound, lambda f: 1 / np.sqrt(1 + (f / cutoff_hz) ** (2 * order)))


def highpass(sound: Sound, cutoff_hz: float, order: int = 2) -> Sound:
    """Keep what lies above `cutoff_hz`."""
    return equalise(
        sound, lambda f: 1 / np.sqrt(1 + (cutoff_hz / np.maximum(f, 1e-3)) ** (2 * order))
    )


def bandpass(sound: Sound, low_hz: float, high_hz: float, order: int = 2) -> Sound:
    """Keep what lies between."""
    return highpass(lowpass(sound, high_hz, order), low_hz, order)


def distort(sound: Sound, drive: float) -> Sound:
    """An overdriven amplifier and its cabinet: the lows are tamed before they clip, the presence
    stands out after."""
    tight = equalise(sound, lambda f: 0.25 + 1 / (1 + (350 / np.maximum(f, 1)) ** 2))
    driven = np.tanh(drive * tight) + 0.15 * np.tanh(drive * tight - 0.4)

    def cabinet(f: NDArray[Any]) -> NDArray[Any]:
        body = 1 + 0.8 * np.exp(-(((f - 140) / 90) ** 2))
        presence = 1.6 * np.exp(-(((f - 2800) / 1400) ** 2))
        cut = 1 + (f / 5600) ** 8 + (70 / np.maximum(f, 1)) ** 4
        return np.asarray((body + presence) / np.sqrt(cut))

    return equalise(driven.astype(np.float32), cabinet)


def compress(mix: Sound, ratio: float, ambience: float = 0.03) -> Sound:
    """Even out loudness, as every record's master is: `ratio` dB louder become 1.

    `ambience` is the loudness, against the loudest, below which there is only the room.
    """
    power = (mix**2).mean(axis=1)
    width = round(COMPRESSOR_S * RATE)
    sums = np.cumsum(np.pad(power.astype(np.float64), (width // 2 + 1, width - width // 2 - 1)))
    loudness = np.sqrt(np.maximum(sums[width:] - sums[:-width], 0) / width)[: len(mix)]
    floor = ambience * float(loudness.max())
    gain = np.maximum(loudness, floor) ** (1 / ratio - 1)
    evened: Sound = (mix * gain[:, None]).astype(np.float32)
    return evened


def tape(mix: Sound, hiss: float) -> Sound:
    """The noise that a recording never goes below, `hiss` against its mean loudness."""
    sides = [lowpass(noise(len(mix), seed), 2500, 1) for seed in (31, 37)]
    level = hiss * float(np.sqrt(np.mean(mix**2)))
    hissing: Sound = mix + level / np.float32(np.std(sides[0])) * np.stack(sides, axis=1)
    return hissing.astype(np.float32)


def echo(mix: Sound, delay_s: float, feedback: float, repeats: int = 5) -> Sound:
    """A tape echo: each repeat softer, darker and on the other side."""
    wet = np.zeros_like(mix)
    shift = round(delay_s * RATE)
    repeat = lowpass(mix, 2600)
    for number in range(1, repeats + 1):
        if number * shift >= len(mix):
            break
        repeat = repeat[:, ::-1] * feedback
        wet[number * shift :] += repeat[: len(mix) - number * shift]
    return mix + wet


def reverb(mix: Sound, size_s: float, wet: float, damping_hz: float = 6000) -> Sound:
    """A room: convolution with decaying noise, other noise on each side."""
    tail = seconds(size_s)
    decay = np.exp(-6.9 * tail / size_s)
    impulse = np.stack([noise(len(tail), seed) * decay for seed in (1, 2)], axis=1)
    impulse = lowpass(impulse.astype(np.float32), damping_hz, 1)
    impulse /= np.sqrt((impulse**2).sum(axis=0))
    return mix + wet * convolve(mix, impulse)


# Strings and keys ---------------------------------------------------------------------------


@lru_cache(maxsize=2048)
def pluck(
    note: float, duration_s: float, brightness: float = 0.5, sustain: float = 0.996, seed: int = 3
) -> Sound:
    """A plucked string, after Karplus and Strong (1983): a burst of noise, smoothed as it returns.

    `brightness` from 0 (a thumb) to 1 (a pick), `sustain` just below 1.
    """
    frequency = hertz(note)
    period = max(2, int(RATE / frequency))
    burst = lowpass(noise(period, seed), 900 * 14**brightness, 1)
    burst -= burst.mean()
    lines = np.empty((int(duration_s * RATE / period) + 2, period), np.float32)
    lines[0] = burst / np.abs(burst).max()
    blend = 0.5 - 0.35 * brightness
    for index in range(1, len(lines)):
        before = lines[index - 1]
        lines[index] = (1 - blend) * before
        lines[index, 1:] += blend * before[:-1]
        lines[index, 0] += blend * (lines[index - 2, -1] if index > 1 else 0)
        lines[index] *= sustain
    string = lines.ravel()
    # The delay line has a whole number of samples; the right pitch lies in between.
    speed = frequency * (period + blend) / RATE
    times = np.arange(round(duration_s * RATE)) * speed
    return fade(np.interp(times, np.arange(len(string)), string), 0.001, 0.03)


@lru_cache(maxsize=1024)
def upright_bass(note: float, duration_s: float) -> Sound:
    """A plucked double bass: a dark string over a round fundamental."""
    t = seconds(duration_s)
    body = np.sin(2 * np.pi * hertz(note) * t) * np.exp(-2.2 * t)
    string = lowpass(pluck(note, duration_s, 0.25, 0.994), 1100)
    return fade(0.7 * body + 0.8 * string, 0.006, 0.04)


@lru_cache(maxsize=1024)
def electric_bass(note: float, duration_s: float) -> Sound:
    """A fingered electric bass."""
    t = seconds(duration_s)
    fundamental = np.sin(2 * np.pi * hertz(note) * t) * np.exp(-1.5 * t)
    string = lowpass(pluck(note, duration_s, 0.45, 0.996), 1900)
    return fade(np.tanh(1.3 * (0.6 * fundamental + 0.7 * string)), 0.003, 0.02)


@lru_cache(maxsize=1024)
def sub_bass(note: float, duration_s: float) -> Sound:
    """A sine with a little grit: the low end of hip-hop."""
    t = seconds(duration_s)
    return fade(np.tanh(1.8 * np.sin(2 * np.pi * hertz(note) * t)) * np.exp(-0.7 * t), 0.006, 0.06)


@lru_cache(maxsize=1024)
def electric_piano(note: float, duration_s: float, hardness: float = 1.0) -> Sound:
    """A tine piano by frequency modulation."""
    t, frequency = seconds(duration_s), hertz(note)
    tine = 0.35 * hardness * np.exp(-9 * t) * np.sin(2 * np.pi * 14 * frequency * t)
    modulator = 1.2 * hardness * np.exp(-2.5 * t) * np.sin(2 * np.pi * frequency * t)
    tone = np.sin(2 * np.pi * frequency * t + modulator + 0.3 * tine) * np.exp(-1.6 * t)
    return fade(tone, 0.003, 0.06)


@lru_cache(maxsize=1024)
def piano(note: float, duration_s: float, hardness: float = 1.0) -> Sound:
    """A struck string: stretched partials, each decaying faster than the one below."""
    t, frequency = seconds(duration_s), hertz(note)
    sound = np.zeros(len(t))
    for partial in range(1, 17):
        pitch = frequency * partial * np.sqrt(1 + 0.0004 * partial**2)
        if pitch > 0.9 * NYQUIST:
            break
        loudness = np.exp(-0.32 * (partial - 1) / hardness) / partial**0.4
        decay = 0.9 + 0.35 * partial + frequency / 900
        detune = 1 + 0.0004 * (partial % 3 - 1)
        sound += loudness * np.exp(-decay * t) * np.sin(2 * np.pi * pitch * detune * t)
    hammer = highpass(noise(len(t)), 1500) * np.exp(-220 * t) * 0.25
    return fade(0.4 * sound + 0.3 * hammer, 0.002, 0.08)


@lru_cache(maxsize=512)
def organ(note: float, duration_s: float) -> Sound:
    """A tonewheel organ with a turning speaker."""
    t, frequency = seconds(duration_s), hertz(note)
    vibrato = 0.0025 * np.sin(2 * np.pi * 6.3 * t)
    phase = 2 * np.pi * frequency * (t + vibrato / 6.3)
    bars = ((0.5, 0.7), (1, 1.0), (1.5, 0.5), (2, 0.5), (3, 0.25), (4, 0.2))
    tone = sum(gain * np.sin(ratio * phase) for ratio, gain in bars)
    return fade(0.35 * np.asarray(tone) * (1 + 0.15 * np.sin(2 * np.pi * 6.3 * t)), 0.006, 0.03)


# Waves, winds and voices --------------------------------------------------------------------


def saw(frequency_hz: float | NDArray[np.float64], duration_s: float) -> NDArray[np.float64]:
    """A sawtooth without the harshest of its aliases (polynomial steps)."""
    count = round(duration_s * RATE)
    step = np.broadcast_to(np.asarray(frequency_hz) / RATE, count)
    phase = np.cumsum(step) % 1.0
    wave = 2 * phase - 1
    early = phase < step
    x = phase[early] / step[early]
    wave[early] -= 2 * x - x * x - 1
    late = phase > 1 - step
    x = (phase[late] - 1) / step[late]
    wave[late] -= x * x + 2 * x + 1
    return wave


@lru_cache(maxsize=512)
def synth(note: float, duration_s: float, cutoff_hz: float = 2500, pluckiness: float = 4) -> Sound:
    """Two detuned saws whose filter closes: leads, stabs and synthesiser basses."""
    frequency = hertz(note)
    wave = saw(frequency * 1.004, duration_s) + saw(frequency * 0.996, duration_s)
    bright = lowpass(wave.astype(np.float32), cutoff_hz * 2.2)
    dark = lowpass(wave.astype(np.float32), cutoff_hz * 0.45)
    opening = np.exp(-pluckiness * seconds(duration_s)).astype(np.float32)
    return fade(0.5 * (bright * opening + dark * (1 - opening)), 0.004, 0.03)


@lru_cache(maxsize=512)
def strings(note: float, duration_s: float, attack_s: float = 0.12) -> Sound:
    """A section of bowed strings: players a little apart in pitch and vibrato."""
    t, frequency = seconds(duration_s), hertz(note)
    section = np.zeros(len(t))
    for player in range(5):
        rate, detune = 5.1 + 0.35 * player, 1 + 0.0016 * (player - 2)
        vibrato = 1 + 0.004 * np.sin(2 * np.pi * rate * t + player) * np.minimum(1, 3 * t)
        section += saw(frequency * detune * vibrato, duration_s)
    body = equalise(
        section.astype(np.float32),
        lambda f: (1 / (1 + (f / 2600) ** 2)) * (1 + 0.9 * np.exp(-(((f - 480) / 260) ** 2))),
    )
    return fade(0.16 * body, attack_s, min(0.25, 0.4 * duration_s))


@lru_cache(maxsize=512)
def reed(note: float, duration_s: float, breath: float = 0.06, bend: float = 0.5) -> Sound:
    """A saxophone or, bent further, a blues harp: a rich tone that swells and wavers."""
    t = seconds(duration_s)
    scoop = 2 ** (-bend * np.exp(-18 * t) / 12)
    vibrato = 1 + 0.006 * np.sin(2 * np.pi * 5.4 * t) * np.clip(3 * t - 0.5, 0, 1)
    wave = saw(hertz(note) * scoop * vibrato, duration_s) + breath * noise(len(t))
    tone = equalise(
        np.asarray(wave, np.float32),
        lambda f: (
            (1 / (1 + (f / 2300) ** 2))
            * (0.5 + np.exp(-(((f - 700) / 350) ** 2)) + 0.5 * np.exp(-(((f - 1500) / 400) ** 2)))
        ),
    )
    return fade(0.35 * tone, 0.03, 0.06)


@lru_cache(maxsize=512)
def flute(note: float, duration_s: float) -> Sound:
    """A flute: few partials, breath, a slow vibrato."""
    t, frequency = seconds(duration_s), hertz(note)
    vibrato = np.cumsum(1 + 0.005 * np.sin(2 * np.pi * 5 * t) * np.minimum(1, 2 * t)) / RATE
    tone = sum(
        gain * np.sin(2 * np.pi * frequency * partial * vibrato)
        for partial, gain in ((1, 1.0), (2, 0.35), (3, 0.12), (4, 0.04))
    )
    air = bandpass(noise(len(t)), frequency, 4 * frequency) * 0.08
    return fade(0.5 * np.asarray(tone) + air, 0.05, 0.08)


@lru_cache(maxsize=1024)
def voice(
    note: float, duration_s: float, vowel: str = "a", glide: float = 0.0, rasp: float = 0.05
) -> Sound:
    """Somebody singing one vowel; `glide` in semitones to the end, as in speech."""
    t = seconds(duration_s)
    vibrato = 1 + 0.009 * np.sin(2 * np.pi * 5.6 * t) * np.clip(4 * t - 0.8, 0, 1)
    pitch = hertz(note) * 2 ** (glide * t / duration_s / 12) * vibrato
    source = saw(pitch, duration_s) + rasp * noise(len(t))

    def throat(f: NDArray[np.float64]) -> NDArray[np.float64]:
        shape = 0.03 / (1 + (f / 3000) ** 2)
        for centre_hz, width_hz, gain in VOWELS[vowel]:
            shape += gain * np.exp(-(((f - centre_hz) / width_hz) ** 2))
        return shape

    return fade(0.9 * equalise(np.asarray(source, np.float32), throat), 0.025, 0.05)


# Drums --------------------------------------------------------------------------------------


@lru_cache
def kick(low_hz: float = 48, punch: float = 1.0, length_s: float = 0.35) -> Sound:
    """A bass drum: a falling sine and the beater's click."""
    t = seconds(length_s)
    phase = 2 * np.pi * (low_hz * t + 3.2 * (1 - np.exp(-38 * t)))
    click = highpass(noise(len(t)), 2500) * np.exp(-300 * t) * 0.35 * punch
    return fade(np.tanh(1.6 * np.sin(phase) * np.exp(-9 * t)) + click, 0.001, 0.05)


@lru_cache
def snare(tone_hz: float = 190, snap: float = 1.0, length_s: float = 0.22) -> Sound:
    """A snare drum: two modes of the skin under rattling noise."""
    t = seconds(length_s)
    skin = np.sin(2 * np.pi * tone_hz * t) + 0.5 * np.sin(2 * np.pi * 1.6 * tone_hz * t)
    rattle = bandpass(noise(len(t), 11), 900, 9500, 1) * np.exp(-17 * t)
    return fade(0.55 * skin * np.exp(-26 * t) + 0.5 * snap * rattle, 0.001, 0.03)


@lru_cache
def rim() -> Sound:
    """A cross-stick."""
    t = seconds(0.06)
    return fade(np.sin(2 * np.pi * 1700 * t) * np.exp(-90 * t) + 0.3 * snare()[: len(t)], 0.0005)


@lru_cache
def clap() -> Sound:
    """Hands: a few bursts and a tail."""
    t = seconds(0.2)
    bursts = sum(np.exp(-180 * np.clip(t - lag, 0, 1)) * (t >= lag) for lag in (0, 0.011, 0.022))
    return fade(bandpass(noise(len(t), 5), 900, 5000) * (0.5 * bursts + 0.5 * np.exp(-22 * t)))


@lru_cache
def hat(length_s: float = 0.06) -> Sound:
    """A hi-hat, closed when short, open when long."""
    t = seconds(length_s * 4)
    metal = sum(np.sign(np.sin(2 * np.pi * f * t)) for f in (3170, 4210, 5390, 6490, 8030))
    hiss = highpass((0.12 * np.asarray(metal) + noise(len(t), 9)).astype(np.float32), 6500)
    return fade(0.5 * hiss * np.exp(-t / length_s * 2.2), 0.001)


@lru_cache
def ride(length_s: float = 0.9) -> Sound:
    """A ride cymbal: a ping over a shimmer."""
    t = seconds(length_s)
    ping = sum(np.sin(2 * np.pi * f * t) for f in (2310, 3730, 4910, 6170, 7590)) * np.exp(-9 * t)
    shimmer = highpass(noise(len(t), 13), 5500) * np.exp(-4 * t)
    return fade(0.10 * np.asarray(ping) + 0.22 * shimmer, 0.001, 0.1)


@lru_cache
def crash(length_s: float = 2.0) -> Sound:
    """A crash cymbal."""
    t = seconds(length_s)
    return fade(highpass(noise(len(t), 17), 3200, 1) * np.exp(-2.6 * t) * 0.6, 0.002, 0.3)


@lru_cache
def tom(tone_hz: float) -> Sound:
    """A tom."""
    t = seconds(0.4)
    phase = 2 * np.pi * (tone_hz * t + 1.2 * (1 - np.exp(-25 * t)))
    return fade(np.sin(phase) * np.exp(-8 * t) + 0.08 * noise(len(t)) * np.exp(-40 * t), 0.001)


@lru_cache
def brush() -> Sound:
    """A brush swept over a snare."""
    t = seconds(0.3)
    return fade(0.3 * bandpass(noise(len(t), 19), 1800, 9000, 1) * np.exp(-9 * t), 0.03, 0.08)


@lru_cache
def shaker() -> Sound:
    """A shaker."""
    t = seconds(0.09)
    return fade(0.4 * highpass(noise(len(t), 23), 5500) * np.exp(-30 * t), 0.015)


@lru_cache
def crackle(duration_s: float, seed: int = 29) -> Sound:
    """The dust on a record."""
    rng = np.random.default_rng(seed)
    dust = np.zeros(round(duration_s * RATE), np.float32)
    places = rng.integers(0, len(dust), round(14 * duration_s))
    dust[places] = rng.uniform(-1, 1, len(places))
    return bandpass(dust, 800, 7000, 1) + 0.004 * noise(len(dust), seed)
