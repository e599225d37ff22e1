"""What a family of denoisers states about itself: one `Family` per package under `tinyfusion_pl.models`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint.

    Args:
        model: Registered name of its model.
        url: URL of the file; for a folder, base URL of the files of a diffusers repository.
        kwargs: Arguments of the model that its name does not imply.
        file: File name in the cache, where the published one is ambiguous.
        other_names: Further file names of the same checkpoint, such as the one on the server.
        is_folder: A diffusers pipeline; only its transformer is downloaded.
        size: Size of the file in bytes, where known.
        sha256: SHA-256 of the file as 64 hexadecimal digits, where known.
        num_training_images: Images seen in training, repeats included, where the authors state it;
            recovery is compared with this number.
    """

    model: str
    url: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None
    other_names: tuple[str, ...] = ()
    is_folder: bool = False
    size: int | None = None
    sha256: str | None = None
    num_training_images: int | None = None


class ReadSizes(Protocol):
    """Reads the registered name and the arguments of a model from its state dict."""

    def __call__(
        self, state: State, where: str | Path, *, name: str | None, given: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """Return the registered name and the arguments that the shapes show.

        Args:
            state: State dict in the published layout.
            where: Origin of `state`, for errors.
            name: Registered name of the model, where it is known.
            given: Arguments that the caller states.
        """


class WriteDiffusers(Protocol):
    """Writes a model into an empty folder that diffusers opens."""

    def __call__(
        self,
        model: nn.Module,
        folder: Path,
        *,
        vae: Path | None,
        id2label: Mapping[int, str] | None,
    ) -> None:
        """Write the transformer, or with `vae` the whole pipeline."""


@dataclass(frozen=True, kw_only=True)
class DiffusersLayout:
    """Conversion of a family from and to diffusers.

    Args:
        classes: Values of ``_class_name`` in ``config.json``; the first is the current one.
        signs: Keys that every state dict in this layout has.
        read_arguments: Arguments of our model from diffusers' config and the folder that holds it.
        convert: Published layout of diffusers' state dict, from it, our arguments and its file.
        get_name: Registered name for our arguments.
        write: Writes a model in diffusers' layout.
    """

    classes: tuple[str, ...]
    signs: tuple[str, ...]
    read_arguments: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    convert: Callable[[State, Mapping[str, Any], Path], dict[str, Tensor]]
    get_name: Callable[[Mapping[str, Any]], str]
    write: WriteDiffusers


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of denoisers. Only `name`, `model` and `sizes` are required.

    Args:
        name: Name of the family, for messages.
        model: The class.
        sizes: Registered name -> arguments.
        published_names: Registered name -> the name in the paper, which `create_model` takes too.
        signs: Keys that only checkpoints of this family have; equal for families that share a
            layout.
        label_tables: Keys of label tables that have a last row for the null label.
        read_sizes: Reads name and arguments from a state dict; without it, loading an unnamed
            checkpoint asks for the model's name.
        check_weights: Called with state dict, registered name and path of a file that does not name
            its model; raises or warns where the weights were trained as another family.
        published: File or repository name -> published checkpoint.
        shipped: Registered name -> folder of weights in the package's ``assets/``.
        to_published: Content of the ``.pt`` file that the original repository loads; default: the
            bare state dict.
        check_export: Called with model and format before an export; warns about differences.
        diffusers: Conversion from and to diffusers, where it has the model.
    """

    name: str
    model: type[nn.Module]
    sizes: Mapping[str, Mapping[str, Any]]
    published_names: Mapping[str, str] = field(default_factory=dict)
    signs: tuple[str, ...] = ()
    label_tables: tuple[str, ...] = ()
    read_sizes: ReadSizes | None = None
    check_weights: Callable[[State, str, str | Path], None] | None = None
    published: Mapping[str, Published] = field(default_factory=dict)
    shipped: Mapping[str, str] = field(default_factory=dict)
    to_published: Callable[[dict[str, Tensor]], Any] | None = None
    check_export: Callable[[nn.Module, str], None] | None = None
    diffusers: DiffusersLayout | None = None
