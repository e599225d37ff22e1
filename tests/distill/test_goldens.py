import pytest

from goldens_util import assert_near, golden_files, load, new_dit, part
from tinyfusion_pl.distill import Distillation
from tinyfusion_pl.objectives import GaussianDiffusion


@pytest.mark.golden
@pytest.mark.parametrize("file", golden_files("masked_kd*"))
def test_against_reference_every_term_total_and_gradients(file):
    golden = load(file)
    student, teacher = new_dit(part(golden, "student")), new_dit(part(golden, "teacher"))
    objective = GaussianDiffusion()
    draw = objective.draw(golden["x0"], t=golden["t"], noise=golden["noise"])
    losses = Distillation().losses(
        student,
        teacher,
        objective,
        draw,
        golden["y"],
        feature_weight=1e-2,
        pairs={"blocks": [tuple(pair) for pair in golden["pairs"].tolist()]},
    )
    for ours, theirs in {
        "loss": "loss",
        "loss_data": "gt",
        "loss_kd": "kd_loss",
        "loss_feature": "feat_loss",
    }.items():
        assert_near(losses[ours], golden[f"loss.{theirs}"], 1e-5, ours)
    output, teacher_output = (m(draw.x_t, draw.t, golden["y"]) for m in (student, teacher))
    terms = objective.distillation_losses(output, teacher_output, draw)
    assert_near(terms["vb_kd"], golden["loss.vb_kd"], 1e-5, "vb_kd")
    data = objective.losses(output, draw)
    assert_near(data["mse"], golden["loss.mse"], 1e-5, "mse")
    assert_near(data["vb"], golden["loss.vb"], 1e-5, "vb")
    losses["loss"].mean().backward()
    parameters = dict(student.named_parameters())
    for name, grad in part(golden, "grad.student").items():
        assert_near(parameters[name].grad, grad, 1e-4, name)
    assert all(p.grad is None for p in teacher.parameters())
