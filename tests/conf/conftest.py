"""Configurations are composed as in a fresh process: nothing is known of a command that ran before."""

import pytest
from hydra.core.hydra_config import HydraConfig


@pytest.fixture(autouse=True)
def _no_command_before(monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
