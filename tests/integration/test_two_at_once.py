"""Two commands in one run folder at once: the second is told who has it, and changes nothing."""

import multiprocessing
import os
import time

import pytest

from tinyfusion_pl import cli
from tinyfusion_pl.tasks import LearnMask, RunFolder

FORK = multiprocessing.get_context("fork")
SMALL = [
    "run_dir=out",
    "pruning=learned",
    "data.batch_size=8",
    "+debug=default",
    "task.stages=[learn_mask]",
]


@pytest.fixture
def running(tmp_path, monkeypatch):
    """A process that runs `SMALL`, held at the beginning of its stage until the file ``go`` is there."""
    run = LearnMask.run

    def waiting(self, folder: RunFolder, inputs):
        (tmp_path / "begun").touch()
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        run(self, folder, inputs)

    def first():
        LearnMask.run = waiting
        os._exit(cli.main(SMALL))

    monkeypatch.chdir(tmp_path)
    process = FORK.Process(target=first)
    process.start()
    deadline = time.monotonic() + 100
    while not (tmp_path / "begun").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_a_second_command_in_a_run_folder_is_refused(running, tmp_path, capfd):
    def refused(*other):
        assert cli.main([*SMALL, *other]) == 1
        said = capfd.readouterr().err
        assert "another run_dir" in said and "Traceback" not in said
        return said

    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for other in ([], ["seed=1"]):
        assert f"in use by process {running.pid}" in refused(*other)
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == before
    (tmp_path / "go").touch()
    running.join(100)
    assert running.exitcode == 0 and (tmp_path / "out" / "shallow" / "record.json").exists()
    assert "belongs to a run of another configuration (seed is 0 there and 1 here" in refused(
        "seed=1"
    )
    assert not list((tmp_path / "out").rglob(".*"))
