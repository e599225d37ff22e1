import math

import pytest
import torch

from goldens_util import assert_near
from mar_util import trained_like
from tinyfusion_pl.objectives import ImageSampler, MaskedAutoregression
from tinyfusion_pl.objectives.masked_sampling import guidance_at, masked_counts

SIGNAL = (
    ((torch.arange(1, 1001).double() / 1000 + 0.008) / 1.008 * math.pi / 2).cos()
    / math.cos(0.008 / 1.008 * math.pi / 2)
).square()
SIGNAL[-1] = SIGNAL[-2] * 0.001  # the last beta is clipped to 0.999


class Oracle:
    """The best MAR for tokens that are a number: 2y - 5 and 0.1 for each token known before; and what it was asked."""

    num_classes, guided = 5, False

    def __init__(self):
        self.seen, self.times = [], []

    def encode(self, tokens, visible, y):
        known = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[2]))
        self.seen.append((visible.clone(), known.clone(), y.clone()))
        return 2.0 * y - 5 + 0.1 * visible.shape[1]

    def decode(self, hidden, visible):
        return hidden[:, None, None].expand(-1, 4, 1)

    def head(self, x, t, z):
        self.times.append(t.tolist())
        a = SIGNAL[t][:, None]
        epsilon = ((x.double() - a.sqrt() * z) / (1 - a).sqrt()).float()
        return torch.cat([epsilon, torch.full_like(x, -1.0)], 1)


def labels(n):
    return torch.arange(n) % 5


def sample(denoiser, n=3, *, c=2, size=2, **options):
    options = {"num_iterations": 4, "num_sampling_steps": 5, **options}
    return MaskedAutoregression().sample(
        denoiser, torch.randn(n, c, size, size), labels(n), **options
    )


@pytest.mark.parametrize("num_iterations", [1, 3, 4, 9])
def test_tokens_of_one_point_are_found_exactly_each_from_those_before_it(num_iterations):
    oracle, order = Oracle(), torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2], [0, 1, 2, 3]])
    noise = torch.randn(6, 3, 2, 2, 2)
    noise[-1, :, 0] = (
        order.argsort(1).view(3, 2, 2).float()
    )  # the order's smallest values come last
    x = sample(oracle, noise=noise, num_iterations=num_iterations)
    counts = {1: [4], 3: [1, 1, 2], 4: [1, 1, 1, 1], 9: [1, 1, 1, 1]}[num_iterations]
    assert [seen[0].shape[1] for seen in oracle.seen] == [
        sum(counts[:i]) for i in range(len(counts))
    ]
    expected = torch.empty(3, 4)
    known = 0
    for count in counts:
        turn = order.flip(1)[:, known : known + count]
        expected.scatter_(1, turn, (2.0 * labels(3) - 5 + 0.1 * known)[:, None].expand(-1, count))
        known += count
    assert_near(x, expected.view(3, 1, 2, 2).expand(-1, 2, -1, -1), 1e-3)
    for visible, seen, _ in oracle.seen[1:]:  # what was sampled is what is seen afterwards
        assert_near(
            seen, x.flatten(2).transpose(1, 2).gather(1, visible[..., None].expand(-1, -1, 2)), 1e-6
        )


def test_256_iterations_over_256_tokens_are_one_token_each():
    assert masked_counts(256, 256) == list(range(255, -1, -1))


@pytest.mark.parametrize("num_iterations", [1, 2, 8, 64, 100, 255])
def test_the_mask_shrinks_by_the_cosine_and_ends_empty(num_iterations):
    counts = masked_counts(256, num_iterations)
    assert len(counts) == num_iterations and counts[-1] == 0
    assert all(a > b for a, b in zip([256, *counts], counts))
    if num_iterations <= 8:  # few enough that each step is more than one token
        assert counts[:-1] == [
            math.floor(256 * math.cos(math.pi / 2 * i / num_iterations))
            for i in range(1, num_iterations)
        ]


def test_guidance_grows_with_the_known_tokens_or_is_constant():
    for num_masked in (255, 128, 1):
        linear = guidance_at(num_masked, 256, guidance_scale=3.0, guidance_schedule="linear")
        assert linear == pytest.approx(1 + 2 * (256 - num_masked) / 256)
        assert guidance_at(num_masked, 256, guidance_scale=3.0, guidance_schedule="constant") == 3.0
    last = guidance_at(0, 256, guidance_scale=3.0, guidance_schedule="linear")
    assert last == guidance_at(1, 256, guidance_scale=3.0, guidance_schedule="linear")


@pytest.mark.parametrize(
    ("schedule", "scales"), [("constant", [3, 3, 3, 3]), ("linear", [1.5, 2, 2.5, 2.5])]
)
def test_guidance_moves_tokens_away_from_the_null_label(schedule, scales):
    oracle, noise = Oracle(), torch.randn(6, 3, 2, 2, 2)
    x = sample(oracle, noise=noise, guidance_scale=3.0, guidance_schedule=schedule)
    assert [seen[2].tolist() for seen in oracle.seen] == [
        [0, 1, 2, 5, 5, 5]
    ] * 4  # label and null label side by side
    order = noise[-1, :, 0].flatten(1).argsort(1).flip(1)
    for i, scale in enumerate(scales):
        plain, null = 2.0 * labels(3) - 5 + 0.1 * i, 2.0 * 5 - 5 + 0.1 * i
        ours = x.flatten(2).gather(2, order[:, None, i : i + 1].expand(-1, 2, -1))[..., 0]
        assert_near(ours, (null + scale * (plain - null))[:, None].expand(-1, 2), 1e-3)


def test_without_guidance_the_batch_is_not_doubled():
    oracle = Oracle()
    sample(oracle)
    assert [len(seen[0]) for seen in oracle.seen] == [3] * 4
    assert all(len(t) == 3 for t in oracle.times)


def test_the_head_is_asked_at_respaced_original_timesteps_and_the_transformer_once_an_iteration():
    oracle = Oracle()
    sample(oracle, num_sampling_steps=4)
    assert [t[0] for t in oracle.times] == [999, 666, 333, 0] * 4
    assert len(oracle.seen) == 4


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_sample_depends_on_its_own_noise_and_not_on_the_batch(guidance_scale):
    model, objective = trained_like().eval(), MaskedAutoregression()
    z, y = torch.randn(5, 3, 4, 4), labels(5)
    options = {"num_iterations": 6, "num_sampling_steps": 3, "guidance_scale": guidance_scale}
    noise = torch.randn(objective.num_noises(**options), *z.shape)
    whole = objective.sample(model, z, y, noise=noise, **options)
    parts = [
        objective.sample(model, z[i], y[i], noise=noise[:, i], **options)
        for i in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    assert_near(torch.cat(parts), whole, 1e-4)
    other = noise.clone()
    other[:, 0] += torch.randn_like(other[:, 0])
    changed = objective.sample(model, z, y, noise=other, **options)
    assert_near(changed[1:], whole[1:], 1e-4)
    assert not torch.equal(changed[0], whole[0])


def test_the_temperature_scales_the_noise_of_the_steps():
    model, objective, z = trained_like().eval(), MaskedAutoregression(), torch.randn(2, 3, 4, 4)
    options = {"num_iterations": 4, "num_sampling_steps": 3}
    noise = torch.randn(4, *z.shape)
    half = torch.cat([noise[:-1] / 2, noise[-1:]])
    assert_near(
        objective.sample(model, z, labels(2), noise=noise, temperature=0.5, **options),
        objective.sample(model, z, labels(2), noise=half, **options),
        1e-6,
    )
    none = torch.cat([torch.zeros_like(noise[:-1]), noise[-1:]])
    assert_near(
        objective.sample(model, z, labels(2), noise=noise, temperature=0.0, **options),
        objective.sample(model, z, labels(2), noise=none, **options),
        1e-6,
    )


def test_a_generator_draws_what_it_drew_before():
    model, objective, z = trained_like().eval(), MaskedAutoregression(), torch.randn(2, 3, 4, 4)

    def sampled(seed):
        return objective.sample(
            model,
            z,
            labels(2),
            num_iterations=3,
            num_sampling_steps=3,
            generator=torch.Generator().manual_seed(seed),
        )

    ours = sampled(7)
    torch.manual_seed(99)  # the global state has no part in it
    assert torch.equal(ours, sampled(7)) and not torch.equal(ours, sampled(8))


def images(model, **options):
    return ImageSampler(
        denoiser=model,
        objective=MaskedAutoregression(),
        latent_shape=(3, 4, 4),
        decode=lambda latents: latents,
        sampling={"num_iterations": 5, "num_sampling_steps": 3, "guidance_scale": 2.0},
        **options,
    )


def test_a_numbered_sample_is_the_same_in_any_batch():
    model = trained_like()
    whole = images(model)(torch.arange(4), labels(4))
    assert_near(images(model)(torch.tensor([2, 3]), labels(4)[2:]), whole[2:], 1e-4)
    assert model.training  # left as it was
    assert not torch.equal(images(model, seed=1)(torch.arange(4), labels(4)), whole)


def test_encoder_decoder_and_head_run_in_the_samplers_precision_and_the_process_in_float32():
    model = trained_like()
    dtypes = {}
    for part in ("z_proj", "decoder_blocks.0.mlp.fc1", "diffloss.net.input_proj"):
        model.get_submodule(part).register_forward_hook(
            lambda module, args, output, part=part: dtypes.update({part: output.dtype})
        )
    latents = images(model, precision="bfloat16")(torch.arange(2), labels(2))
    assert (
        latents.dtype == torch.float32
        and set(dtypes.values()) == {torch.bfloat16}
        and len(dtypes) == 3
    )
    exact = images(model)(torch.arange(2), labels(2))
    assert set(dtypes.values()) == {torch.float32}
    assert not torch.equal(latents, exact)


def test_compiling_compiles_what_the_sampler_calls(monkeypatch):
    model, compiled = trained_like(), []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function: compiled.append(getattr(function, "__name__", "forward")) or function,
    )
    sampler = images(model, compile=True)
    for _ in range(2):  # once for all batches
        sampler(torch.arange(2), labels(2))
    assert sorted(compiled) == ["decode", "encode", "head"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_iterations": 0}, "num_iterations is 0"),
        ({"num_sampling_steps": 1001}, "num_sampling_steps is 1001; give 1 to 1000"),
        ({"guidance_schedule": "cosine"}, "'cosine'; give one of 'linear', 'constant'"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.inf}, "temperature is inf"),
    ],
)
def test_options_out_of_range_are_named_by_the_check_and_before_the_denoiser_runs(wrong, said):
    oracle = Oracle()
    with pytest.raises(ValueError, match=said):
        sample(oracle, **wrong)
    with pytest.raises(ValueError, match=said):
        MaskedAutoregression().check_sampling(**wrong)
    assert not oracle.seen


def test_options_of_another_objective_are_not_known():
    with pytest.raises(TypeError, match="guidance_channels"):
        MaskedAutoregression().check_sampling(guidance_channels=3)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(5, 3, 2, 2, 2\); expected \(6, 3, 2, 2, 2\)"):
        sample(Oracle(), noise=torch.zeros(5, 3, 2, 2, 2))


def test_a_denoiser_that_is_no_mar_is_refused():
    with pytest.raises(ValueError, match="no encode, decode, head: MAR's sampler needs a MAR"):
        sample(torch.nn.Identity())
