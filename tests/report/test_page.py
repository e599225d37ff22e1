import base64
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from tinyfusion_pl.artifacts import ArtifactError
from tinyfusion_pl.report import headline, write_report
from tinyfusion_pl.report import page as page_module
from tinyfusion_pl.report.words import duration, feature_note, value

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """The page parsed: every tag closed in order, texts, attributes."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.open, self.tags, self.texts = [], [], []
        self.feed(self.source)
        self.close()
        assert self.open == [], "tags were left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(page_module.drawing, "DPI", 40)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are created but not rendered, which is slow: the names of figures to save."""
    names = []

    def save(figure, path):
        names.append(path.stem)
        path.parent.mkdir(exist_ok=True)
        path.touch()

    monkeypatch.setattr(page_module.drawing, "save_figure", save)
    return names


@pytest.fixture
def rows():
    """`rows(page)`: the cells of each table row, by the row's heading."""

    def read(page):
        found = re.findall(r"<tr>(.*?)</tr>", page.source, re.S)
        cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in found]
        texts = [[re.sub(r"<[^>]*>", "", cell) for cell in row] for row in cells]
        return {row[0]: row[1:] for row in texts}

    return read


def test_page_of_a_whole_run_is_self_contained_and_well_formed(new_run):
    run = new_run()
    target = write_report(run)
    assert target == run / "report.html"
    page = Page(target)
    assert (
        re.findall(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", page.source))
        == []
    )
    assert page.all("script") == page.all("link") == []
    anchors = [link["href"].removeprefix("#") for link in page.all("a")]
    assert set(anchors) == {section["id"] for section in page.all("section")}


def test_page_embeds_the_figures_with_alt_texts(new_run):
    run = new_run()
    page = Page(write_report(run))
    names = {
        "samples",
        "overview",
        "decisions",
        "block_probabilities",
        "curves_learn_mask",
        "curves_recover",
    }
    assert {path.name for path in (run / "figures").iterdir()} == {f"{name}.png" for name in names}
    embedded = {
        base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        for image in page.all("img")
    }
    assert embedded == {path.read_bytes() for path in (run / "figures").iterdir()}
    assert all(data.startswith(b"\x89PNG") for data in embedded)
    assert all(len(image["alt"]) > 20 for image in page.all("img"))


def test_tables_hold_the_metrics_costs_and_protocol(new_run, undrawn, rows):
    page = Page(write_report(new_run()))
    table = rows(page)
    assert table["blocks"][:3] == ["12", "6", "6"]
    assert table["parameters"][:3] == ["1,012,345", "523,456", "523,456"]
    assert table["FID"][:3] == ["9.213", "1,069", "12.04"]
    assert table["Inception score"][:3] == ["9.41", "2.13", "9.02"]
    assert table["accuracy"][:3] == ["97.9%", "18.7%", "96.1%"]
    assert table["images/s"][:3] == ["410.2", "790.8", "791.7"]
    assert table["speed-up, measured"][2] == "1.93x"
    assert table["speed-up, ideal"][2] == "2.00x"
    assert table["recovery"][0] == "1 min 33 s"
    assert table["total"][0] == "3 min 26 s"
    assert table["guidance_scale"] == ["1.5"]
    assert table["guidance_channels"] == ["null"]
    assert table["seed"] == ["0"]
    assert "1,123 MiB" in page.text


def test_page_shows_which_blocks_are_kept(new_run, undrawn):
    run = new_run(patterns={"blocks": [(3, 4), (2, 4)]})
    page = Page(write_report(run))
    kept = json.loads((run / "shallow/record.json").read_text())["stacks"]["blocks"]["kept_blocks"]
    titles = {
        attrs["title"] for attrs in page.all("span") if attrs.get("class", "").startswith("block")
    }
    assert titles == {f"block {b} {'kept' if b in kept else 'removed'}" for b in range(8)}
    assert "5 of 8" in page.text


@pytest.mark.parametrize("recorded", [True, False], ids=["groups recorded", "no groups recorded"])
def test_page_shows_mirrored_pairs_in_their_groups(new_run, undrawn, recorded):
    run = new_run()
    units = [[0, 7], [1, 6], [2, 5], [3, 4]]
    groups = [
        {"start": 2 * i, "num_kept": 1, "num_blocks": 2, "confidence": 0.9, "entropy": 0.3}
        for i in range(2)
    ]
    stack = {
        "kept_blocks": [1, 2, 5, 6],
        "block_probabilities": [0.1, 0.9, 0.9, 0.1, 0.1, 0.9, 0.9, 0.1],
        "groups": groups,
        "units": units,
    }
    entry = {"step": 0, "tau": 1.0, "scaling": 100.0, "stacks": {"in_blocks+out_blocks": stack}}
    (run / "learn_mask/decisions.jsonl").write_text(json.dumps(entry) + "\n")
    stored = {**stack, "pattern": "1:2", "num_blocks": 8, "groups": groups if recorded else []}
    (run / "shallow/record.json").write_text(
        json.dumps({"stacks": {"in_blocks+out_blocks": stored}})
    )
    page = Page(write_report(run))
    strips = re.findall(r'<li class="group">(.*?)</li>', page.source)
    shown = [[int(n) for n in re.findall(r'title="block (\d+)', strip)] for strip in strips]
    assert shown == ([[0, 1, 6, 7], [2, 3, 4, 5]] if recorded else [list(range(8))])
    assert (
        "4 of 8" in page.text
        and "1 of 2 units" in page.text
        and "keeps N of M units of blocks that are only removed together" in page.text
    )


def test_unknown_metrics_become_rows_if_they_are_numbers(new_run, undrawn, rows):
    run = new_run()
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["recovered"] |= {"clip_score": 6.25, "note": "hello", "broken": None}
    (run / "metrics.json").write_text(json.dumps(metrics))
    table = rows(Page(write_report(run)))
    assert table["clip_score"][:3] == ["—", "—", "6.25"]
    assert not {"note", "broken"} & table.keys()


def test_values_are_escaped(new_run, undrawn):
    run = new_run()
    evil = '<script>alert("1")</script>'
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["name"] = metrics["protocol"]["feature_network"] = metrics["protocol"][evil] = evil
    metrics["seconds"][evil] = 1.0
    metrics["teacher"][evil] = 1.0
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "config.yaml").write_text(f"name: {evil}\n")
    record = json.loads((run / "shallow/record.json").read_text())
    record["source"] = {evil: evil}
    record["stacks"] = {evil: record["stacks"]["blocks"] | {"pattern": evil}}
    (run / "shallow/record.json").write_text(json.dumps(record))
    (run / "logs/recover").rename(run / "logs/<script>")
    page = Page(write_report(run))
    assert page.all("script") == []
    assert page.text.count(evil) >= 9


PARTS = {
    "samples.safetensors": "samples",
    "learn_mask/decisions.jsonl": "decisions",
    "config.yaml": None,
    "shallow/record.json": None,
    "logs": "curves_recover",
    "metrics.json": "overview",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_line_replaces_each_missing_part(new_run, undrawn, part):
    run = new_run()
    shutil.rmtree(run / part) if (run / part).is_dir() else (run / part).unlink()
    page = Page(write_report(run))
    assert (
        "Not available yet: this run has no "
        + (part if part != "logs" else "logs/<stage>/**/metrics.csv")
        in page.text
    )
    assert len(undrawn) >= 4
    assert PARTS[part] not in undrawn


def test_folder_with_only_a_config_gives_a_page_without_images(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    page = Page(write_report(tmp_path))
    assert "Nothing has been measured yet" in page.text
    assert page.all("img") == []


def test_torn_decision_line_is_mentioned(new_run, undrawn):
    run = new_run()
    with (run / "learn_mask/decisions.jsonl").open("a") as file:
        file.write('{"step": 510, "ta')
    assert "1 torn line in learn_mask/decisions.jsonl" in Page(write_report(run)).text


def test_long_lists_of_a_record_are_counted_not_printed(new_run, undrawn):
    run = new_run()
    record = json.loads((run / "shallow/record.json").read_text())
    record["stacks"]["blocks"]["groups"][0]["probabilities"] = [0.123456] * 3432
    (run / "shallow/record.json").write_text(json.dumps(record))
    page = Page(write_report(run))
    assert "(3432 entries)" in page.text
    assert "0.123456" not in page.text
    assert f'"kept_blocks": {record["stacks"]["blocks"]["kept_blocks"]}' in page.text


def test_equal_runs_give_equal_bytes(new_run):
    a, b = new_run("a"), new_run("b")
    assert write_report(a).read_bytes() == write_report(b).read_bytes()


def test_broken_metrics_leave_the_old_page_as_it_was(new_run):
    run = new_run()
    (run / "report.html").write_text("old")
    (run / "metrics.json").write_text('{"name": ')
    with pytest.raises(ArtifactError, match=r"metrics\.json"):
        write_report(run)
    assert (run / "report.html").read_text() == "old"


def metrics(**changes):
    return {
        "teacher": {"depth": 12, "fid": 9.21, "accuracy": 0.979},
        "pruned": {"depth": 6, "fid": 1069.3, "accuracy": 0.19},
        "recovered": {"depth": 6, "fid": 12.04, "accuracy": 0.961},
        "speedup": {"measured": 1.93, "ideal": 2.0},
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {},
            "12 → 6 blocks: 1.93x faster sampling (ideal 2.00x), "
            "FID 9.2 → 12.0, accuracy 97.9% → 96.1%",
        ),
        (
            {"recovered": {}},
            "12 → 6 blocks (before recovery): 1.93x faster sampling (ideal 2.00x), "
            "FID 9.2 → 1069.3, accuracy 97.9% → 19.0%",
        ),
        ({"speedup": {}, "teacher": {"depth": 12}}, "12 → 6 blocks: FID 12.0, accuracy 96.1%"),
        ({"speedup": {}, "teacher": {}, "recovered": {"depth": 6}}, "6 blocks"),
        ({"recovered": {}, "pruned": {}}, "Only the teacher has been measured"),
        ({"recovered": {}, "pruned": {}, "teacher": {}}, "Nothing has been measured yet"),
    ],
)
def test_headline_states_what_was_measured(changes, sentence):
    assert headline(metrics(**changes)) == sentence


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("digits_classifier", "never with published FID values"),
        ("InceptionV3 (torch-fidelity)", "as published values do"),
        ("RandomInceptionFeatures-0123456789ab", "the quality values here are meaningless"),
        (None, "does not record"),
    ],
)
def test_note_states_what_fid_can_be_compared_with(network, words):
    note = feature_note({"feature_network": network} if network else {})
    assert words in note
    assert network is None or network in note


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.25, "0.25 s"),
        (9.7, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7810, "2 h 10 min"),
    ],
)
def test_durations_are_written_for_people(seconds, written):
    assert duration(seconds) == written


@pytest.mark.parametrize(
    ("key", "number", "written"),
    [
        ("fid", None, "—"),
        ("fid", float("nan"), "nan"),
        ("accuracy", 1.0, "100.0%"),
        ("num_params", 675_129, "675,129"),
    ],
)
def test_values_are_written_for_people(key, number, written):
    assert value(key, number) == written


def test_scores_of_a_criterion_are_a_table_highest_first(new_run, undrawn, rows):
    run = new_run()
    record = json.loads((run / "shallow" / "record.json").read_text())
    (path, stack), *_ = record["stacks"].items()
    stack["scores"] = [float(i) / 8 for i in range(stack["num_blocks"])]
    (run / "shallow" / "record.json").write_text(json.dumps(record))
    found = {
        "criterion": "taylor",
        "num_block_runs": 1536,
        "kept_blocks": {path: stack["kept_blocks"]},
        "shortgpt": {path: [0]},
    }
    (run / "learn_mask" / "selection.json").write_text(json.dumps(found))
    page = Page(write_report(run))
    assert "The search alone" not in page.text
    (run / "learn_mask" / "selection.json").write_text(
        json.dumps({**found, "kept_blocks": {path: [0, 1, 2, 3, 4, 5]}})
    )
    assert "The search alone" in Page(write_report(run)).text
    table = rows(page)
    for block in range(stack["num_blocks"]):
        assert table[str(block)][:2] == [
            f"{block / 8:.4g}",
            "kept" if block in stack["kept_blocks"] else "removed",
        ]
    assert "scores" in undrawn and "taylor" in page.text and "1,536 runs of a block" in page.text
