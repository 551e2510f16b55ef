"""The demo's tracks: one small composition a style. Beats count from 0, notes are MIDI numbers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from worker.demo import synth
from worker.demo.synth import RATE, Sound

TAIL_S = 0.6
HUMAN_TIMING_S = 0.006
HUMAN_GAIN = 0.12

Chord = tuple[int, ...]
Line = Sequence[tuple[float, float, float]]
"""A melody: beat, note, beats it lasts."""
Instrument = Callable[[float, float], Sound]
"""Plays a note for some seconds."""


@dataclass
class Song:
    """Sounds placed on beats, on named buses that get their effects together.

    `swing` moves the second half of every beat: 0.5 is straight, 0.66 a shuffle.
    """

    bpm: float
    beats: int
    swing: float = 0.5
    seed: int = 1
    buses: dict[str, Sound] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.samples = round((self.length(self.beats) + TAIL_S) * RATE)

    @property
    def bars(self) -> range:
        """Bars of four beats."""
        return range(self.beats // 4)

    def length(self, beats: float) -> float:
        """Seconds that `beats` take."""
        return beats * 60 / self.bpm

    def add(
        self, sound: Sound, beat: float, gain: float = 1.0, pan: float = 0.0, bus: str = "dry"
    ) -> None:
        """Place a sound; `pan` from -1, left, to 1, right. Nobody plays exactly on the beat."""
        if bus not in self.buses:
            self.buses[bus] = np.zeros((self.samples, 2), np.float32)
        whole, part = divmod(beat, 1)
        swung = part / 0.5 * self.swing if part <= 0.5 else 1 - (1 - part) / 0.5 * (1 - self.swing)
        hurry_s = self.random.normal(0, HUMAN_TIMING_S)
        start = max(0, round((self.length(whole + swung) + hurry_s) * RATE))
        heard = sound[: max(0, self.samples - start)]
        level = gain * (1 + self.random.uniform(-HUMAN_GAIN, HUMAN_GAIN))
        angle = (pan + 1) * np.pi / 4
        sides = np.array([np.cos(angle), np.sin(angle)], np.float32) * np.sqrt(2) * level
        self.buses[bus][start : start + len(heard)] += heard[:, None] * sides

    def beat(  # noqa: PLR0917 - gain, pan and bus come last, as on a mixing desk
        self,
        sound: Sound,
        at: float,
        beats: Iterable[float],
        gain: float = 1.0,
        pan: float = 0.0,
        bus: str = "drums",
    ) -> None:
        """Place one sound on every one of `beats`, counted from `at`."""
        for beat in beats:
            self.add(sound, at + beat, gain, pan, bus)

    def play(  # noqa: PLR0917 - gain, pan and bus come last, as on a mixing desk
        self,
        instrument: Instrument,
        at: float,
        line: Line,
        gain: float = 1.0,
        pan: float = 0.0,
        bus: str = "dry",
    ) -> None:
        """Play a melody from `at` on."""
        for beat, note, beats in line:
            self.add(instrument(note, self.length(beats)), at + beat, gain, pan, bus)

    def strum(  # noqa: PLR0917 - gain, pan and bus come last, as on a mixing desk
        self,
        instrument: Instrument,
        chord: Sequence[float],
        at: float,
        strokes: Iterable[tuple[float, float]],
        gain: float = 1.0,
        pan: float = 0.0,
        bus: str = "dry",
        spread: float = 0.02,
    ) -> None:
        """Play a chord at every stroke (beat, beats), its notes `spread` beats apart."""
        for beat, beats in strokes:
            line = [(beat + number * spread, note, beats) for number, note in enumerate(chord)]
            self.play(instrument, at, line, gain / len(chord) ** 0.6, pan, bus)

    def wander(
        self, scale: Sequence[float], rhythm: Sequence[float], until: float, leap: int = 2
    ) -> Line:
        """A melody made up as it goes: random steps through `scale`, lengths out of `rhythm`."""
        line, beat = [], 0.0
        place = int(self.random.integers(len(scale) // 3, 2 * len(scale) // 3))
        while beat < until:
            beats = float(self.random.choice(rhythm))
            step = int(self.random.integers(-leap, leap + 1))
            place = min(max(place + step, 0), len(scale) - 1)
            line.append((beat, scale[place], beats))
            beat += beats
        return line

    def effect(self, bus: str, change: Callable[[Sound], Sound]) -> None:
        """Send a whole bus through an effect."""
        self.buses[bus] = change(self.buses[bus])

    def mix(self, loudness: float, *, ratio: float = 2.0, hiss: float = 0.04) -> Sound:
        """All buses together, mastered, (samples, 2), at a root mean square of `loudness`.

        `ratio` is how far loud and soft are brought together, `hiss` the noise between.
        """
        total: Sound = np.sum(np.stack(list(self.buses.values())), axis=0)
        total = synth.tape(synth.compress(synth.reverb(total, 0.35, 0.22), ratio), hiss)
        total *= loudness / max(1e-6, float(np.sqrt(np.mean(total**2))))
        end = round(TAIL_S * RATE)
        total[-end:] *= np.linspace(1, 0, end, dtype=np.float32)[:, None]
        limited: Sound = (0.98 * np.tanh(total / 0.98)).astype(np.float32)
        return limited


@dataclass(frozen=True)
class Style:
    """A track of the demo."""

    genre: str
    title: str
    compose: Callable[[], Sound]


EIGHTHS = tuple(eighth / 2 for eighth in range(8))
SIXTEENTHS = tuple(sixteenth / 4 for sixteenth in range(16))
BEATS = (0.0, 1.0, 2.0, 3.0)
BACKBEAT = (1.0, 3.0)


def pluck(brightness: float, sustain: float) -> Instrument:
    """A plucked string of that character."""
    return lambda note, duration_s: synth.pluck(note, duration_s, brightness, sustain)


def sing(vowels: str, rasp: float = 0.05) -> Instrument:
    """A singer who goes round `vowels`, one a note."""
    sung = iter(vowels * 1000)
    return lambda note, duration_s: synth.voice(note, duration_s, next(sung), 0.0, rasp)


def blues() -> Sound:
    """Twelve bars in E: a shuffling guitar, a walking bass, a harp and a guitar that answer."""
    song = Song(bpm=92, beats=48, swing=0.66, seed=11)
    roots = (40, 45, 40, 40, 45, 45, 40, 40, 47, 45, 40, 47)
    low, high = (52, 55, 57, 58, 59, 62, 64), (64, 67, 69, 70, 71, 74, 76, 79)
    guitar = pluck(0.6, 0.997)
    harp = partial(synth.reed, breath=0.1, bend=1.2)
    for bar, root in enumerate(roots):
        at = 4 * bar
        sixths = [7, 7, 9, 9, 7, 7, 9, 9]
        for eighth, sixth in zip(EIGHTHS, sixths, strict=True):
            song.strum(guitar, (root, root + sixth), at, [(eighth, 0.5)], 0.75, -0.35, "guitar")
        walk = [
            (beat, root - 12 + step, 0.95) for beat, step in zip(BEATS, (0, 4, 7, 9), strict=True)
        ]
        song.play(synth.upright_bass, at, walk, 0.95)
        song.beat(synth.hat(0.04), at, EIGHTHS, 0.16, 0.3)
        song.beat(synth.kick(55, 0.5), at, (0, 2), 0.5)
        song.beat(synth.snare(190, 0.7), at, BACKBEAT, 0.4)
        if bar % 4 < 2:
            sung = song.wander(low, (0.5, 0.5, 1.0, 1.5), 2.8)
            song.play(sing("aoe", 0.35), at, sung, 1.0, 0, "voice")
        elif bar % 4 == 2:
            song.play(harp, at, song.wander(high, (0.5, 0.5, 1.0), 3.5), 0.5, 0.25, "harp")
        else:
            lick = song.wander(high, (0.5, 0.5, 0.5, 1.0), 3.5)
            song.play(pluck(0.8, 0.998), at, lick, 0.9, 0.2, "guitar")
    song.effect("guitar", lambda mix: 0.6 * synth.distort(mix, 2.0))
    song.effect("harp", lambda mix: synth.reverb(0.7 * synth.distort(mix, 1.5), 0.9, 0.25))
    song.effect("voice", lambda mix: synth.reverb(mix, 0.7, 0.2))
    song.effect("drums", lambda mix: synth.reverb(mix, 0.5, 0.15))
    return song.mix(0.12)


def classical() -> Sound:
    """An andante in C: broken chords on the piano, a string section, a flute on top."""
    song = Song(bpm=72, beats=32, seed=12)
    chords: list[Chord] = [
        (48, 60, 64, 67), (55, 59, 62, 67), (57, 60, 64, 69), (52, 59, 64, 67),
        (53, 60, 65, 69), (48, 60, 64, 67), (50, 57, 62, 65), (43, 59, 62, 67),
    ]  # fmt: skip
    melody: Line = [
        (0, 79, 2), (2, 76, 1), (3, 77, 1), (4, 74, 3), (7, 76, 1), (8, 76, 2), (10, 72, 2),
        (12, 71, 3), (16, 77, 2), (18, 81, 1), (19, 79, 1), (20, 76, 3), (23, 74, 1),
        (24, 74, 1.5), (25.5, 77, 0.5), (26, 76, 1), (27, 74, 1), (28, 74, 2), (30, 72, 2),
    ]  # fmt: skip
    for bar, chord in enumerate(chords):
        at = 4 * bar
        broken = [(beat, chord[(0, 2, 3, 2, 1, 2, 3, 2)[round(4 * beat) % 8]], 1.2)
                  for beat in SIXTEENTHS]  # fmt: skip
        song.play(partial(synth.piano, hardness=0.8), at, broken, 0.35, -0.2, "hall")
        for part, note in enumerate(chord):
            voice = [(0.0, note + (12 if part else 0), 4.2)]
            song.play(
                partial(synth.strings, attack_s=0.3), at, voice, 0.5, part * 0.3 - 0.4, "hall"
            )
        song.play(synth.strings, at, [(0, chord[0] - 12, 4.2)], 0.6, 0.5, "hall")
    song.play(synth.flute, 0, melody, 0.4, 0.1, "hall")
    song.play(partial(synth.strings, attack_s=0.06), 0, melody, 0.55, -0.45, "hall")
    song.effect("hall", lambda mix: synth.reverb(mix, 2.4, 0.6, 4500))
    return song.mix(0.085)


def country() -> Sound:
    """Boom-chick in G: flat-picked steel strings, a banjo roll, a fiddle, a singer, brushes."""
    song = Song(bpm=112, beats=48, seed=13)
    major, fourth, fifth = (43, 59, 62, 67), (48, 60, 64, 67), (50, 57, 62, 66)
    chords = (major, major, fourth, major, major, fifth, major, fifth, fourth, major, fifth, major)
    verse: Line = [(0, 66, 1), (1, 66, 0.5), (1.5, 64, 0.5), (2, 62, 1.5), (4, 64, 1), (5, 66, 0.5),
                   (5.5, 69, 0.5), (6, 66, 1.6)]  # fmt: skip
    fiddling = [(eighth, note, 0.55) for eighth, note in
                zip(EIGHTHS, (74, 76, 78, 81, 83, 81, 78, 76), strict=True)]  # fmt: skip
    steel, singer = pluck(0.95, 0.998), sing("aeoa", 0.12)
    for bar, chord in enumerate(chords):
        at, root = 4 * bar, chord[0]
        fifth_below = root + (7 if root < 48 else -5)
        bass = [(0.0, root, 1.4), (2.0, fifth_below, 1.4)]
        song.play(synth.upright_bass, at, [(b, n - 12, d) for b, n, d in bass], 0.7)
        song.play(steel, at, bass, 0.6, -0.3, "room")
        song.strum(steel, chord[1:], at, [(1, 0.8), (1.5, 0.5), (3, 0.8), (3.5, 0.5)], 0.9, -0.3,
                   "room")  # fmt: skip
        song.beat(synth.snare(210, 0.6), at, BACKBEAT, 0.22, 0.1, "room")
        song.beat(synth.brush(), at, (0.5, 1.5, 2.5, 3.5), 0.22, 0.2, "room")
        shape = (chord[3], chord[2], chord[1] + 12, chord[3], chord[2] + 12, chord[3] + 12)
        roll = [(beat, shape[number % 6], 0.5) for number, beat in enumerate(EIGHTHS)]
        song.play(pluck(1.0, 0.99), at, roll, 0.45, 0.45, "room")
        if bar % 4 == 3:
            song.play(partial(synth.strings, attack_s=0.03), at, fiddling, 0.6, 0.3, "room")
        if bar % 4 in {0, 1} or bar == 10:
            song.play(singer, at, verse[:4] if bar % 2 == 0 else verse[4:], 1.0, 0, "room")
    song.effect("room", lambda mix: synth.reverb(mix, 0.7, 0.15))
    return song.mix(0.12)


def disco() -> Sound:
    """Four on the floor: octave bass, open hats between the beats, strings, a scratching guitar."""
    song = Song(bpm=122, beats=56, seed=14)
    chords: list[Chord] = [(45, 64, 67, 72), (50, 62, 65, 69), (43, 62, 65, 71), (48, 60, 64, 67)]
    hook: Line = [(0, 76, 0.75), (0.75, 74, 0.75), (1.5, 72, 1), (2.5, 69, 1.5), (4, 77, 0.75),
                  (4.75, 76, 0.75), (5.5, 74, 1), (6.5, 72, 1.5)]  # fmt: skip
    run = [(step / 4, 69 + 2 * step, 0.3) for step in range(8)]
    strings, singer = partial(synth.strings, attack_s=0.05), sing("ae")
    for bar in song.bars:
        at, chord = 4 * bar, chords[bar % 4]
        song.beat(synth.kick(52, 1.2), at, BEATS, 1.0)
        song.beat(synth.hat(0.2), at, (0.5, 1.5, 2.5, 3.5), 0.5, 0.2)
        song.beat(synth.hat(0.03), at, SIXTEENTHS, 0.22, 0.2)
        song.beat(synth.snare(200), at, BACKBEAT, 0.5)
        song.beat(synth.clap(), at, BACKBEAT, 0.5)
        octaves = [(b, chord[0] - 12 + (12 if b % 1 else 0), 0.45) for b in EIGHTHS]
        song.play(synth.electric_bass, at, octaves, 0.9)
        scratches = [(beat, 0.2) for beat in SIXTEENTHS if round(4 * beat) % 4 and beat % 0.75]
        song.strum(pluck(1.0, 0.97), chord[1:], at, scratches, 0.5, 0.5, "band", 0.005)
        if bar >= 2:
            high = [note + 12 for note in chord[1:]]
            song.strum(strings, high, at, [(0, 3.9)], 1.0, -0.3, "band", 0)
        if bar % 4 == 3:
            song.play(strings, at + 2, run, 0.5, -0.3, "band")
        if bar >= 2 and bar % 2 == 0:
            song.play(singer, at, hook, 0.55, 0, "band")
            song.play(partial(synth.synth, cutoff_hz=3500), at, hook, 0.3, 0.2, "band")
    song.effect("band", lambda mix: synth.reverb(synth.highpass(mix, 150), 1.2, 0.25))
    song.effect("drums", lambda mix: synth.reverb(mix, 0.4, 0.08))
    return song.mix(0.17)


def hiphop() -> Sound:
    """A dusty loop at 92: sub bass, hard drums, a chopped electric piano, a voice in rhythm."""
    song = Song(bpm=92, beats=40, swing=0.56, seed=15)
    loop: list[Chord] = [(57, 60, 64, 67), (53, 57, 60, 64)]
    for bar in song.bars:
        at, chord = 4 * bar, loop[bar % 2]
        song.beat(synth.kick(46, 1.3, 0.45), at, (0, 0.75, 2.5, 3.75)[: 3 + bar % 2], 1.1)
        song.beat(synth.snare(170, 1.3), at, BACKBEAT, 0.9)
        song.beat(synth.clap(), at, BACKBEAT, 0.6)
        song.beat(synth.hat(0.035), at, EIGHTHS, 0.35, 0.15)
        if bar % 4 == 3:
            song.beat(synth.hat(0.02), at + 3, [roll / 6 for roll in range(6)], 0.3, 0.15)
        bass = [(0, chord[0] - 24, 0.7), (0.75, chord[0] - 24, 1.2), (2.5, chord[0] - 24, 1.3)]
        song.play(synth.sub_bass, at, bass, 0.5)
        chops = [(0, 1.4), (1.5, 0.4), (2.25, 1.6)]
        song.strum(synth.electric_piano, chord, at, chops, 0.35, -0.2, "sample")
        if bar >= 1:
            _rap(song, at)
    song.add(synth.crackle(song.length(song.beats)), 0, 0.5, 0, "sample")
    song.effect("sample", lambda mix: synth.lowpass(mix, 3200))
    song.effect("rap", lambda mix: synth.reverb(synth.highpass(mix, 180), 0.3, 0.12))
    song.effect("drums", lambda mix: np.tanh(1.4 * mix).astype(np.float32))
    return song.mix(0.2, ratio=1.3, hiss=0.1)


def _rap(song: Song, at: float) -> None:
    """A bar of syllables in sixteenths, near one pitch and gliding as speech does."""
    consonant = synth.fade(synth.highpass(synth.noise(1800), 3500) * 0.25)
    for beat in SIXTEENTHS[:15]:
        if song.random.random() < 0.1 and beat % 1:
            continue
        note = 45 + int(song.random.choice((0, 0, 1, 2, 3, 5)))
        vowel = "aeou"[int(song.random.integers(4))]
        glide = float(song.random.choice((-3.0, -1.5, 1.0)))
        song.add(synth.voice(note, song.length(0.22), vowel, glide, 0.25), at + beat, 1.0, 0, "rap")
        if song.random.random() < 0.5:
            song.add(consonant, max(0.0, at + beat - 0.03), 0.6, 0, "rap")


def jazz() -> Sound:
    """Two-five-ones at 132: a walking bass, a ride, sevenths on the piano, a saxophone solo."""
    song = Song(bpm=132, beats=64, swing=0.64, seed=16)
    changes: list[tuple[int, Chord]] = [
        (38, (53, 57, 60, 64)), (43, (53, 57, 59, 64)), (36, (52, 55, 59, 62)),
        (45, (55, 61, 64, 70)),
    ]  # fmt: skip
    scale = (57, 59, 60, 61, 62, 64, 66, 67, 68, 69, 71, 73, 74, 76)
    comping = (((0.0, 0.9), (1.5, 0.9)), ((0.5, 0.9), (2.5, 0.6)), ((1.5, 0.5), (3.0, 0.9)))
    saxophone = partial(synth.reed, breath=0.09, bend=0.6)
    for bar in song.bars:
        at = 4 * bar
        root, chord = changes[bar % 4]
        third = root + (4 if bar % 4 == 2 else 3)
        walk = (root, third, root + 7, changes[(bar + 1) % 4][0] + 1)
        line = [(beat, note, 0.98) for beat, note in zip(BEATS, walk, strict=True)]
        song.play(synth.upright_bass, at, line, 0.95, 0, "room")
        song.beat(synth.ride(), at, BEATS, 0.42, 0.4, "room")
        song.beat(synth.ride(0.5), at, (1.5, 3.5), 0.3, 0.4, "room")
        song.beat(synth.hat(0.05), at, BACKBEAT, 0.25, -0.2, "room")
        song.beat(synth.kick(60, 0.3), at, BEATS, 0.12, 0, "room")
        song.beat(synth.brush(), at, song.random.choice((0.5, 1.5, 2.5, 3.5), 2), 0.4, 0, "room")
        strokes = comping[int(song.random.integers(3))]
        song.strum(synth.piano, chord, at, strokes, 0.8, -0.35, "room", 0.01)
        solo = song.wander(scale, (0.5, 0.5, 0.5, 1.0, 1.5), 3.2, leap=3)
        song.play(saxophone, at, solo, 0.55, 0.15, "room")
    song.effect("room", lambda mix: synth.reverb(mix, 1.1, 0.22, 5000))
    return song.mix(0.11)


def metal() -> Sound:
    """Drop D at 140: palm-muted power chords left and right, double kick, a shouting voice."""
    song = Song(bpm=140, beats=60, seed=17)
    riff, progression = (38, 38, 38, 41, 38, 38, 44, 43), (38, 41, 36, 43)
    shouted: Line = [(0, 50, 0.9), (1, 53, 0.9), (2, 52, 0.9), (3, 50, 0.9)]
    guitar, shout = pluck(0.95, 0.999), sing("ae", 0.9)
    for bar in song.bars:
        at = 4 * bar
        chorus = bar // 4 % 2 == 1
        roots = (progression[bar % 4],) * 8 if chorus else riff
        for beat, root in zip(EIGHTHS, roots, strict=True):
            stroke = [(beat, 0.55 if chorus or root != 38 else 0.3)]
            for side, pan, detune in (("left", -0.9, 0.06), ("right", 0.9, -0.05)):
                power = [root + detune + interval for interval in (0, 7, 12, 19, 24)]
                song.strum(guitar, power, at, stroke, 0.6, pan, side, 0.0)
        song.play(synth.electric_bass, at,
                  [(beat, root - 12, 0.45) for beat, root in zip(EIGHTHS, roots, strict=True)],
                  0.9, 0, "bass")  # fmt: skip
        song.beat(synth.kick(58, 2.2, 0.14), at, SIXTEENTHS, 1.8)
        song.beat(synth.snare(185, 1.3), at, BACKBEAT, 0.7)
        song.beat(synth.crash(1.2) if chorus else synth.hat(0.12), at, BEATS, 1.0, 0.4)
        if bar % 4 == 3:
            for step in range(8):
                song.add(synth.tom(160 - 12 * step), at + 2 + step / 4, 0.6, 0, "drums")
        if chorus:
            song.play(shout, at, shouted, 6.0, 0, "shout")
    for side in ("left", "right"):
        song.effect(side, lambda mix: 0.6 * synth.distort(mix, 10))
    song.effect("bass", lambda mix: 0.4 * synth.distort(mix, 4))
    song.effect("shout", lambda mix: synth.reverb(0.3 * synth.distort(mix, 6), 0.8, 0.2))
    song.effect("drums", lambda mix: synth.reverb(mix, 0.5, 0.12, 9000))
    return song.mix(0.2)


def pop() -> Sound:
    """Four chords at 104: a synthesiser pumping under a singer, claps, a bright hook."""
    song = Song(bpm=104, beats=48, seed=18)
    chords: list[Chord] = [(45, 60, 64, 69), (41, 60, 65, 69), (48, 60, 64, 67), (43, 59, 62, 67)]
    verse: Line = [(0, 76, 0.5), (0.5, 76, 0.5), (1, 74, 0.5), (1.5, 72, 1), (2.5, 72, 0.5),
                   (3, 74, 1), (4, 77, 0.5), (4.5, 76, 0.5), (5, 74, 1), (6, 72, 0.5),
                   (6.5, 69, 1.4)]  # fmt: skip
    singer, harmony = sing("aeou", 0.08), sing("aeou", 0.08)
    bass = partial(synth.synth, cutoff_hz=900, pluckiness=6)
    pad = partial(synth.synth, cutoff_hz=1500, pluckiness=0.6)
    hook = partial(synth.synth, cutoff_hz=4200, pluckiness=9)
    for bar in song.bars:
        at, chord = 4 * bar, chords[bar % 4]
        song.beat(synth.kick(50, 1.1), at, (0, 1.5, 2), 0.8)
        song.beat(synth.clap(), at, BACKBEAT, 0.6)
        song.beat(synth.snare(215), at, BACKBEAT, 0.5)
        song.beat(synth.hat(0.04), at, EIGHTHS, 0.22, 0.2)
        song.beat(synth.shaker(), at, (0.75, 1.75, 2.75, 3.75), 0.25, -0.4)
        song.play(bass, at, [(beat, chord[0] - 12, 0.42) for beat in EIGHTHS], 0.8)
        song.strum(pad, chord[1:], at, [(0, 3.9)], 0.7, 0.3, "band", 0)
        song.strum(pluck(0.9, 0.997), chord[1:], at, [(beat, 0.6) for beat in EIGHTHS], 0.45, -0.5,
                   "band")  # fmt: skip
        arpeggio = [(beat, chord[1 + number % 3] + 12, 0.4) for number, beat in enumerate(EIGHTHS)]
        song.play(hook, at, arpeggio, 0.35 if bar >= 6 else 0.15, -0.4, "band")
        if bar >= 2 and bar % 2 == 0:
            song.play(singer, at, verse, 1.1, 0, "voice")
            song.play(harmony, at, [(b, n - 4, d) for b, n, d in verse], 0.4, -0.3, "voice")
    song.effect("band", lambda mix: synth.reverb(mix, 1.0, 0.22))
    song.effect("voice", lambda mix: synth.reverb(mix, 1.4, 0.28))
    return song.mix(0.2)


def reggae() -> Sound:
    """One drop at 74: the guitar's off-beat, a bubbling organ, a heavy bass, tape echo."""
    song = Song(bpm=148, beats=64, swing=0.54, seed=19)  # counted in double time
    chords: list[Chord] = [(45, 60, 64, 69), (45, 60, 64, 69), (50, 62, 65, 69), (43, 59, 62, 67)]
    riddim: tuple[Line, Line] = (
        [(0, 0, 1), (1, 7, 0.5), (1.5, 5, 0.5), (2, 3, 1), (3, 0, 0.8)],
        [(0.5, 0, 0.5), (1, 0, 1), (2.5, 7, 0.5), (3, 5, 1)],
    )
    toast: Line = [(0, 66, 1.5), (2, 69, 1), (3, 68, 1), (4, 66, 2.5), (8, 64, 1.5), (10, 66, 1),
                   (11, 64, 1), (12, 61, 3)]  # fmt: skip
    bubble = [(beat + shift, 0.26) for beat in BACKBEAT for shift in (-0.5, 0.0, 0.5)]
    singer = sing("oae", 0.1)

    def bass(note: float, duration_s: float) -> Sound:
        return synth.lowpass(synth.electric_bass(note, duration_s), 420)

    for bar in song.bars:
        at, chord = 4 * bar, chords[bar % 4]
        song.beat(synth.kick(48, 0.8), at, (2,), 1.0)
        song.beat(synth.rim(), at, (2,), 0.7, 0, "echo")
        song.beat(synth.hat(0.04), at, BEATS, 0.8, 0.25)
        song.beat(synth.hat(0.03), at, (0.5, 1.5, 2.5, 3.5), 0.16, 0.25)
        off = [(beat, 0.28) for beat in BACKBEAT]
        song.strum(pluck(0.85, 0.985), [n + 12 for n in chord[1:]], at, off, 2.2, -0.4, "skank",
                   0.012)  # fmt: skip
        song.strum(synth.piano, chord[1:], at, off, 0.6, -0.2, "skank", 0.005)
        song.strum(synth.organ, chord[1:], at, bubble, 1.0, 0.45, "skank", 0)
        song.play(bass, at, [(b, chord[0] - 12 + n, d) for b, n, d in riddim[bar % 2]], 0.8)
        if bar % 4 == 3:
            song.beat(synth.snare(250, 0.9), at, (3.5,), 0.6, 0.2, "echo")
            song.beat(synth.tom(140), at, (3,), 0.6, -0.3, "echo")
        if bar % 4 == 0:
            song.play(singer, at, toast, 1.0, 0.1, "echo")
    song.effect("echo", lambda mix: synth.reverb(synth.echo(mix, song.length(1.5), 0.4), 1.0, 0.2))
    song.effect("skank", lambda mix: synth.reverb(synth.highpass(mix, 250), 0.6, 0.15))
    return song.mix(0.16)


def rock() -> Sound:
    """Straight eighths at 126: crunching guitars, a backbeat, a singer, a solo to end with."""
    song = Song(bpm=126, beats=56, seed=20)
    roots, scale = (40, 40, 43, 45, 40, 40, 38, 45), (64, 67, 69, 71, 74, 76, 79, 81, 83)
    verse: Line = [(0, 64, 1), (1, 64, 0.5), (1.5, 67, 1), (2.5, 64, 1.5), (4, 69, 1), (5, 67, 1),
                   (6, 64, 1.8)]  # fmt: skip
    guitar, singer = pluck(0.85, 0.998), sing("aeo", 0.3)
    for bar in song.bars:
        at, root = 4 * bar, roots[bar % 8]
        power = (root, root + 7)
        for side, pan in (("left", -0.7), ("right", 0.7)):
            muted = [(beat, 0.4) for beat in EIGHTHS if beat not in {0.0, 1.5, 3.0}]
            ringing = [(0.0, 1.4), (1.5, 1.4), (3.0, 0.9)]
            song.strum(guitar, power, at, muted, 0.8, pan, side)
            song.strum(guitar, (*power, root + 12, root + 16), at, ringing, 1.2, pan, side)
        song.beat(synth.hat(0.09), at, BEATS, 0.3, 0.3)
        song.beat(synth.hat(0.06), at, (0.5, 1.5, 2.5, 3.5), 0.22, 0.3)
        song.beat(synth.snare(180, 1.1), at, BACKBEAT, 0.75)
        song.beat(synth.kick(54, 1.2), at, (0, 1.5, 2, 2.5) if bar % 2 else (0, 2, 2.5), 0.7)
        if bar % 4 == 0:
            song.beat(synth.crash(), at, (0,), 0.6, -0.3)
        song.play(synth.electric_bass, at, [(beat, root - 12, 0.48) for beat in EIGHTHS], 0.8)
        if bar >= 10:
            song.play(
                pluck(0.9, 0.999), at, song.wander(scale, (0.5, 0.5, 1.0), 3.6), 1.2, 0.1, "solo"
            )
        elif bar % 2:
            song.play(singer, at, verse, 2.2, 0, "voice")
    for side in ("left", "right"):
        song.effect(side, lambda mix: 0.5 * synth.distort(mix, 8))
    song.effect("solo", lambda mix: synth.reverb(0.4 * synth.distort(mix, 9), 0.9, 0.25))
    song.effect("voice", lambda mix: synth.reverb(0.6 * synth.distort(mix, 1.6), 0.8, 0.2))
    song.effect("drums", lambda mix: synth.reverb(mix, 0.7, 0.16, 8000))
    return song.mix(0.18)


STYLES = (
    Style("blues", "Twelve Bars from the Delta", blues),
    Style("classical", "Andante in C", classical),
    Style("country", "Flat-Picked Sunday", country),
    Style("disco", "Mirror Ball", disco),
    Style("hiphop", "Dust on the Loop", hiphop),
    Style("jazz", "Two, Five, One", jazz),
    Style("metal", "Drop D", metal),
    Style("pop", "Four Chords", pop),
    Style("reggae", "One Drop", reggae),
    Style("rock", "Backbeat", rock),
)
