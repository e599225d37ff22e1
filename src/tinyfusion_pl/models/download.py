"""Downloading a file once: into a partial file, renamed when complete and verified."""

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
    """Report files as missing inside the block instead of downloading them."""
    token = _waits.set(True)
    try:
        yield
    finally:
        _waits.reset(token)


class NotOnServerError(ArtifactError):
    """The server responds, but does not have the file."""


def cache_folder() -> Path:
    """Folder of downloaded weights: ``torch.hub.get_dir()/checkpoints``, below TORCH_HOME."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def fetch(
    url: str, path: str | os.PathLike, *, size: int | None = None, sha256: str | None = None
) -> Path:
    """Download `url` to `path` unless it exists, and return `path`.

    Shows a progress bar on a terminal. The length that the server states is always checked.

    Args:
        url: An http or https URL.
        path: Destination, written atomically.
        size: Expected size in bytes, where known.
        sha256: Expected SHA-256 as 64 hexadecimal digits, where known.

    Raises:
        ArtifactError: The download failed, or the result is not the expected file; the message
            names the URL and where to put the file.
        NotOnServerError: The server has no such file.
    """
    path = Path(path)
    if path.exists():
        return path
    if _waits.get():
        raise ArtifactError(
            f"{path.name} is not there yet. It is downloaded from {url} when nothing else is "
            f"missing; otherwise put it at {path}."
        )
    by_hand = f"Download that file elsewhere and put it at {path}."
    remove_strays(path.parent, of=path)  # of a killed download
    digest = hashlib.sha256()
    with atomic_path(path) as partial, partial.open("wb") as file:
        received, stated = 0, None
        for chunk, length in _chunks(url, path.name, by_hand):
            stated = length
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
        for expected in (stated, size):
            if expected is not None and received != expected:
                raise ArtifactError(
                    f"{path.name} did not come whole from {url}: {received} of {expected} bytes. "
                    f"Run again. {by_hand}"
                )
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ArtifactError(
                f"The download of {url} is not {path.name}: its checksum is "
                f"{digest.hexdigest()[:12]}..., that of the published file "
                f"{sha256[:12]}.... {by_hand}"
            )
    return path


def _chunks(url: str, name: str, by_hand: str) -> Iterator[tuple[bytes, int | None]]:
    """Yield chunks of the response with its total length; reports network errors only."""
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
