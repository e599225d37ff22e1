"""MAR through mask learning, recovery and a shallow folder, in a real Trainer."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from mar_util import trained_like
from tinyfusion_pl import DepthPruningCallback, MaskLearning, Recovery
from tinyfusion_pl.models import load_decision, load_shallow
from tinyfusion_pl.objectives import ImageSampler, MaskedAutoregression


def fit(module, *callbacks, folder, **kwargs):
    x = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=3,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **kwargs,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, torch.arange(16) % 5), batch_size=4))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    torch.manual_seed(0)
    folder, model = (
        tmp_path_factory.mktemp("mar"),
        trained_like(encoder_depth=4, decoder_depth=6, activation_checkpointing=True),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruning = DepthPruningCallback("1:2", save_dir=folder / "shallow", logits_lr=0.1)
    fit(MaskLearning(model, objective=MaskedAutoregression()), pruning, folder=folder)
    return folder / "shallow", before, pruning


def test_both_stacks_learn_their_masks_and_keep_half_each(pruned):
    _, _, pruning = pruned
    assert {path: len(kept) for path, kept in pruning.decision.kept_blocks.items()} == {
        "encoder_blocks": 2,
        "decoder_blocks": 3,
    }
    for stack in pruning.gates.stacks:
        assert all((logits != 0.02).any() for logits in stack.logits)


def test_kept_blocks_and_the_head_have_their_original_weights(pruned):
    folder, before, pruning = pruned
    shallow = load_shallow(folder)
    kept = {path: iter(blocks) for path, blocks in pruning.decision.kept_blocks.items()}
    for path, stack in (
        ("encoder_blocks", shallow.encoder_blocks),
        ("decoder_blocks", shallow.decoder_blocks),
    ):
        for block in stack:
            source = next(kept[path])
            assert all(
                torch.equal(value, before[f"{path}.{source}.{name}"])
                for name, value in block.state_dict().items()
            )
    assert len(shallow.diffloss["net"].res_blocks) == 2
    for name, value in shallow.state_dict().items():
        if "_blocks." not in name or name.startswith("diffloss."):
            assert torch.equal(value, before[name]), name


def test_each_stack_may_have_a_pattern_of_its_own(tmp_path):
    pruning = DepthPruningCallback(
        {"encoder_blocks": "1:2", "decoder_blocks": "3:4"},
        weight_update="full",
        save_dir=tmp_path / "shallow",
    )
    model = trained_like(encoder_depth=2, decoder_depth=4)
    fit(MaskLearning(model, objective=MaskedAutoregression()), pruning, folder=tmp_path)
    shallow = load_shallow(tmp_path / "shallow")
    assert (shallow.config["encoder_depth"], shallow.config["decoder_depth"]) == (1, 3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_pruned_model_recovers_with_masked_distillation_and_samples(
    pruned, tmp_path, precision
):
    folder, before, _ = pruned
    teacher = trained_like(encoder_depth=4, decoder_depth=6)
    teacher.load_state_dict(before)
    module = Recovery(
        load_shallow(folder),
        teacher=teacher,
        decision=load_decision(folder),
        objective=MaskedAutoregression(),
    )
    assert module.pairs == {
        path: [(i, 2 * i + 1) for i in range(n)]
        for path, n in (("encoder_blocks", 2), ("decoder_blocks", 3))
    }
    start = {name: value.clone() for name, value in module.denoiser.state_dict().items()}
    logged = []
    module.log_dict = lambda values, **_: logged.append(values)
    fit(module, folder=tmp_path, precision=precision)
    assert {"train/loss_data", "train/loss_kd", "train/loss_feature"} == set(logged[0])
    assert all(value.isfinite() and value > 0 for values in logged for value in values.values())
    assert all(
        not torch.equal(value, start[name])
        for name, value in module.denoiser.state_dict().items()
        if name.endswith("weight")
    )
    sampler = ImageSampler(
        denoiser=module.denoiser,
        objective=module.objective,
        latent_shape=(3, 4, 4),
        decode=lambda latents: latents,
        sampling={"num_iterations": 4, "num_sampling_steps": 2, "guidance_scale": 3.0},
    )
    assert sampler(torch.arange(2), torch.tensor([0, 4])).isfinite().all()
