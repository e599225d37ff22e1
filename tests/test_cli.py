"""The command line: words, run folders, errors told to people, sweeps, processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tinyfusion_pl import cli
from tinyfusion_pl.cli import command_line

CONFIGS = {
    "toy": """
        defaults: [paths: default, hydra: default, _self_]
        name: toy
        seed: 0
        rate: 0.001
        part: {_target_: cli_tasks.Part, pattern: "1:2"}
        shown: {pattern: "${part.pattern}", part: "${part}", place: "${paths.output_dir}/x"}
        run_dir: runs/${name}/${config_hash:}
        task: {_target_: cli_tasks.note, _partial_: true, part: "${part}", seed: "${seed}", stages: [a, b]}
        """,
    "failing": """
        defaults: [toy, _self_]
        task: {_target_: cli_tasks.fail, error: value}
        """,
    "processes": """
        defaults: [paths: default, hydra: default, _self_]
        name: processes
        seed: 0
        run_dir: runs/${name}/${config_hash:}
        task: {_target_: cli_tasks.train_twice_on_two_processes, _partial_: true, seed: "${seed}"}
        """,
}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder to run in, with configurations of its own in ``c/``."""
    (tmp_path / "c").mkdir()
    for name, text in CONFIGS.items():
        (tmp_path / "c" / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def toy(*arguments, config="toy"):
    return cli.main(["--config-dir", "c", "--config-name", config, *arguments])


def folders(work):
    return sorted(file.parent for file in work.glob("runs/toy/*/config.yaml"))


def note(folder):
    return json.loads((folder / "note.json").read_text())


# --- words


def test_a_word_goes_to_its_function(capsys, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "join", "os.path:join")
    assert cli.main(["join", "a", "b"]) == 0
    assert capsys.readouterr().out == "a/b\n"


def test_compare_prints_the_report_rooms_comparison(capsys, monkeypatch):
    monkeypatch.setattr(
        "tinyfusion_pl.report.compare",
        lambda run_dir, other_run_dir: f"{run_dir} against {other_run_dir}",
    )
    assert cli.main(["compare", "A", "B"]) == 0
    assert capsys.readouterr().out == "A against B\n"


def test_compare_of_what_is_no_run_is_one_sentence(capsys, tmp_path):
    assert cli.main(["compare", str(tmp_path / "none"), str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ") and str(tmp_path / "none") in error and "Traceback" not in error
    )


def test_an_unknown_word_lists_the_known_ones(capsys):
    assert cli.main(["compre", "A", "B"]) == 2
    assert re.fullmatch(
        r"error: Unknown command 'compre'; available commands: compare, export\. .*task=.*\n",
        capsys.readouterr().err,
    )


def test_a_word_with_too_few_arguments_says_what_it_takes(capsys):
    assert cli.main(["compare"]) == 2
    assert capsys.readouterr().err == "error: Usage: tinyfusion compare RUN_DIR [OTHER_RUN_DIR]\n"


@pytest.mark.parametrize("argument", ["+experiment=x", "~seed", "seed=1", "-m", "--help"])
def test_settings_and_flags_are_no_words(argument, monkeypatch):
    monkeypatch.setattr(
        command_line, "_run_command", lambda *arguments: pytest.fail("taken for a word")
    )
    monkeypatch.setattr(command_line, "_run_task", lambda: None)
    assert cli.main([argument]) == 0


# --- run folders


def test_a_task_gets_its_built_parts_and_the_run_folder(work):
    assert toy("seed=3", "part.pattern='2:4'") == 0
    (folder,) = folders(work)
    assert note(folder) == {"pattern": "2:4", "seed": 3, "stages": ["a", "b"]}


def test_the_same_command_has_the_same_folder_and_any_other_value_another(work):
    assert [toy(), toy(), toy("seed=0"), toy("paths.output_dir=elsewhere")] == [0] * 4
    assert len(folders(work)) == 1
    assert [toy("seed=1"), toy("rate=0.01"), toy("part.pattern='1:4'"), toy("++more=1")] == [0] * 4
    assert len(folders(work)) == 5


def test_a_misspelt_group_is_refused_instead_of_added_as_a_setting_that_nothing_reads(work, capsys):
    assert toy("+experimnt=dit_d14") == 1
    assert "no configuration group 'experimnt'" in capsys.readouterr().err and not folders(work)


def test_stages_of_one_configuration_share_a_folder(work):
    assert toy("task.stages=[a]") == toy("task.stages=[b]") == 0
    (folder,) = folders(work)
    assert note(folder)["stages"] == ["b"]


def test_only_our_own_files_are_in_the_folder(work):
    toy()
    assert sorted(file.name for file in folders(work)[0].iterdir()) == ["config.yaml", "note.json"]


def test_kept_configuration_is_resolved_and_reads_back_the_same(work):
    toy("seed=4")
    file = folders(work)[0] / "config.yaml"
    kept = OmegaConf.load(file)
    raw = OmegaConf.to_container(kept, resolve=False)
    assert raw["shown"]["pattern"] == kept.shown.part.pattern == "1:2"
    assert raw["paths"]["output_dir"] == str(file.parent) and kept.shown.place == f"{file.parent}/x"
    assert file.parent.name == cli.config_hash(kept)


def test_hash_knows_values_not_how_they_are_written():
    def config(text):
        return OmegaConf.create(text)

    one = config("{a: 1, b: '${a}', c: {d: '1:2'}}")
    same = config("{c: {d: '1:2'}, b: 1, a: 1, run_dir: x, paths: {y: z}, task: 7}")
    assert cli.config_hash(one) == cli.config_hash(same)
    assert cli.config_hash(one) != cli.config_hash(config("{a: 1, b: '${a}', c: {d: 62}}"))
    assert re.fullmatch("[0-9a-f]{8}", cli.config_hash(one))


def test_a_folder_of_another_configuration_is_refused_and_left_as_it_is(work, capsys):
    assert toy("run_dir=mine", "seed=1") == 0
    before = {file: file.read_bytes() for file in Path("mine").iterdir()}
    assert toy("run_dir=mine", "seed=2") == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "mine belongs to a run of another configuration (seed is 1 there and 2 here)" in error
    )
    assert {file: file.read_bytes() for file in Path("mine").iterdir()} == before
    assert toy("run_dir=mine", "seed=1", "task.stages=[z]") == 0
    assert note(Path("mine"))["stages"] == ["z"]


def test_a_folder_that_was_moved_still_goes_on(work):
    assert toy("run_dir=here") == 0
    Path("here").rename("there")
    assert toy("run_dir=there") == 0


def test_a_broken_configuration_file_is_not_overwritten(work, capsys):
    Path("mine").mkdir()
    Path("mine/config.yaml").write_text("seed: [")
    assert toy("run_dir=mine") == 1
    assert "mine/config.yaml is not a valid configuration" in capsys.readouterr().err
    assert Path("mine/config.yaml").read_text() == "seed: ["


# --- errors


def told(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error.removeprefix("error: ")


def test_a_wrong_value_is_told_before_anything_is_written(work, capsys):
    assert toy("part.pattern='5:4'") == 1
    assert (
        told(capsys)
        == "part.pattern: Pattern '5:4' keeps 5 of 4 blocks. Give N:M with 1 <= N <= M, e.g. '2:4'.\n"
    )
    assert not Path("runs").exists()


@pytest.mark.parametrize("argument", ["part.pattern=???", "seed=???", "name=???"])
def test_a_missing_value_is_named_with_how_to_give_it(work, capsys, argument):
    key = argument.split("=")[0]
    assert toy(argument) == 1
    assert told(capsys) == f"{key} has no value. Give one: {key}=VALUE.\n"


def test_an_argument_that_a_part_does_not_have_is_named_with_its_place(work, capsys):
    assert toy("+part.depth=3") == 1
    assert told(capsys).startswith("part.depth is not a setting of Part")


def test_a_setting_that_does_not_exist_is_refused(work, capsys):
    assert toy("sed=1") == 1
    assert "Could not override 'sed'" in told(capsys)


@pytest.mark.parametrize(
    ("argument", "choice"), [("+experiment=foo", "digits_teacher"), ("data=foo", "digits")]
)
def test_an_unknown_choice_lists_the_choices(capsys, work, argument, choice):
    assert cli.main([argument]) == 1
    error = told(capsys)
    assert "'foo'" in error.replace("/foo'", "'foo'") and f"\t{choice}\n" in error


def test_a_folder_that_cannot_be_made_is_named(work, capsys):
    assert toy("run_dir=c/toy.yaml/inside") == 1
    assert told(capsys) == "Cannot use c/toy.yaml/inside: Not a directory.\n"


def test_an_error_of_the_task_is_told_in_one_sentence(work, capsys):
    assert toy(config="failing") == 1
    assert told(capsys) == "it went wrong\n"


def test_the_traceback_is_shown_when_asked_for(work, capsys, monkeypatch):
    monkeypatch.setenv("TINYFUSION_TRACEBACK", "1")
    assert toy(config="failing") == 1
    assert re.match(
        r"Traceback .*cli_tasks\.py.*error: it went wrong\n$", capsys.readouterr().err, re.DOTALL
    )


def test_an_error_in_the_code_shows_its_traceback(work, capsys):
    assert toy("task.error=bug", config="failing") == 1
    error = capsys.readouterr().err
    assert re.match(
        r"Traceback .*cli_tasks\.py.*error: KeyError\('it went wrong'\)\n$", error, re.DOTALL
    )


def test_ctrl_c_says_how_to_resume(work, capsys):
    assert toy("task.error=interrupt", config="failing") == 130
    assert "Rerun the same command to resume." in capsys.readouterr().err


def test_an_unknown_flag_is_wrong_usage(capsys):
    assert cli.main(["--no-such-flag"]) == 2


def test_the_process_is_left_as_it_was(work, monkeypatch):
    argv, environment = list(sys.argv), dict(os.environ)
    toy("task.error=bug", config="failing")
    assert sys.argv == argv and dict(os.environ) == environment


# --- sweeps and processes


def test_each_job_of_a_sweep_has_the_folder_that_it_has_alone(work):
    assert toy("-m", "seed=1,2", "part.pattern='1:2','2:4'") == 0
    swept = folders(work)
    assert {(note(folder)["seed"], note(folder)["pattern"]) for folder in swept} == {
        (1, "1:2"), (1, "2:4"), (2, "1:2"), (2, "2:4")}  # fmt: skip
    assert len(swept) == 4
    assert toy("seed=2", "part.pattern='2:4'") == 0
    assert folders(work) == swept


def test_a_failing_job_does_not_keep_the_others_from_running(work, capsys):
    assert toy("-m", "seed=0,1", config="failing") == 1
    assert "error: it went wrong\n" in capsys.readouterr().err
    assert [
        note(folder)["seed"] for folder in folders(work) if (folder / "note.json").exists()
    ] == [1]


def test_a_job_of_a_sweep_is_one_run_for_the_processes_that_it_starts(work, monkeypatch):
    seen = []
    monkeypatch.setattr(
        command_line, "run", lambda cfg, run_dir: seen.append((sys.argv[1:], run_dir))
    )
    assert toy("-m", "seed=1,2", "hydra.verbose=false", "part.pattern='1:2'") == 0
    for seed, (argv, run_dir) in zip([1, 2], seen):
        flags, task = (
            ["--config-dir", "c", "--config-name", "toy"],
            [f"seed={seed}", "part.pattern='1:2'"],
        )
        assert argv == [*flags, *task, "hydra.verbose=false", "hydra.mode=RUN"]
        with initialize_config_dir(str(work / "c"), version_base="1.3"):
            cfg = compose("toy", [f"seed={seed}", "hydra.searchpath=[pkg://tinyfusion_pl.conf]"])
        assert run_dir == work / cfg.run_dir


def test_other_processes_neither_write_the_configuration_nor_accept_another(work, monkeypatch):
    assert toy("run_dir=mine") == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    # What Lightning's DDP adds to the command line of the processes that it starts.
    added = ["hydra.run.dir=mine", "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    assert toy(*added) == 0
    assert toy("seed=1", *added) == 1
    assert toy("run_dir=new") == 0 and not Path("new/config.yaml").exists()


@pytest.mark.slow
def test_two_processes_a_job_run_in_a_sweep(work):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    cli_of = [
        sys.executable,
        "-m",
        "tinyfusion_pl",
        "--config-dir",
        "c",
        "--config-name",
        "processes",
    ]
    result = subprocess.run(
        [*cli_of, "-m", "seed=1,2"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    files = list(work.glob("runs/processes/*/rank*.json"))
    found = [json.loads(file.read_text()) | {"file": file.name} for file in files]
    assert sorted((each["seed"], each["file"], each["world_size"]) for each in found) == [
        (seed, f"rank{rank}.json", 2) for seed in (1, 2) for rank in (0, 1)]  # fmt: skip
    assert len({file.parent for file in files}) == 2
    assert len({each["process"] for each in found}) == 3  # the sweep's, and one more for each job
