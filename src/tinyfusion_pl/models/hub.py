"""``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of our own models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import ModelHubMixin, snapshot_download
from torch import nn

from tinyfusion_pl.artifacts import read_json, sha256, write_text
from tinyfusion_pl.checksums import SEAL
from tinyfusion_pl.models.model_cards import make_model_card
from tinyfusion_pl.models.pretrained import load_pretrained
from tinyfusion_pl.models.records import RECORD, check_depths, get_decision
from tinyfusion_pl.models.shallow import WEIGHTS, save_shallow
from tinyfusion_pl.models.sources import get_source

METRICS = "metrics.json"
CARD = "README.md"
# Entries of a record that `save_shallow` computes from the model.
COMPUTED = ("format", "model", "library", "run_maps", "num_params", "weights", "versions", SEAL)


class HubMixin(ModelHubMixin):
    """Saves a model as `save_shallow` does, with a model card, and loads it with `load_pretrained`.

    ``push_to_hub(repo_id)`` is that of ``huggingface_hub.ModelHubMixin``.
    """

    _hub_mixin_config: ClassVar[dict[str, Any]] = {}  # arguments are in record.json instead

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # ModelHubMixin defines __new__(*args, **kwargs), which would hide the arguments.
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        cls.__signature__ = inspect.Signature(parameters)

    def save_pretrained(  # type: ignore[override]  # of the mixin, what push_to_hub passes
        self,
        save_directory: str | Path,
        *,
        record: Mapping[str, Any] | None = None,
        metrics: str | Path | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        config: Any = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``model.safetensors``, ``record.json`` and a model card ``README.md``.

        Args:
            save_directory: Folder to write; created if missing. An existing README.md is kept.
            record: Entries of the record, see `save_shallow`. Default: those of the record that the
                model was loaded with, or its source.
            metrics: The run's ``metrics.json``, whose figures go into the card. Default: the one in
                the folder that the model was loaded from, or in the folder above, if the weights
                are unchanged since.
            push_to_hub: Call ``push_to_hub`` afterwards.
            repo_id: Repository for `push_to_hub`; default: the name of the folder.
            config: Unused; the record has the arguments.
            model_card_kwargs: Unused.
            push_to_hub_kwargs: Passed to ``push_to_hub``.

        Returns:
            URL of the commit with `push_to_hub`, otherwise None.

        Raises:
            ArtifactError: A file could not be written, or the record's decision does not match the
                model, e.g. because it was pruned after loading.
        """
        assert isinstance(self, nn.Module)
        folder = Path(save_directory)
        loaded = vars(self).get("record")
        if record is None:
            record = {"source": get_source(self)} if loaded is None else loaded
        record = {key: value for key, value in record.items() if key not in COMPUTED}
        if record.get("stacks"):
            check_depths(
                self, get_decision(record, RECORD), f"The record of the {type(self).__name__}"
            )
        save_shallow(folder, self, record)
        if metrics is None and loaded is not None:
            if loaded["weights"]["sha256"] == sha256(folder / WEIGHTS):
                metrics = self._find_metrics()
        if not (folder / CARD).exists():
            figures = None if metrics is None else read_json(metrics)
            write_text(folder / CARD, make_model_card(read_json(folder / RECORD), figures))
        if push_to_hub:
            return self.push_to_hub(repo_id=repo_id or folder.name, **push_to_hub_kwargs)
        return None

    def _find_metrics(self) -> Path | None:
        path = vars(self).get("record_folder")
        if path is None:
            return None
        places = (Path(path) / METRICS, Path(path).parent / METRICS)
        return next((place for place in places if place.is_file()), None)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # overrides are our model's arguments
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **overrides: Any,
    ) -> Any:
        """Load a model that `save_pretrained` wrote, in evaluation mode.

        Args:
            pretrained_model_name_or_path: Folder, or repository on the Hugging Face Hub.
            force_download: Download again, even if cached.
            token: Access token; default: the one of ``hf auth login``.
            cache_dir: Cache folder of downloads.
            local_files_only: Use the cache only.
            revision: Branch, tag or commit.
            overrides: Arguments of the model, e.g. ``activation_checkpointing=True``.

        Raises:
            ArtifactError: A file is missing or damaged.
            ValueError: The folder holds a model of another class.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    str(pretrained_model_name_or_path),
                    allow_patterns=[WEIGHTS, RECORD],
                    force_download=force_download,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    revision=revision,
                )
            )
        model = load_pretrained(folder, **overrides)
        if not isinstance(model, cls):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {type(model).__name__}, not a "
                f"{cls.__name__}. Call {type(model).__name__}.from_pretrained."
            )
        return model
