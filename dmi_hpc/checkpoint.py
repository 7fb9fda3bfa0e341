"""Checkpoints: a folder ``step-00001234`` that is whole or absent.

``weights.safetensors`` (readable anywhere), ``state.pt`` (optimiser, counters, random states; loaded
with weights_only), ``checkpoint.json`` (network, target scale, digests of both files). Written to a
temporary folder, fsynced, renamed. A torn or altered one is found by its digests and passed over.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dmi_hpc.config import Config
from dmi_hpc.errors import CheckpointError, FormatVersionError
from dmi_hpc.files import atomic_folder, write_json
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.problem import TargetScale

FORMAT_VERSION = 1
WEIGHTS, STATE, META = "weights.safetensors", "state.pt", "checkpoint.json"


class Meta(Config):
    """What a checkpoint is of; `files` holds the xxh3_128 of each file."""

    format: Literal["dmi-checkpoint"] = "dmi-checkpoint"
    version: int = FORMAT_VERSION
    step: int
    epoch: int
    network: NetworkSpec
    scale: TargetScale
    task: Mapping[str, Any]
    metrics: Mapping[str, float] = {}
    files: Mapping[str, str] = {}


def _digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def save(
    folder: Path, meta: Meta, weights: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> Path:
    """Write ``folder/step-N`` atomically and return it."""
    target = folder / f"step-{meta.step:08d}"
    with atomic_folder(target) as temp:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in weights.items()}, temp / WEIGHTS
        )
        torch.save(dict(state), temp / STATE)
        files = {name: _digest(temp / name) for name in (WEIGHTS, STATE)}
        write_json(temp / META, meta.model_copy(update={"files": files}).model_dump(mode="json"))
    return target


def read_meta(path: Path) -> Meta:
    """Meta of the checkpoint folder `path`, its files' digests verified. Raises CheckpointError."""
    try:
        raw = json.loads((path / META).read_text())
        version = raw.get("version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatVersionError(
                f"{path}: checkpoint format {version}, this DMI-HPC reads up to {FORMAT_VERSION}"
            )
        meta = Meta.model_validate(raw)
        for name, expected in meta.files.items():
            found = _digest(path / name)
            if found != expected:
                raise CheckpointError(f"{path / name}: checksum {found}, expected {expected}")
    except (OSError, json.JSONDecodeError, ValidationError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint: {error}") from None
    return meta


def load_weights(path: Path, module: torch.nn.Module) -> None:
    """Load the weights of checkpoint `path` into `module`; raises CheckpointError if they differ."""
    try:
        module.load_state_dict(load_file(path / WEIGHTS))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / WEIGHTS}: does not fit the network: {error}") from None


def load_state(path: Path) -> dict[str, Any]:
    """Optimiser, counters and random states of checkpoint `path`."""
    state: dict[str, Any] = torch.load(path / STATE, weights_only=True, map_location="cpu")
    return state


def all_in(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def latest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Newest whole checkpoint; each torn one passed over is told to `warn`."""
    for path in reversed(all_in(folder)):
        try:
            read_meta(path)
        except CheckpointError as error:
            warn(f"{error}; using the checkpoint before it")
            continue
        return path
    return None


def prune(folder: Path, keep: int, best: Path | None) -> None:
    """Remove all but the `keep` newest checkpoints and the best one."""
    for path in all_in(folder)[:-keep]:
        if path != best:
            shutil.rmtree(path)


def best(folder: Path) -> tuple[Path, Meta]:
    """The checkpoint with the lowest validation error, and its meta. Raises CheckpointError."""
    found = [(path, read_meta(path)) for path in all_in(folder)]
    scored = [(path, meta) for path, meta in found if "validation_mae" in meta.metrics]
    if not scored:
        raise CheckpointError(
            f"{folder}: no checkpoint of a finished epoch; first: dmi train RECIPE"
        )
    return min(scored, key=lambda item: (item[1].metrics["validation_mae"], item[1].step))
