"""Fetching a file once: into a partial file that gets its name when whole and right."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch.hub import tqdm

from tinyfusion_pl.artifacts import ArtifactError, atomic_path
from tinyfusion_pl.locks import remove_strays

CHUNK = 1 << 20
TIMEOUT_S = 30.0


_waits: ContextVar[bool] = ContextVar("download_waits", default=False)


@contextmanager
def without_download() -> Iterator[None]:
    """Inside, what is not there yet is told as missing instead of fetched: for looking at what else is missing."""
    token = _waits.set(True)
    try:
        yield
    finally:
        _waits.reset(token)


class NotOnServerError(ArtifactError):
    """The server answers, and does not have the file."""


def cache_folder() -> Path:
    """Where downloaded weights lie: ``torch.hub.get_dir()/checkpoints``, which TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def fetch(
    url: str, path: str | os.PathLike, *, size: int | None = None, sha256: str | None = None
) -> Path:
    """`path`, fetched from `url` unless it is there, in which case nothing is asked of the network.

    A progress bar is shown on a terminal. The length that the server states is always held against what arrives.

    Args:
        url: http(s).
        path: Where the file goes, whole or not at all.
        size, sha256: Of the whole file, in bytes and as 64 hexadecimal digits, where known.

    Raises:
        ArtifactError: the server cannot be reached or what arrives is not the file; names the URL and the place to put the file.
        NotOnServerError: the server has no such file.
    """
    path = Path(path)
    if path.exists():
        return path
    if _waits.get():
        raise ArtifactError(
            f"{path.name} is not there yet. It is downloaded from {url} when nothing else is missing, or put it at {path}."
        )
    by_hand = f"Download that file elsewhere and put it at {path}."
    remove_strays(path.parent, of=path)  # what a killed download left
    digest = hashlib.sha256()
    with atomic_path(path) as partial, open(partial, "wb") as file:
        received, stated = 0, None
        for chunk, length in _chunks(url, path.name, by_hand):
            stated = length
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
        for expected in (stated, size):
            if expected is not None and received != expected:
                raise ArtifactError(
                    f"{path.name} did not come whole from {url}: {received} of {expected} bytes. Run again. {by_hand}"
                )
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ArtifactError(
                f"What {url} gave is not {path.name}: its checksum is {digest.hexdigest()[:12]}..., that of the published "
                f"file {sha256[:12]}.... {by_hand}"
            )
    return path


def _chunks(url: str, name: str, by_hand: str) -> Iterator[tuple[bytes, int | None]]:
    """What the server sends, and beside each piece how much it will be in all; errors of the network, and only these, are told here."""
    request = urllib.request.Request(url, headers={"User-Agent": "tinyfusion_pl"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            if response.headers.get_content_type() == "text/html":
                raise ArtifactError(f"{url} gave a web page instead of {name}. {by_hand}")
            length = response.headers.get("Content-Length")
            total = int(length) if length is not None else None
            with tqdm(
                total=total, desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=None
            ) as bar:
                yield b"", total
                while chunk := _read(response, url, name, by_hand):
                    yield chunk, total
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        kind = NotOnServerError if error.code in (404, 410) else ArtifactError
        raise kind(
            f"{name} cannot be fetched: {url} answers {error.code} {error.reason}. {by_hand}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise ArtifactError(
            f"{name} cannot be fetched from {url} ({getattr(error, 'reason', error)}). {by_hand}"
        ) from error


def _read(response: http.client.HTTPResponse, url: str, name: str, by_hand: str) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise ArtifactError(
            f"{name} stopped coming from {url} ({error!r}). Run again. {by_hand}"
        ) from error
