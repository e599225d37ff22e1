"""Foreign npy and npz files: one sentence that names the file, bounded memory, nothing unpickled, nothing hung."""

import io
import os
import resource
import zipfile

import numpy as np
import pytest

from tinyfusion_pl.arrays import MIN_BYTES, check_regular, read_npy, read_npz
from tinyfusion_pl.artifacts import ArtifactError

ARRAYS = {
    "a": np.arange(12.0).reshape(3, 4).T,
    "b": np.array("text"),
    "c": np.array([], dtype=np.float32),
    "d": np.arange(3, dtype=">i2"),
    "e": np.array(["ab", "c"]),
    "f": np.array(-1),
    "g": np.zeros((0, 3)),
}


def npy(array, **options):
    np.save(buffer := io.BytesIO(), array, **options)
    return buffer.getvalue()


def header(text, *, version=b"\x01\x00"):
    text = text.encode("latin1")
    return (
        b"\x93NUMPY"
        + version
        + len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
        + text
    )


def pack(path, *entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def shape(text, *, descr="'<f4'"):
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {text}, }}")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_reads(tmp_path, save):
    save(tmp_path / "x.npz", **ARRAYS)
    found, names = read_npz(tmp_path / "x.npz", only=[*ARRAYS, "missing"])
    assert names == list(ARRAYS) == list(found)
    with np.load(tmp_path / "x.npz") as expected:
        for name, array in found.items():
            assert (
                np.array_equal(array, expected[name])
                and array.dtype == expected[name].dtype
                and array.shape == expected[name].shape
            )
    np.save(tmp_path / "x.npy", ARRAYS["a"])
    assert np.array_equal(read_npy(tmp_path / "x.npy"), ARRAYS["a"])


BROKEN = {
    "no magic": b"no array",
    "empty": b"",
    "magic alone": b"\x93NUMPY",
    "version": b"\x93NUMPY\x09\x00" + bytes(20),
    "pickle": npy(np.array([{}], dtype=object), allow_pickle=True),
    "cut": npy(np.zeros(100))[:-8],
    "more": npy(np.zeros(3)) + b"12345678",
    "impossible": shape("(99999999999, 99999999999)"),
    "terabyte": shape("(1099511627776,)"),
    "negative": shape("(-4, -4)"),
    "not a shape": shape("'x'"),
    "float shape": shape("(1.5,)"),
    "dtype": shape("(2,)", descr="'rubbish'"),
    "structured": shape("(2,)", descr="[('a', '<f4'), ('a', '<f4')]"),
    "no dictionary": header("[1, 2]"),
    "no keys": header("{}"),
    "parentheses": header("(" * 5000),
    "long header": header("{'descr': '<f4', " + " " * 60_000 + "}"),
    "length": header("{}", version=b"\x02\x00")[:8] + b"\xff\xff\xff\xff",
    "many dimensions": shape(str((1,) * 80)),
    "no size": shape("(99999999999,)", descr="'<U0'"),
    "unicode": header("{'descr': '\xff'}"),
    "code": header("__import__('os').getcwd()"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_entry_that_is_no_array_names_the_file(tmp_path, name):
    pack(tmp_path / "x.npz", ("a.npy", BROKEN[name]), ("readme.txt", "not looked at"))
    (tmp_path / "x.npy").write_bytes(BROKEN[name])
    for read in (
        lambda: read_npz(tmp_path / "x.npz", only=["a"]),
        lambda: read_npy(tmp_path / "x.npy"),
    ):
        with pytest.raises(
            ArtifactError, match=r"x\.np. is not a whole np. file of (a )?plain array"
        ) as error:
            read()
        assert "\n" not in str(error.value)
    assert read_npz(tmp_path / "x.npz", only=["b"]) == ({}, ["a", "readme.txt"])


def test_bombs_are_refused_without_unpacking_them(tmp_path):
    zeros = MIN_BYTES + (1 << 20)
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w", force_zip64=True) as file,
    ):
        file.write(shape(f"({zeros},)", descr="'|u1'"))
        for _ in range(zeros >> 20):
            file.write(bytes(1 << 20))
    assert (tmp_path / "x.npz").stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match="arrays unpack to .* bytes or more"):
        read_npz(tmp_path / "x.npz", only=["a"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    pack(tmp_path / "x.npz", ("a.npy", npy(np.zeros(2))), ("a", npy(np.ones(2))))
    with pytest.raises(ArtifactError, match="holds 'a' twice"):
        read_npz(tmp_path / "x.npz", only=["a"])


def test_corrupt_bytes_never_raise_anything_else(tmp_path):
    generator = np.random.default_rng(0)
    for save in (np.savez, np.savez_compressed):
        save(buffer := io.BytesIO(), **ARRAYS)
        content = np.frombuffer(buffer.getvalue(), np.uint8)
        for i in range(300):
            broken = content.copy()
            broken[generator.integers(0, len(broken), 3)] = generator.integers(0, 256, 3)
            (tmp_path / "x.npz").write_bytes(
                broken[: generator.integers(0, len(broken)) if i % 3 == 0 else None].tobytes()
            )
            try:
                read_npz(tmp_path / "x.npz", only=list(ARRAYS))
            except ArtifactError as error:
                assert str(tmp_path / "x.npz") in str(error)


def test_pipes_and_devices_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "device.npz").symlink_to("/dev/zero")
    (tmp_path / "folder.npz").mkdir()
    for name, kind in (("pipe", "a named pipe"), ("device", "a device"), ("folder", "a folder")):
        for read in (check_regular, lambda path: read_npz(path, only=["a"]), read_npy):
            with pytest.raises(ArtifactError, match=f"{name}.npz is {kind}, not a regular file"):
                read(tmp_path / f"{name}.npz")
    (tmp_path / "x.npy").write_bytes(npy(np.zeros(2)))
    (tmp_path / "link.npy").symlink_to(tmp_path / "x.npy")
    assert read_npy(tmp_path / "link.npy").shape == (2,)
    with pytest.raises(ArtifactError, match="There is no file .*lost.npy"):
        read_npy(tmp_path / "lost.npy")
