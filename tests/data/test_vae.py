"""The VAE from each place that it may be in, its numbers against diffusers' own, and MAR's layout against that network written plainly."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from latents_toys import autoencoder
from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.data import VAE, load_vae, vae
from tinyfusion_pl.data.vae_keys import compvis_to_diffusers

SMALL_MAR = {
    "block_out_channels": (4, 4, 8),
    "latent_channels": 3,
    "layers_per_block": 2,
    "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
}


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)


def test_moments_and_images_are_those_of_diffusers(images):
    model = autoencoder().eval()
    ours = VAE(model, source="test", batch_size=2)
    moments = ours.encode(images)
    with torch.no_grad():
        posterior = model.encode(images / 127.5 - 1).latent_dist
        latents = torch.randn(3, 4, 4, 4)
        decoded = model.decode(latents / 0.18215).sample
    assert torch.allclose(moments, torch.cat([posterior.mean, posterior.logvar], 1), atol=1e-6)
    assert (
        ours.scaling_factor == 0.18215
        and ours.downsampling == 2
        and ours.latent_shape(8) == (4, 4, 4)
    )
    expected = (127.5 * decoded + 128.0).clamp(0, 255).to(torch.uint8)
    assert (ours.decode(latents).int() - expected.int()).abs().max() <= 1 and ours.decode(
        latents
    ).dtype == torch.uint8


@pytest.mark.parametrize(
    "options", [{"slicing": True}, {"batch_size": 1}, {"precision": "bfloat16"}]
)
def test_options_change_cost_and_not_the_result(options):
    latents = torch.randn(3, 4, 8, 8)
    plain, other = (
        VAE(autoencoder(), source="test", **each).decode(latents).int() for each in ({}, options)
    )
    assert (plain - other).abs().max() <= (4 if "precision" in options else 1)
    assert plain.float().std() > 1


def test_flags_reach_the_model_and_bfloat16_is_what_it_computes_in():
    model = VAE(autoencoder(), source="test", slicing=True, tiling=True, precision="bfloat16").model
    assert (
        model.use_slicing and model.use_tiling and next(model.parameters()).dtype == torch.bfloat16
    )
    model = VAE(model, source="test").model
    assert not model.use_slicing and not model.use_tiling


def test_a_folder_and_a_pipelines_folder_give_the_same_vae(tmp_path, images):
    autoencoder().save_pretrained(tmp_path / "pipeline" / "vae")
    one, other = load_vae(tmp_path / "pipeline"), load_vae(str(tmp_path / "pipeline" / "vae"))
    assert torch.equal(one.encode(images), other.encode(images))
    assert torch.equal(one.encode(images), VAE(autoencoder(), source="test").encode(images))


def test_the_fingerprint_is_of_the_encoder_in_any_precision():
    one, same, decoder, other = (
        autoencoder(),
        autoencoder().half(),
        autoencoder(),
        autoencoder(seed=1),
    )
    torch.nn.init.zeros_(decoder.decoder.conv_in.weight)
    prints = [vae.encoder_fingerprint(model) for model in (one, same, decoder, other)]
    assert prints[0] == prints[1] == prints[2] != prints[3]


@pytest.mark.parametrize(
    ("architecture", "channels", "size", "scale"), [("sd", 4, 32, 0.18215), ("mar", 16, 16, 0.2325)]
)
def test_random_weights_are_said_and_have_the_published_sizes(
    monkeypatch, architecture, channels, size, scale
):
    small = {**vae.ARCHITECTURES[architecture]}
    small["block_out_channels"] = (32,) * len(
        small["block_out_channels"]
    )  # the real ones take seconds
    monkeypatch.setitem(vae.ARCHITECTURES, architecture, small)
    with pytest.warns(UserWarning, match=f"randomly initialised .architecture '{architecture}'"):
        ours, again = (load_vae("random", architecture=architecture) for _ in range(2))
    assert ours.latent_shape(256) == (channels, size, size) and ours.scaling_factor == scale
    assert ours.record() == again.record()


# -- the layout of CompVis and MAR
def compvis_key(key, num_levels):
    """A diffusers name in CompVis's layout: the map under test the other way round, written from the published names."""
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(
        r"up_blocks\.(\d+)", lambda found: f"up.{num_levels - 1 - int(found[1])}", key
    ).replace("down_blocks", "down")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    key = re.sub(r"(down|up)samplers\.0", r"\1sample", key).replace("resnets", "block")
    for theirs, published in attention.items():
        key = re.sub(
            rf"attentions\.(\d)\.{re.escape(theirs)}\.", rf"attentions.\1.{published}.", key
        )
    return key.replace("mid_block.attentions.0", "mid.attn_1").replace("attentions", "attn")


def compvis_state(model):
    num_levels = len(model.config.block_out_channels)
    state = {}
    for name, tensor in model.state_dict().items():
        attention = "attentions" in name and tensor.ndim == 2
        state[compvis_key(name, num_levels)] = (
            tensor[:, :, None, None] if attention else tensor
        ).clone()
    return state


class Plain:
    """The published autoencoder as plain functions of its weights (latent diffusion's ``Encoder`` and ``Decoder``)."""

    def __init__(self, state, *, groups, num_levels):
        self.state, self.groups, self.num_levels = state, groups, num_levels

    def conv(self, name, x, **kwargs):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(
            x,
            weight,
            self.state[f"{name}.bias"],
            padding=kwargs.pop("padding", weight.shape[-1] // 2),
            **kwargs,
        )

    def norm(self, name, x):
        return F.group_norm(
            x, self.groups, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6
        )

    def resnet(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        return h + (
            self.conv(f"{name}.nin_shortcut", x)
            if f"{name}.nin_shortcut.weight" in self.state
            else x
        )

    def attention(self, name, x):
        q, k, v = (
            self.conv(f"{name}.{each}", self.norm(f"{name}.norm", x)).flatten(2) for each in "qkv"
        )  # (N, C, HW)
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)  # (N, HW, HW)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def middle(self, side, h):
        return self.resnet(
            f"{side}.mid.block_2",
            self.attention(f"{side}.mid.attn_1", self.resnet(f"{side}.mid.block_1", h)),
        )

    def level(self, name, h, num_blocks):
        for j in range(num_blocks):
            h = self.resnet(f"{name}.block.{j}", h)
            if f"{name}.attn.{j}.q.weight" in self.state:
                h = self.attention(f"{name}.attn.{j}", h)
        return h

    def encode(self, x):
        h = self.conv("encoder.conv_in", x)
        for i in range(self.num_levels):
            h = self.level(f"encoder.down.{i}", h, 2)
            if i < self.num_levels - 1:
                h = self.conv(
                    f"encoder.down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0
                )
        h = self.conv(
            "encoder.conv_out", F.silu(self.norm("encoder.norm_out", self.middle("encoder", h)))
        )
        return self.conv("quant_conv", h)

    def decode(self, z):
        h = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z)))
        for i in reversed(range(self.num_levels)):
            h = self.level(f"decoder.up.{i}", h, 3)
            if i:
                h = self.conv(
                    f"decoder.up.{i}.upsample.conv",
                    F.interpolate(h, scale_factor=2.0, mode="nearest"),
                )
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", h)))


def test_mars_layout_gives_the_outputs_of_the_published_network(tmp_path, monkeypatch, images):
    source = autoencoder(**SMALL_MAR)
    state = compvis_state(source)
    for name in state:  # so that a mistaken pair of equal shapes shows
        state[name] = state[name] + 0.05 * torch.randn(state[name].shape)
    assert {
        "encoder.down.2.attn.1.q.weight",
        "decoder.up.2.attn.2.proj_out.bias",
        "decoder.up.1.upsample.conv.weight",
        "encoder.mid.attn_1.norm.weight",
        "encoder.down.2.block.0.nin_shortcut.weight",
    } <= set(state)
    torch.save({"model": {**state, "loss.logvar": torch.zeros(())}}, tmp_path / "kl16.ckpt")
    monkeypatch.setattr(vae, "_new", lambda architecture: autoencoder(**SMALL_MAR, seed=5))
    ours, plain = (
        load_vae(tmp_path / "kl16.ckpt", architecture="mar", scaling_factor=1.0),
        Plain(state, groups=2, num_levels=3),
    )
    assert torch.allclose(ours.encode(images), plain.encode(images / 127.5 - 1), atol=1e-4)
    z = torch.randn(2, 3, 2, 2)
    expected = (127.5 * plain.decode(z) + 128).clamp(0, 255).to(torch.uint8)
    assert (ours.decode(z).int() - expected.int()).abs().max() <= 1 and expected.float().std() > 1


@pytest.mark.parametrize("architecture", ["sd", "mar"])
def test_published_names_become_diffusers_own_at_the_real_size(architecture):
    with torch.device("meta"):
        model = vae._new(architecture)
    converted = compvis_to_diffusers(
        {name: tensor for name, tensor in compvis_state_shapes(model).items()}
    )
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


def compvis_state_shapes(model):
    with torch.device("meta"):
        return compvis_state(model)


# -- what cannot be used
def test_an_unreachable_hub_says_what_to_put_where(monkeypatch):
    def refuse(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", refuse)
    with pytest.raises(
        ArtifactError,
        match=r"stabilityai/sd-vae-ft-ema cannot be loaded .*couldn't connect.*Where there is no network, "
        r"download config.json and diffusion_pytorch_model.safetensors from https://huggingface.co/stabilityai/"
        r"sd-vae-ft-ema .*vae.source=FOLDER",
    ):
        load_vae("stabilityai/sd-vae-ft-ema")


def test_broken_folders_are_named(tmp_path):
    autoencoder().save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    save_file(
        {name: tensor for name, tensor in whole.items() if name != "decoder.conv_in.bias"},
        weights,
        metadata={"format": "pt"},
    )
    with pytest.raises(ArtifactError, match="lacks 1 weights, decoder.conv_in.bias among them"):
        load_vae(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"vae cannot be loaded"):
        load_vae(tmp_path)
    weights.unlink()
    with pytest.raises(
        ArtifactError,
        match=r"cannot be loaded .* Put diffusion_pytorch_model.safetensors of this VAE into .*vae",
    ):
        load_vae(tmp_path)
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(ArtifactError, match="holds no VAE: neither config.json"):
        load_vae(tmp_path)


def test_wrong_sources_and_settings_say_what_is_allowed(tmp_path):
    with pytest.raises(
        ArtifactError, match="There is no VAE at .*nowhere.*OWNER/NAME, or 'random'"
    ):
        load_vae(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="There is no checkpoint"):
        load_vae(tmp_path / "kl16.ckpt", architecture="mar")
    with pytest.raises(ValueError, match="vae.source is not set.*kl16.ckpt"):
        load_vae(None)
    with pytest.raises(ValueError, match="architecture is 'kl32'; give one of 'sd', 'mar'"):
        load_vae("random", architecture="kl32")
    for settings, said in (
        ({"precision": "float16"}, "'float32', 'bfloat16'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"scaling_factor": -1}, "scaling_factor is -1"),
    ):
        with pytest.raises(ValueError, match=said):
            VAE(autoencoder(), source="test", **settings)
    with pytest.raises(ValueError, match="shift_factor 0.1"):
        VAE(autoencoder(shift_factor=0.1), source="test")


def test_a_checkpoint_of_another_network_names_what_differs(tmp_path, monkeypatch):
    torch.save(
        {"state_dict": compvis_state(autoencoder(latent_channels=3))}, tmp_path / "other.ckpt"
    )
    monkeypatch.setattr(vae, "_new", lambda architecture: autoencoder())
    with pytest.raises(
        ValueError,
        match=r"of another shape: .*encoder.conv_out.weight \(6, 16, 3, 3\) instead of \(8, 16, 3, 3\)",
    ):
        load_vae(tmp_path / "other.ckpt")


def test_other_latents_and_images_are_refused():
    ours = VAE(autoencoder(), source="here")
    for latents in (torch.zeros(1, 16, 4, 4), torch.zeros(4, 4, 4)):
        with pytest.raises(ValueError, match=r"decodes latents \(N, 4, h, w\)"):
            ours.decode(latents)
    with pytest.raises(ValueError, match="not finite"):
        ours.decode(torch.full((1, 4, 4, 4), float("nan")))
    with pytest.raises(ValueError, match=r"takes uint8 images .* torch.float32"):
        ours.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="image_size is 9; .* multiples of 2"):
        ours.latent_shape(9)
