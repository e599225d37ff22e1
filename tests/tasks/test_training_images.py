"""How many images a model was trained on, from its record to the table."""

import json

import pytest

from tinyfusion_pl.cli import main
from tinyfusion_pl.models import load_pretrained
from tinyfusion_pl.models.records import TRAINING_IMAGES
from tinyfusion_pl.report import compare

SMALL = ["evaluate.num_samples=4", "evaluate.batch_size=4", "evaluate.num_shown=2", "evaluate.num_timing_rounds=0",
         "evaluate.sampling.num_sampling_steps=2"]  # fmt: skip


def test_training_counts_on_from_where_it_starts(tmp_path):
    shipped = load_pretrained("shipped").source[TRAINING_IMAGES]
    assert shipped == 4000 * 128  # conf/experiment/digits_teacher.yaml
    arguments = [
        "train.fit.trainer.max_steps=2",
        "train.module.scheduler.num_warmup_steps=0",
        "data.batch_size=8",
        f"run_dir={tmp_path}",
        *SMALL,
    ]
    assert main(["+experiment=digits_permuted", *arguments]) == 0
    record = json.loads((tmp_path / "trained" / "record.json").read_text())
    assert record[TRAINING_IMAGES] == shipped + 2 * 8
    assert load_pretrained(tmp_path / "trained").source[TRAINING_IMAGES] == record[TRAINING_IMAGES]


def test_the_table_states_the_share_of_the_teachers_training(tmp_path):
    arguments = ["pruning=first", "pruning.keep=6", "recover.fit.trainer.max_steps=2", "data.batch_size=16", *SMALL,
                 f"hydra.sweep.dir={tmp_path}", "name=share", "seed=0"]  # fmt: skip
    assert main(["-m", *arguments]) == 0
    table = compare(tmp_path)
    header, _, row = [line.split(" | ") for line in table.splitlines() if line.startswith("|")]
    share = dict(zip(header, row))["recovery, share of the teacher's training"]
    assert float(share.rstrip("%")) == pytest.approx(100 * 2 * 16 / (4000 * 128), rel=1e-2)
