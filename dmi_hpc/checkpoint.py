"""Checkpoints: a folder ``step-00001234`` that is whole or absent.

``weights.safetensors`` (readable anywhere), ``state.pt`` (optimiser, counters, random states; loaded
with weights_only), ``checkpoint.json`` (network, target scale, digests of both files). Written to a
temporary folder, fsynced, renamed. A torn or altered one is found by its digests and passed over.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized

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
    data: str = ""  # identity of the shard set; "" in checkpoints from before it was recorded
    metrics: Mapping[str, float] = {}
    files: Mapping[str, str] = {}


def save(
    folder: Path, meta: Meta, weights: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> Path:
    """Write ``folder/step-N`` atomically and return it. One of these very weights is kept as it is:
    a training that was set back comes to the same step again. Raises OSError."""
    target = folder / f"step-{meta.step:08d}"
    state_bytes = io.BytesIO()
    torch.save(dict(state), state_bytes)
    # written by Python: torch and safetensors themselves hide the cause of a failed write
    contents = {
        WEIGHTS: serialized({k: t.detach().cpu().contiguous() for k, t in weights.items()}),
        STATE: state_bytes.getvalue(),
    }
    files = {name: xxhash.xxh3_128_hexdigest(content) for name, content in contents.items()}
    if _holds(target, files[WEIGHTS]):
        return target
    with atomic_folder(target) as temp:
        for name, content in contents.items():
            (temp / name).write_bytes(content)
        write_json(temp / META, meta.model_copy(update={"files": files}).model_dump(mode="json"))
    return target


def _holds(path: Path, weights: str) -> bool:
    """True if a whole checkpoint of the weights of that digest is there."""
    try:
        return path.exists() and read_meta(path).files[WEIGHTS] == weights
    except CheckpointError:
        return False


def read_meta(path: Path, *, verify: bool = True) -> Meta:
    """Meta of the checkpoint folder `path`; verify: its files' digests too. CheckpointError."""
    try:
        raw = json.loads((path / META).read_text())
        version = raw.get("version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatVersionError(
                f"{path}: checkpoint format {version}, this DMI-HPC reads up to {FORMAT_VERSION}"
            )
        meta = Meta.model_validate(raw)
        for name, expected in meta.files.items() if verify else ():
            found = xxhash.xxh3_128_hexdigest((path / name).read_bytes())
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


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Of this rank, by kind of device: dropout masks are drawn on the one that computes."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Continue from what `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:  # absent: it was trained on the CPU so far
        torch.cuda.set_rng_state(states["cuda"], device)


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


def best(folder: Path, warn: Callable[[str], None]) -> tuple[Path, Meta]:
    """The whole checkpoint with the lowest validation error, and its meta; each damaged one passed
    over is told to `warn`. Raises CheckpointError if there is none."""
    scored: list[tuple[float, int, Path]] = []
    for path in all_in(folder):
        try:
            meta = read_meta(path, verify=False)
        except CheckpointError as error:
            warn(f"{error}; passed over")
            continue
        if "validation_mae" in meta.metrics:
            scored.append((meta.metrics["validation_mae"], meta.step, path))
    for _, _, path in sorted(scored):
        try:
            return path, read_meta(path)
        except CheckpointError as error:
            warn(f"{error}; using the next best checkpoint")
    raise CheckpointError(
        f"{folder}: no whole checkpoint of a finished epoch; first: dmi train RECIPE"
    )
