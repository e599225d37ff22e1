"""Renamed settings: the old names work for one release, with a warning that names the new ones."""

import pytest
from omegaconf import OmegaConf

from tinyfusion_pl import tasks
from tinyfusion_pl.cli import main
from tinyfusion_pl.cli.renamed import KEYS, rename_overrides, rename_settings


@pytest.mark.parametrize(
    "line",
    [
        ["data=imagenet_latents", "data.pictures=a.npz"],
        ["task=reference", "reference.pictures=a.npz"],
    ],
)
def test_an_old_key_on_the_command_line_warns_and_works(line, capsys):
    old = line[1].partition("=")[0]
    with pytest.warns(FutureWarning, match=f"{old} was renamed to {KEYS[old]}"):
        assert main([*line, "--cfg", "job"]) == 0
    assert "images: a.npz" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
def test_a_prefix_of_an_old_key_stays(prefix):
    with pytest.warns(FutureWarning):
        assert rename_overrides([f"{prefix}data.pictures=a=b"]) == [f"{prefix}data.images=a=b"]


def test_other_overrides_stay():
    line = ["-m", "data.images=a", "name=data.pictures", "+experiment=table1"]
    assert rename_overrides(line) == line


def test_an_old_key_and_target_in_a_file_are_renamed():
    target = {"_target_": "tinyfusion_pl.tasks.PictureFiles"}
    cfg = OmegaConf.create({"data": {"pictures": "a"}, "measure": {"files": target}})
    with pytest.warns(FutureWarning, match="renamed"):
        rename_settings(cfg)
    assert cfg.data == {"images": "a"}
    assert cfg.measure.files._target_ == "tinyfusion_pl.tasks.ImageFiles"


@pytest.mark.parametrize(
    ("old", "new"), [("PictureFiles", "ImageFiles"), ("Unfinished", "UnfinishedError")]
)
def test_an_old_class_name_is_an_alias(old, new):
    with pytest.warns(DeprecationWarning, match=new):
        assert getattr(tasks, old) is getattr(tasks, new)
