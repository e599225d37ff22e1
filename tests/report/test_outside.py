"""Texts from the files of a run do nothing on the page or in the terminal, wherever they stand."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from report.test_page import Page
from tinyfusion_pl.report import compare, write_report
from tinyfusion_pl.report import page as page_module
from tinyfusion_pl.report.outside import html, printable, printable_content

TAG, ATTRIBUTE, TERMINAL = (
    "<script>alert(1)</script>",
    'x" onmouseover="alert(1)',
    "\x1b[31m\x9b2J\u202ered\x07\r",
)


def _touch(figure, path):
    path.parent.mkdir(exist_ok=True)
    path.touch()


@pytest.fixture
def hostile(new_run):
    """A run in which every name from outside is `name`."""

    def make(name, folder="run"):
        run = new_run(folder)
        metrics = json.loads((run / "metrics.json").read_text())
        model = metrics["teacher"]
        metrics |= {name: {**model, name: 1.5}, "name": name}
        metrics["protocol"] |= {name: name, "deep": {name: [name]}, "feature_network": name}
        metrics["seconds"][name] = metrics["speedup"][name] = 1.0
        (run / "metrics.json").write_text(json.dumps(metrics))
        samples = load_file(run / "samples.safetensors")
        save_file({**samples, name: samples["teacher"]}, run / "samples.safetensors")
        record = json.loads((run / "shallow/record.json").read_text())
        record["source"] = {name: name}
        record["stacks"] = {name: {**record["stacks"]["blocks"], "pattern": name}}
        (run / "shallow/record.json").write_text(json.dumps(record))
        lines = [
            json.loads(line)
            for line in (run / "learn_mask/decisions.jsonl").read_text().splitlines()
        ]
        for line in lines:
            line["stacks"] = {name: line["stacks"]["blocks"]}
        (run / "learn_mask/decisions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        (run / "config.yaml").write_text(f"name: {name}\n")
        return run

    return make


@pytest.mark.parametrize("name", [TAG, ATTRIBUTE, TERMINAL], ids=["tag", "attribute", "terminal"])
def test_a_hostile_name_is_text_wherever_it_stands_on_the_page(hostile, monkeypatch, name):
    monkeypatch.setattr(page_module.drawing, "save_figure", _touch)
    page = Page(write_report(hostile(name)))
    assert page.all("script") == [] and not any(
        "onmouseover" in attributes for _, attributes in page.tags
    )
    assert page.source.isascii() or not {"\x1b", "\x9b", "\u202e", "\x07"} & set(page.source)
    shown = printable(name)
    assert page.text.count(shown) >= 9
    assert any(shown in attributes["alt"] for attributes in page.all("img"))


def test_a_formula_in_a_name_is_drawn_as_it_is(hostile, monkeypatch):
    monkeypatch.setattr(page_module.drawing, "DPI", 40)
    run = hostile(r"$\frac{1$")
    assert write_report(run).exists() and (run / "figures" / "overview.png").exists()


def test_compare_prints_no_control_characters(hostile, tmp_path):
    a, b = hostile(TERMINAL, "a"), hostile(TERMINAL + "b", "b\x1b[2J")
    said = compare(a, b)
    assert all(each.isprintable() for each in said.split("\n"))
    assert r"\x1b[31m\x9b2J\u202ered\x07\r" in said and r"b\x1b[2J" in said


def test_what_is_not_known_to_be_html_is_escaped():
    assert html("<b>{}</b>{}", "<i>", html("<u>{}</u>", "&")) == "<b>&lt;i&gt;</b><u>&amp;</u>"


def test_printable_keeps_letters_and_escapes_control_characters():
    assert printable("Käse 模型 é–\u3000") == "Käse 模型 é–\u3000"
    assert printable("a\x00\x1b\u200b\ud800\u2028\n") == r"a\x00\x1b\u200b\ud800\u2028\n"
    assert printable_content({"\x1b": ["\x07", 1, None, {"a": "\x1b"}]}) == {
        r"\x1b": [r"\x07", 1, None, {"a": r"\x1b"}]
    }
