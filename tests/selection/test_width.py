"""Narrower models: what is cut is held against slices of the dense weights, made by hand."""

import importlib.util
import json
import math

import pytest
import torch

from odd_values import replaced
from small_dit_model import small_batch, small_dit
from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.distill import Distillation
from tinyfusion_pl.models import create_model, load_pretrained, load_shallow, save_shallow
from tinyfusion_pl.modules import Recovery
from tinyfusion_pl.objectives import GaussianDiffusion, Interpolants
from tinyfusion_pl.selection import Calibration, Selection, WidthPruning

SMALL = {"num_samples": 16, "num_intervals": 4, "batch_size": 8}
HEADS, HEAD, HIDDEN, MLP = 4, 8, 32, 128


def draw_by(objective):
    return lambda n: Calibration.of(objective, torch.randn(n, 4, 8, 8), torch.randint(10, (n,)))


def narrow(model, objective=None, seed=0, **options):
    pruning = WidthPruning(**{**SMALL, **options})
    pruning.check(model)
    return pruning(model, draw_by(objective or GaussianDiffusion()), seed=seed)


def count(model):
    return sum(p.numel() for p in model.parameters())


# -- which weights are left ---------------------------------------------------
def some(n, num_kept, parts=1):
    """Which of `n` channels stay, as many in each part, at random; ascending."""
    each = [
        torch.randperm(n // parts)[: num_kept // parts].sort().values + i * n // parts
        for i in range(parts)
    ]
    return torch.cat(each)


@pytest.fixture
def planted():
    """A DiT of width 32 of whose channels exactly those that stay at width 20 are used; and which they are."""
    torch.manual_seed(0)
    model = small_dit(kept=(0, 1))
    stays = {"x": some(HIDDEN, 20), "c": some(HIDDEN, 20), "t": some(HIDDEN, 20)}
    for i in range(2):
        stays |= {f"attn{i}": some(HIDDEN, 20, HEADS), f"mlp{i}": some(MLP, 80)}
    with torch.no_grad():
        for name, axes in layout().items():
            parameter = model.get_parameter(name)
            for axis, (channels, copies) in axes.items():
                size = parameter.shape[axis] // copies
                gone = [i for i in range(size) if i not in stays[channels]]
                parameter.unflatten(axis, (copies, size)).index_fill_(
                    axis + 1, torch.tensor(gone), 0.0
                )
    return model, stays


def layout():
    """Parameter -> axis -> (which channels it has there, how many times in a row). Others are not cut."""
    names = {
        "x_embedder.proj.weight": {0: ("x", 1)},
        "x_embedder.proj.bias": {0: ("x", 1)},
        "pos_embed": {2: ("x", 1)},
        "t_embedder.mlp.0.weight": {0: ("t", 1)},
        "t_embedder.mlp.0.bias": {0: ("t", 1)},
        "t_embedder.mlp.2.weight": {0: ("c", 1), 1: ("t", 1)},
        "t_embedder.mlp.2.bias": {0: ("c", 1)},
        "y_embedder.embedding_table.weight": {1: ("c", 1)},
        "final_layer.linear.weight": {1: ("x", 1)},
        "final_layer.adaLN_modulation.1.weight": {0: ("x", 2), 1: ("c", 1)},
        "final_layer.adaLN_modulation.1.bias": {0: ("x", 2)},
    }
    for i in range(2):
        names |= {
            f"blocks.{i}.{name}": axes
            for name, axes in {
                "adaLN_modulation.1.weight": {0: ("x", 6), 1: ("c", 1)},
                "adaLN_modulation.1.bias": {0: ("x", 6)},
                "attn.qkv.weight": {0: (f"attn{i}", 3), 1: ("x", 1)},
                "attn.qkv.bias": {0: (f"attn{i}", 3)},
                "attn.proj.weight": {0: ("x", 1), 1: (f"attn{i}", 1)},
                "attn.proj.bias": {0: ("x", 1)},
                "mlp.fc1.weight": {0: (f"mlp{i}", 1), 1: ("x", 1)},
                "mlp.fc1.bias": {0: (f"mlp{i}", 1)},
                "mlp.fc2.weight": {0: ("x", 1), 1: (f"mlp{i}", 1)},
                "mlp.fc2.bias": {0: ("x", 1)},
            }.items()
        }
    return names


def test_channels_that_do_nothing_go_from_every_weight(planted):
    model, stays = planted
    found = narrow(model, removed=0.58)
    state = found.shallow.state_dict()
    assert found.shallow.config == {
        **model.config,
        "hidden_size": 20,
    } and found.decision.kept_blocks == {"blocks": [0, 1]}
    for name, parameter in model.state_dict().items():
        for axis, (channels, copies) in layout().get(name, {}).items():
            size = parameter.shape[axis] // copies
            parameter = (
                parameter.unflatten(axis, (copies, size))
                .index_select(axis + 1, stays[channels])
                .flatten(axis, axis + 1)
            )
        if "qkv" in name:
            parameter[:20] *= math.sqrt(
                5 / 8
            )  # queries: attention divides by the root of a head's width
        torch.testing.assert_close(state[name], parameter, rtol=1e-6, atol=0, msg=name)


def test_attention_computes_the_same_from_what_stays(planted):
    model, stays = planted
    shallow = narrow(model, removed=0.58).shallow
    x = torch.zeros(2, 5, HIDDEN)
    x[..., stays["x"]] = torch.randn(2, 5, 20)
    for wide, thin in zip(model.blocks, shallow.blocks):
        torch.testing.assert_close(thin.attn(x[..., stays["x"]]), wide.attn(x)[..., stays["x"]])
        torch.testing.assert_close(thin.mlp(x[..., stays["x"]]), wide.mlp(x)[..., stays["x"]])


def test_times_of_small_losses_do_not_count():
    """Whose loss is seen with gradients, for a loss that falls with the time in a known way."""
    seen = []

    def loss(output, t):
        if torch.is_grad_enabled():
            seen.extend(t.tolist())
        return 1 - t / 1000 + 0 * output.flatten(1).mean(1)

    def draw(n):
        x, t, y = small_batch(n)
        return Calibration((x, t, y), num_samples=n, context=t, loss=loss)

    found = WidthPruning(num_samples=16, num_intervals=8, batch_size=3, threshold=0.5)(
        small_dit(), draw
    )
    t = small_batch(16)[1].tolist()
    losses = [1 - (t[i] + t[i + 1]) / 2000 for i in range(0, 16, 2)]
    counted = [i for i, each in enumerate(losses) if each > 0.5 * max(losses)]
    assert (
        sorted(seen) == [t[j] for i in counted for j in (2 * i, 2 * i + 1)] and 0 < len(counted) < 8
    )
    assert [each["used"] for each in found.intervals] == [i in counted for i in range(8)]
    assert [each["loss"] for each in found.intervals] == pytest.approx(losses)
    assert found.num_block_runs == 3 * (16 + 3 * len(seen) + 2)


def test_the_dense_model_is_left_as_it_is():
    model = small_dit().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = narrow(model).shallow.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(
        torch.equal(tensor, first[name])
        for name, tensor in narrow(model).shallow.state_dict().items()
    )  # same seed


# -- sizes --------------------------------------------------------------------
@pytest.mark.parametrize("removed, published, hidden_size", [(0.5, 338e6, 816), (0.75, 169e6, 576)])
def test_dit_xl_comes_to_published_sizes_within_two_percent(removed, published, hidden_size):
    from tinyfusion_pl.selection.channels import count_params, width_for

    with torch.device("meta"):
        model = create_model("dit_xl_2")
        assert width_for(model, (1 - removed) * count(model), depth=28) == hidden_size
        narrower = create_model("dit_xl_2", hidden_size=hidden_size)
    assert (
        count_params(model, depth=28, hidden_size=hidden_size)
        == count(narrower)
        == pytest.approx(published, rel=0.02)
    )


@pytest.mark.slow
@pytest.mark.parametrize("removed, published", [(0.5, 338e6), (0.75, 169e6)])
def test_dit_xl_itself_is_narrowed_saved_and_reloaded(removed, published, tmp_path):
    found = narrow(
        create_model("dit_xl_2", input_size=8, num_classes=10).eval(),
        num_samples=2,
        num_intervals=1,
        removed=removed,
    )
    full = {"input_size": 32, "num_classes": 1000}
    with torch.device("meta"):
        assert count(create_model("dit_xl_2", **{**found.shallow.config, **full})) == pytest.approx(
            published, rel=0.02
        )
    save_shallow(
        tmp_path, found.shallow, {"stacks": found.decision.as_dict(), "width": found.width}
    )
    args = small_batch(2)
    with torch.no_grad():
        assert torch.equal(load_shallow(tmp_path)(*args), found.shallow.eval()(*args))


def test_depth_goes_first_and_width_makes_up_the_rest():
    model = small_dit(kept=(0, 1, 2, 3))
    found = narrow(model, removed=0.5, depth=Selection("uniform", keep=2, num_samples=8))
    (stack,) = found.decision.stacks.values()
    assert (
        stack.kept_blocks == [0, 2]
        and stack.num_blocks == 4
        and stack.criterion == "uniform, then diff_pruning"
    )
    assert found.width["removed"] == 1 - count(found.shallow) / count(model)
    others = [
        count(create_model("dit", **{**found.shallow.config, "hidden_size": size}))
        for size in range(4, 32, 4)
    ]
    assert count(found.shallow) == min(others, key=lambda n: abs(n - count(model) / 2))


def test_a_sit_becomes_narrower_too():
    found = narrow(small_dit(name="sit_s_2"), Interpolants())
    assert type(found.shallow).__name__ == "SiT" and found.shallow(*small_batch()).shape == (
        6,
        4,
        8,
        8,
    )


# -- what it ends in ----------------------------------------------------------
@pytest.fixture
def saved(tmp_path):
    found = narrow(small_dit(), depth=Selection("first", keep=2, num_samples=8))
    record = {"stacks": found.decision.as_dict(), "width": found.width}
    return save_shallow(tmp_path / "shallow", found.shallow, record), found


def test_a_saved_model_gives_the_same_bit_for_bit(saved):
    folder, found = saved
    args = small_batch()
    with torch.no_grad():
        expected = found.shallow.eval()(*args)
        assert torch.equal(load_shallow(folder)(*args), expected)
        assert torch.equal(load_pretrained(folder)(*args), expected)


@pytest.mark.parametrize(
    "path, value",
    [
        (("width", "hidden_size"), 16),
        (("model", "kwargs", "hidden_size"), 16),
        (("width",), 5),
        (("width", "dense_hidden_size"), "x"),
    ],
)
def test_a_record_of_another_width_is_refused(saved, path, value):
    file = saved[0] / "record.json"
    file.write_text(json.dumps(replaced(json.loads(file.read_text()), path, value)))
    with (
        pytest.raises(ArtifactError, match="width"),
        pytest.warns(UserWarning, match="its own checksum"),
    ):
        load_shallow(saved[0])


def test_a_narrow_student_learns_from_the_output():
    teacher = small_dit()
    found = narrow(teacher)
    distillation, objective = Distillation(weight_feature=0.0), GaussianDiffusion()
    Recovery(
        found.shallow,
        teacher=teacher,
        decision=found.decision,
        objective=objective,
        distillation=distillation,
    )
    x, y = torch.randn(4, 4, 8, 8), torch.randint(10, (4,))
    optimizer = torch.optim.SGD(found.shallow.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        torch.manual_seed(0)
        each = distillation.losses(
            found.shallow, teacher, objective, objective.draw(x), y, pairs={}, feature_weight=0.0
        )
        loss = each["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_hidden_states_of_unequal_widths_are_not_compared():
    teacher = small_dit()
    found = narrow(teacher)
    with pytest.raises(ValueError, match="fewer channels.*distill=output"):
        Recovery(
            found.shallow, teacher=teacher, decision=found.decision, objective=GaussianDiffusion()
        )


# -- what is refused ----------------------------------------------------------
@pytest.mark.parametrize("name", ["uvit_s_2", "udit_s", "mar_base"])
def test_other_families_are_refused_by_name(name):
    with torch.device("meta"):
        model = create_model(name)
    with pytest.raises(ValueError, match="DiT or a SiT.*pruning=learned"):
        WidthPruning().check(model)


def test_without_torch_pruning_the_extra_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "torch_pruning" else find_spec(name),
    )
    with pytest.raises(ValueError, match=r"tinyfusion_pl\[width\]"):
        WidthPruning()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"removed": 1.0}, "removed is 1.0"),
        ({"removed": 0.0}, "removed is 0.0"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"num_intervals": 17}, "fewer than num_intervals=17"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"removed": 0.999}, "Remove less"),
        ({"removed": 0.1, "depth": Selection("first", keep=1)}, "Keep more blocks, or remove more"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WidthPruning(**{**SMALL, **options}).check(small_dit())
