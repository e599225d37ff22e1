"""Every experiment and sweep composes, and patterns stay strings: YAML reads an unquoted 1:2 as 62."""

from itertools import product
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

import tinyfusion_pl.cli  # noqa: F401  (registers the resolvers that main.yaml uses)
from tinyfusion_pl.metrics import InceptionFeatures

CONF = Path(__file__).parents[2] / "conf"


def options(group):
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


EXPERIMENTS = options("experiment")


@pytest.fixture(autouse=True)
def _hydra():
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        yield


def patterns(node, path=""):
    """Every value under a key `pattern`, with its path."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "pattern":
                yield f"{path}{key}", value
            else:
                yield from patterns(value, f"{path}{key}.")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from patterns(value, f"{path}{index}.")


def assert_patterns_are_strings(cfg):
    found = dict(patterns(OmegaConf.to_container(cfg, resolve=False)))
    assert found and all(value is None or type(value) is str for value in found.values()), found


def jobs(sweep):
    """The overrides of each job of a sweep, as Hydra's basic sweeper makes them."""
    params = compose("main", [f"+sweep={sweep}"], return_hydra_config=True).hydra.sweeper.params
    axes = [
        [f"{axis.get_key_element()}={value}" for value in axis.sweep_string_iterator()]
        if axis.is_sweep_override()
        else [axis.input_line]
        for axis in OverridesParser.create().parse_overrides(
            [f"{key}={value}" for key, value in params.items()]
        )
    ]
    return [list(job) for job in product(*axes)]


def trainers(node, path=""):
    """(path, settings) of every Trainer of a configuration."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, dict) and value.get("_target_") == "lightning.pytorch.Trainer":
            yield f"{path}{key}", value
        yield from trainers(value, f"{path}{key}.")


@pytest.mark.parametrize(
    "experiment", [[], ["+experiment=dit_d14"], ["+experiment=digits_teacher"]], ids=str
)
def test_all_trainers_run_on_what_runtime_says(experiment):
    given = {"accelerator": "gpu", "devices": 3, "num_nodes": 2, "precision": "bf16-true"}
    cfg = compose(
        "main", [*experiment, *(f"runtime.{key}={value}" for key, value in given.items())]
    )
    found = dict(trainers(OmegaConf.to_container(cfg, resolve=False)))
    assert len(found) >= 7
    for path in found:
        trainer = OmegaConf.select(cfg, path)
        assert {key: trainer[key] for key in ("accelerator", "devices", "num_nodes")} == {
            k: given[k] for k in given if k != "precision"
        }
        assert trainer.precision == ("bf16-true" if path.endswith("fit.trainer") else "32-true")


@pytest.mark.parametrize("name", options("trainer"))
def test_one_override_chooses_the_strategy_of_every_fit(name):
    cfg = compose("main", [f"trainer={name}"])
    chosen = OmegaConf.load(CONF / "trainer" / f"{name}.yaml").strategy
    assert [cfg[stage].fit.trainer.strategy for stage in ("learn_mask", "recover", "train")] == [
        chosen
    ] * 3
    assert "strategy" not in cfg.evaluate.trainer


def test_default_composes_with_string_patterns():
    assert_patterns_are_strings(compose("main"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_with_string_patterns(name):
    cfg = compose("main", [f"+experiment={name}"])
    assert cfg.name == name  # its run folder is named after it
    assert_patterns_are_strings(cfg)


@pytest.mark.parametrize("name", options("sweep"))
def test_every_job_of_a_sweep_composes_with_string_patterns(name):
    if name.endswith("_optuna"):
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    overrides = jobs(name)
    assert len(overrides) > 1
    for job in overrides:
        assert_patterns_are_strings(compose("main", [f"+sweep={name}", *job]))


@pytest.mark.parametrize("name", options("sampler"))
@pytest.mark.parametrize(
    "experiment",
    [[], *([f"+experiment={name}"] for name in ("dit_d14", "sit_d14", "mar_d16", "table1"))],
    ids=str,
)
def test_a_chosen_sampler_is_taken_whole_by_every_experiment(experiment, name):
    sampling = compose("main", [*experiment, f"sampler@evaluate.sampling={name}"]).evaluate.sampling
    chosen = OmegaConf.load(CONF / "sampler" / f"{name}.yaml")
    assert {key: sampling[key] for key in chosen} == dict(chosen)
    assert set(sampling) - set(chosen) <= {"guidance_scale"}


@pytest.mark.parametrize("name", options("debug"))
@pytest.mark.parametrize(
    "experiment",
    [[], *([f"+experiment={name}"] for name in EXPERIMENTS if not name.startswith("table"))],
    ids=str,
)
def test_debug_shortens_every_fit_of_an_experiment(experiment, name):
    cfg = OmegaConf.to_container(compose("main", [*experiment, f"+debug={name}"]), resolve=False)
    fits = {
        key: node["fit"] for key, node in cfg.items() if isinstance(node, dict) and "fit" in node
    }
    steps = {key: fit["trainer"]["max_steps"] for key, fit in fits.items()}
    assert steps and all(count <= 10 for count in steps.values()), steps


@pytest.mark.parametrize(
    "name", [name for name in options("model") if not name.startswith("digits")]
)
def test_activation_checkpointing_is_a_flag_of_every_published_model(name):
    assert compose("main", [f"model={name}"]).model.activation_checkpointing is False
    model = compose(
        "main", [f"model={name}", "model.activation_checkpointing=true", "model.checkpoint=random"]
    ).model
    sizes = {"hidden_size": 64, "num_heads": 4, "num_classes": 10}
    with pytest.warns(UserWarning, match="randomly initiali"):
        assert instantiate(model, **sizes).activation_checkpointing is True


@pytest.mark.parametrize("name", options("metrics"))
def test_metrics_have_the_widths_of_their_feature_network(name):
    """Without weights: the networks are as wide as their classes or timm's configurations say."""
    import timm

    metrics = compose("main", [f"metrics={name}"]).metrics
    network = metrics.feature_network
    if metrics.metrics is None:
        return
    if "model_name" in network:
        with torch.device("meta"):
            model = timm.create_model(
                network.model_name, **({"num_classes": 0} if name == "fd_dinov2" else {})
            )
        widths = {
            "features": model.num_features,
            "logits": timm.get_pretrained_cfg(network.model_name).num_classes,
        }
    else:
        widths = {
            "features": InceptionFeatures.num_features,
            "logits": InceptionFeatures.num_classes,
            "spatial": InceptionFeatures.num_spatial,
        }
    for metric in metrics.metrics.values():
        width = metric.get("num_features", metric.get("num_classes"))
        assert (
            width == widths[metric.get("of", "logits" if "num_classes" in metric else "features")]
        )


def test_an_unquoted_pattern_is_found(tmp_path):
    (tmp_path / "pruning.yaml").write_text("pruning: {pattern: 1:2}\nquoted: [{pattern: '1:2'}]\n")
    cfg = OmegaConf.load(tmp_path / "pruning.yaml")
    assert dict(patterns(OmegaConf.to_container(cfg))) == {
        "pruning.pattern": 62,
        "quoted.0.pattern": "1:2",
    }
    with pytest.raises(AssertionError):
        assert_patterns_are_strings(cfg)


def test_a_pattern_sweep_on_the_command_line_keeps_strings():
    parsed = OverridesParser.create().parse_override("pruning.pattern='1:2','2:4+1:2'")
    values = list(parsed.sweep_string_iterator())
    assert [
        compose("main", ["pruning=learned", f"pruning.pattern={value}"]).pruning.pattern
        for value in values
    ] == ["1:2", "2:4+1:2"]
