import math
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from tests.audio import ENCODINGS, LAYOUTS, LOSSLESS, damaged, encode, encode_as, noise, tone, wav
from worker.decode.decoder import (
    PACKED_CONTAINERS,
    Decoder,
    decode_samples,
    decode_windows,
)
from worker.errors import (
    AudioEmpty,
    AudioTooLong,
    AudioUnreadable,
    DecodeFailed,
    TimbreError,
)
from worker.windows import Samples

RATE_HZ = 16_000
PACKED = (
    "mp3", "mp2", "flac", "ogg", "opus", "m4a", "alac.m4a", "wav", "24.wav", "8.wav", "64.wav",
)  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> "Write":
    return Write(tmp_path)


class Write:
    """`write(data)`: a file of these bytes, named so that nothing can be told by its suffix."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def __call__(self, data: bytes) -> Path:
        self._count += 1
        path = self._folder / f"spooled-{self._count}"
        path.write_bytes(data)
        return path


def amplitude_db(samples: Samples, frequency_hz: float) -> float:
    """Level of one frequency in decibels of a sine of half full scale, edges left out."""
    inner = samples[RATE_HZ // 2 : -RATE_HZ // 2]
    time_s = np.arange(inner.size) / RATE_HZ
    weights = np.hanning(inner.size) * np.exp(-2j * np.pi * frequency_hz * time_s)
    return 20 * math.log10(2 * abs(inner @ weights) / np.hanning(inner.size).sum() / 0.5)


@pytest.mark.parametrize("suffix", ENCODINGS)
def test_every_encoding_becomes_mono_at_the_rate_asked_for(suffix: str, tmp_path: Path) -> None:
    path = encode_as(tmp_path / f"tone.{suffix}", 4.0).rename(tmp_path / "spooled")

    decoder = Decoder(path, RATE_HZ)
    samples = np.concatenate(list(decoder))

    assert samples.dtype == np.float32
    assert samples.size / RATE_HZ == pytest.approx(4.0, abs=0.12), "priming and padding at most"
    assert amplitude_db(samples, 440.0) == pytest.approx(0.0, abs=0.6)
    assert decoder.facts.sample_rate_hz == ENCODINGS[suffix][2]
    assert decoder.facts.channels == 2
    assert decoder.facts.duration_s == pytest.approx(samples.size / RATE_HZ, abs=0.001)
    assert decoder.facts.damaged_packets == 0
    assert (decoder.facts.container in PACKED_CONTAINERS) is (suffix in PACKED)


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_lossless_encodings_keep_the_length_to_the_sample(suffix: str, tmp_path: Path) -> None:
    path = encode_as(tmp_path / f"tone.{suffix}", 1.0)

    assert decode_samples(path, RATE_HZ).size == RATE_HZ


def test_containers_and_codecs_have_short_names(tmp_path: Path) -> None:
    facts = {}
    for suffix in ("mp3", "m4a", "ogg", "webm"):
        decoder = Decoder(encode_as(tmp_path / f"tone.{suffix}", 1.0), RATE_HZ)
        list(decoder)
        facts[suffix] = (decoder.facts.container, decoder.facts.codec)

    assert facts == {
        "mp3": ("mp3", "mp3"),
        "m4a": ("mp4", "aac"),
        "ogg": ("ogg", "vorbis"),
        "webm": ("matroska", "opus"),
    }


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8, 9, 24, 64])
def test_the_downmix_is_the_plain_mean_of_all_channels(channels: int, write: Write) -> None:
    signal = noise(1.0, RATE_HZ, channels=channels)

    samples = decode_samples(write(wav(signal, RATE_HZ)), RATE_HZ)

    np.testing.assert_allclose(samples, signal.mean(axis=1), atol=1e-6)


def test_known_surround_layouts_are_averaged_alike(tmp_path: Path) -> None:
    signal = noise(1.0, RATE_HZ, channels=6)
    path = encode(tmp_path / "surround.flac", signal, RATE_HZ, muxer="flac", codec="flac")

    samples = decode_samples(path, RATE_HZ)

    np.testing.assert_allclose(samples, signal.mean(axis=1), atol=1e-4)


def test_many_channels_that_each_have_a_place_are_averaged_alike(write: Write) -> None:
    signal = noise(1.0, RATE_HZ, channels=32)
    plain = wav(signal, RATE_HZ)
    floats = bytes.fromhex("0300000000001000800000AA00389B71")
    places = struct.pack("<HHI", 22, 32, 0xFFFFFFFF) + floats
    extensible = b"fmt " + struct.pack("<IH", 40, 0xFFFE) + plain[22:36] + places
    data = b"WAVE" + extensible + plain[36:]

    samples = decode_samples(write(b"RIFF" + struct.pack("<I", len(data)) + data), RATE_HZ)

    np.testing.assert_allclose(samples, signal.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000])
def test_a_tone_below_the_new_nyquist_frequency_keeps_its_level(rate_hz: int, write: Write) -> None:
    highest_hz = 0.875 * min(rate_hz, RATE_HZ) / 2
    for frequency_hz in (100.0, 1000.0, highest_hz):
        samples = decode_samples(write(wav(tone(3.0, rate_hz, frequency_hz), rate_hz)), RATE_HZ)

        assert amplitude_db(samples, frequency_hz) == pytest.approx(0.0, abs=0.1)


def test_a_tone_above_the_new_nyquist_frequency_is_gone(write: Write) -> None:
    for frequency_hz in (8_700.0, 9_000.0, 12_000.0, 20_000.0):
        samples = decode_samples(write(wav(tone(3.0, 44_100, frequency_hz), 44_100)), RATE_HZ)

        assert np.abs(samples[1000:-1000]).max() < 0.5 * 10 ** (-60 / 20)


def test_resampling_agrees_with_the_reference_of_music_research(write: Write) -> None:
    librosa = pytest.importorskip("librosa", reason="librosa is in the extra `lab`")
    tones = [tone(3.0, 44_100, frequency_hz) for frequency_hz in (50, 440, 3000, 6000)]
    below_6_khz = np.stack(tones).mean(axis=0)

    samples = decode_samples(write(wav(below_6_khz, 44_100)), RATE_HZ)

    reference = librosa.resample(below_6_khz[:, 0], orig_sr=44_100, target_sr=RATE_HZ)
    np.testing.assert_allclose(samples[500:-500], reference[500:-500], atol=1e-3)


@pytest.mark.parametrize("rate_hz", [8, 100, 768_000, 3_072_000])
@pytest.mark.parametrize("channels", [1, 64])
def test_odd_rates_are_resampled(rate_hz: int, channels: int, write: Write) -> None:
    signal = noise(max(0.02, 1 / rate_hz), rate_hz, channels=channels)

    samples = decode_samples(write(wav(signal, rate_hz)), RATE_HZ)

    assert samples.size == math.ceil(len(signal) * RATE_HZ / rate_hz)
    assert np.isfinite(samples).all()


@pytest.mark.parametrize(("rate_hz", "channels"), [(4, 1), (4_000_000, 1), (44_100, 65)])
def test_rates_and_channels_beyond_the_limits_are_refused(
    rate_hz: int, channels: int, write: Write
) -> None:
    with pytest.raises(AudioUnreadable, match=r"sample rate|channels"):
        decode_samples(write(wav(noise(100 / rate_hz, rate_hz, channels=channels), rate_hz)), 16)


@pytest.mark.parametrize("count", [1, 2, 50, 1000])
def test_the_shortest_files_give_their_samples(count: int, write: Write) -> None:
    samples = decode_samples(write(wav(np.ones((count, 1), np.float32), 44_100)), RATE_HZ)

    assert samples.size == math.ceil(count * RATE_HZ / 44_100)
    assert samples.any()


def test_numbers_that_are_none_and_nonsense_levels_are_made_harmless(write: Write) -> None:
    signal = tone(1.0, RATE_HZ)
    signal[[100, 200, 300, 400]] = np.array([[np.nan], [np.inf], [-np.inf], [1e30]])
    signal[600] = -7.5  # loud, and no nonsense

    samples = decode_samples(write(wav(signal, RATE_HZ)), RATE_HZ)

    assert samples[[100, 200, 300, 400]].tolist() == [0.0, 0.0, 0.0, 8.0]
    np.testing.assert_allclose(samples[401:], signal[401:, 0])


def test_tags_that_are_no_utf8_do_no_harm(write: Write) -> None:
    plain = wav(noise(1.0, RATE_HZ), RATE_HZ)
    artist = b"INFOIART" + struct.pack("<I", 6) + "Björk".encode("latin-1") + b"\0"
    tags = b"LIST" + struct.pack("<I", len(artist)) + artist

    samples = decode_samples(write(plain[:36] + tags + plain[36:]), RATE_HZ)

    assert np.array_equal(samples, decode_samples(write(plain), RATE_HZ))


def test_of_a_video_the_audio_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("aac", rate=44_100)
        assert isinstance(audio, av.AudioStream)
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))
        sound = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(tone(2.0, 44_100, channels=2).T), format="fltp", layout="stereo"
        )
        sound.sample_rate = 44_100
        for _ in range(50):
            container.mux(video.encode(picture))
        container.mux(audio.encode(sound))
        for stream in (video, audio):
            container.mux(stream.encode(None))

    decoder = Decoder(path, RATE_HZ)
    samples = np.concatenate(list(decoder))

    assert (decoder.facts.container, decoder.facts.codec) == ("mp4", "aac")
    assert samples.size / RATE_HZ == pytest.approx(2.0, abs=0.1)
    assert amplitude_db(samples, 440.0) == pytest.approx(0.0, abs=0.6)


def test_a_picture_is_not_decoded_to_learn_its_size(write: Write, tmp_path: Path) -> None:
    drawing = av.CodecContext.create("png", "w")
    assert isinstance(drawing, av.VideoCodecContext)
    drawing.width, drawing.height, drawing.pix_fmt = 64, 48, "rgb24"
    [png] = drawing.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8)))
    picture = b"\0image/png\0\3\0" + bytes(png)
    frame = b"APIC" + struct.pack(">IH", len(picture), 0) + picture
    tag = b"ID3\3\0\0" + bytes(len(frame) >> shift & 0x7F for shift in (21, 14, 7, 0)) + frame
    path = write(tag + encode_as(tmp_path / "tone.mp3", 1.0).read_bytes())

    level = av.logging.get_level()
    av.logging.set_level(av.logging.WARNING)
    with av.logging.Capture() as logs:
        decode_samples(path, RATE_HZ)
    av.logging.set_level(level)

    sizes = [text for _, _, text in logs if "unspecified size" in text]
    assert len(sizes) == 2, "the file is opened twice"


def test_a_change_of_format_half_way_is_followed(tmp_path: Path) -> None:
    first = encode(
        tmp_path / "a.mp3", tone(2.4, 44_100, channels=2), 44_100, muxer="mp3", codec="libmp3lame"
    )
    second = encode(tmp_path / "b.mp3", tone(2.0, 22_050), 22_050, muxer="mp3", codec="libmp3lame")
    both = tmp_path / "both.mp3"
    both.write_bytes(first.read_bytes() + second.read_bytes())

    decoder = Decoder(both, RATE_HZ)
    samples = np.concatenate(list(decoder))

    assert samples.size / RATE_HZ == pytest.approx(4.4, abs=0.2)
    assert amplitude_db(samples[: 2 * RATE_HZ], 440.0) == pytest.approx(0.0, abs=0.6)
    assert amplitude_db(samples[-2 * RATE_HZ :], 440.0) == pytest.approx(0.0, abs=0.6)
    assert (decoder.facts.sample_rate_hz, decoder.facts.channels) == (44_100, 2)


def test_a_change_of_the_channels_places_alone_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = tmp_path / "both"
    with both.open("wb") as file:
        for layout in ("4.0", "quad"):
            monkeypatch.setitem(LAYOUTS, 4, layout)
            signal = tone(2.0, 48_000, channels=4)
            path = encode(tmp_path / layout, signal, 48_000, muxer="ac3", codec="ac3")
            file.write(path.read_bytes())

    samples = decode_samples(both, RATE_HZ)

    assert samples.size / RATE_HZ == pytest.approx(4.0, abs=0.1)


def test_damage_in_the_middle_is_skipped_and_counted(tmp_path: Path) -> None:
    decoder = Decoder(damaged(tmp_path / "a.m4a", share=0.45), RATE_HZ)

    samples = np.concatenate(list(decoder))

    assert decoder.facts.damaged_packets > 100
    assert 4.0 < samples.size / RATE_HZ < 5.0


@pytest.mark.parametrize("suffix", PACKED)
def test_damage_neither_loses_nor_repeats_what_packed_frames_gave(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode_as(tmp_path / f"whole.{suffix}", 6.0).read_bytes()
    random = np.random.default_rng(0)
    for number in range(30):
        data = bytearray(whole)
        start = int(random.integers(len(data)))
        if number % 3:
            data[start : start + 300] = random.bytes(len(data[start : start + 300]))
        else:
            del data[start:]
        path = tmp_path / f"damaged-{number}"
        path.write_bytes(data)

        packed = decoded_or_error(path)
        with monkeypatch.context() as patch:
            patch.setattr("worker.decode.decoder.PACKED_CONTAINERS", set[str]())
            single = decoded_or_error(path)

        assert packed == single


def decoded_or_error(path: Path) -> tuple[bytes | str, object]:
    decoder = Decoder(path, RATE_HZ)
    try:
        return np.concatenate(list(decoder)).tobytes(), decoder.facts
    except TimbreError as error:
        return error.message, decoder.facts


def test_a_file_damaged_for_the_most_part_is_unreadable(tmp_path: Path) -> None:
    path = damaged(tmp_path / "a.m4a", share=0.6)

    with pytest.raises(AudioUnreadable, match="packets are damaged"):
        decode_samples(path, RATE_HZ)


def test_a_truncated_file_gives_what_it_has(tmp_path: Path) -> None:
    path = encode_as(tmp_path / "tone.mp3", 4.0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    assert decode_samples(path, RATE_HZ).size / RATE_HZ == pytest.approx(2.0, abs=0.2)


def test_a_container_that_breaks_off_is_damage_and_ends_the_track(tmp_path: Path) -> None:
    path = encode_as(tmp_path / "tone.wv", 4.0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])

    decoder = Decoder(path, RATE_HZ)
    samples = np.concatenate(list(decoder))

    assert decoder.facts.damaged_packets == 1
    assert samples.size == 3 * RATE_HZ, "the blocks of half a second that are whole"


@pytest.mark.parametrize(
    "data",
    [b"\0" * 5000, b"MZ" + b"\x90" * 5000, b"<html><body>Not found</body></html>", b"{}", b"R"],
)
def test_what_is_no_audio_is_unreadable(data: bytes, write: Write) -> None:
    with pytest.raises(AudioUnreadable):
        decode_samples(write(data), RATE_HZ)


def test_audio_of_an_unknown_codec_is_unreadable(write: Write) -> None:
    data = bytearray(wav(noise(1.0, RATE_HZ), RATE_HZ))
    data[20:22] = b"\x34\x12"  # in place of floating-point PCM

    with pytest.raises(AudioUnreadable, match="codec is unknown"):
        decode_samples(write(bytes(data)), RATE_HZ)


def test_a_file_without_bytes_and_one_without_samples_are_empty(write: Write) -> None:
    for data in (b"", wav(np.empty((0, 1), np.float32), 44_100)):
        with pytest.raises(AudioEmpty):
            decode_samples(write(data), RATE_HZ)


def test_a_file_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(DecodeFailed, match="No such file"):
        decode_samples(tmp_path / "gone", RATE_HZ)


def test_a_track_longer_than_the_limit_is_refused(write: Write) -> None:
    path = write(wav(tone(3.0, 8000), 8000))

    assert decode_samples(path, RATE_HZ, max_duration_s=3.0).size == 3 * RATE_HZ
    given: list[Samples] = []
    with pytest.raises(AudioTooLong, match=r"longer than 1\.9 s"):
        given.extend(Decoder(path, RATE_HZ, max_duration_s=1.9))
    assert sum(samples.size for samples in given) < 2 * RATE_HZ, "as soon as it is too long"


def test_a_track_that_changes_again_and_again_is_refused_as_soon(tmp_path: Path) -> None:
    pieces = [
        encode(tmp_path / f"{rate_hz}", tone(0.2, rate_hz), rate_hz, muxer="ac3", codec="ac3")
        for rate_hz in (48_000, 32_000)
    ]
    path = tmp_path / "changing"
    path.write_bytes(b"".join(piece.read_bytes() for piece in pieces) * 20)

    given: list[Samples] = []
    with pytest.raises(AudioTooLong):
        given.extend(Decoder(path, RATE_HZ, max_duration_s=2.0))

    assert sum(samples.size for samples in given) < 3 * RATE_HZ


def test_a_length_that_the_header_lies_about_is_not_believed(write: Write) -> None:
    honest = wav(tone(2.0, 44_100), 44_100)
    at = honest.index(b"data") + 4
    endless = honest[:at] + struct.pack("<I", 0xFFFFFFF0) + honest[at + 4 :]

    decoder = Decoder(write(endless), RATE_HZ, max_duration_s=2.0)

    assert np.concatenate(list(decoder)).size == 2 * RATE_HZ
    assert decoder.facts.duration_s == 2.0


@pytest.mark.parametrize("claimed", [1, 2**36 - 1], ids=["a sample", "eighteen days"])
def test_a_number_of_samples_that_ffmpeg_believes_is_not_believed_here(
    claimed: int, write: Write, tmp_path: Path
) -> None:
    data = bytearray(encode_as(tmp_path / "tone.flac", 2.0).read_bytes())
    rate_and_form = int.from_bytes(data[18:26]) >> 36
    data[18:26] = (rate_and_form << 36 | claimed).to_bytes(8)
    path = write(bytes(data))
    with av.open(str(path)) as container:
        assert container.streams.audio[0].duration == claimed

    decoder = Decoder(path, RATE_HZ, max_duration_s=2.0)

    assert np.concatenate(list(decoder)).size == 2 * RATE_HZ
    assert decoder.facts.duration_s == 2.0
    with pytest.raises(AudioTooLong):
        list(Decoder(path, RATE_HZ, max_duration_s=1.9))


def test_windows_are_those_of_the_samples(write: Write) -> None:
    path = write(wav(noise(10.5, RATE_HZ), RATE_HZ))
    window = 3 * RATE_HZ

    pieces = decode_windows(
        path, RATE_HZ, window_samples=window, hop_samples=window, min_tail_samples=RATE_HZ
    )
    windows = np.concatenate(list(pieces))

    samples = decode_samples(path, RATE_HZ)
    assert windows.shape == (4, window)
    assert np.array_equal(windows[:3].ravel(), samples[: 3 * window])
    assert np.array_equal(windows[3], samples[-window:])
