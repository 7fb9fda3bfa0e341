"""Checkpoints: a folder ``step-00001234`` that is whole or absent.

``weights.safetensors`` (readable anywhere), ``state.pt`` (optimiser, counters, random states; loaded
with weights_only), ``checkpoint.json`` (network, target scale, digests of both files). Written to a
temporary folder, fsynced, renamed. A torn or altered one is found by its digests and passed over.

Format 2 keeps the optimiser's state by the names of the parameters, for any number of ranks and any
engine; of format 1 the weights are still read.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal, cast

import torch
import xxhash
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from dmi_hpc.config import Config
from dmi_hpc.errors import CheckpointError, FormatVersionError
from dmi_hpc.files import TEMP_PREFIX, atomic_folder, write_json
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.targets import Scale

FORMAT_VERSION = 2
WEIGHTS, STATE, META = "weights.safetensors", "state.pt", "checkpoint.json"
PIECE = 1 << 20  # bytes hashed, then written while still in the cache; both let other threads run
_DTYPES = {  # as safetensors calls them, and in its order
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@cache
def software() -> Mapping[str, str]:
    """Versions of the packages that make a checkpoint; what is not installed is left out."""
    found = {}
    for name in ("dmi-hpc", "torch", "deepspeed"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Meta(Config):
    """What a checkpoint is of; `files` holds the xxh3_128 of each file."""

    format: Literal["dmi-checkpoint"] = "dmi-checkpoint"
    version: int = FORMAT_VERSION
    step: int
    epoch: int
    network: NetworkSpec
    scale: Scale
    task: Mapping[str, Any]
    data: str = ""  # identity of the shard set; "" in checkpoints from before it was recorded
    metrics: Mapping[str, float] = {}  # of a finished epoch; {} within one
    recipe: str = ""  # fingerprint
    software: Mapping[str, str] = {}  # versions; save() sets it
    ranks: int = 1
    engine: str = ""
    zero_stage: int = 0
    files: Mapping[str, str] = {}


def save(
    folder: Path, meta: Meta, weights: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> Path:
    """Write ``folder/step-N`` atomically and return it. One of these very weights is kept as it is:
    a training that was set back comes to the same step again. Raises OSError."""
    target = folder / f"step-{meta.step:08d}"
    if target.exists() and _holds(target, meta, weights):
        return target
    with atomic_folder(target) as temp:
        with _digesting(temp / WEIGHTS) as file:
            _write_tensors(file, weights)
        files = {WEIGHTS: file.digest()}
        with _digesting(temp / STATE) as file:
            torch.save(dict(state), cast(IO[bytes], file))  # it calls write and flush only
        files[STATE] = file.digest()
        whole = meta.model_copy(update={"files": files, "software": software()})
        write_json(temp / META, whole.model_dump(mode="json"))
    return target


def _holds(path: Path, meta: Meta, weights: Mapping[str, torch.Tensor]) -> bool:
    """True if a whole checkpoint of the same weights, and as well described, is there."""
    try:
        there = read_meta(path)
    except CheckpointError:
        return False
    if (there.version, there.metrics) != (meta.version, meta.metrics):
        return False
    with _digesting(Path(os.devnull)) as file:
        _write_tensors(file, weights)
    return there.files[WEIGHTS] == file.digest()


class _Digesting:
    """A file that is written, and the digest of what was.

    The first error is kept and what comes after it is dropped: torch would hide why a write failed.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._hash = stream, xxhash.xxh3_128()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view) if self.error is None else 0, PIECE):
                piece = view[start : start + PIECE]
                self._hash.update(piece)
                self._stream.write(piece)
        except OSError as error:
            self.error = error
        return len(view)

    def flush(self) -> None:
        """Nothing: closing the stream does."""

    def digest(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def _digesting(path: Path) -> Iterator[_Digesting]:
    with path.open("wb") as stream:
        file = _Digesting(stream)
        yield file
        if file.error is not None:
            raise file.error


def _write_tensors(file: _Digesting, tensors: Mapping[str, torch.Tensor]) -> None:
    """The bytes that safetensors itself would make, without a second copy of them in memory."""
    rank = list(_DTYPES).index
    order = sorted(tensors, key=lambda name: (rank(tensors[name].dtype), name))
    header, end = {}, 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        flat = tensors[name].detach().cpu().reshape(-1)
        file.write(flat.view(torch.uint8).numpy())


def read_meta(path: Path, *, verify: bool = True) -> Meta:
    """Meta of the checkpoint folder `path`; verify: its files' digests too. CheckpointError."""
    try:
        raw = json.loads((path / META).read_text())
        version = raw.get("version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatVersionError(
                f"{path}: checkpoint format {version}, this DMI-HPC reads up to {FORMAT_VERSION}"
            )
        meta = Meta.model_validate(raw)
        for name in (WEIGHTS, STATE) if verify else ():
            found, expected = _digest(path / name), meta.files.get(name, "none")
            if found != expected:
                raise CheckpointError(f"{path / name}: checksum {found}, expected {expected}")
    except (OSError, ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint: {error}") from None
    return meta


def _digest(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            found.update(piece)
    return found.hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Weights of checkpoint `path` by name, on the CPU. CheckpointError if they cannot be read."""
    try:
        return load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / WEIGHTS}: not readable: {error}") from None


def load_weights(path: Path, module: torch.nn.Module) -> None:
    """Load the weights of checkpoint `path` into `module`; raises CheckpointError if they differ."""
    try:
        module.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path / WEIGHTS}: does not fit the network: {error}") from None


def load_state(path: Path) -> dict[str, Any]:
    """Optimiser, counters and random states of checkpoint `path`. CheckpointError if it is of format
    1, or unreadable."""
    found = read_meta(path, verify=False).version
    if found < FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {found}, a training is continued from format "
            f"{FORMAT_VERSION}: this one keeps the optimizer's state otherwise. Its weights are good "
            "(dmi evaluate, dmi predict). To train on, set train.start.path to it in a new run, or "
            "continue with the DMI-HPC that wrote it"
        )
    try:
        state: dict[str, Any] = torch.load(path / STATE, weights_only=True, map_location="cpu")
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path / STATE}: not readable: {error}") from None
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
            # killed in the middle, it must not look like a torn checkpoint; files.remove_stale
            hidden = f"{TEMP_PREFIX}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            shutil.rmtree(path.rename(path.with_name(hidden)))


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
        # earlier versions knew no other error than the mean absolute one
        names = ("validation_error", "validation_mae")
        scored += [(meta.metrics[n], meta.step, path) for n in names if n in meta.metrics]
    for _, _, path in sorted(scored):
        try:
            return path, read_meta(path)
        except CheckpointError as error:
            warn(f"{error}; using the next best checkpoint")
    raise CheckpointError(
        f"{folder}: no whole checkpoint of a finished epoch; first: dmi train RECIPE"
    )
