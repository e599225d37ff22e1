"""Valid settings are accepted, and do what they say: what the checks must not refuse."""

import copy
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from settings_door import passed
from tinyfusion_pl import cli
from tinyfusion_pl.cli import command_line
from tinyfusion_pl.cli.settings import checked

CONF = Path(__file__).parents[2] / "conf"

# what is typed in a shell -> the value at the key of its first word, after the checks
VALID = {
    "evaluate.num_samples=5e1": 50,
    "data.batch_size=2.0": 2,
    "learn_mask.fit.trainer.max_steps=2.0": 2,
    "recover.fit.trainer.max_steps=1e2": 100,
    "pruning=learned pruning.anneal_steps=5e1": 50,
    "seed=1e3": 1000,
    "seed=4294967295": 4294967295,
    "adapter.weight_update.lora_alpha=16.0": 16,
    "adapter.weight_update.lora_alpha=32": 32,
    "evaluate.sampling.num_sampling_steps=2.5e1": 25,
    "evaluate.sampling.guidance_scale=1": 1,
    "evaluate.sampling.guidance_scale=0": 0,
    "evaluate.sampling.guidance_channels=null": None,
    "+evaluate.sampling.eta=0.5": 0.5,
    "+evaluate.sampling.clip_denoised=true": True,
    "recover.fit.trainer.gradient_clip_val=null": None,
    "recover.fit.trainer.gradient_clip_val=1": 1,
    "learn_mask.fit.trainer.max_epochs=null": None,
    "learn_mask.fit.trainer.precision=bf16-mixed": "bf16-mixed",
    "learn_mask.fit.trainer.precision=32": 32,
    "learn_mask.fit.trainer.devices=auto": "auto",
    "learn_mask.fit.trainer.devices=[0,1]": [0, 1],
    "learn_mask.fit.trainer.devices='\"1\"'": "1",
    "learn_mask.fit.trainer.devices=-1": -1,
    "learn_mask.fit.trainer.strategy=ddp": "ddp",
    "runtime.devices=auto": "auto",
    "runtime.devices=[0,1]": [0, 1],
    "runtime.devices=4": 4,
    "runtime.num_nodes=8": 8,
    "runtime.precision=16-mixed": "16-mixed",
    "trainer.strategy=ddp_find_unused_parameters_true": "ddp_find_unused_parameters_true",
    "+recover.fit.trainer.max_time=00:01:00:00": "00:01:00:00",
    "+recover.fit.trainer.max_time='{minutes: 5}'": {"minutes": 5},
    "+recover.fit.trainer.deterministic=warn": "warn",
    "+recover.fit.trainer.deterministic=true": True,
    "+recover.fit.trainer.limit_train_batches=0.5": 0.5,
    "+recover.fit.trainer.profiler=simple": "simple",
    "+recover.fit.trainer.gradient_clip_algorithm=value": "value",
    "+adapter.weight_update.target_modules=[qkv]": ["qkv"],
    "+adapter.weight_update.target_modules=all-linear": "all-linear",
    "+adapter.weight_update.lora_dropout=0.1": 0.1,
    "+adapter.weight_update.use_rslora=true": True,
    "+adapter.weight_update.init_lora_weights=gaussian": "gaussian",
    "+adapter.weight_update.rank_pattern='{qkv: 4}'": {"qkv": 4},
    "+learn_mask.module.optimizer.betas=[0.9,0.95]": [0.9, 0.95],
    "+learn_mask.module.optimizer.fused=null": None,
    "learn_mask.module.optimizer.lr=1": 1,
    "learn_mask.module.optimizer._target_=torch.optim.SGD +learn_mask.module.optimizer.momentum=0.9": "torch.optim.SGD",
    "pruning=learned pruning.pattern='\"3:6\"'": "3:6",
    "pruning=learned pruning.pattern='\"1:1+1:2\"'": "1:1+1:2",
    "pruning=learned pruning.pattern='{denoiser.blocks: \"1:2\"}'": {"denoiser.blocks": "1:2"},
    "pruning=learned pruning.pattern=null pruning.keep=6": None,
    "pruning=learned pruning.keep=6 pruning.pattern=null": 6,
    "pruning=learned pruning.keep=0.5 pruning.pattern=null": 0.5,
    "pruning=learned pruning.keep='{denoiser.blocks: 6}' pruning.pattern=null": {"denoiser.blocks": 6},
    "pruning=learned pruning.search_loss=teacher": "teacher",
    "pruning=learned pruning.relaxation=hard_concrete pruning.pattern=null pruning.keep=6": "hard_concrete",
    "pruning=learned pruning.straight_through=kept": "kept",
    "pruning=learned pruning.stacks=denoiser.blocks": "denoiser.blocks",
    "pruning=learned pruning.stacks=[denoiser.blocks]": ["denoiser.blocks"],
    "pruning=learned pruning.init=-1.5": -1.5,
    "pruning=diff_pruning pruning.removed=0.75": None,
    "pruning=diff_pruning pruning.threshold=0": None,
    "pruning=diff_pruning pruning.num_samples=2e3": None,
    "pruning=ch pruning.depth.criterion=oracle pruning.depth.keep=6": None,
    "pruning=ch pruning.depth.criterion='{_target_: tinyfusion_pl.selection.criteria.rules.First}'": None,
    "pruning=learned pruning.tau_start=8": 8,
    "pruning=learned pruning.delta_w=merge": "merge",
    "pruning=learned +pruning.verify=false": False,
    "distill.weight_kd=1": 1,
    "distill.weight_feature=0": 0,
    "recover.module.scheduler=null": None,
    "recover.weights=raw": "raw",
    "recover.replace=linear": "linear",
    "model.weights=raw": "raw",
    "+model.activation_checkpointing=true": True,
    "+model.activation_checkpointing=0.5": 0.5,
    "learn_mask.fit.compile=true": True,
    "model.checkpoint='\"epoch=0-step=1 (2).ckpt\"'": "epoch=0-step=1 (2).ckpt",
    "model.checkpoint=~/x.pt": str(Path("~/x.pt").expanduser()),
    "+evaluate.models.mine=a.pt": "a.pt",
    "+evaluate.models.mine=null": None,
    "evaluate.reference='\"größe #1.npz\"'": "größe #1.npz",
    "evaluate.trainer.callbacks=[]": [],
    "evaluate.num_shown=0": 0,
    "name=x.y+z-1": "x.y+z-1",
    "name='\"größe\"'": "größe",
    "run_dir='\"with space (1)\"'": "with space (1)",
    "recipe=null": None,
    "averaging.decay=0": 0,
    "task.stages=[learn_mask,report]": ["learn_mask", "report"],
    "learn_mask.fit.callbacks.progress=null": None,
    "logger=wandb logger.factory.tags=[a,b]": None,
    "logger=wandb logger.factory.entity=me": None,
    "logger=wandb logger.factory.log_models=true": None,
    "logger=tensorboard": None,
    "metrics=inception metrics.metrics.sfid=null": None,
    "metrics=timm metrics.feature_network.model_name=resnet18 +metrics.feature_network.global_pool=avg": None,
    "data=imagenet_latents data.root=x data.class_to_idx=imagenet": None,
    "sampler@evaluate.sampling=dpm_solver +evaluate.sampling.scheduler.use_karras_sigmas=true": None,
    "callbacks@recover.fit.callbacks=evaluation recover.fit.callbacks.evaluation.every_n_steps=50": None,
    "task=measure measure.samples=x 'measure.reference=${data}'": None,
    "task=train +task.overrides.depth=6": None,
    "task=extract_latents extract.images=x extract.output=y extract.num_images=1e3": None,
    "adapter=full": None,
    "adapter=frozen": None,
    "logger=none": None,
    "distill=finetune": None,
    "distill=lift": None,
    "distill=interval": None,
    "distill=interval distill.interval_share=null": None,
    "distill.output_loss=lift": "lift",
    "+learn_mask.fit.callbacks.lr='{_target_: lightning.pytorch.callbacks.LearningRateMonitor}'":
        {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"},
    "recover.fit.trainer.strategy='{_target_: lightning.pytorch.strategies.DDPStrategy, find_unused_parameters: true}'":
        {"_target_": "lightning.pytorch.strategies.DDPStrategy", "find_unused_parameters": True},
}  # fmt: skip


@pytest.mark.parametrize("line", VALID)
def test_a_valid_setting_has_its_value(line):
    cfg, expected = passed(line), VALID[line]
    key = line.removeprefix("pruning=learned ").split()[0].partition("=")[0].lstrip("+")
    if (
        expected is None
        and "@" in key
        or key in ("adapter", "logger", "distill", "metrics", "data", "task", "pruning")
    ):
        return  # choices of groups, which compose
    value = OmegaConf.select(cfg, key)
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("debug", [(), ("+debug=default",), ("+debug=dry_run",)], ids=str)
@pytest.mark.parametrize(
    "experiment", sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
)
def test_every_experiment_passes(experiment, debug):
    if experiment.startswith(("digits", "cifar10", "table", "temperature", "figure")) and debug == (
        "+debug=dry_run",
    ):
        pytest.skip("dry_run is for recipes on latents")
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        cfg = compose("main", [f"+experiment={experiment}", *debug])
    before = copy.deepcopy(cfg)
    found = checked(cfg)
    for part in set(cfg) - {"run_dir", "hydra", "paths", "task"}:
        assert (
            OmegaConf.to_container(found, resolve=False)[part]
            == OmegaConf.to_container(before, resolve=False)[part]
        )


# -- those that take a run to see


class Begun(Exception):
    pass


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Run a command line up to where a run begins; returns the task with all its parts."""
    monkeypatch.chdir(tmp_path)
    tasks, build = [], command_line._build

    def write(*_):
        raise Begun

    monkeypatch.setattr(command_line, "_build", lambda node: tasks.append(build(node)) or tasks[-1])
    monkeypatch.setattr(command_line, "write_config", write)
    monkeypatch.setattr(command_line, "report", lambda error, *_: tasks.append(error) or 1)

    def run(*arguments):
        cli.main([*arguments, "run_dir=out"])
        assert isinstance(tasks[-1], Begun), tasks[-1]
        return tasks[-2]

    return run


def test_null_drops_a_callback(begun):
    task = begun(
        "learn_mask.fit.callbacks.progress=null",
        "recover.fit.callbacks.ema=null",
        "recover.weights=raw",
    )
    assert task.learn_mask.fit.callbacks == {} and set(task.recover.fit.callbacks) == {"progress"}


def test_a_whole_float_arrives_as_an_integer(begun):
    task = begun(
        "evaluate.num_samples=5e1", "data.batch_size=8.0", "recover.fit.trainer.max_steps=2e1"
    )
    assert (
        task.evaluate.num_samples,
        task.data.batch_size,
        task.recover.fit.trainer.keywords["max_steps"],
    ) == (50, 8, 20)
    assert all(type(n) is int for n in (task.evaluate.num_samples, task.data.batch_size))


def test_raw_weights_need_no_averaging(begun):
    task = begun("callbacks@recover.fit.callbacks=default", "recover.weights=raw")
    assert set(task.recover.fit.callbacks) == {"progress"} and task.recover.weights == "raw"


def test_a_mixture_may_keep_a_group_whole(begun):
    task = begun("pruning=learned", "pruning.pattern='1:1+6:11'")
    assert task.stages == ["learn_mask", "recover", "evaluate", "report"]
