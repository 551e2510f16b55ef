"""The fetcher against local files, honest and not."""

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from worker.errors import (
    AddressRefused,
    AudioNotFound,
    AudioTooLarge,
    ChecksumMismatch,
    FetchForbidden,
    FetchUnavailable,
    TimbreError,
    UriUnsupported,
)
from worker.fetch.fetcher import Fetcher
from worker.settings import FetchSettings

AUDIO = bytes(range(256)) * 8000


@pytest.fixture
def music(tmp_path: Path) -> Path:
    """A root of music beside a folder of secrets."""
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.mp3").write_bytes(b"secret")
    (tmp_path / "music2").mkdir()
    (tmp_path / "music2" / "key.mp3").write_bytes(b"secret")
    root = tmp_path / "music"
    (root / "album").mkdir(parents=True)
    (root / "album" / "a.mp3").write_bytes(AUDIO)
    return root


@pytest.fixture
def settings(tmp_path: Path, music: Path) -> FetchSettings:
    return FetchSettings(
        spool_dir=tmp_path / "spool",
        file_roots=(tmp_path / "absent", music),
        max_bytes=len(AUDIO),
        attempts=1,
    )


@pytest.fixture
async def fetcher(settings: FetchSettings) -> AsyncIterator[Fetcher]:
    async with Fetcher(settings) as made:
        yield made


async def failure(fetcher: Fetcher, uri: str) -> TimbreError:
    with pytest.raises(TimbreError) as raised:
        async with fetcher.fetch(uri):
            pass
    return raised.value


class TestWhatArrives:
    @pytest.mark.parametrize("form", ["file://{}", "file://localhost{}", "file:{}", "FILE://{}"])
    async def test_a_file_in_every_form_of_address(
        self, fetcher: Fetcher, music: Path, form: str
    ) -> None:
        async with fetcher.fetch(form.format(music / "album" / "a.mp3")) as audio:
            assert audio.path.read_bytes() == AUDIO
            assert audio.sha256 == hashlib.sha256(AUDIO).hexdigest()
            assert audio.size_bytes == len(AUDIO)

    async def test_a_name_as_a_command_line_has_it(self, fetcher: Fetcher, music: Path) -> None:
        """A byte that is no UTF-8 comes as a surrogate, and not escaped."""
        (music / os.fsdecode(b"\xff.mp3")).write_bytes(b"audio")
        async with fetcher.fetch(f"file://{music}/" + os.fsdecode(b"\xff.mp3")) as audio:
            assert audio.path.read_bytes() == b"audio"

    @pytest.mark.parametrize(
        "name", [b"two words.mp3", b"100%25.mp3", b"a#b?c.mp3", "żółw.mp3".encode(), b"\xff.mp3"]
    )
    async def test_any_name(self, fetcher: Fetcher, music: Path, name: bytes) -> None:
        path = music / os.fsdecode(name)
        path.write_bytes(b"audio")
        async with fetcher.fetch(path.as_uri()) as audio:
            assert audio.path.read_bytes() == b"audio"

    async def test_a_link_that_stays_inside(self, fetcher: Fetcher, music: Path) -> None:
        (music / "link.mp3").symlink_to("album/a.mp3")
        (music / "folder").symlink_to("album")
        for name in ("link.mp3", "folder/a.mp3", "album/../album/a.mp3"):
            async with fetcher.fetch(f"file://{music}/{name}") as audio:
                assert audio.size_bytes == len(AUDIO)

    async def test_a_root_that_is_a_link(self, tmp_path: Path, music: Path) -> None:
        (tmp_path / "linked").symlink_to(music)
        settings = FetchSettings(spool_dir=tmp_path / "spool", file_roots=(tmp_path / "linked",))
        async with (
            Fetcher(settings) as fetcher,
            fetcher.fetch(f"file://{tmp_path}/linked/album/a.mp3") as audio,
        ):
            assert audio.size_bytes == len(AUDIO)

    async def test_what_changes_afterwards_does_not_change_what_was_hashed(
        self, fetcher: Fetcher, music: Path
    ) -> None:
        path = music / "album" / "a.mp3"
        async with fetcher.fetch(path.as_uri()) as audio:
            with path.open("r+b") as file:
                file.write(b"overwritten")
            assert hashlib.sha256(audio.path.read_bytes()).hexdigest() == audio.sha256

    async def test_the_original_stays(self, fetcher: Fetcher, music: Path) -> None:
        path = music / "album" / "a.mp3"
        async with fetcher.fetch(path.as_uri()):
            pass
        assert path.read_bytes() == AUDIO


class TestEscapes:
    @pytest.mark.parametrize(
        "rest",
        [
            "../secrets/key.mp3",
            "album/../../secrets/key.mp3",
            "%2e%2e/secrets/key.mp3",
            "..%2fsecrets%2fkey.mp3",
            "../music2/key.mp3",
            "../secrets/absent.mp3",
            "..",
            "to-file",
            "to-folder/key.mp3",
            "to-link",
            "to-device",
            "to-proc",
            "loop",
        ],
    )
    async def test_are_refused(self, fetcher: Fetcher, music: Path, rest: str) -> None:
        (music / "to-file").symlink_to("../secrets/key.mp3")
        (music / "to-folder").symlink_to(music.parent / "secrets")
        (music / "to-link").symlink_to("to-file")
        (music / "to-device").symlink_to("/dev/zero")
        (music / "to-proc").symlink_to("/proc/self/environ")
        (music / "loop").symlink_to("loop")
        assert isinstance(await failure(fetcher, f"file://{music}/{rest}"), AddressRefused)

    @pytest.mark.parametrize("uri", ["file:///etc/passwd", "file:///", "file:///proc/self/mem"])
    async def test_other_places_are_refused(self, fetcher: Fetcher, uri: str) -> None:
        assert isinstance(await failure(fetcher, uri), AddressRefused)

    async def test_without_roots_every_file_is_refused(self, tmp_path: Path, music: Path) -> None:
        async with Fetcher(FetchSettings(spool_dir=tmp_path / "spool")) as fetcher:
            error = await failure(fetcher, f"file://{music}/album/a.mp3")
        assert isinstance(error, AddressRefused)
        assert "FILE_ROOTS" in error.message

    @pytest.mark.parametrize("swapped", ["album", "album/a.mp3"])
    async def test_a_link_put_in_place_after_the_check_is_refused(
        self, fetcher: Fetcher, music: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
    ) -> None:
        """The swap happens at the worst moment: when the path was resolved and found inside."""
        target = music.parent / "secrets"
        (target / "a.mp3").write_bytes(b"secret")
        resolve = os.path.realpath

        def resolve_then_swap(path: str) -> str:
            real = resolve(path)
            if real == str(music / "album" / "a.mp3"):
                (music / swapped).rename(music / "aside")
                (music / swapped).symlink_to(target if swapped == "album" else target / "a.mp3")
            return real

        monkeypatch.setattr(os.path, "realpath", resolve_then_swap)
        error = await failure(fetcher, f"file://{music}/album/a.mp3")
        assert isinstance(error, AddressRefused)


class TestWhatIsNoAudioFile:
    @pytest.mark.parametrize(
        "uri",
        [
            "file:",
            "file://",
            "file:relative.mp3",
            "file://server/share/a.mp3",
            "file:///music/a%00.mp3",
        ],
    )
    async def test_addresses_of_another_form(self, fetcher: Fetcher, uri: str) -> None:
        assert isinstance(await failure(fetcher, uri), UriUnsupported)

    async def test_missing(self, fetcher: Fetcher, music: Path) -> None:
        for rest in ("absent.mp3", "absent/a.mp3", "x" * 300, "x" * 5000):
            error = await failure(fetcher, f"file://{music}/{rest}")
            assert isinstance(error, AudioNotFound)
            assert len(error.message) < 500

    async def test_folders_pipes_and_sockets(self, fetcher: Fetcher, music: Path) -> None:
        os.mkfifo(music / "pipe")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(os.path.relpath(music / "socket"))
            for name in ("", "album", "pipe", "socket", "album/a.mp3/x"):
                async with asyncio.timeout(5):
                    error = await failure(fetcher, f"file://{music}/{name}")
                assert isinstance(error, AddressRefused), name

    async def test_a_pipe_with_a_writer(self, fetcher: Fetcher, music: Path) -> None:
        os.mkfifo(music / "pipe")
        writer = os.open(music / "pipe", os.O_RDWR)
        os.write(writer, b"audio")
        try:
            assert isinstance(await failure(fetcher, f"file://{music}/pipe"), AddressRefused)
        finally:
            os.close(writer)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
    async def test_unreadable(self, fetcher: Fetcher, music: Path) -> None:
        (music / "album" / "a.mp3").chmod(0)
        assert isinstance(await failure(fetcher, f"file://{music}/album/a.mp3"), FetchForbidden)

    async def test_too_large(self, fetcher: Fetcher, music: Path) -> None:
        with (music / "large.mp3").open("wb") as file:
            file.truncate(len(AUDIO) + 1)
        assert isinstance(await failure(fetcher, f"file://{music}/large.mp3"), AudioTooLarge)

    @pytest.mark.parametrize("size_bytes", [len(AUDIO), 10])
    async def test_of_another_size_than_at_first(
        self, settings: FetchSettings, music: Path, size_bytes: int
    ) -> None:
        path = music / "album" / "a.mp3"
        os.truncate(path, len(AUDIO) - 10)
        changing = Fetcher(settings, on_bytes=lambda _: os.truncate(path, size_bytes))
        async with changing as fetcher:
            error = await failure(fetcher, path.as_uri())
        assert isinstance(error, FetchUnavailable)
        assert f"was to have {len(AUDIO) - 10} bytes" in error.message

    async def test_other_bytes_than_the_event_names(self, fetcher: Fetcher, music: Path) -> None:
        with pytest.raises(ChecksumMismatch):
            async with fetcher.fetch(f"file://{music}/album/a.mp3", expected_sha256="0" * 64):
                pass
