"""Files for `wandb sweep`, expanded as its agent does, and the same spaces as Hydra's sweeps."""

import itertools
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from sweep_files import FILES, arms_of, command_of, config_of, overrides_of
from tinyfusion_pl.cli.overrides import readable
from tinyfusion_pl.cli.settings import checked

CONF = Path(__file__).parents[2] / "conf"
GRIDS = ("gumbel", "distill")


def composed(overrides):
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        return checked(compose("main", readable(overrides)))


def composed_group(name):
    return OmegaConf.load(CONF / "adapter" / f"{name}.yaml")


def assert_arrives(cfg, arm):
    for name, value in arm.items():
        if name == "adapter":
            assert cfg.adapter == composed_group(value)
            continue
        found = OmegaConf.select(cfg, name)
        assert found == value, f"{name} is {found!r}, not {value!r}"
        assert isinstance(found, str) == isinstance(value, str)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_values_arrive_as_the_file_states_them(file):
    config = config_of(file)
    arms = arms_of(config)
    for arm in arms:
        words = readable(overrides_of(command_of(config, arm)))
        read = {
            each.key_or_group: each.value()
            for each in OverridesParser.create().parse_overrides(words)
        }
        assert {name: read[name] for name in arm} == arm
    for arm in (arms[0], arms[-1]):
        cfg = composed(overrides_of(command_of(config, arm)))
        assert_arrives(cfg, arm)
        assert cfg.name == file.stem and cfg.logger.factory.experiment == file.stem
        if "early_terminate" in config:
            every = cfg.recover.fit.callbacks.evaluation.every_n_steps
            assert (
                config["early_terminate"]["min_iter"] <= cfg.recover.fit.trainer.max_steps // every
            )


def test_there_is_a_file_of_each_method_for_each_space():
    methods = ("bayes", "grid", "hyperband", "random")
    assert {file.stem for file in FILES} == {f"{a}_{b}" for a in GRIDS for b in methods}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_hyperband_optimizes_val_fid_and_the_others_final_fid(file):
    config = config_of(file)
    name = "val/fid" if "early_terminate" in config else "final/fid"
    assert config["metric"] == {"name": name, "goal": "minimize"}


def test_an_unquoted_pattern_is_refused():
    arm = yaml.safe_load("pruning.pattern: 1:2")
    assert arm == {"pruning.pattern": 62}
    with pytest.raises(Exception, match="pattern"):
        from hydra.utils import instantiate

        cfg = composed(["pruning=learned", *create_sweep_command_args(
            {"args": {"pruning.pattern": {"value": arm["pruning.pattern"]}}}
        )["args_no_hyphens"]])  # fmt: skip
        instantiate(cfg.pruning)()


@pytest.mark.parametrize("name", GRIDS)
def test_the_sweep_of_hydra_has_the_arms_of_the_grid(name):
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        cfg = compose("main", [f"+sweep={name}"], return_hydra_config=True)
    params = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    swept = OverridesParser.create().parse_overrides(params)
    names = [each.key_or_group for each in swept]
    values = [list(each.sweep_string_iterator()) for each in swept]
    hydra = {frozenset(zip(names, map(str, arm))) for arm in itertools.product(*values)}
    (file,) = (file for file in FILES if file.stem == f"{name}_grid")
    arms = arms_of(config_of(file))
    quoted = [
        {key: f"'{each}'" if key == "pruning.pattern" else str(each) for key, each in arm.items()}
        for arm in arms
    ]
    assert hydra == {frozenset(arm.items()) for arm in quoted}


@pytest.mark.parametrize("name", GRIDS)
def test_optuna_searches_the_space_of_the_random_file(name):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra sweeps")
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        cfg = compose("main", [f"+sweep={name}_optuna"], return_hydra_config=True)
    assert cfg.hydra.sweeper._target_.endswith("OptunaSweeper")
    (file,) = (file for file in FILES if file.stem == f"{name}_random")
    parameters = config_of(file)["parameters"]
    assert set(cfg.hydra.sweeper.params) == set(parameters)
    for key, text in cfg.hydra.sweeper.params.items():
        space = OverridesParser.create().parse_override(f"{key}={text}").value()
        if "values" in parameters[key]:
            shown = [str(each).strip("'\"") for each in space.list]
            assert shown == [str(each) for each in parameters[key]["values"]]
        else:
            assert (space.start, space.end) == (parameters[key]["min"], parameters[key]["max"])


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm"])
def test_launchers_compose(launcher):
    pytest.importorskip(
        f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher", reason="the extra sweeps"
    )
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        cfg = compose(
            "main", ["+sweep=gumbel", f"hydra/launcher={launcher}"], return_hydra_config=True
        )
    assert "Launcher" in cfg.hydra.launcher._target_


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_engine_of_wandb_proposes_arms_that_compose(file):
    engine = pytest.importorskip("sweeps.run", reason="pip install sweeps")
    sweeps = pytest.importorskip("sweeps")
    config, done = config_of(file), []
    assert sweeps.config.SweepConfig(config)
    for i in range(2):
        proposed = sweeps.next_run(dict(config), done, validate=False)
        arm = {key: each["value"] for key, each in proposed.config.items()}
        assert_arrives(composed(overrides_of(command_of(config, arm))), arm)
        logged = {config["metric"]["name"]: 10.0 + i}
        done.append(engine.SweepRun(
            name=str(i), state=engine.RunState.finished, config=proposed.config, history=[logged],
            summaryMetrics=logged, search_info=proposed.search_info,
        ))  # fmt: skip
