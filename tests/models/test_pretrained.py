"""One way to trained weights: every form they come in, and what is told of those that do not fit."""

import argparse
import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from goldens_util import CASES, assert_near, golden_files, load, part
from small_dit_model import small_dit
from tinyfusion_pl.artifacts import ArtifactError, save_tensors
from tinyfusion_pl.models import (
    Denoiser,
    DiT,
    create_model,
    load_denoiser,
    load_pretrained,
    register_model,
    registry,
    save_shallow,
)

SIZES = {
    "input_size": 8,
    "in_channels": 4,
    "hidden_size": 32,
    "num_heads": 4,
    "num_classes": 10,
}  # of small_dit, but for the depth


class SiT(DiT):
    """Stands for a family whose keys and shapes are DiT's."""


class MAR(Denoiser):
    """Stands for a family with two stacks and MAR's names."""

    STACKS = {"encoder_blocks": "encoder_depth", "decoder_blocks": "decoder_depth"}

    def __init__(self, *, width=768, encoder_depth=3, decoder_depth=3, num_classes=5):
        super().__init__(
            {
                "width": width,
                "encoder_depth": encoder_depth,
                "decoder_depth": decoder_depth,
                "num_classes": num_classes,
            }
        )
        block = lambda: torch.nn.ModuleDict({"norm1": torch.nn.LayerNorm(width)})  # noqa: E731
        self.encoder_blocks = torch.nn.ModuleList(block() for _ in range(encoder_depth))
        self.decoder_blocks = torch.nn.ModuleList(block() for _ in range(decoder_depth))
        self.diffloss = torch.nn.ModuleDict(
            {"net": torch.nn.ModuleDict({"input_proj": torch.nn.Linear(4, 8)})}
        )


@pytest.fixture(autouse=True)
def families(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))
    register_model("sit_xl_2", SiT, alias="SiT-XL/2", depth=28)
    register_model("mar_base", MAR, width=768)


@pytest.fixture
def model():
    return small_dit()


def noisy(state):
    return {key: torch.randn_like(value) for key, value in state.items()}


def same(model, state):
    ours = model.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[k], state[k]) for k in state)


class Module(LightningModule):
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def training_step(self, batch):
        return 0 * self.denoiser.final_layer.linear.bias.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def lightning_checkpoint(model, path):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(accelerator="cpu", max_steps=1, **quiet)
    trainer.fit(Module(model), torch.utils.data.DataLoader(torch.ones(1, 1)))
    trainer.save_checkpoint(path)


NAMESPACE = argparse.Namespace(model="DiT-D14/2", image_size=256, lr=1e-4)
FORMS = {
    "bare.pt": lambda model, path: torch.save(model.state_dict(), path),
    "ema.pt": lambda model, path: torch.save(
        {
            "ema": model.state_dict(),
            "model": noisy(model.state_dict()),
            "opt": {},
            "args": NAMESPACE,
        },
        path,
    ),
    "mar.pth": lambda model, path: torch.save(
        {
            "model": noisy(model.state_dict()),
            "model_ema": model.state_dict(),
            "optimizer": {"state": {}},
            "epoch": 399,
            "scaler": {},
            "args": NAMESPACE,
        },
        path,
    ),
    "model.safetensors": lambda model, path: save_tensors(path, model.state_dict()),
    "last.ckpt": lightning_checkpoint,
    "shallow": lambda model, path: save_shallow(path, model, {"stacks": {}}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_by_its_path_alone(tmp_path, model, form):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    FORMS[form](model, tmp_path / form)
    options = {} if form == "shallow" else {"num_heads": 4}  # which only a record says
    loaded = load_pretrained(tmp_path / form, **options)
    assert same(loaded, state) and loaded.config == model.config and not loaded.training
    assert loaded.source["path"] == str(tmp_path / form) and len(loaded.source["sha256"]) == 64


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_as_a_configured_model_of_its_own_depth(tmp_path, form):
    model = small_dit(kept=(0, 3), name="dit_xl_2")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    FORMS[form](model, tmp_path / form)
    loaded = load_denoiser(
        "dit_xl_2", checkpoint=tmp_path / form, **SIZES
    )  # its registered depth is 28
    assert same(loaded, state) and len(loaded.blocks) == loaded.config["depth"] == 2


@pytest.mark.parametrize("form", ["ema.pt", "mar.pth"])
def test_raw_weights_by_option(tmp_path, model, form):
    FORMS[form](model, tmp_path / form)
    raw = torch.load(tmp_path / form, weights_only=False)["model"]
    assert same(load_pretrained(tmp_path / form, weights="raw", num_heads=4), raw)
    with pytest.raises(ValueError, match="'ema' or 'raw'"):
        load_pretrained(tmp_path / form, weights="best", num_heads=4)


@pytest.mark.parametrize(
    "overrides",
    [
        {"patch_size": 4},
        {"learn_sigma": False},
        {"mlp_ratio": 2.0},
        {"input_size": 16},
        {"in_channels": 1},
        {"num_classes": 3},
        {"class_dropout_prob": 0.0},
    ],
)
def test_every_size_but_the_heads_is_read_from_the_shapes(tmp_path, overrides):
    model = small_dit(**overrides)
    FORMS["bare.pt"](model, tmp_path / "bare.pt")
    classes = (
        {"num_classes": 10} if "class_dropout_prob" in overrides else {}
    )  # a table of 10 rows: 10 classes, or 9 and the null label
    assert load_pretrained(tmp_path / "bare.pt", num_heads=4, **classes).config == model.config


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("dit_forward*"))
def test_against_reference_a_published_layout_loads_by_its_path(tmp_path, file):
    golden = load(file)
    torch.save({"ema": part(golden, "weights"), "args": NAMESPACE}, tmp_path / "published.pt")
    loaded = load_pretrained(tmp_path / "published.pt", num_heads=CASES["config"]["heads"])
    with torch.no_grad():
        assert_near(loaded(golden["x"], golden["t"], golden["y"]), golden["output"], 1e-5)


@pytest.mark.parametrize("depth", [1, 14])
def test_a_shallow_published_file_of_a_registered_width_needs_no_argument_at_all(tmp_path, depth):
    model = create_model("dit_digits", depth=depth)
    FORMS["bare.pt"](model, tmp_path / "TinyDigits.pt")
    loaded = load_pretrained(tmp_path / "TinyDigits.pt")
    assert (loaded.model_name, loaded.config) == ("dit_digits", model.config)


@pytest.mark.parametrize(
    ("name", "depth", "input_size"),
    [("dit_xl_2", 14, 32), ("dit_xl_2", 28, 64), ("dit_l_4", 7, 32), ("dit_b_2", 12, 32)],
)
def test_published_sizes_are_told_by_their_shapes(name, depth, input_size):
    from tinyfusion_pl.models.detection import name_and_sizes

    with torch.device("meta"):
        model = create_model(name, depth=depth, input_size=input_size)
        found, sizes = name_and_sizes(model.state_dict(), "file.pt", given={})
        assert found == name and create_model(found, **sizes).config == model.config


def test_heads_that_nothing_tells_are_asked_for(tmp_path, model):
    FORMS["bare.pt"](model, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"bare\.pt holds a DiT of width 32.*num_heads=\.\.\."):
        load_pretrained(tmp_path / "bare.pt")


def test_a_depth_that_is_given_is_held_against_the_file(tmp_path, model):
    FORMS["bare.pt"](model, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"bare\.pt does not fit dit: 10 missing: blocks\.3"):
        load_pretrained(tmp_path / "bare.pt", num_heads=4, depth=4)


def test_a_copy_of_a_published_file_under_its_name_is_what_the_name_says(tmp_path):
    model = small_dit(name="dit_xl_2", input_size=64)
    FORMS["bare.pt"](model, tmp_path / "DiT-XL-2-512x512.pt")
    sizes = {k: v for k, v in SIZES.items() if k != "input_size"}
    loaded = load_denoiser("dit_xl_2", checkpoint=tmp_path / "DiT-XL-2-512x512.pt", **sizes)
    assert loaded.config["input_size"] == 64 and same(loaded, model.state_dict())


def test_two_stacks_are_read_each_and_the_width_tells_the_published_size(tmp_path):
    model = create_model("mar_base", encoder_depth=2, decoder_depth=4)
    torch.save(
        {
            "model": noisy(model.state_dict()),
            "model_ema": model.state_dict(),
            "args": argparse.Namespace(model="mar_base"),
        },
        tmp_path / "checkpoint-last.pth",
    )
    save_tensors(tmp_path / "plain.safetensors", model.state_dict())
    for file in ("checkpoint-last.pth", "plain.safetensors"):
        for name in (None, "mar_base"):
            loaded = load_pretrained(tmp_path / file, name=name)
            assert same(loaded, model.state_dict()) and loaded.config == model.config


def test_lists_that_are_one_stack_count_together():
    """As U-ViT's, whose in and out blocks are pruned in pairs."""
    from tinyfusion_pl.models.detection import get_depths

    class Paired(MAR):
        STACKS = {"encoder_blocks+decoder_blocks": "depth"}

    register_model("paired", Paired)
    assert get_depths(MAR(width=8, encoder_depth=2, decoder_depth=11).state_dict(), "paired") == {
        "depth": 13
    }


def test_a_mar_of_an_unknown_width_is_asked_for_its_name(tmp_path):
    save_tensors(tmp_path / "m.safetensors", MAR(width=16).state_dict())
    with pytest.raises(
        ValueError, match="MAR of width 16; published widths are 768, 1024, 1280.*name="
    ):
        load_pretrained(tmp_path / "m.safetensors")


# -- families that look alike
def test_what_looks_like_a_dit_and_says_nothing_is_one_unless_the_name_says_otherwise(
    tmp_path, model
):
    FORMS["bare.pt"](model, tmp_path / "bare.pt")
    assert type(load_pretrained(tmp_path / "bare.pt", num_heads=4)) is DiT
    assert type(load_pretrained(tmp_path / "bare.pt", name="sit_xl_2", **SIZES)) is SiT


def test_the_half_of_the_last_layer_that_a_sit_does_not_train_tells_which_of_both_a_file_is_of(
    tmp_path, model
):
    sit = create_model("sit_s_2", depth=1, **SIZES)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2)
    optimizer = torch.optim.AdamW(sit.parameters(), lr=1e-2)
    (sit(x, t, y) - x).square().mean().backward()
    optimizer.step()
    torch.save(sit.state_dict(), tmp_path / "sit.pt")
    for name in (None, "dit_s_2"):
        with pytest.raises(
            ValueError, match=r"sit.pt looks like a SiT checkpoint.*all zeros.*name=sit_xl_2"
        ):
            load_pretrained(tmp_path / "sit.pt", name=name, **SIZES)
    assert same(load_pretrained(tmp_path / "sit.pt", name="sit_s_2", **SIZES), sit.state_dict())
    FORMS["bare.pt"](model, tmp_path / "dit.pt")
    with pytest.warns(
        UserWarning, match="dit.pt is loaded as sit_s_2, but looks like a DiT checkpoint"
    ):
        load_pretrained(tmp_path / "dit.pt", name="sit_s_2", **SIZES)


def test_the_arguments_of_its_training_tell_a_sit(tmp_path, model):
    torch.save(
        {"ema": model.state_dict(), "args": argparse.Namespace(model="SiT-XL/2")},
        tmp_path / "0400000.pt",
    )
    loaded = load_pretrained(tmp_path / "0400000.pt", num_heads=4)
    assert type(loaded) is SiT and len(loaded.blocks) == 3
    with pytest.raises(
        ValueError,
        match=r"0400000\.pt holds a sit_xl_2, which is another family than dit_xl_2.*model\.name=sit_xl_2",
    ):
        load_denoiser("dit_xl_2", checkpoint=tmp_path / "0400000.pt", **SIZES)


@pytest.mark.parametrize(
    ("file", "name", "other"),
    [
        ("DiT-XL-2-256x256.pt", "sit_xl_2", "dit_xl_2"),
        ("TinyDiT-D14-MaskedKD-500K.pt", "sit_xl_2", "dit_xl_2"),
        ("SiT-XL-2-256x256.pt", "dit_xl_2", "sit_xl_2"),
        ("SiT-XL-2-256.pt", "dit_xl_2", "sit_xl_2"),
    ],
)
def test_a_published_file_name_of_the_other_family_is_refused(tmp_path, model, file, name, other):
    FORMS["bare.pt"](model, tmp_path / file)
    with pytest.raises(
        ValueError,
        match=f"{file} holds a {other}, which is another family than {name}.*name={other}",
    ):
        load_denoiser(name, checkpoint=tmp_path / file, **SIZES)


def test_a_record_of_another_model_is_refused(tmp_path, model):
    save_shallow(tmp_path / "shallow", model, {"stacks": {}})
    with pytest.raises(ValueError, match="shallow holds a dit, not a sit_xl_2"):
        load_pretrained(tmp_path / "shallow", name="sit_xl_2")


def test_keys_of_another_family_are_told_as_such(tmp_path, model):
    FORMS["bare.pt"](model, tmp_path / "dit.pt")
    save_tensors(tmp_path / "mar.safetensors", MAR(width=16).state_dict())
    with pytest.raises(
        ValueError,
        match=r"dit\.pt holds weights of another family \(DiT or SiT\) than mar_base's \(MAR\)",
    ):
        load_pretrained(tmp_path / "dit.pt", name="mar_base")
    with pytest.raises(
        ValueError,
        match=r"mar\.safetensors holds weights of another family \(MAR\) than dit_digits's \(DiT or SiT\)",
    ):
        load_denoiser("dit_digits", checkpoint=tmp_path / "mar.safetensors")


@pytest.mark.golden
@pytest.mark.parametrize("family", ["uvit", "udit", "mar", "sit"])
def test_goldens_of_other_families_are_recognised(family):
    from tinyfusion_pl.models.detection import detect_family

    files = [file.values[0] for file in golden_files(f"{family}*") if file.values[0]]
    for file in files:
        assert (
            detect_family(part(load(file), "weights"))
            == {"uvit": "U-ViT", "udit": "U-DiT", "mar": "MAR", "sit": "DiT or SiT"}[family]
        )
    if not files:
        pytest.skip(f"no {family} among the goldens")


# -- what does not fit
def test_a_foreign_state_dict_is_asked_for_its_name(tmp_path):
    save_tensors(tmp_path / "other.safetensors", torch.nn.Linear(2, 2).state_dict())
    with pytest.raises(
        ValueError, match=r"Cannot recognize the model of .*other\.safetensors.*name='dit_xl_2'"
    ):
        load_pretrained(tmp_path / "other.safetensors")


@pytest.mark.parametrize("form", ["bare.pt", "ema.pt", "mar.pth", "model.safetensors", "last.ckpt"])
def test_truncated_files_are_named(tmp_path, model, form):
    FORMS[form](model, tmp_path / form)
    content = (tmp_path / form).read_bytes()
    (tmp_path / form).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=f"{form} .*truncated"):
        load_pretrained(tmp_path / form, num_heads=4)


def test_wrong_shapes_are_named(tmp_path, model):
    save_tensors(
        tmp_path / "m.safetensors",
        {**model.state_dict(), "blocks.1.attn.proj.bias": torch.zeros(33)},
    )
    with pytest.raises(
        ValueError,
        match=r"m\.safetensors does not fit dit: 1 of another shape: blocks\.1\.attn\.proj\.bias \(33,\)",
    ):
        load_pretrained(tmp_path / "m.safetensors", num_heads=4)


def test_what_is_missing_is_told_with_what_could_be_meant(tmp_path):
    with pytest.raises(
        ArtifactError,
        match="There is no checkpoint at .*DiT-XL-256.pt. Did you mean DiT-XL-2-256x256.pt",
    ):
        load_pretrained(tmp_path / "DiT-XL-256.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ArtifactError, match=r"empty does not hold a model: expected record\.json .*config\.json"
    ):
        load_pretrained(tmp_path / "empty")


def test_an_altered_or_half_copied_shallow_folder_is_told(tmp_path, model):
    save_shallow(tmp_path / "shallow", model, {"stacks": {}})
    save_tensors(tmp_path / "shallow" / "model.safetensors", noisy(model.state_dict()))
    with pytest.raises(ArtifactError, match="altered"):
        load_pretrained(tmp_path / "shallow")
    (tmp_path / "shallow" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="There is no file"):
        load_pretrained(tmp_path / "shallow")


def test_arguments_beside_a_record_arrive(tmp_path, model):
    save_shallow(tmp_path / "shallow", model, {"stacks": {}})
    assert load_pretrained(
        tmp_path / "shallow", activation_checkpointing=True
    ).activation_checkpointing


def test_a_trained_folder_whose_record_has_no_decision_loads(tmp_path, model):
    """What task=train leaves, and what the package ships."""
    save_shallow(tmp_path / "trained", model, {})
    record = json.loads((tmp_path / "trained" / "record.json").read_text())
    del record["format"]
    (tmp_path / "trained" / "record.json").write_text(json.dumps(record))
    assert same(load_pretrained(tmp_path / "trained"), model.state_dict())


def test_shipped_weights_belong_to_their_model():
    shipped = load_pretrained("shipped")
    assert shipped.model_name == "dit_digits" and shipped.source["path"] == "shipped:digits_teacher"
    assert same(load_denoiser("dit_digits", checkpoint="shipped"), shipped.state_dict())
    with pytest.raises(
        ValueError,
        match="ships weights for dit_digits, not for 'dit_xl_2'; give model.checkpoint=PATH",
    ):
        load_denoiser("dit_xl_2", checkpoint="shipped")
