"""Every arm of the paper's tables composes at every scale; where the paper's settings differ, those are taken."""

import csv
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser

from tinyfusion_pl.cli import main

CONF = Path(__file__).parents[2] / "conf"
TABLES = sorted(file.stem for file in (CONF / "experiment").glob("table*.yaml"))


def composed(*overrides):
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        return compose("main", list(overrides), return_hydra_config=True)


def axes(cfg):
    """Setting -> its values, as Hydra's basic sweeper takes them."""
    lines = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    parsed = OverridesParser.create().parse_overrides(lines)
    return {each.get_key_element(): list(each.sweep_string_iterator()) for each in parsed}


@pytest.mark.parametrize("scale", ["digits", "imagenet"])
@pytest.mark.parametrize("table", TABLES)
def test_arms_of_a_table_compose(table, scale):
    # Tables 2 and 6 are of the published recipes, whatever the scale.
    scale_of = [] if table in ("table2", "table6") else [f"scale={scale}"]
    last = [
        f"{key}={values[-1]}"
        for key, values in axes(composed(f"+experiment={table}", *scale_of)).items()
    ]
    assert composed(f"+experiment={table}", *scale_of, *last).name == table


@pytest.mark.parametrize(("table", "weights"), [("table4", "ema"), ("table7", "raw")])
def test_papers_settings_of_a_table_at_its_scale(table, weights):
    cfg = composed(f"+experiment={table}", "scale=imagenet")
    assert cfg.recover.fit.trainer.max_steps == 10_000
    assert cfg.evaluate.sampling.num_sampling_steps == 64
    assert cfg.recover.weights == weights
    small = composed(f"+experiment={table}")
    assert (
        small.recover.fit.trainer.max_steps == 100
        and small.evaluate.sampling.num_sampling_steps == 25
    )


def test_patterns_of_table_4_keep_half_of_28_blocks():
    found = axes(composed("+experiment=table4", "scale=imagenet"))["pruning.pattern"]
    assert [each.strip("'") for each in found] == ["1:2", "2:4", "7:14"]


def test_table_6_states_what_the_recipes_compose_to(tmp_path):
    assert main(["-m", "+experiment=table6", f"hydra.sweep.dir={tmp_path}"]) == 0
    rows = {row["published"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert set(rows) == {"dit_d19", "dit_d14", "dit_d7", "sit_d14", "mar_d16"}
    assert rows["dit_d19"]["pattern"] == "3:4+3:4+2:4+3:4+2:4+3:4+3:4"
    assert (
        float(rows["sit_d14"]["weight_feature"]) == 2e-4
        and float(rows["dit_d7"]["weight_feature"]) == 1e-2
    )
    assert int(rows["dit_d14"]["recover_images"]) == 500_000 * 256
    assert "learn_mask_batch=128" in (tmp_path / "table.md").read_text()
