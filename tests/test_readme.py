"""The commands of the README and docs run, and the README's table matches the API."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from tinyfusion_pl import cli
from tinyfusion_pl.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text()


def code_lines(language, text=README):
    for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL):
        yield from (line.split("  #")[0].strip() for line in block.splitlines() if line.strip())


PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
LINES = [line for text in PAGES for line in code_lines("bash", text)]
LAUNCHED = [
    f"tinyfusion {found[1]}"
    for line in LINES
    if (found := re.match(r"(?:srun|torchrun) .*tinyfusion(?:_pl)? (.*)", line))
]
COMMANDS = [
    line for line in LINES if line.startswith("tinyfusion") and line.split()[1] not in cli.COMMANDS
]
COMMANDS = list(dict.fromkeys(COMMANDS + LAUNCHED))  # pages repeat the README's


PLUGINS = {
    "_optuna": "optuna_sweeper",
    "launcher=joblib": "joblib_launcher",
    "launcher=submitit": "submitit_launcher",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_composes(command, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for word, plugin in PLUGINS.items():
        if word in command:
            pytest.importorskip(f"hydra_plugins.hydra_{plugin}", reason="the extra sweeps")
    words = shlex.split(command)[1:]
    if "-m" in words:  # the first arm
        words = [word.partition(",")[0] for word in words if word != "-m"]
    assert main(words if {"--help", "--cfg"} & set(words) else [*words, "--cfg", "job"]) == 0
    assert "pruning:" in capfd.readouterr().out or "--help" in words


def test_files_named_by_the_evaluation_page_exist():
    groups = set(re.findall(r"`metrics=(\w+)", EVALUATION))
    assert {"inception", "kid", "fd_dinov2", "cmmd", "timm", "digits"} <= groups
    assert all((ROOT / "conf" / "metrics" / f"{name}.yaml").exists() for name in groups)
    files = set(re.findall(r"(?:examples|tests|benchmarks)/[\w/.]+", EVALUATION))
    assert len(files) >= 3 and all(
        (ROOT / name).exists() or (ROOT / f"{name}.npz").exists() for name in files
    )


def test_sweep_files_named_by_the_docs_exist():
    text = (ROOT / "docs" / "sweeps.md").read_text()
    files = re.findall(r"wandb sweep (\S+)", text)
    assert files and all((ROOT / file).exists() for file in files)
    for pattern in re.findall(r"`(?:sweeps/)?(\w*\*\w*\.yaml)`", text):
        assert list((ROOT / "sweeps").glob(pattern)), pattern


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in code_lines("bash") if line.startswith("make")] + [
        "test-all"
    ]
    assert (
        all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
        and len(targets) == 3
    )


def test_argument_table_matches_the_callback_and_its_defaults():
    import inspect

    from tinyfusion_pl import DepthPruningCallback

    parameters = inspect.signature(DepthPruningCallback).parameters
    rows = re.findall(r"^\| (`\w+`[^|]*) \| ([^|]*) \|", README, re.MULTILINE)
    assert len(rows) >= 5
    for names, defaults in rows:
        names, defaults = (
            re.findall(r"`(\w+)`", names),
            [d.strip(' `"') for d in defaults.split(",")],
        )
        for name, default in zip(names, defaults):
            assert name in parameters
            if default not in ("", "found", "stated", "all steps"):
                own = parameters[name].default
                if isinstance(own, bool):
                    assert default == str(own)
                    continue
                assert float(default) == own if isinstance(own, (int, float)) else default == own


@pytest.mark.slow
def test_vit_example_prunes_and_recovers_a_foreign_model(tmp_path):
    example = runpy.run_path(str(ROOT / "examples" / "prune_vit_classifier.py"))
    results = example["main"](str(tmp_path), 250)
    dense, pruned, healed = results.values()
    assert dense > 0.6 and healed > pruned
