"""What is written opens in the program it was written for."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps

from small_dit_model import relative, small_batch, small_dit
from tinyfusion_pl import cli
from tinyfusion_pl.artifacts import ArtifactError, read_json, temporary_path
from tinyfusion_pl.models import export_model, load_pretrained, load_shallow, save_shallow


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def new_vae(**overrides):
    return AutoencoderKL(
        **{
            **dict(
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                norm_num_groups=4,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                layers_per_block=1,
            ),
            **overrides,
        }
    )


@pytest.fixture
def vae(tmp_path):
    new_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


# -- diffusers
def test_diffusers_opens_a_shallow_model_with_equal_outputs_at_shift_1(tmp_path):
    model = small_dit(frequency_shift=1)
    export_model(model, tmp_path / "out")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert len(theirs.transformer_blocks) == 3
    x, t, y = small_batch()
    with torch.no_grad():
        assert relative(theirs(x, timestep=t, class_labels=y).sample, model(x, t, y)) < 1e-6


@pytest.mark.parametrize(
    "sizes", [{"learn_sigma": False}, {"patch_size": 4}, {"input_size": 16}, {"norm2_eps": 1e-3}]
)
def test_diffusers_gets_every_size(tmp_path, sizes):
    model = small_dit(frequency_shift=1, **sizes)
    theirs = DiTTransformer2DModel.from_pretrained(
        export_model(model, tmp_path / "out", format="diffusers")
    )
    x, t, y = small_batch()
    x = torch.randn(6, 4, *[model.config["input_size"]] * 2)
    with torch.no_grad():
        assert relative(theirs(x, timestep=t, class_labels=y).sample, model(x, t, y)) < 1e-6


def test_a_model_of_shift_0_warns_and_differs_by_the_shift_alone(tmp_path):
    model = small_dit()
    with pytest.warns(
        UserWarning, match="frequency_shift=0, diffusers with 1.*docs/checkpoints.md"
    ):
        export_model(model, tmp_path / "out")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    x, t, y = small_batch()
    with torch.no_grad():
        expected = model(x, t, y)
        assert relative(theirs(x, timestep=t, class_labels=y).sample, expected) > 1e-2
        for module in theirs.modules():
            if isinstance(module, Timesteps):
                module.downscale_freq_shift = 0
        assert relative(theirs(x, timestep=t, class_labels=y).sample, expected) < 1e-6


def test_a_model_of_shift_1_warns_when_written_for_the_original_code(tmp_path, recwarn):
    with pytest.warns(UserWarning, match="frequency_shift=1, the original DiT code with 0"):
        export_model(small_dit(frequency_shift=1), tmp_path / "out.pt")
    recwarn.clear()
    export_model(small_dit(), tmp_path / "again.pt")
    export_model(small_dit(frequency_shift=1), tmp_path / "out")
    assert not [each for each in recwarn if "frequency_shift" in str(each.message)]


def test_what_went_to_diffusers_comes_back_the_same(tmp_path):
    model = small_dit(frequency_shift=1)
    again = load_pretrained(export_model(model, tmp_path / "out"))
    assert same(again, model) and again.config == model.config


def test_ditpipeline_opens_and_samples(tmp_path, vae):
    model = small_dit(frequency_shift=1, num_classes=1000)
    export_model(model, tmp_path / "out", vae=vae)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "model_index.json",
        "scheduler",
        "transformer",
        "vae",
    ]
    pipe = DiTPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        pipe.get_label_ids(["golden retriever", "white shark"]),
        guidance_scale=4.0,
        num_inference_steps=2,
        output_type="np",
        generator=torch.manual_seed(0),
    ).images
    assert images.shape == (2, 16, 16, 3) and images.std() > 0
    assert pipe.labels["golden retriever"] == 207 and pipe.scheduler.config["beta_end"] == 0.02
    assert same(load_pretrained(tmp_path / "out"), model)


def test_the_pipelines_schedule_is_the_one_the_model_was_trained_with(tmp_path, vae):
    from tinyfusion_pl.objectives import GaussianDiffusion

    export_model(small_dit(frequency_shift=1, num_classes=1000), tmp_path / "out", vae=vae)
    theirs = DiTPipeline.from_pretrained(tmp_path / "out").scheduler.alphas_cumprod
    torch.manual_seed(0)
    draw = GaussianDiffusion().draw(torch.zeros(64, 1, 1, 1))
    torch.testing.assert_close(
        draw.x_t.flatten(), draw.noise.flatten() * (1 - theirs[draw.t]).sqrt(), rtol=1e-5, atol=1e-6
    )


def test_the_vae_may_be_that_of_a_pipeline_and_names_may_be_given(tmp_path, vae):
    (tmp_path / "pipeline").mkdir()
    shutil.move(vae, tmp_path / "pipeline" / "vae")
    with pytest.warns(UserWarning, match="1000 as the null label, this model 10"):
        export_model(
            small_dit(frequency_shift=1),
            tmp_path / "out",
            vae=tmp_path / "pipeline",
            id2label={i: f"class {i}" for i in range(10)},
        )
    assert DiTPipeline.from_pretrained(tmp_path / "out").labels["class 7"] == 7


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"class_dropout_prob": 0.0}, "always has a null label"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 4, this model has 2.0"),
    ],
)
def test_what_diffusers_has_not_is_refused_before_anything_is_written(tmp_path, overrides, said):
    with pytest.raises(ValueError, match=said):
        export_model(small_dit(**overrides), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_position_embedding_than_the_computed_one_is_refused(tmp_path):
    model = small_dit(frequency_shift=1)
    with torch.no_grad():
        model.pos_embed[0, 3, 5] += 0.1
    with pytest.raises(ValueError, match="position embedding"):
        export_model(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "does not hold an AutoencoderKL"),
        (
            lambda folder: new_vae(latent_channels=3).save_pretrained(folder),
            "has 3 latent channels, the model takes 4",
        ),
        (
            lambda folder: export_model(small_dit(frequency_shift=1), folder),
            "'DiTTransformer2DModel'; DiTPipeline takes an AutoencoderKL",
        ),
    ],
)
def test_a_vae_that_does_not_fit_is_refused(tmp_path, make, said):
    make(tmp_path / "other")
    with pytest.raises(ArtifactError, match=said):
        export_model(small_dit(frequency_shift=1), tmp_path / "out", vae=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        export_model(small_dit(frequency_shift=1), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["out", "out.pt", "out.safetensors"])
def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path, name):
    left = temporary_path(tmp_path / name)  # an earlier process had this one's number
    left.mkdir() if left.suffix == "" else left.touch()
    export_model(small_dit(frequency_shift=int(name == "out")), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_disk_that_fills_up_leaves_no_half_folder(tmp_path, vae, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", no_space)
    with pytest.raises(ArtifactError, match="Cannot write .*out: No space left on device"):
        export_model(small_dit(frequency_shift=1, num_classes=1000), tmp_path / "out", vae=vae)
    assert [file.name for file in tmp_path.iterdir()] == ["vae"]


# -- the other formats
def test_published_is_a_bare_state_dict_of_published_names(tmp_path):
    model = small_dit()
    state = torch.load(export_model(model, tmp_path / "out.pt"), weights_only=True)
    assert list(state) == list(model.state_dict()) and state["pos_embed"].shape == (1, 16, 32)
    assert {"x_embedder.proj.weight", "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight", "blocks.2.attn.qkv.weight",
            "blocks.0.adaLN_modulation.1.bias", "final_layer.linear.weight"} <= state.keys()  # fmt: skip
    assert same(load_pretrained(tmp_path / "out.pt", num_heads=4), model)


def test_safetensors_needs_nothing_beside_it(tmp_path):
    model = small_dit(frequency_shift=1, mlp_ratio=2.0, class_dropout_prob=0.0)
    again = load_pretrained(export_model(model, tmp_path / "out.safetensors"))
    assert (
        same(again, model) and again.config == model.config and again.model_name == model.model_name
    )


def test_the_written_tensors_share_nothing_with_the_model(tmp_path):
    model = small_dit()
    path = export_model(model, tmp_path / "out.pt")
    before = load_pretrained(path, num_heads=4).state_dict()["pos_embed"].clone()
    with torch.no_grad():
        model.pos_embed.zero_()
    assert torch.equal(load_pretrained(path, num_heads=4).state_dict()["pos_embed"], before)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("out", "published"),
        ("out.pt", "diffusers"),
        ("out.pt", "safetensors"),
        ("out.safetensors", "published"),
        ("out", "safetensors"),
    ],
)
def test_a_format_that_does_not_go_with_the_suffix_is_refused(tmp_path, name, format):
    with pytest.raises(ValueError, match="does not match"):
        export_model(small_dit(), tmp_path / name, format=format)


def test_unknown_formats_foreign_models_and_stray_options_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="Unknown format 'onnx'; expected one of published, safetensors, diffusers"
    ):
        export_model(small_dit(), tmp_path / "out", format="onnx")
    with pytest.raises(ValueError, match="Cannot export a Linear"):
        export_model(torch.nn.Linear(1, 1), tmp_path / "out.pt")
    with pytest.raises(ValueError, match="vae and id2label"):
        export_model(small_dit(), tmp_path / "out.pt", vae=tmp_path)
    with pytest.raises(ValueError, match="id2label belongs to a pipeline"):
        export_model(small_dit(frequency_shift=1), tmp_path / "out", id2label={0: "a"})


@pytest.mark.parametrize("name", ["out", "out.pt", "out.safetensors"])
def test_a_place_that_cannot_be_written_to_is_named(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match=f"Cannot write .*{name}"):
        export_model(small_dit(frequency_shift=int(name == "out")), tmp_path / "file" / name)


# -- the command line
def test_the_word_exports_a_shallow_folder_to_every_format(tmp_path, capsys, vae):
    model = small_dit(frequency_shift=1, num_classes=1000)
    save_shallow(tmp_path / "shallow", model, {"stacks": {}})
    assert cli.main(["export", str(tmp_path / "shallow"), str(tmp_path / "out.safetensors")]) == 0
    assert "dit, 0.1M parameters, as safetensors" in capsys.readouterr().out
    assert (
        cli.main(
            ["export", str(tmp_path / "out.safetensors"), str(tmp_path / "folder"), "diffusers"]
        )
        == 0
    )
    assert (
        cli.main(
            ["export", str(tmp_path / "folder"), str(tmp_path / "pipeline"), "diffusers", str(vae)]
        )
        == 0
    )
    assert read_json(tmp_path / "pipeline" / "model_index.json")["_class_name"] == "DiTPipeline"
    again = load_pretrained(tmp_path / "pipeline")
    assert same(again, model) and same(load_shallow(tmp_path / "shallow"), again)


def test_the_word_tells_its_mistakes_in_one_sentence(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path / "none"), "out.pt"]) == 1
    assert capsys.readouterr().err.startswith(
        f"error: There is no checkpoint at {tmp_path / 'none'}. "
    )
    assert cli.main(["export", "one"]) == 2
    assert (
        capsys.readouterr().err == "error: Usage: tinyfusion export MODEL OUTPUT [FORMAT] [VAE]\n"
    )


def test_the_docs_figure_of_the_shift_gap_is_what_its_lines_compute(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    (lines,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "gap = {}" in block
    )
    stated = float(re.search(r"\| DiT-S/2, 6 blocks \| 0\.02 \| ([\d.]+) \|", page)[1])
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="frequency_shift"):
        exec(lines, found := {})
    assert round(found["gap"][0], 2) == stated and found["gap"][1] < 1e-6
