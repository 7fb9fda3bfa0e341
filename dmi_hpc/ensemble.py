"""Several trained networks as one: the mean of their predictions, and how sure they are.

A folder with ``ensemble.json`` and each member as exported by ``dmi_hpc.export``. The spread of
networks trained from different seeds as an uncertainty: B. Lakshminarayanan et al., "Simple and
scalable predictive uncertainty estimation using deep ensembles", NeurIPS 2017.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import Field, ValidationError
from torch import nn

from dmi_hpc.config import Config
from dmi_hpc.errors import CheckpointError, FormatVersionError
from dmi_hpc.export import export
from dmi_hpc.files import atomic_folder, write_json
from dmi_hpc.models.graphs import Inputs, Output, mean_of
from dmi_hpc.predict import ENSEMBLE, Model, load
from dmi_hpc.tasks.base import Array

FORMAT_VERSION = 1


class Calibration(Config):
    """From the spread of the members to a standard deviation of the error.

    sigma^2 = (scale x spread)^2 + floor^2. floor: what all members get wrong alike, in the unit.
    """

    scale: float = 1.0
    floor: float = 0.0

    def sigma(self, spread: Array) -> Array:
        return np.hypot(self.scale * spread, self.floor)


class Spec(Config):
    """``ensemble.json``. members: names of folders beside it; scores: for people and reports."""

    format: Literal["dmi-ensemble"] = "dmi-ensemble"
    version: int = FORMAT_VERSION
    members: tuple[Annotated[str, Field(pattern=r"^[\w.-]*\w$")], ...] = Field(min_length=2)
    calibration: Calibration
    scores: Mapping[str, Any] = {}


class Mean(nn.Module):
    """The mean output of networks of equal inputs and outputs."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, inputs: Inputs) -> Output:
        return mean_of([network(inputs) for network in self.networks])


@dataclass(frozen=True)
class Ensemble(Model):
    """Predicts as a `Model` does; of a target on a log scale the mean is the geometric one."""

    members: tuple[Model, ...]
    calibration: Calibration

    def predict_with_sigma(self, fields: Mapping[str, ArrayLike]) -> tuple[Array, Array]:
        """(predictions, their standard deviations), (n,) float64 each, in the quantity's unit."""
        predictions = np.stack([member.predict(fields) for member in self.members])
        mean = self.scale.centre(predictions)
        return mean, self.calibration.sigma(spread(predictions))


def spread(predictions: Array) -> Array:
    """(members, n) -> (n,) standard deviations over the members, at least two."""
    return np.asarray(predictions.std(axis=0, ddof=1))


def ensemble_of(members: Sequence[Model], calibration: Calibration) -> Ensemble:
    """`members`, at least two, as one; all of one task and one training set."""
    assert len(members) > 1 and len({member.scale for member in members}) == 1
    first = members[0]
    return Ensemble(
        first.task,
        first.scale,
        Mean([member.module for member in members]).eval(),
        min(member.batch_size for member in members),
        first.network,
        f"mean of {len(members)} networks",
        first.data,
        {},
        tuple(members),
        calibration,
    )


def save_ensemble(
    folder: Path,
    members: Mapping[str, Model],
    calibration: Calibration,
    scores: Mapping[str, Any],
) -> None:
    """Write `folder`, whole or not at all; an earlier one is replaced. members: by folder name."""
    spec = Spec(members=tuple(members), calibration=calibration, scores=scores)
    with atomic_folder(folder) as new:
        for name, member in members.items():
            export(member, new / name, "safetensors")
        write_json(new / ENSEMBLE, spec.model_dump(mode="json"))


def load_ensemble(folder: Path, device: torch.device | str | None = None) -> Ensemble:
    """Inverse of `save_ensemble`. Raises CheckpointError if it is damaged, FormatVersionError."""
    spec = read_spec(folder)
    members = [load(folder / name, device=device) for name in spec.members]
    return ensemble_of(members, spec.calibration)


def read_spec(folder: Path) -> Spec:
    """What the folder says it is. Raises CheckpointError, FormatVersionError."""
    path = folder / ENSEMBLE
    try:
        raw = json.loads(path.read_text())
        version = raw.get("version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatVersionError(
                f"{path}: format {version}, this DMI-HPC reads up to {FORMAT_VERSION}"
            )
        return Spec.model_validate(raw)
    except (OSError, json.JSONDecodeError, AttributeError, ValidationError) as error:
        raise CheckpointError(f"{path}: not an ensemble: {error}") from None
