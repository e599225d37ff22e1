from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgba

from tinyfusion_pl.report.drawing import COLORS, DROPPED, KEPT
from tinyfusion_pl.report.figure_curves import plot_curves
from tinyfusion_pl.report.figure_decisions import (
    MAX_STEPS_DRAWN,
    opacity,
    plot_block_probabilities,
    plot_decisions,
)
from tinyfusion_pl.report.figure_overview import plot_overview
from tinyfusion_pl.report.figure_samples import plot_samples
from tinyfusion_pl.report.reading import StackHistory, read_run
from tinyfusion_pl.report.sweep_figures import plot_activations, plot_candidate_losses, plot_speedup


def history(num_steps=3, num_blocks=4, *, group_size=2, every=10):
    rng = np.random.default_rng(0)
    groups = tuple(
        {"members": list(range(start, start + group_size)), "num_kept": 1, "num_blocks": group_size}
        for start in range(0, num_blocks, group_size)
    )
    kept = np.zeros((num_steps, num_blocks), dtype=bool)
    for group in groups:
        kept[np.arange(num_steps), rng.choice(group["members"], num_steps)] = True
    confidence = np.repeat(rng.uniform(0.1, 1, (num_steps, len(groups))), group_size, axis=1)
    return StackHistory(
        np.arange(num_steps) * every, kept, rng.uniform(0, 1, kept.shape), confidence, groups
    )


def mesh(axes):
    (found,) = [collection for collection in axes.collections if isinstance(collection, QuadMesh)]
    return found


def borders(axes):
    return [artist.get_ydata()[0] for artist in axes.lines if artist.get_gid() == "group border"]


def test_kept_blocks_are_marked_with_confidence_as_opacity():
    own = history()
    panel = plot_decisions({"blocks": own}).axes[0]
    colors = mesh(panel).get_array()  # (B, T, RGBA)
    np.testing.assert_allclose(colors[..., 3], np.where(own.kept, opacity(own.confidence), 0).T)
    np.testing.assert_allclose(colors[..., :3], np.broadcast_to(to_rgba(KEPT)[:3], (4, 3, 3)))
    assert mesh(panel).get_coordinates()[0, :, 0].tolist() == [
        0,
        10,
        20,
        30,
    ]  # each lasts until the next record
    assert panel.get_ylim() == (3.5, -0.5), "block 0 is on top"


def test_opacity_is_the_confidence_above_a_visible_floor():
    steps = opacity(np.array([0.0, 0.5, 1.0]))
    assert 0 < steps[0] < 0.2
    assert steps[2] == 1
    assert steps[1] - steps[0] == pytest.approx(steps[2] - steps[1])


def test_each_stack_has_a_panel_with_name_and_kept_count():
    figure = plot_decisions({"encoder": history(), "decoder": history(num_blocks=6, group_size=3)})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert any(title.startswith("encoder: 2 of 4 blocks kept") for title in titles)
    assert any(title.startswith("decoder: 2 of 6 blocks kept") for title in titles)


def test_long_histories_are_thinned_to_the_final_decision():
    own = history(num_steps=5000, num_blocks=28, group_size=14)
    panel = plot_decisions({"blocks": own}).axes[0]
    colors = mesh(panel).get_array()
    assert colors.shape[1] == MAX_STEPS_DRAWN
    np.testing.assert_array_equal(colors[:, -1, 3] > 0, own.kept[-1])


def test_a_single_recorded_step_can_be_drawn():
    own = history(num_steps=1)
    assert (mesh(plot_decisions({"blocks": own}).axes[0]).get_array()[..., 3] > 0).sum() == 2
    assert plot_block_probabilities({"blocks": own})


def test_bars_show_probabilities_and_highlight_kept_blocks():
    own = history()
    heat, bars = plot_block_probabilities({"blocks": own}).axes
    assert [bar.get_width() for bar in bars.patches] == own.probabilities[-1].tolist()
    colors = [to_hex(bar.get_facecolor()).upper() for bar in bars.patches]
    assert colors == [KEPT if kept else DROPPED for kept in own.kept[-1]]
    shades = mesh(heat).get_array()
    order = np.argsort(own.probabilities[:, 0])
    assert np.all(np.diff(shades[0, order, 0]) < 0), "the more probable, the darker"


def test_group_borders_and_the_uniform_probability_are_drawn():
    heat, bars = plot_block_probabilities({"blocks": history(num_blocks=9, group_size=3)}).axes
    assert borders(heat) == borders(bars) == [2.5, 5.5]
    dotted = [
        segment
        for c in bars.collections
        if isinstance(c, LineCollection)
        for segment in c.get_segments()
    ]
    assert [segment[0][0] for segment in dotted] == pytest.approx([1 / 3] * 9)


def test_groups_of_mirrored_pairs_have_borders_on_both_sides():
    mirrored = replace(
        history(num_blocks=8),
        groups=tuple(
            {"members": members, "num_kept": 1, "num_blocks": 2}
            for members in ([0, 1, 6, 7], [2, 3, 4, 5])
        ),
    )
    heat, bars = plot_block_probabilities({"in_blocks+out_blocks": mirrored}).axes
    assert borders(heat) == borders(bars) == [1.5, 5.5]


def images(num, channels=1, size=8):
    rng = np.random.default_rng(3)
    return {
        model: rng.integers(0, 256, (num, channels, size, size), dtype=np.uint8) for model in COLORS
    }


def shown(figure):
    return {image.get_gid(): image for image in figure.axes[0].images}


def test_samples_of_one_noise_and_label_stand_below_each_other():
    samples = {"labels": np.array([2, 0, 1] * 2 + [5, 6, 7]), **images(9)}
    panels = shown(plot_samples(samples))
    for index in range(9):
        columns = {panels[f"{model}/{index}"].get_extent()[0] for model in COLORS}
        assert len(columns) == 1
        tops = [panels[f"{model}/{index}"].get_extent()[3] for model in COLORS]
        assert tops == sorted(tops), "teacher above pruned above recovered"
    np.testing.assert_array_equal(panels["pruned/3"].get_array()[..., 0], samples["pruned"][3, 0])


def test_columns_are_ordered_and_headed_by_label():
    figure = plot_samples({"labels": np.array([2, 0, 1, 3, 4, 5]), **images(6)})
    headers = [
        (t.get_position()[0], t.get_text())
        for t in figure.axes[0].texts
        if t.get_text().startswith("label")
    ]
    assert [text for _, text in sorted(headers)] == [f"label {label}" for label in range(6)]
    assert shown(figure)["teacher/1"].get_extent()[0] < shown(figure)["teacher/2"].get_extent()[0]


def test_rows_are_named_with_depth_in_the_models_colour():
    samples = {"labels": np.arange(6), **images(6)}
    del samples["recovered"]
    texts = {
        t.get_text(): t.get_color()
        for t in plot_samples(samples, depths={"teacher": 28}).axes[0].texts
    }
    assert texts["teacher\n28 blocks"] == COLORS["teacher"]
    assert texts["pruned"] == COLORS["pruned"]
    assert not any(text.startswith("recovered") for text in texts)


@pytest.mark.parametrize("num", [1, 2, 6, 10])
def test_names_of_rows_stay_inside_the_figure(num):
    figure = plot_samples(
        {"labels": np.arange(num), **images(num)}, depths={model: 28 for model in COLORS}
    )
    figure.canvas.draw()
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert (
            box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        ), text.get_text()


def test_images_are_enlarged_without_blur_in_equal_gray_values():
    samples = {"labels": np.arange(6), **images(6)}
    for image in shown(plot_samples(samples)).values():
        assert image.get_interpolation() == "nearest"
        assert image.get_array().shape == (8, 8, 3), "grey as RGB: no colour map stretches it"


def test_of_many_labels_ten_are_shown():
    samples = {"labels": np.arange(100, 164), **images(64, channels=3)}
    panels = shown(plot_samples(samples))
    assert len(panels) == 3 * 10
    assert {"teacher/0", "teacher/63"} <= panels.keys()


def test_curves_show_every_logged_value_and_a_smoothed_line():
    steps = np.arange(0, 4000, 10)
    values = 5 + np.random.default_rng(0).normal(0, 1, 400)
    axes = plot_curves({"train/loss": (steps, values)}).axes[0]
    raw, smooth = axes.lines
    np.testing.assert_array_equal(raw.get_xydata(), np.stack([steps, values], axis=1))
    assert np.std(smooth.get_ydata()) < 0.5 * np.std(values)
    assert np.mean(smooth.get_ydata()) == pytest.approx(5, abs=0.15)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "train/loss")


def test_smoothing_keeps_a_straight_line_and_passes_over_nan():
    steps = np.arange(400.0)
    values = np.where(steps == 200, np.nan, 2.0)
    smooth = plot_curves({"train/loss": (steps, values)}).axes[0].lines[1].get_ydata()
    np.testing.assert_allclose(smooth, 2.0)


def test_losses_over_orders_of_magnitude_use_a_log_scale():
    steps = np.arange(100)
    figure = plot_curves(
        {"train/loss": (steps, 10.0 ** (-steps / 30)), "train/loss_kd": (steps, 2.0 + steps / 100)}
    )
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]


def test_curves_without_a_known_column_give_no_figure():
    assert (
        plot_curves({"lr-AdamW": (np.arange(3), np.ones(3)), "epoch": (np.arange(3), np.ones(3))})
        is None
    )


def test_losses_that_were_never_finite_are_said_to_be_so():
    figure = plot_curves({"train/loss": (np.arange(3), np.full(3, np.nan))})
    assert "never finite" in figure.axes[0].get_title(loc="left")


def test_overview_bars_are_measured_values_in_model_colors(new_run):
    metrics = read_run(new_run()).metrics
    figure = plot_overview(metrics)
    for axes, key in zip(figure.axes, ("images_per_second", "fid", "accuracy"), strict=True):
        assert [bar.get_width() for bar in axes.patches] == [
            metrics[model][key] for model in COLORS
        ]
        assert [to_hex(bar.get_facecolor()).upper() for bar in axes.patches] == list(
            COLORS.values()
        )


def test_overview_leaves_out_what_was_not_measured():
    figure = plot_overview({"teacher": {"fid": 3.0}, "pruned": {"depth": 6, "fid": float("nan")}})
    assert [len(axes.patches) for axes in figure.axes] == [1]
    assert plot_overview({"teacher": {"depth": 12}}) is None


def overlaps(figure):
    """Pairs of texts that cover each other once the figure is laid out."""
    figure.draw_without_rendering()
    texts = []
    for axes in figure.axes:
        titles = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        ticks = [
            text
            for axis in (axes.xaxis, axes.yaxis)
            for text, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
            if min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())
        ]
        texts += [*axes.texts, *(titles + ticks if axes.axison else [])]
    boxes = [
        (text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()
    ]
    pairs = combinations(boxes, 2)
    return [(a, b) for (a, box), (b, other) in pairs if box.padded(-1).overlaps(other.padded(-1))]


def test_no_text_covers_another_with_28_blocks_in_groups_of_14():
    stacks = {"blocks": history(num_steps=50, num_blocks=28, group_size=14, every=2000)}
    assert overlaps(plot_decisions(stacks)) == []
    assert overlaps(plot_block_probabilities(stacks)) == []


def test_no_text_covers_another_in_a_whole_run(new_run):
    run = read_run(new_run())
    assert overlaps(plot_decisions(run.stacks)) == []
    assert overlaps(plot_block_probabilities(run.stacks)) == []
    assert (
        overlaps(plot_samples(run.samples, depths={"teacher": 12, "pruned": 6, "recovered": 6}))
        == []
    )
    assert overlaps(plot_overview(run.metrics)) == []
    for curves in run.curves.values():
        assert overlaps(plot_curves(curves)) == []


def test_ticks_on_a_log_scale_are_numbers():
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        figure = plot_curves({"train/loss": (np.arange(40), np.geomspace(100, 0.01, 40))})
        figure.draw_without_rendering()
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert "1" in labels and not any("$" in label for label in labels)


def test_every_choice_is_marked_at_its_loss():
    losses = np.linspace(1, 2, 100)
    figure = plot_candidate_losses(losses, {"uniform": 1.5, "first": 1.1})
    texts = [text.get_text().strip() for text in figure.axes[0].texts]
    assert texts == ["first (10% are lower)", "uniform (50% are lower)"]
    lines = [
        c.get_segments()[0][0][0]
        for c in figure.axes[0].collections
        if isinstance(c, LineCollection)
    ]
    assert lines == [1.1, 1.5] and overlaps(figure) == []


def test_the_ideal_line_and_the_measured_points_are_drawn():
    axes = plot_speedup([("shortgpt 0.5", 2.0, 1.9), ("shortgpt 0.25", 4.0, 3.5)]).axes[0]
    points = {
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if len(line.get_xdata()) == 1
    }
    assert points == {(2.0, 1.9), (4.0, 3.5)}
    (ideal,) = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert list(ideal.get_xdata()) == list(ideal.get_ydata())


def test_sigma_lines_stand_where_the_statistics_say():
    counts, edges = np.histogram(np.random.default_rng(0).normal(size=1000), bins=20)
    sides = {
        side: {"mean": 1.0, "sigma": 2.0, "largest_in_sigma": 3.0}
        for side in ("teacher", "student")
    }
    figure = plot_activations(
        {"pair": dict.fromkeys(sides, (counts, edges))}, {"pair": sides}, num_sigma=(1.0, 2.0)
    )
    for axes in figure.axes:
        assert sorted(line.get_xdata()[0] for line in axes.lines) == [-3.0, -1.0, 3.0, 5.0]
