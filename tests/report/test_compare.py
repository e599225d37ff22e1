import json

import pytest

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.report import compare


@pytest.fixture
def two_runs(new_run):
    """Two run folders; `change(metrics)` edits the second's."""

    def make(change=lambda metrics: None):
        a, b = new_run("a"), new_run("b")
        metrics = json.loads((b / "metrics.json").read_text())
        change(metrics)
        (b / "metrics.json").write_text(json.dumps(metrics))
        return a, b

    return make


def rows(table, model):
    """The lines below `model`: label -> the texts of its cells."""
    lines = table.splitlines()
    start = lines.index(model) + 1
    found = {}
    for line in lines[start:]:
        if not line.startswith("  "):
            break
        label, *cells = [cell for cell in line.split("  ") if cell.strip()]
        found[label.strip()] = [cell.strip() for cell in cells]
    return found


def test_table_holds_both_runs_and_their_difference(two_runs):
    def change(metrics):
        metrics["recovered"] |= {"fid": 10.04, "accuracy": 0.971, "depth": 8, "num_params": 700_000}
        metrics["seconds"]["recover"] = 33.4
        metrics["peak_memory_mib"] = 1000.4
        metrics["speedup"]["measured"] = 1.4

    table = compare(*two_runs(change))
    recovered = rows(table, "recovered")
    assert recovered["FID"] == ["12.04", "10.04", "-2"]
    assert recovered["accuracy"] == ["96.1%", "97.1%", "+1.0 pp"]
    assert recovered["blocks"] == ["6", "8", "+2"]
    assert recovered["parameters"] == ["523,456", "700,000", "+176,544"]
    assert rows(table, "teacher")["FID"] == ["9.213", "9.213", "+0"]
    assert rows(table, "time")["recovery"] == ["1 min 33 s", "33 s", "-1 min 00 s"]
    assert rows(table, "speed-up")["measured"] == ["1.93x", "1.40x", "-0.53x"]
    (memory,) = [line.split() for line in table.splitlines() if line.startswith("peak memory")]
    assert memory == ["peak", "memory", "1,123", "MiB", "1,000", "MiB", "-123", "MiB"]


def test_equal_protocols_are_reported_as_equal(two_runs):
    assert "Protocol: equal. The values are comparable." in compare(*two_runs())


def test_differing_protocol_entries_are_listed_with_both_values(two_runs):
    def change(metrics):
        metrics["protocol"]["guidance_scale"] = 4.0
        metrics["protocol"]["extra"] = [1, 2]
        del metrics["protocol"]["guidance_channels"]

    table = compare(*two_runs(change))
    assert (
        "DIFFERS in guidance_scale, guidance_channels, extra. The values are NOT comparable"
        in table
    )
    cells = {
        line.split()[0]: line.split()[1:] for line in table.splitlines() if line.startswith("  ")
    }
    assert cells["guidance_scale"] == ["1.5", "4.0"]
    assert cells["guidance_channels"] == ["null", "(not", "given)"]
    assert cells["extra"] == ["(not", "given)", "[1,", "2]"]
    assert "seed" not in cells


def test_differences_need_equal_protocols_except_for_depth(two_runs):
    def other(metrics):
        metrics["protocol"]["num_samples"] = 50_000
        metrics["recovered"] |= {"fid": 10.04, "depth": 8}

    def unknown(metrics):
        del metrics["protocol"]

    recovered = rows(compare(*two_runs(other)), "recovered")
    assert recovered["FID"] == ["12.04", "10.04"] and recovered["blocks"] == ["6", "8", "+2"]
    _, b = two_runs(unknown)
    assert rows(compare(b, b), "recovered")["FID"] == ["12.04", "12.04"]


def test_only_the_entries_that_differ_are_named_however_deep(two_runs):
    def first(metrics, k=3):
        metrics["protocol"]["metrics"] = {
            "fid": {"of": "features"},
            "precision_recall": {"of": "features", "k": k},
        }

    a, _ = two_runs()
    _, b = two_runs(lambda metrics: first(metrics, k=5))
    metrics = json.loads((a / "metrics.json").read_text())
    first(metrics)
    (a / "metrics.json").write_text(json.dumps(metrics))
    assert "DIFFERS in metrics.precision_recall.k. " in compare(a, b)


def test_measured_images_are_compared_and_refused_like_runs(tmp_path):
    for name, num_samples, fid in (("a", 40, 5.0), ("b", 40, 7.0), ("c", 50, 6.0)):
        (tmp_path / name).mkdir()
        written = {
            "name": f"{name}.npz",
            "samples": {"fid": fid},
            "protocol": {"num_samples": num_samples},
        }
        (tmp_path / name / "measure.json").write_text(json.dumps(written))
    table = compare(tmp_path / "a", tmp_path / "b")
    assert rows(table, "samples")["FID"] == ["5", "7", "+2"] and "(b.npz)" in table
    table = compare(tmp_path / "a", tmp_path / "c")
    assert "DIFFERS in num_samples. " in table and rows(table, "samples")["FID"] == ["5", "6"]


def test_protocol_settings_are_compared_by_value(two_runs):
    def change(metrics):
        metrics["protocol"] |= {"num_samples": 1000.0, "seed": "0"}

    assert "DIFFERS in seed. " in compare(*two_runs(change))


def test_unknown_protocols_are_not_called_comparable(two_runs):
    def change(metrics):
        del metrics["protocol"]

    _, b = two_runs(change)
    assert "unknown" in compare(b, b)
    assert "are comparable" not in compare(b, b)


def test_what_only_one_run_measured_has_no_difference(two_runs):
    def change(metrics):
        metrics["recovered"]["clip_score"] = 6.25
        del metrics["pruned"], metrics["peak_memory_mib"]

    table = compare(*two_runs(change))
    assert rows(table, "recovered")["clip_score"] == ["—", "6.25"]
    assert rows(table, "pruned")["FID"] == ["1,069", "—"]


def test_columns_are_aligned(two_runs):
    lines = compare(*two_runs()).splitlines()
    header = next(line for line in lines if line.endswith("B - A"))
    assert {len(line) for line in lines if line.startswith("  ")} == {len(header)}


def test_run_that_was_not_evaluated_is_refused_by_name(two_runs):
    a, b = two_runs()
    (b / "metrics.json").unlink()
    with pytest.raises(ArtifactError, match="not evaluated") as error:
        compare(a, b)
    assert str(b) in str(error.value)
