"""The files that W&B writes offline, read back: a log of records in LevelDB's format, each a protocol buffer of W&B's own."""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import wandb
from wandb.proto import wandb_internal_pb2

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What W&B would show of a run: one file, or those of several attempts in order."""

    run_id: str = ""
    group: str = ""
    sweep_id: str = ""
    config: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    history: list = field(default_factory=list)
    step_metrics: dict = field(default_factory=dict)
    exit_code: int | None = None
    artifacts: list = field(default_factory=list)

    def curve(self, name, step):
        """(step, value) of each row that has `name`."""
        return [(row.get(step), row[name]) for row in self.history if name in row]


def read_runs(folder: Path) -> list[OfflineRun]:
    """The runs of all files below `folder`, by id, in the order in which they began."""
    wandb.teardown()  # W&B's process writes the end of a file after `finish` has returned
    runs = {}
    for file in sorted(Path(folder).glob("wandb/offline-run-*/*.wandb")):
        run_id = file.stem.removeprefix("run-")
        _read(file, runs.setdefault(run_id, OfflineRun(run_id)))
    return list(runs.values())


def _records(data: bytes):
    place, parts = FILE_HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + HEADER])
        chunk = data[place + HEADER : place + HEADER + size]
        place += HEADER + size
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def _items(items):
    for item in items:
        yield item.key or "/".join(item.nested_key), json.loads(item.value_json)


def _read(file: Path, run: OfflineRun) -> None:
    data = file.read_bytes()
    assert data.startswith(b":W&B"), f"{file} is no file of W&B"
    for record in _records(data):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.group, run.sweep_id = record.run.run_group, record.run.sweep_id
            run.config.update(_items(record.run.config.update))
        elif kind == "config":
            run.config.update(_items(record.config.update))
        elif kind == "summary":
            run.summary.update(_items(record.summary.update))
        elif kind == "history":
            run.history.append(dict(_items(record.history.item)))
        elif kind == "metric":
            run.step_metrics[record.metric.glob_name or record.metric.name] = (
                record.metric.step_metric
            )
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
        elif kind == "request" and record.request.HasField("log_artifact"):
            run.artifacts.append(record.request.log_artifact.artifact.name)
        elif kind == "artifact":
            run.artifacts.append(record.artifact.name)
