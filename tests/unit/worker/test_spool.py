import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from worker.errors import AudioTooLarge, SettingsInvalid, SpoolFull
from worker.spool import Spool, in_thread

HOLDER = """
import sys, time
from pathlib import Path
from worker.spool import Spool
spool = Spool(Path(sys.argv[1]), max_bytes=100, max_file_bytes=100)
spool.open()
spool.file()._path.write_bytes(b"left behind")
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def spool(root: Path) -> Iterator[Spool]:
    made = Spool(root, max_bytes=1_000_000, max_file_bytes=600_000)
    made.open()
    yield made
    made.close()


def files(root: Path) -> list[Path]:
    return [path for path in root.glob("*/*") if path.is_file()]


class TestFiles:
    async def test_hold_what_was_written(self, spool: Spool) -> None:
        file = spool.file()
        pieces = [os.urandom(size) for size in (1, 0, 70_000, 300_000, 5)]
        for piece in pieces:
            await file.write(piece)
        audio = await file.finish()
        data = b"".join(pieces)
        assert audio.path.read_bytes() == data
        assert (audio.sha256, audio.size_bytes) == (sha256(data).hexdigest(), len(data))
        assert audio.path.stat().st_mode & 0o777 == 0o600
        assert spool.used_bytes == len(data)
        file.remove()
        assert not audio.path.exists()
        assert spool.used_bytes == 0

    async def test_may_be_empty(self, spool: Spool) -> None:
        file = spool.file()
        audio = await file.finish()
        assert (audio.size_bytes, audio.path.read_bytes()) == (0, b"")
        file.remove()

    async def test_are_bounded_each(self, spool: Spool) -> None:
        file = spool.file()
        await file.write(bytes(600_000))
        with pytest.raises(AudioTooLarge, match="MAX_BYTES"):
            await file.write(b"x")
        file.remove()

    async def test_are_bounded_together(self, spool: Spool) -> None:
        one, other = spool.file(), spool.file()
        await one.write(bytes(600_000))
        await other.write(bytes(400_000))
        with pytest.raises(SpoolFull, match="SPOOL_MAX_BYTES"):
            await other.write(b"x")
        one.remove()
        await other.write(b"x")
        other.remove()
        other.remove()
        assert spool.used_bytes == 0

    async def test_a_full_disk_is_a_full_spool(self, spool: Spool, root: Path) -> None:
        """The kernel refuses to let files grow, as a full disk does."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        file = spool.file()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(SpoolFull, match="SPOOL_DIR"):
                await file.write(bytes(500_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            file.remove()
        assert files(root) == []
        assert spool.used_bytes == 0


class TestFolders:
    def test_nothing_stays_after_closing(self, root: Path) -> None:
        spool = Spool(root, max_bytes=1, max_file_bytes=1)
        spool.open()
        spool.file()._path.write_bytes(b"x")
        spool.close()
        spool.close()
        assert list(root.iterdir()) == []

    def test_the_dead_are_cleaned_up_after_and_the_living_left_alone(self, root: Path) -> None:
        command = [sys.executable, "-c", HOLDER, str(root)]
        holders = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
        try:
            for holder in holders:
                assert holder.stdout is not None
                assert holder.stdout.readline() == b"ready\n"
            dead, living = holders
            dead.send_signal(signal.SIGKILL)
            dead.wait()
            assert len(files(root)) == 2
            spool = Spool(root, max_bytes=1, max_file_bytes=1)
            spool.open()
            (left,) = files(root)
            assert left.parent.name.startswith(f"{living.pid}-")
            spool.close()
        finally:
            for holder in holders:
                holder.kill()
                holder.communicate()

    def test_many_may_start_at_once(self, root: Path) -> None:
        spools = [Spool(root, max_bytes=1, max_file_bytes=1) for _ in range(20)]
        threads = [threading.Thread(target=spool.open) for spool in spools]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len([path for path in root.iterdir() if path.is_dir()]) == 20
        for spool in spools:
            spool.file()._path.write_bytes(b"x")
            spool.close()
        assert list(root.iterdir()) == []

    def test_a_folder_that_cannot_be_made_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        spool = Spool(tmp_path / "file" / "spool", max_bytes=1, max_file_bytes=1)
        with pytest.raises(SettingsInvalid, match="SPOOL_DIR"):
            spool.open()


class TestThreads:
    async def test_a_cancelled_caller_leaves_after_its_thread(self) -> None:
        entered, leave, left = threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            entered.set()
            leave.wait(5)
            left.set()

        caller = asyncio.create_task(in_thread(work))
        await asyncio.to_thread(entered.wait, 5)
        for _ in range(2):
            caller.cancel()
            await asyncio.sleep(0.01)
            assert not caller.done()
        leave.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert left.is_set()

    async def test_results_and_errors_come_back(self) -> None:
        assert await in_thread(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await in_thread(divmod, 7, 0)
