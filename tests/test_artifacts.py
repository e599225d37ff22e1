"""Files are written whole or not at all: with a real size limit, a folder that really refuses, a real interruption."""

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tinyfusion_pl.artifacts import (
    ArtifactError,
    atomic_path,
    load_tensors,
    read_json,
    save_tensors,
    sha256,
    write_json,
    write_text,
)

WRITERS = {
    "text": lambda path: write_text(path, "x" * 100_000),
    "json": lambda path: write_json(path, {"x": "x" * 100_000}),
    "tensors": lambda path: save_tensors(path, {"x": torch.zeros(100_000)}),
}


@contextmanager
def files_limited_to(num_bytes):
    """A write past the limit fails in the kernel (EFBIG), for root too: the nearest thing to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def read_only_folder():
    """A folder that refuses writes; root, whom chmod does not stop, becomes nobody for the test."""
    was_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        if was_root:
            try:
                os.seteuid(65534)
            except OSError:
                pytest.skip("root that may not become another user: no folder is read-only to it")
        try:
            yield Path(folder)
        finally:
            if was_root:
                os.seteuid(0)
            os.chmod(folder, 0o755)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_write_that_does_not_fit_leaves_the_old_file_and_nothing_else(tmp_path, write):
    path = tmp_path / "record"
    path.write_text("old")
    with files_limited_to(10_000), pytest.raises(ArtifactError, match=f"Cannot write {path}"):
        write(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["record"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_read_only_folder_is_named_and_stays_empty(read_only_folder, write):
    with pytest.raises(
        ArtifactError, match=f"Cannot write {read_only_folder / 'new'}.*Choose a folder"
    ):
        write(read_only_folder / "new")
    assert os.listdir(read_only_folder) == []


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_parent_that_is_a_file_is_refused(tmp_path, write):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ArtifactError, match="Cannot write"):
        write(tmp_path / "file" / "new")
    assert (tmp_path / "file").read_text() == "kept"


def test_full_disk_message_says_free_some_space(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left on device. Free some space"):
        write_text(tmp_path / "new", "text")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ZeroDivisionError])
def test_interrupted_block_passes_its_exception_on_and_leaves_nothing(tmp_path, interruption):
    with pytest.raises(interruption), atomic_path(tmp_path / "new") as temporary:
        temporary.write_text("half")
        raise interruption
    assert os.listdir(tmp_path) == []


def test_killed_writer_leaves_nothing_under_the_final_name(tmp_path):
    code = (
        "import sys, time\nfrom tinyfusion_pl.artifacts import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path:\n"
        "    path.write_text('half')\n    print('written', flush=True)\n    time.sleep(60)\n"
    )
    path = tmp_path / "new"
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"written\n"
        writer.send_signal(signal.SIGKILL)
    assert not path.exists()


def test_temporary_path_is_beside_the_file_with_its_suffix(tmp_path):
    with atomic_path(tmp_path / "deep" / "figure.png") as temporary:
        assert temporary.parent == tmp_path / "deep" and temporary.suffix == ".png"
        temporary.write_bytes(b"image")
        assert not (tmp_path / "deep" / "figure.png").exists()
    assert os.listdir(tmp_path / "deep") == ["figure.png"]


def test_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="Cannot write"), atomic_path(tmp_path / "new"):
        pass


def test_json_and_text_round_trip(tmp_path):
    record = {"pattern": "1:2", "größe": [1, 2.5, None, True]}
    write_json(tmp_path / "record.json", record)
    assert read_json(tmp_path / "record.json") == record
    write_text(tmp_path / "text", "ä\n")
    assert (tmp_path / "text").read_bytes() == "ä\n".encode()


@pytest.mark.parametrize("obj", [{"x": float("nan")}, {"x": object()}])
def test_what_is_no_json_is_refused_and_nothing_written(tmp_path, obj):
    with pytest.raises(ValueError, match="record.json as JSON"):
        write_json(tmp_path / "record.json", obj)
    assert os.listdir(tmp_path) == []


def test_tensors_round_trip_shared_and_strided(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "base": base,
        "tied": base,
        "view": base[1:],
        "strided": base.t(),
        "int": torch.tensor(3),
    }
    save_tensors(tmp_path / "x.safetensors", tensors, metadata={"pattern": "1:2"})
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_written_files_get_the_modes_that_plain_files_get(tmp_path):
    (tmp_path / "plain").touch()
    for name, write in WRITERS.items():
        write(tmp_path / name)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode, name


def test_missing_truncated_and_foreign_files_are_named(tmp_path):
    whole, cut, other = tmp_path / "whole", tmp_path / "cut", tmp_path / "other"
    save_tensors(whole, {"x": torch.zeros(100)})
    cut.write_bytes(whole.read_bytes()[:-7])
    other.write_text("a pickle perhaps, or a page that says 404")
    for read in (load_tensors, read_json, sha256):
        with pytest.raises(ArtifactError, match=f"There is no file {tmp_path / 'missing'}"):
            read(tmp_path / "missing")
        with pytest.raises(ArtifactError, match=f"{tmp_path} is a folder"):
            read(tmp_path)
    for bad in (cut, other):
        with pytest.raises(ArtifactError, match=f"{bad} is not a whole safetensors file"):
            load_tensors(bad)
    with pytest.raises(ArtifactError, match=f"{other} is not a JSON file"):
        read_json(other)


def test_sha256_of_a_file_longer_than_one_chunk(tmp_path):
    content = os.urandom((1 << 20) + 5)
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()
