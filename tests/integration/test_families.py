"""Every family through the whole job on the command line, small, on digits."""

import json

import pytest

from tinyfusion_pl import load_shallow
from tinyfusion_pl.cli import main

SMALL = [
    "+debug=default",
    "model.checkpoint=random",
    "data.batch_size=8",
    "evaluate.num_timing_rounds=1",
    "+model.num_classes=10",
    "+model.in_channels=1",
    "+model.input_size=8",
    "+model.hidden_size=32",
    "+model.num_heads=2",
]
SIT = ["model.name=sit_s_2", "objective=sit", "+model.depth=4"]
FAMILIES = {
    "sit-sde": (
        [*SIT, "sampler@evaluate.sampling=sit_sde", "evaluate.sampling.num_sampling_steps=4"],
        {"blocks": 2},
    ),
    "sit-ode": ([*SIT, "sampler@evaluate.sampling=sit_ode", "distill=output"], {"blocks": 2}),
    "dit-dpm_solver": (
        ["model.name=dit_s_2", "+model.depth=4", "sampler@evaluate.sampling=dpm_solver"],
        {"blocks": 2},
    ),
    "mar": (
        [
            "model.name=mar_base",
            "objective=mar",
            "sampler@evaluate.sampling=mar",
            "+model.encoder_depth=2",
            "+model.decoder_depth=4",
            "+model.head_width=32",
            "+model.head_depth=1",
            "+model.buffer_size=4",
            "evaluate.sampling.num_iterations=4",
        ],
        {"encoder_blocks": 1, "decoder_blocks": 2},
    ),
    "uvit": (
        ["model.name=uvit_s_2", "objective=noise", "+model.depth=4"],
        {"in_blocks+out_blocks": 2},
    ),
    "udit": (
        [
            "model.name=udit_s",
            "+model.depth_latent=2",
            "+model.depth_encoder_2=2",
            "+model.depth_decoder_2=2",
        ],
        {
            "encoder_level_1": 1,
            "encoder_level_2": 1,
            "latent": 1,
            "decoder_level_2": 1,
            "decoder_level_1": 1,
        },
    ),
}


ALSO = ("sit-ode", "dit-dpm_solver")  # whose samplers tests/integration/test_sit.py runs


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] if name in ALSO else [])
        for name, each in FAMILIES.items()
    ],
    ids=FAMILIES,
)
@pytest.mark.filterwarnings("ignore:.*randomly initiali")
def test_a_family_is_pruned_recovered_measured_and_reported(words, kept, tmp_path, capfd):
    assert main([*SMALL, "pruning=learned", *words, f"run_dir={tmp_path}"]) == 0, (
        capfd.readouterr().err
    )
    record = json.loads((tmp_path / "shallow" / "record.json").read_text())
    assert {path: len(stack["kept_blocks"]) for path, stack in record["stacks"].items()} == kept
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert all(metrics[role]["fid"] > 0 for role in ("teacher", "pruned", "recovered"))
    assert metrics["recovered"]["depth"] == sum(kept.values()) < metrics["teacher"]["depth"]
    assert load_shallow(tmp_path / "recovered").config == load_shallow(tmp_path / "shallow").config
    assert (tmp_path / "report.html").stat().st_size > 10_000
