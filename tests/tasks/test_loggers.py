"""The loggers that configs name."""

from lightning.pytorch import Trainer

from tinyfusion_pl import DepthPruningCallback, MaskLearning, create_model
from tinyfusion_pl.data import DigitsDataModule
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.tasks import wandb_logger


def test_wandb_gets_the_decision_and_a_resumed_stage_goes_on_in_its_run(tmp_path):
    logger = wandb_logger(folder=tmp_path / "logs" / "learn_mask", stage="learn_mask", experiment="digits_d6", project="p", offline=True)
    again = wandb_logger(folder=tmp_path / "logs" / "learn_mask", stage="learn_mask", experiment="digits_d6", project="p", offline=True)
    other = wandb_logger(folder=tmp_path / "logs" / "recover", stage="recover", experiment="digits_d6", project="p", offline=True)
    assert logger.version == again.version != other.version
    module = MaskLearning(create_model("dit_digits", depth=2, hidden_size=16, num_heads=2), objective=GaussianDiffusion())
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=2, logger=logger, log_every_n_steps=1, enable_checkpointing=False,
                      callbacks=[DepthPruningCallback("1:2", save_dir=tmp_path / "shallow")], enable_progress_bar=False,
                      enable_model_summary=False)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=4))
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["gates/blocks/kept_0"] + summary["gates/blocks/kept_1"] == 1
    assert summary["gates/tau"] > 0 and list((tmp_path / "logs").rglob("*.wandb"))
