import asyncio
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.full_disk import full_disk
from worker.errors import AudioTooLarge, FetchUnavailable, SettingsInvalid, SpoolFull
from worker.fetch.spool import WRITE_PARTS, Room, Share, Spool, in_thread

HOLDER = """
import sys, time
from pathlib import Path
from worker.fetch.spool import Spool
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
        assert spool.room.used_bytes == len(data)
        with audio.path.open("rb") as reader:  # by the number that the file's own had
            file.remove()
            assert reader.read() == data
        assert not audio.path.exists()
        assert spool.room.used_bytes == 0

    async def test_do_not_gather_tiny_pieces_in_memory(self, spool: Spool, root: Path) -> None:
        file = spool.file()
        for _ in range(WRITE_PARTS):
            await file.write(b"x")
        assert [path.stat().st_size for path in files(root)] == [WRITE_PARTS]
        file.remove()

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

    async def test_larger_than_the_spool_are_refused_at_once(self, root: Path) -> None:
        spool = Spool(root, max_bytes=100, max_file_bytes=1000)
        spool.open()
        with pytest.raises(AudioTooLarge, match="SPOOL_MAX_BYTES"):
            spool.file().expect(101)
        file = spool.file()
        await file.write(bytes(100))
        with pytest.raises(AudioTooLarge, match="SPOOL_MAX_BYTES"):
            await file.write(b"x")
        file.remove()
        spool.close()

    async def test_hold_as_many_bytes_as_were_expected(self, spool: Spool) -> None:
        file = spool.file()
        file.expect(10)
        await file.write(bytes(9))
        with pytest.raises(FetchUnavailable):
            await file.finish()
        await file.write(b"x")
        with pytest.raises(FetchUnavailable):
            await file.write(b"x")
        file.remove()

    async def test_a_full_disk_is_a_full_spool(self, spool: Spool, root: Path) -> None:
        file = spool.file()
        with full_disk(100_000), pytest.raises(SpoolFull, match="SPOOL_DIR"):
            await file.write(bytes(500_000))
        file.remove()
        assert files(root) == []
        assert spool.room.used_bytes == 0

    async def test_a_folder_that_was_removed_is_no_fault_of_the_source(
        self, spool: Spool, root: Path
    ) -> None:
        file = spool.file()
        await file.write(b"x")
        shutil.rmtree(root)
        with pytest.raises(SpoolFull, match="SPOOL_DIR"):
            await file.finish()
        file.remove()

    async def test_a_spool_that_fails_keeps_no_room(self, spool: Spool, root: Path) -> None:
        """Its folder is a file, in which nothing can be made nor removed, as on a disk gone bad."""
        (folder,) = (path for path in root.iterdir() if path.is_dir())
        folder.rmdir()
        folder.touch()
        file = spool.file()
        with pytest.raises(SpoolFull, match="SPOOL_DIR"):
            await file.write(bytes(500_000))
        file.remove()
        assert spool.room.used_bytes == 0

    async def test_what_a_disk_tells_only_at_the_close_is_heard(
        self, spool: Spool, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        close = os.close

        def refuse(fd: int) -> None:
            close(fd)
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        whole, abandoned = spool.file(), spool.file()
        with monkeypatch.context() as disk:
            disk.setattr(os, "close", refuse)
            for file in (whole, abandoned):
                await file.write(bytes(300_000))
            with pytest.raises(SpoolFull, match="SPOOL_DIR"):
                await whole.finish()
            for file in (whole, abandoned):
                file.remove()
        assert files(root) == []
        assert spool.room.used_bytes == 0


async def asking(room: Room, share: Share, size_bytes: int) -> asyncio.Task[None]:
    """A task that has asked for room, and has it or waits."""
    task = asyncio.create_task(room.take(share, size_bytes))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


class TestRoom:
    async def test_who_finds_none_waits_until_some_is_given_back(self) -> None:
        room, complete, late = Room(100), Share(80), Share(80)
        await room.take(complete, 80)
        room.complete(complete)
        waiting = await asking(room, late, 80)
        assert not waiting.done()
        room.give_back(complete)
        await waiting
        assert room.used_bytes == 80
        room.give_back(late)
        room.give_back(late)
        assert room.used_bytes == 0

    async def test_first_come_first_served(self) -> None:
        room, complete = Room(100), Share(100)
        await room.take(complete, 100)
        room.complete(complete)
        shares = [Share(60), Share(50), Share(1)]
        large, middle, small = [await asking(room, share, share.most_bytes) for share in shares]
        room.give_back(complete)
        await large
        assert not middle.done()
        assert not small.done(), "nobody overtakes, however little is asked for"
        room.give_back(shares[0])
        await asyncio.gather(middle, small)

    async def test_what_the_oldest_still_needs_stays_free(self) -> None:
        room, oldest, next_one = Room(100), Share(60), Share(100)
        await room.take(oldest, 10)
        await room.take(next_one, 40)
        waiting = await asking(room, next_one, 1)
        assert not waiting.done()
        await room.take(oldest, 50)
        room.complete(oldest)
        assert not waiting.done()
        room.give_back(oldest)
        await waiting
        await room.take(next_one, 59)
        assert room.used_bytes == 100

    async def test_who_announces_much_and_sends_nothing_costs_it_once(self) -> None:
        room = Room(100)
        for _ in range(10):
            await room.take(Share(50), 0)
        honest = Share(50)
        async with asyncio.timeout(1):
            await room.take(honest, 50)

    async def test_the_cancelled_give_up_their_place(self) -> None:
        room, complete = Room(100), Share(80)
        await room.take(complete, 80)
        room.complete(complete)
        large, small = Share(90), Share(20)
        first, second = await asking(room, large, 90), await asking(room, small, 20)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        room.give_back(large)
        await second
        assert room.used_bytes == 100

    async def test_the_cancelled_give_up_what_they_had_just_been_given(self) -> None:
        room, complete, late = Room(100), Share(100), Share(100)
        await room.take(complete, 100)
        room.complete(complete)
        waiting = await asking(room, late, 100)
        room.give_back(complete)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        room.give_back(late)
        assert room.used_bytes == 0

    @pytest.mark.parametrize("seed", range(20))
    async def test_all_come_to_an_end_whatever_they_announce_and_send(self, seed: int) -> None:
        """Many that grow at once, some given up on the way; together never more than there is."""
        chance = random.Random(seed)
        room = Room(100)

        async def one() -> None:
            size = chance.randint(0, 100)
            share = Share(size if chance.random() < 0.5 else 100)
            ends_at = chance.choice([size, size, size // 2])
            try:
                while share.taken_bytes < ends_at:
                    piece = min(chance.randint(1, 30), ends_at - share.taken_bytes)
                    await room.take(share, piece)
                    assert room.used_bytes <= 100
                    await asyncio.sleep(0)
                if ends_at == size:
                    room.complete(share)
                await asyncio.sleep(0.001 * chance.random())
            finally:
                room.give_back(share)

        async with asyncio.timeout(10):
            tasks = [asyncio.create_task(one()) for _ in range(100)]
            await asyncio.sleep(0.001)
            for task in chance.sample(tasks, 30):
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError)
        assert room.used_bytes == 0


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

    def test_a_folder_of_another_user_is_refused(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root.mkdir()
        if os.geteuid() == 0:  # whose folders are nobody else's
            os.chown(root, 4711, -1)
        monkeypatch.setattr(os, "geteuid", lambda: 4712)
        with pytest.raises(SettingsInvalid, match=r"another user's.*SPOOL_DIR"):
            Spool(root, max_bytes=1, max_file_bytes=1).open()
        assert list(root.iterdir()) == []

    def test_a_link_is_refused_and_nothing_removed_where_it_leads(
        self, root: Path, tmp_path: Path
    ) -> None:
        project = tmp_path / "project"
        (project / "Cargo").mkdir(parents=True)
        (project / "Cargo.lock").touch()
        root.symlink_to(project)
        with pytest.raises(SettingsInvalid, match=r"link.*SPOOL_DIR"):
            Spool(root, max_bytes=1, max_file_bytes=1).open()
        assert {path.name for path in project.iterdir()} == {"Cargo", "Cargo.lock"}


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
