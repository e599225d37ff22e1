"""Values as people type them: paths with characters of Hydra's grammar, and the home folder's ``~``."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tinyfusion_pl import cli

CONFIG = """
    defaults: [paths: default, hydra: default, _self_]
    name: toy
    place: here
    places: {}
    listed: []
    home: ~/from_file
    run_dir: runs/${name}
    task: {_target_: overrides_tasks.note, _partial_: true, place: "${place}", places: "${places}", listed: "${listed}", home: "${home}"}
    """
ODD = [
    "epoch=0-step=1.ckpt",
    "ckpt (1).pt",
    "ckpt(1).pt",
    "a#b.pt",
    "größe.pt",
    "模型.pt",
    "a[1].pt",
    "[a].pt",
    "{a}.pt",
    "a}b",
    "a&b;c",
    "wow!.pt",
    "it's.pt",
    'say "x".pt',
    "back\\slash=.pt",
    "end=\\",
    "a=b,c=d",
    "${x}=1",
    "x^y",
    "<x>",
    "`x`",
    "a=ü (2)[3].pt",
]


@pytest.fixture
def work(tmp_path, monkeypatch):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "toy.yaml").write_text(CONFIG)
    (tmp_path / "c" / "overrides_tasks.py").write_text(
        "import json\ndef note(run_dir, **values):\n    (run_dir / 'note.json').write_text(json.dumps(values))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "c")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def toy(*arguments):
    return cli.main(["--config-dir", "c", "--config-name", "toy", *arguments])


def noted(folder="runs/toy"):
    return json.loads((Path(folder) / "note.json").read_text())


def told(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error and "hydra.cc" not in error
    return error.removeprefix("error: ").removesuffix("\n")


@pytest.mark.parametrize("value", ODD)
def test_an_odd_path_is_told_with_what_to_type(work, capsys, value):
    assert toy(f"place={value}") == 1
    said = told(capsys)
    assert said.startswith(f"place={value} ")
    (typed,) = shlex.split(said.partition("Quote it: ")[2].removesuffix("."))  # as a shell reads it
    assert toy(typed) == 0
    assert noted()["place"] == value


def test_the_sentence_shows_the_quotes(work, capsys):
    assert cli.main(["model.checkpoint=epoch=0-step=1.ckpt"]) == 1
    assert told(capsys).endswith(""" Quote it: 'model.checkpoint="epoch=0-step=1.ckpt"'.""")
    assert not Path("runs").exists()


@pytest.mark.parametrize("value", ["a b.pt", "C:/a.pt", "a\\b.pt", "@x+y%z?", "-a.pt", "a.b.c"])
def test_other_paths_need_no_quotes(work, value):
    assert toy(f"place={value}") == 0
    assert noted()["place"] == value


def test_a_comma_outside_a_sweep_says_what_it_could_mean(work, capsys):
    assert toy("place=a,b.pt") == 1
    said = told(capsys)
    assert "add -m" in said and """'place="a,b.pt"'""" in said and "'place=[a,b.pt]'" in said


@pytest.mark.parametrize(("argument", "expected"), [
    ("places=[a=b]", """'places=["TEXT"]'"""),
    ("+places={a: x=1.pt}", """'+places={NAME: "TEXT"}'"""),
    ("place", "KEY=VALUE"),
    ("plätze=1", "not a valid key"),
    ("place=choice(a=b)", """'place="choice(a=b)"'"""),
    ("place=None", "place=null"),
    ("run_dir=5e1", """parsed as 50.0. For a string, quote it: 'run_dir="5e1"'"""),
])  # fmt: skip
def test_what_cannot_be_read_is_named_with_a_remedy(work, capsys, argument, expected):
    assert toy(argument) == 1
    said = told(capsys)
    assert argument.partition("=")[0].lstrip("+") in said and expected in said, said
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "argument", ["place=~/x=1 (2).pt", 'place="~/x=1 (2).pt"', "place='~/x=1 (2).pt'"]
)
def test_a_tilde_is_the_home_folder(work, argument):
    assert toy(argument) == 0
    assert noted()["place"] == str(work / "home" / "x=1 (2).pt")


def test_a_tilde_is_found_wherever_a_path_is(work):
    assert toy("+places.mine=~/a.pt", "+places.other='~'") == 0
    home = str(work / "home")
    assert noted() == {
        "place": "here",
        "places": {"mine": f"{home}/a.pt", "other": home},
        "listed": [],
        "home": f"{home}/from_file",
    }
    assert f"home: {home}/from_file" in Path("runs/toy/config.yaml").read_text()
    assert toy("listed=[~/a,b, ~/c]", "run_dir=list") == 0
    assert noted("list")["listed"] == [f"{home}/a", "b", f"{home}/c"]
    assert toy("+places={mine: ~/a.pt}", "run_dir=mapping") == 0
    assert noted("mapping")["places"] == {"mine": f"{home}/a.pt"}


@pytest.mark.parametrize("argument", ["run_dir=~/runs/x", "run_dir='~/runs/x'"])
def test_a_run_folder_in_the_home_folder(work, argument):
    assert toy(argument) == 0
    assert noted(work / "home" / "runs" / "x")["place"] == "here"
    assert not (work / "~").exists()


def test_a_sweep_over_paths_in_the_home_folder(work):
    assert toy("-m", "place=~/a=1,~/b,c", "run_dir='~/${place}'", "name=x") == 0
    assert (
        toy("-m", "place=~/a=1,~/b,c", "run_dir=~/r/${name}", "name=x,y,z") == 1
    )  # three places share a folder
    home = work / "home"
    assert {noted(home / "r" / name)["place"] for name in "xyz"} == {f"{home}/a=1"}


def test_a_user_that_does_not_exist_is_told(work, capsys):
    assert toy("place=~nobody-of-this-name/x") == 1
    assert "no user 'nobody-of-this-name'" in told(capsys)


def test_the_home_of_another_user(work):
    import pwd

    user = pwd.getpwuid(os.getuid())
    assert toy(f"place=~{user.pw_name}/x") == 0
    assert noted()["place"] == os.path.join(user.pw_dir, "x")


def test_what_is_printed_for_a_shell_is_one_word():
    parse = OverridesParser.create().parse_override
    for value in ODD:
        (typed,) = shlex.split(cli.overrides.quoted(f"a.b={value}"))
        assert re.sub(r"\\(?=\$\{)", "", parse(typed).value()) == value
