"""What trials leave on disk: checkpoints to go on from, and weights that their children begin with.

    RUN/search/trials/ID/checkpoints/        of a trial that runs or waits at a rung
    RUN/search/trials/ID/origin.json         what it began with, and the time it took so far
    RUN/search/weights/ID.safetensors        the best weights of a member of the population

Workers write, each its own trial's; the driver alone removes, so both stay bounded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dmi_hpc.errors import CheckpointError
from dmi_hpc.files import atomic_file, write_json
from dmi_hpc.models.spec import NetworkSpec

ORIGIN = "origin.json"


@dataclass(frozen=True)
class Trained:
    """A trained network; epochs: its own and those of the ancestors whose weights it began with;
    error: of validation, in the task's unit."""

    network: NetworkSpec
    weights: dict[str, torch.Tensor]
    epochs: float
    error: float


@dataclass(frozen=True)
class Origin:
    """parent: id of the trial whose weights were inherited, None if it began anew; share: of the
    parameters; epochs: of all ancestors; seconds: that the trial itself took so far."""

    parent: int | None = None
    share: float = 0.0
    epochs: float = 0.0
    seconds: float = 0.0


class Kept:
    """Paths and files below `folder`, RUN/search."""

    def __init__(self, folder: Path) -> None:
        self._trials, self._weights = folder / "trials", folder / "weights"

    def checkpoints(self, number: int) -> Path:
        return self._trials / str(number) / "checkpoints"

    def save_origin(self, number: int, origin: Origin) -> None:
        write_json(self._trials / str(number) / ORIGIN, vars(origin))

    def origin(self, number: int) -> Origin:
        """As it was saved; CheckpointError if it cannot be read."""
        path = self._trials / str(number) / ORIGIN
        try:
            return Origin(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path}: expected what this trial began with, found: {error}. Remove the folder "
                f"{path.parent}: the trial then begins anew"
            ) from None

    def save_weights(self, number: int, trained: Trained) -> None:
        """Replace those of the trial, whole or not at all."""
        about = {
            "network": trained.network.model_dump_json(),
            "epochs": repr(trained.epochs),
            "error": repr(trained.error),
        }
        with atomic_file(self._weights / f"{number}.safetensors") as temp:
            save_file(trained.weights, temp, metadata=about)

    def weights(self, number: int) -> Trained | None:
        """Those of the trial; None if none are kept, or without their error, as an earlier version did.
        CheckpointError if they cannot be read."""
        path = self._weights / f"{number}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about: dict[str, str] = file.metadata() or {}
            network = NetworkSpec.model_validate_json(about["network"])
            if "error" not in about:
                return None
            epochs, error = float(about["epochs"]), float(about["error"])
            return Trained(network, load_file(path), epochs, error)
        except (SafetensorError, OSError, KeyError, ValidationError) as error:
            raise CheckpointError(
                f"{path}: expected the weights of a trial, found: {error}. Remove the file: children "
                "of that trial then begin anew"
            ) from None

    def forget(self, number: int) -> None:
        """Remove the checkpoints of a trial, if it has any. By the driver alone."""
        shutil.rmtree(self._trials / str(number), ignore_errors=True)

    def prune(self, trials: Collection[int], parents: Collection[int]) -> None:
        """Remove the checkpoints of all but `trials` (that run or wait to go on), and the weights of
        all but `parents` (the population, and trials that run). By the driver alone."""
        for path in self._trials.glob("*"):
            if path.name.isdecimal() and int(path.name) not in trials:
                shutil.rmtree(path)
        for path in self._weights.glob("*.safetensors"):
            if path.stem.isdecimal() and int(path.stem) not in parents:
                path.unlink()
