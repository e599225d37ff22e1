"""One process at a time writes a folder or a file, and what killed ones left half written goes."""

import multiprocessing
import os
import signal
import time

import pytest

from tinyfusion_pl.artifacts import TEMPORARY, ArtifactError, host_hash, temporary_path, write_text
from tinyfusion_pl.locks import LOCK, sole_writer

FORK = multiprocessing.get_context("fork")


def hold(target, is_folder):
    with sole_writer(target, setting="run_dir", is_folder=is_folder):
        time.sleep(60)


@pytest.fixture
def another(tmp_path):
    """Starts a process that holds a target, until the test ends."""
    processes = []

    def start(target, *, is_folder=True):
        processes.append(process := FORK.Process(target=hold, args=(target, is_folder)))
        process.start()
        lock = target / LOCK if is_folder else target.with_name(f".{target.name}{LOCK}")
        while not (lock.exists() and lock.read_text().endswith("}")):
            time.sleep(0.01)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path, another):
    holder = another(tmp_path / "run")
    with pytest.raises(
        ArtifactError, match=rf"run is in use by process {holder.pid} on .*another run_dir"
    ):
        with sole_writer(tmp_path / "run", setting="run_dir"):
            pass
    with sole_writer(tmp_path / "other", setting="run_dir"):
        pass


def test_a_second_process_is_refused_a_file_and_no_other_in_its_folder(tmp_path, another):
    another(tmp_path / "a.npz", is_folder=False)
    with (
        pytest.raises(ArtifactError, match="a.npz is in use by process"),
        sole_writer(tmp_path / "a.npz", setting="x", is_folder=False),
    ):
        pass
    with sole_writer(tmp_path / "b.npz", setting="x", is_folder=False):
        pass


def test_a_killed_process_holds_nothing(tmp_path, another):
    holder = another(tmp_path / "run")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    assert (tmp_path / "run" / LOCK).exists()
    with sole_writer(tmp_path / "run", setting="run_dir"):
        (tmp_path / "run" / "kept").touch()
    assert os.listdir(tmp_path / "run") == ["kept"]


def test_one_of_many_at_once_writes_at_a_time(tmp_path):
    """Each that gets the folder finds no other in it; the lock file is removed and made again all the while."""

    def write_often(index, faults):
        for _ in range(200):
            try:
                with sole_writer(tmp_path / "run", setting="run_dir"):
                    try:
                        os.close(os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        faults.put(index)
                    os.unlink(tmp_path / "inside")
            except ArtifactError:
                pass

    (tmp_path / "run").mkdir()
    faults = FORK.Queue()
    processes = [FORK.Process(target=write_often, args=(index, faults)) for index in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert (
        faults.empty()
        and [process.exitcode for process in processes] == [0] * 4
        and not any((tmp_path / "run").iterdir())
    )


def test_the_holder_may_ask_again(tmp_path):
    with sole_writer(tmp_path, setting="run_dir"), sole_writer(tmp_path, setting="run_dir"):
        assert (tmp_path / LOCK).exists()


def test_folders_that_stay_empty_are_removed(tmp_path):
    with pytest.raises(KeyError), sole_writer(tmp_path / "a" / "b", setting="run_dir"):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path):
    (tmp_path / "file").touch()
    with sole_writer(tmp_path / "file" / "run", setting="run_dir"):
        pass


# -- what killed processes left
def gone_pid():
    (process := FORK.Process(target=int)).start()
    process.join()
    return process.pid


def left(folder, *, host=None, pid=None, age=0.0, name="last.ckpt"):
    """A temporary file as a process would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    match = TEMPORARY.fullmatch(temporary_path(folder / name).name)
    path = folder / match.string.replace(match["host"], host or match["host"]).replace(
        f"-{match['pid']}-", f"-{pid or gone_pid()}-"
    )
    path.write_text("half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_temporary_files_of_killed_processes_are_removed_at_the_next_start(tmp_path):
    gone = [
        left(tmp_path),
        left(tmp_path / "learn_mask" / "checkpoints"),
        left(tmp_path / "figures", name="a.png"),
        left(tmp_path, pid=os.getpid()),
        left(tmp_path, host="0123abcd", age=4000),
        left(tmp_path, pid=os.getppid(), age=4000),
    ]
    kept = [left(tmp_path, host="0123abcd"), left(tmp_path, pid=os.getppid())]
    for name in (
        ".hidden",
        ".report.tmp",
        "a.tmp-0123abcd-5-0123abcd",
        f".own.tmp-{host_hash()}-x-0123abcd",
    ):
        (tmp_path / name).touch()
        kept.append(tmp_path / name)
    with sole_writer(tmp_path, setting="run_dir"):
        assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)


def test_only_the_files_own_leftovers_go_beside_a_file(tmp_path):
    mine, other, below = (
        left(tmp_path, name="a.npz"),
        left(tmp_path, name="b.npz"),
        left(tmp_path / "x", name="a.npz"),
    )
    with sole_writer(tmp_path / "a.npz", setting="reference.output", is_folder=False):
        assert not mine.exists() and other.exists() and below.exists()


def test_a_write_that_is_killed_leaves_a_file_that_is_known(tmp_path, monkeypatch):
    """Whatever writes a file whole: the temporary name says by whom."""

    def killed(*_):
        os._exit(9)

    def write():
        monkeypatch.setattr(os, "replace", killed)
        write_text(tmp_path / "report.html", "text")

    (process := FORK.Process(target=write)).start()
    process.join()
    assert len(os.listdir(tmp_path)) == 1 and process.exitcode == 9
    with sole_writer(tmp_path, setting="run_dir"):
        assert os.listdir(tmp_path) == [LOCK]
