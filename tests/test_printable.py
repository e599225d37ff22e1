"""What the command line prints of files' content cannot act on the terminal."""

import sys
import warnings

import pytest
import torch

from tinyfusion_pl import cli
from tinyfusion_pl.artifacts import write_json
from tinyfusion_pl.cli.errors import printable_warnings
from tinyfusion_pl.tasks.folder import say


def test_names_in_files_cannot_act_on_the_terminal(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"ema": {"\x1b[31mred\x07": torch.zeros(3), "\u202eabc": torch.zeros(2)}}, "hostile.pt"
    )
    assert cli.main(["task=learn_mask", "model.checkpoint=hostile.pt", "run_dir=out"]) == 1
    said = "".join(capfd.readouterr())
    assert (
        r"\x1b[31mred\x07" in said
        and r"\u202eabc" in said
        and not set("\x1b\x07\u202e") & set(said)
    )


def test_names_in_warnings_cannot_either(capfd):
    with printable_warnings():
        print(warnings.formatwarning("\x1b[2Jäß", UserWarning, "a.py", 1), file=sys.stderr)
        say("\x1b]0;title\x07 ü")
    out, errors = capfd.readouterr()
    assert r"\x1b[2Jäß" in errors and out == "\\x1b]0;title\\x07 ü\n"


@pytest.mark.parametrize(
    "content",
    [
        {"\x1b[2Jmine": {"fid": 1.0, "\x1b]0;t\x07": 2.0}, "name": "\x1b[31mx"},
        {"teacher": "\x1b[31m"},
    ],
)
def test_compare_cannot_either(tmp_path, capfd, content):
    write_json(tmp_path / "\x1b[31mrun" / "metrics.json", content)
    cli.main(["compare", str(tmp_path / "\x1b[31mrun"), str(tmp_path / "\x1b[31mrun")])
    said = "".join(capfd.readouterr())
    assert r"\x1b[" in said and not set("\x1b\x07") & set(said)
