"""What all tests share: one thread, fixed seeds, no network."""

import ipaddress
import os
import random
import socket

# Before torch and matplotlib are imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _is_local(host) -> bool:
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """A test that reaches for the network fails, wherever it runs."""
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def refuse(host):
        raise RuntimeError(f"Tests do not use the network, but this one reached for {host!r}.")

    def local_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            refuse(address[0])
        return connect(self, address)

    def local_getaddrinfo(host, *args, **kwargs):
        return getaddrinfo(host, *args, **kwargs) if _is_local(host) else refuse(host)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_connect)
        patch.setattr(socket, "getaddrinfo", local_getaddrinfo)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_composition_for_the_mode():
    """Hydra composes each configuration once more to read `hydra.mode`, which here only command lines set."""
    from hydra._internal.hydra import Hydra
    from hydra.types import RunMode

    def get_mode(self, config_name, overrides):
        return RunMode.MULTIRUN if "hydra.mode=MULTIRUN" in overrides else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", get_mode)
        yield
