"""Interval distillation against block calls written out, and the models of other depths that it leaves."""

import copy

import pytest
import torch
from torch import nn

from pruning.toys import Block, TwoStreamToy
from tinyfusion_pl import create_model
from tinyfusion_pl.distill import (
    Distillation,
    Interval,
    TeacherRuns,
    depths,
    get_intervals,
    interval_losses,
    interval_order,
    resolve_intervals,
    restore,
)
from tinyfusion_pl.models import load_decision, load_shallow, save_shallow
from tinyfusion_pl.modules import Recovery
from tinyfusion_pl.objectives import GaussianDiffusion
from tinyfusion_pl.pruning import Decision, GroupDecision, StackDecision, remove_blocks

KEPT, NUM_BLOCKS = [1, 2, 5], 7


def decision(path="blocks", kept=KEPT, num_blocks=NUM_BLOCKS, **kwargs):
    group = GroupDecision(0, len(kept), num_blocks, list(kept))
    stack = StackDecision(
        f"{len(kept)}:{num_blocks}", num_blocks, list(kept), [], [group], **kwargs
    )
    return Decision({path: stack})


def shaken(model, size=0.1):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn_like(p))
    return model


def dit(name="dit", depth=NUM_BLOCKS):
    return shaken(
        create_model(
            name,
            input_size=4,
            in_channels=2,
            hidden_size=16,
            depth=depth,
            num_heads=2,
            num_classes=5,
        )
    ).eval()


@pytest.fixture
def models():
    teacher = dit()
    return shaken(remove_blocks(copy.deepcopy(teacher), {"blocks": KEPT}), 0.05), teacher


@pytest.fixture
def batch():
    objective = GaussianDiffusion()
    return objective, objective.draw(torch.randn(3, 2, 4, 4)), torch.arange(3)


def run(teacher, intervals, *args):
    with torch.no_grad(), TeacherRuns(teacher, intervals) as runs:
        teacher(*args)
    return runs.take()


def test_intervals_are_the_whole_stack():
    assert get_intervals([1, 2, 5], 7) == [Interval(0, 0, 1), Interval(1, 2, 4), Interval(2, 5, 6)]
    assert get_intervals([0, 3], 4) == [Interval(0, 0, 2), Interval(1, 3, 3)]
    assert get_intervals([2], 4) == [Interval(0, 0, 3)]


def of_blocks(student, teacher, draw, y):
    """(3, N) errors, by calling the blocks of a DiT one by one."""
    with torch.no_grad():
        c = teacher.t_embedder(draw.t) + teacher.y_embedder(y)
        states = [teacher.x_embedder(draw.x_t) + teacher.pos_embed]
        for block in teacher.blocks:
            states.append(block(states[-1], c))
    errors = []
    for block, first, last in zip(student.blocks, (0, 2, 5), (1, 4, 6), strict=True):
        ours, theirs = block(states[first], c), states[last + 1]
        errors.append(
            torch.stack(
                [
                    (a - b).square().mean() / b.square().mean()
                    for a, b in zip(ours, theirs, strict=True)
                ]
            )
        )
    return torch.stack(errors)


def test_each_block_learns_its_run_from_the_teachers_states(models, batch):
    (student, teacher), (_, draw, y) = models, batch
    intervals = resolve_intervals(decision(), student, teacher)
    losses = interval_losses(student, run(teacher, intervals, draw.x_t, draw.t, y), intervals)
    torch.testing.assert_close(losses["blocks"], of_blocks(student, teacher, draw, y))


def test_intervals_alone_train_blocks_and_leave_the_rest(models, batch):
    (student, teacher), (objective, draw, y) = models, batch
    distillation = Distillation(weight_interval=2.0, interval_share=0.5, weight_feature=0.0)
    intervals = resolve_intervals(decision(), student, teacher)
    losses = distillation.losses(
        student,
        teacher,
        objective,
        draw,
        y,
        pairs={},
        feature_weight=0.0,
        intervals=intervals,
        alone=True,
    )
    expected = of_blocks(student, teacher, draw, y).mean(0)
    assert losses.keys() == {"loss", "loss_interval"}
    torch.testing.assert_close(losses["loss"], 2 * expected)
    losses["loss"].mean().backward()
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert {
        name for name, p in student.named_parameters() if p.grad is not None
    } == trained  # as DDP needs
    moved = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name in trained if name.startswith("blocks.")}
    assert all(p.grad is None for p in teacher.parameters())


def test_beside_the_other_terms_they_are_added(models, batch):
    (student, teacher), (objective, draw, y) = models, batch
    intervals = resolve_intervals(decision(), student, teacher)
    distillation = Distillation(weight_interval=0.5)
    losses = distillation.losses(
        student, teacher, objective, draw, y, pairs={}, feature_weight=0.0, intervals=intervals
    )
    torch.testing.assert_close(
        losses["loss_interval"], of_blocks(student, teacher, draw, y).mean(0)
    )
    torch.testing.assert_close(
        losses["loss"],
        0.9 * losses["loss_kd"] + 0.1 * losses["loss_data"] + 0.5 * losses["loss_interval"],
    )


def test_the_share_of_steps_comes_first():
    first = Distillation(weight_interval=1.0, interval_share=0.3)
    assert [first.interval_phase(step, 10) for step in (0, 2, 3, 9)] == [
        (True, True),
        (True, True),
        (False, False),
        (False, False),
    ]
    assert Distillation(weight_interval=1.0).interval_phase(9, 10) == (True, False)
    assert Distillation().interval_phase(0, 10) == (False, False)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"interval_share": 0.5}, "weight_interval is 0"),
        ({"weight_interval": 1.0, "interval_share": 0.0}, r"in \(0, 1\]"),
        ({"weight_interval": -1.0}, "weight_interval"),
        (
            {
                "weight_interval": 1.0,
                "interval_share": 0.5,
                "weight_kd": 0.0,
                "weight_data": 0.0,
                "weight_feature": 0.0,
            },
            "interval_share=1",
        ),
    ],
)
def test_settings_that_teach_nothing_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**kwargs)


def test_two_streams_are_compared_each_by_itself():
    torch.manual_seed(0)
    teacher = TwoStreamToy()
    student = shaken(remove_blocks(copy.deepcopy(teacher), {"transformer_blocks": [0, 2]}))
    intervals = resolve_intervals(decision("transformer_blocks", [0, 2], 4), student, teacher)
    x, temb = torch.randn(3, 5, 6), torch.randn(3, 6)
    losses = interval_losses(student, run(teacher, intervals, x, temb), intervals)[
        "transformer_blocks"
    ]
    image, text, rotary = (
        teacher.inp(x),
        teacher.inp(x.flip(1)),
        torch.linspace(0.5, 1.5, 5)[:, None],
    )
    for place in (0, 1):
        mine = student.transformer_blocks[place](image, text, temb, rotary)
        for block in teacher.transformer_blocks[2 * place : 2 * place + 2]:
            text, image = block(image, text, temb, rotary)
        errors = [
            (a - b).square().mean((1, 2)) / b.square().mean((1, 2))
            for a, b in zip(mine, (text, image), strict=True)
        ]
        torch.testing.assert_close(losses[place], (errors[0] + errors[1]) / 2)


def test_a_teacher_in_another_precision_teaches(models, batch):
    (student, teacher), (_, draw, y) = models, batch
    intervals = resolve_intervals(decision(), student, teacher)
    runs = run(teacher.bfloat16(), intervals, draw.x_t, draw.t, y)
    losses = interval_losses(student, runs, intervals)["blocks"]
    torch.testing.assert_close(
        losses, of_blocks(student, teacher.float(), draw, y), rtol=0.1, atol=1e-2
    )


def test_blocks_that_write_into_their_input_are_refused(models, batch):
    (student, teacher), (_, draw, y) = models, batch

    def write(block, args, output):
        args[0].add_(1.0)

    teacher.blocks[2].register_forward_hook(write)
    intervals = resolve_intervals(decision(), student, teacher)
    with pytest.raises(
        ValueError, match="Block 2 of the teacher's 'blocks', or one behind it, writes into 'x'"
    ):
        interval_losses(student, run(teacher, intervals, draw.x_t, draw.t, y), intervals)


def test_mirrored_pairs_are_refused_before_training():
    teacher = create_model(
        "uvit_s_2", depth=4, hidden_size=16, num_heads=2, input_size=4, num_classes=5
    )
    distillation = Distillation(weight_interval=1.0, weight_feature=0.0)
    with pytest.raises(
        ValueError,
        match=r"calls each block of 'in_blocks\+out_blocks' alone, but some only go together, as \[0, 3\]",
    ):
        Recovery(
            teacher,
            teacher=teacher,
            decision=Decision({}),
            distillation=distillation,
            objective=GaussianDiffusion(learn_sigma=False),
        )


def test_a_decision_of_another_depth_is_refused(models):
    with pytest.raises(ValueError, match="keeps 3 of 8 blocks"):
        resolve_intervals(decision(num_blocks=8), *models)


# -- one run, many depths


def calls(draw, y):
    return [((draw.x_t, draw.t, y), {}), ((draw.x_t.flip(0), draw.t, y), {})]


def test_runs_come_back_by_their_loss_largest_first(models, batch):
    (student, teacher), (_, draw, y) = models, batch
    found = interval_order(student, teacher, decision(), calls(draw, y))
    of_calls = [
        of_blocks(student, teacher, type(draw)(None, args[0], args[1], None), y).mean(1)
        for args, _ in calls(draw, y)
    ]
    expected = torch.stack(of_calls).mean(0)
    assert [place for place, _ in found] == [
        ("blocks", int(i)) for i in expected.argsort(descending=True)
    ]
    assert dict(found) == pytest.approx(
        {("blocks", i): float(loss) for i, loss in enumerate(expected)}, rel=1e-4
    )


def test_a_restored_run_is_the_teachers_and_all_else_the_students(models, batch):
    (student, teacher), (_, draw, y) = models, batch
    model, new = restore(student, teacher, decision(), [("blocks", 1)])
    assert new.kept_blocks == {"blocks": [1, 2, 3, 4, 5]} and model.config["depth"] == 5
    sources = [student.blocks[0], *teacher.blocks[2:5], student.blocks[2]]
    with torch.no_grad():
        c = student.t_embedder(draw.t) + student.y_embedder(y)
        x = student.x_embedder(draw.x_t) + student.pos_embed
        for block in sources:
            x = block(x, c)
        expected = student.final_layer(x, c)
        handle = model.final_layer.register_forward_hook(
            lambda module, args, output: found.append(output)
        )
        found = []
        model(draw.x_t, draw.t, y)
        handle.remove()
    assert torch.equal(found[0], expected)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not flags.pop("pos_embed") and all(flags.values())
    with pytest.raises(ValueError, match="no kept block"):
        restore(student, teacher, decision(), [("blocks", 3)])


def test_every_depth_is_saved_with_its_record(models, batch, tmp_path):
    (student, teacher), (_, draw, y) = models, batch
    found = list(depths(student, teacher, decision(), calls(draw, y)))
    assert [each.depth for each in found][0] == 3 and found[-1].depth == 7 and len(found) == 4
    assert found[0].decision.kept_blocks["blocks"] == KEPT and found[-1].decision.kept_blocks[
        "blocks"
    ] == list(range(7))
    for each in found:
        with torch.no_grad():
            distances = [
                (each.model(*args) - teacher(*args)).square().mean() for args, _ in calls(draw, y)
            ]
        assert each.distance == pytest.approx(float(sum(distances) / 2), rel=1e-5)
        folder = save_shallow(
            tmp_path / str(each.depth), each.model, {"stacks": each.decision.as_dict()}
        )
        loaded = load_shallow(folder)
        assert load_decision(folder).kept_blocks == each.decision.kept_blocks
        assert torch.equal(loaded(draw.x_t, draw.t, y), each.model(draw.x_t, draw.t, y))
    plain = remove_blocks(copy.deepcopy(teacher), {"blocks": KEPT})
    last = list(depths(plain, teacher, decision(), calls(draw, y)))[-1]
    assert last.distance == 0.0


class TwoStacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (
            *(nn.ModuleList(Block() for _ in range(n)) for n in (4, 3)),
            nn.Linear(6, 6),
        )

    def forward(self, x):
        for block in (*self.first, *self.second):
            x = block(x)
        return self.head(x)


def test_runs_of_two_stacks_are_put_in_one_order():
    torch.manual_seed(0)
    teacher, x = TwoStacks().eval(), torch.randn(3, 5, 6)
    kept = {"first": [0, 3], "second": [1]}
    student = shaken(remove_blocks(copy.deepcopy(teacher), kept))
    both = Decision(
        {
            **decision("first", kept["first"], 4).stacks,
            **decision("second", kept["second"], 3).stacks,
        }
    )
    found = list(depths(student, teacher, both, [((x,), {})]))
    assert [each.depth for each in found] == [3, 5, 7]
    x_first, x_second = x, teacher.first[3](teacher.first[2](teacher.first[1](teacher.first[0](x))))
    errors = {}
    for place, (block, start, run_of) in {
        ("first", 0): (student.first[0], x_first, teacher.first[:3]),
        ("second", 0): (student.second[0], x_second, teacher.second),
    }.items():
        target = start
        for each in run_of:
            target = each(target)
        errors[place] = float(
            ((block(start) - target).square().mean((1, 2)) / target.square().mean((1, 2))).mean()
        )
    assert found[1].restored == (max(errors, key=errors.get),)
