"""Bad settings: one clear sentence that names the key, before a run has begun, with nothing left behind.

First a table; then each leaf of every experiment with a value of a kind that it cannot have.
"""

import copy
import random
from functools import cache

import pytest
from omegaconf import OmegaConf

from bad_settings import BAD
from settings_door import composed, configured, refusal
from tinyfusion_pl import cli
from tinyfusion_pl.cli.errors import sentence
from tinyfusion_pl.cli.settings import MAX_TOLD, checked
from tinyfusion_pl.models import pretrained

RAW = (
    "Traceback",
    "full_key",
    "object_type",
    "hydra.cc",
    "pydantic",
    "_target_ = ",
    "Error in call to target",
)
OTHERS = ("digits_teacher", "dit_d14", "dit_d7", "mar_d16", "sit_d14")
GROUPS = [("pruning=learned",), (), *((f"+experiment={name}",) for name in OTHERS), ("callbacks@recover.fit.callbacks=evaluation",),
          ("logger=wandb",), ("sampler@evaluate.sampling=dpm_solver",), ("metrics=kid",), ("metrics=fd_dinov2",), ("adapter=full",),
          ("distill=lift",), ("distill=interval",), ("pruning=diff_pruning", "distill=output")]  # fmt: skip


def assert_clear(said, key):
    assert said, "it was accepted"
    assert key in said and not any(word in said for word in RAW), said
    assert len(said) < 4000, said


@pytest.fixture(scope="module")
def teacher():
    return pretrained.load_pretrained("shipped", name="dit_digits")


@pytest.fixture
def _loaded_once(teacher, monkeypatch):
    """The shipped teacher is read once; whatever else is asked for is loaded as ever."""
    load, plain = (
        pretrained.load_pretrained,
        {"name": "dit_digits", "weights": "ema", "prefix": "", "variant": None},
    )
    monkeypatch.setattr(
        pretrained,
        "load_pretrained",
        lambda where, /, **options: (
            copy.deepcopy(teacher)
            if where == "shipped" and options == plain
            else load(where, **options)
        ),
    )


@pytest.mark.usefixtures("_loaded_once")
@pytest.mark.parametrize(("line", "key"), BAD)
def test_a_bad_setting_is_named(line, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_clear(refusal(line, tmp_path / "runs" / "run", monkeypatch), key)
    assert not [file for file in tmp_path.rglob("*") if not file.is_dir()]


# -- every leaf

WRONG = {  # kind of the present value -> values that it cannot have
    "whole": ["2.5", "nan", "inf", "hot", "[[1]]", "{a: 1}", "-7", "1e300"],
    "number": ["nan", "inf", "-inf", "hot", "[[1]]", "{a: 1}", "1e300", "true"],
    "bool": ["5", "hot", "[[1]]", "{a: 1}", "1.5"],
    "text": ["1.5", "[[x]]", "{a: 1}", "nan"],
    "nothing": ["[[x]]", "{a: 1}"],
    "mapping": ["5", "hot", "[[x]]", "nan"],
    "list": ["5", "hot", "nan"],
}
# Looked at by what they make, or where they stand (in the table); timm's options have no types.
ANY = {
    "pruning.pattern",
    "pruning.keep",
    "pruning.units",
    "search.trials",
    "search.trial_steps.0",
    "search.trial_steps.1",
    "search.trial_steps.2",
    "pruning.weight_update",
    "metrics.feature_network.global_pool",
}


def get_kind(value):
    kinds = (
        (bool, "bool"),
        (int, "whole"),
        (float, "number"),
        (str, "text"),
        (dict, "mapping"),
        (list, "list"),
    )
    return next((kind for hint, kind in kinds if isinstance(value, hint)), "nothing")


def leaves(container, prefix=""):
    """(key, value) of every setting, mappings too; a reference as the value behind it."""
    for name, value in container.items() if isinstance(container, dict) else enumerate(container):
        yield f"{prefix}{name}", value
        if isinstance(value, (dict, list)):
            yield from leaves(value, f"{prefix}{name}.")


@cache
def places():
    """Key -> (groups under which it is there, kind of its value), over all experiments."""
    found = {}
    for groups in GROUPS:
        cfg = composed(*groups)
        for key, written in leaves(OmegaConf.to_container(cfg, resolve=False)):
            top = key.partition(".")[0]
            if top in ("hydra", "task") or key in ANY or written == "???":
                continue
            value = written
            if isinstance(written, str) and "${" in written:
                if written.startswith(("${config_hash", "runs/", "${hydra")):
                    continue
                value = OmegaConf.select(cfg, key)
                value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            found.setdefault(key, (groups, get_kind(value)))
    return found


def refused(groups, overrides):
    """What the settings of a command line are refused with."""
    try:
        checked(configured(overrides, groups))
    except Exception as error:
        return sentence(error, overrides)
    return ""


def drawn(seed, each):
    """(groups, kind) -> [(key, value)]: `each` values for every leaf, drawn with `seed`."""
    draw, rows = random.Random(seed), {}
    for key, (groups, kind) in sorted(places().items()):
        values = [
            value for value in WRONG[kind] if value != "hot" or not key.endswith(".devices")
        ]  # a text to Lightning, as "auto"
        for place, value in enumerate(draw.sample(values, min(each, len(values)))):
            rows.setdefault((groups, kind, place), []).append((key, value))
    return rows


def check_swept(rows):
    """Several at once, as far as one sentence each is told; what is not found there is tried alone."""
    wrong = []
    for (groups, kind, _), pairs in rows.items():
        at_once = 1 if kind in ("mapping", "list") else MAX_TOLD
        for start in range(0, len(pairs), at_once):
            some = dict(pairs[start : start + at_once])
            lines = refused(groups, [f"{key}={value}" for key, value in some.items()]).splitlines()
            for key, value in some.items():
                said = next((line for line in lines if key in line), None)
                try:
                    assert_clear(
                        said if at_once > 1 and said else refused(groups, [f"{key}={value}"]), key
                    )
                except AssertionError as error:
                    wrong.append(f"{key}={value} {groups or ''}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def test_every_leaf_refuses_a_value_of_another_kind():
    rows = {groups: pairs[::4] for groups, pairs in drawn(seed=0, each=1).items()}
    assert sum(map(len, rows.values())) > 75
    check_swept(rows)


@pytest.mark.slow
def test_every_leaf_refuses_every_value_of_another_kind():
    check_swept(drawn(seed=0, each=99))


# -- through the whole command line

WHOLE = [
    ("evaluate.num_samples=2.5", "evaluate.num_samples"),
    ("++foo.bar=1", "foo.bar"),
    ("run_dir=''", "run_dir"),
    ("name=../x", "name"),
    ("data=null", "data"),
    ("sampler@evaluate.sampling=null", "sampler@evaluate.sampling"),
    ("distill=5", "distill"),
    ("recipe=5", "recipe"),
    ("task=5", "task"),
    ("model={name: x}", "model"),
    ("evaluate.sampling=[]", "evaluate.sampling"),
    ("+sweep=gumbel", "-m"),
    ("-m", "-m"),
    ("model.checkpoint=epoch=0-step=1.ckpt", 'model.checkpoint="epoch=0-step=1.ckpt"'),
    ("pruning.trials=None", "pruning.trials=null"),
    ("seed=0,1", "seed=0,1"),
    ("sed=1", "sed"),
    ("data.batchsize=1", "data.batchsize"),
]


@pytest.mark.parametrize(("argument", "key"), WHOLE)
def test_the_command_line_ends_with_one_sentence(argument, key, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main([argument, "seed=1"] if argument == "-m" else [argument]) == 1
    out, errors = capfd.readouterr()
    assert errors.startswith("error: ") and key in errors and "learn_mask:" not in out, errors
    assert not any(word in errors for word in RAW), errors
    assert not list(tmp_path.iterdir())
