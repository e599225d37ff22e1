"""What travels in the package, and that it works where the checkout is not."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "tinyfusion_pl"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_package_list_equals_what_is_on_disk():
    on_disk = {"tinyfusion_pl.conf"} | {
        ".".join(file.parent.relative_to(ROOT / "src").parts)
        for file in SOURCES.rglob("__init__.py")
    }
    assert sorted(on_disk) == PYPROJECT["tool"]["setuptools"]["packages"]


def test_every_folder_with_code_is_a_package():
    assert [
        str(file) for file in SOURCES.rglob("*.py") if not (file.parent / "__init__.py").exists()
    ] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the sdist of a copy without what lies around in a checkout."""
    pytest.importorskip("build", reason="pip install build")
    pytest.importorskip("setuptools", minversion="77", reason="pip install 'setuptools>=77'")
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("*.egg-info", "__pycache__")
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / "checkout")
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        folder / "dist",
        folder / "checkout",
        cwd=folder,
    )
    (built,) = (folder / "dist").glob("*.whl")
    return built


def run(*command, cwd, **environment):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel_contains_every_module_configuration_and_asset(wheel):
    conf = ROOT / "conf"
    expected = {
        "tinyfusion_pl/conf/" + file.relative_to(conf).as_posix() for file in conf.rglob("*.yaml")
    }
    expected |= {file.relative_to(ROOT / "src").as_posix() for file in SOURCES.rglob("*.py")}
    assets = (SOURCES / "assets").rglob("*")
    expected |= {file.relative_to(ROOT / "src").as_posix() for file in assets if file.is_file()}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed - {"tinyfusion_pl/conf/__init__.py"} == expected


@pytest.mark.slow
def test_cli_of_the_installed_wheel_works_in_another_directory(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--quiet",
        "--target",
        site,
        wheel,
        cwd=tmp_path,
    )
    elsewhere.mkdir()
    default = (
        site / "tinyfusion_pl" / "conf" / "run" / "default.yaml"
    )  # marked, so that no other copy can answer
    default.write_text(default.read_text().replace("name: digits_d6", "name: of_the_wheel"))
    there = {"PYTHONPATH": str(site)}  # comes before an editable install of the checkout
    assert "name: of_the_wheel" in run(
        sys.executable, "-m", "tinyfusion_pl", "--cfg", "job", cwd=elsewhere, **there
    )
    assert "task: " in run(
        sys.executable, site / "bin" / "tinyfusion", "--help", cwd=elsewhere, **there
    )
