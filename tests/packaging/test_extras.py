"""Optional dependencies: where one is missing, the error names the extra that installs it."""

import sys

import pytest

from tinyfusion_pl.metrics import InceptionFeatures
from tinyfusion_pl.objectives.interpolant_sampling import SamplingOptions


@pytest.mark.parametrize(
    ("module", "build"),
    [
        ("torch_fidelity", lambda: InceptionFeatures("random")),
        ("torchdiffeq", lambda: SamplingOptions(sampler="dopri5")),
    ],
)
def test_missing_library_names_its_extra(monkeypatch, module, build):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"not installed.*pip install 'tinyfusion_pl\[eval\]'"):
        build()


def test_euler_needs_no_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    SamplingOptions(sampler="euler")
