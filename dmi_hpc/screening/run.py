"""A screening: every composition through the network, and the best ones ranked by the hull."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from dmi_hpc.data.importing.parallel import ordered_map
from dmi_hpc.errors import DataError
from dmi_hpc.screening.hull import Known, Potentials
from dmi_hpc.screening.known import UNIT
from dmi_hpc.screening.options import Candidates, Screening
from dmi_hpc.screening.rank import Best, Found, ranked
from dmi_hpc.screening.stream import Block, Network, blocks
from dmi_hpc.targets import TargetScale

if TYPE_CHECKING:
    from dmi_hpc.predict import Model


@dataclass(frozen=True)
class Screened:
    """rows: `dmi_hpc.screening.rank.COLUMNS`; predicted: compositions; within: those near enough to
    the hull, known ones too, of which rows are the best; seconds: of the stream, without the ranking."""

    rows: dict[str, list[Any]]
    predicted: int
    within: int
    seconds: float


def screen(
    model: Model, what: Screening, known: Known, progress: Callable[[int], None] = lambda done: None
) -> Screened:
    """Raises DataError if the network does not predict formation energies from fractions alone.

    progress: is told how many compositions were passed so far, of `enumerate.count`.
    """
    network, kept = Network(model, what.precision), what.candidates
    scale = _scale_of_energies(model)
    best = Best(kept.most, kept.per_system)
    passed = predicted = within = 0
    started = time.monotonic()
    for block, potentials in _with_hulls(what, known, model.device):
        if count := len(block):
            energies = network(block.fractions()).double() * scale.std + scale.mean
            found = _near(block, energies, potentials, kept.within)
            best.add(_chosen(found.take(found.above <= best.worst), kept, known))
            predicted, within = predicted + count, within + len(found)
        passed += block.shape[0] * block.shape[1]
        progress(passed)
    seconds = time.monotonic() - started
    return Screened(ranked(best.parts(), known, what.processes), predicted, within, seconds)


def _scale_of_energies(model: Model) -> TargetScale:
    """Raises DataError if it is not formation energies that are predicted."""
    quantity = model.task.quantity
    if (
        quantity.unit != UNIT
        or not isinstance(model.scale, TargetScale)
        or model.scale.transform != "identity"
    ):
        raise DataError(
            f"task {model.task.name}: a convex hull is of formation energies in {UNIT} alone; found "
            f"{quantity.name} in {quantity.unit or 'no unit'}. Predictions without a hull: dmi predict"
        )
    return model.scale


def _with_hulls(
    what: Screening, known: Known, device: torch.device
) -> Iterator[tuple[Block, Tensor]]:
    """Blocks, and the potentials of their systems, (g, f, n) float64, on the device."""
    here, ahead = itertools.tee(blocks(what.compositions, device))
    # on a CPU the network takes a hundred times longer than the hulls
    processes: int | Literal["auto"] = what.processes
    if processes == "auto" and device.type == "cpu":
        processes = 1
    systems = (block.systems.cpu().numpy() for block in ahead)
    hulls = ordered_map(Potentials(known), systems, processes)
    for block, potentials in zip(here, hulls, strict=True):
        yield block, torch.from_numpy(potentials).to(device)


def _near(block: Block, energies: Tensor, potentials: Tensor, highest: float) -> Found:
    """Compositions of the block that lie at most `highest` above the hull."""
    energy = energies.view(block.shape) if block.neutral is None else _spread(block, energies)
    hull = torch.einsum("sn,gfn->gsf", block.shares(), potentials).amax(2)
    above = energy - hull
    g, s = torch.nonzero(above <= highest, as_tuple=True)
    columns = (block.systems[g], block.amounts[s], energy[g, s], above[g, s])
    return Found(*(column.cpu().numpy() for column in columns))


def _spread(block: Block, predicted: Tensor) -> Tensor:
    """(g, s), infinite where charges do not balance."""
    assert block.neutral is not None
    energy = torch.full(block.shape, torch.inf, dtype=predicted.dtype, device=predicted.device)
    energy[block.neutral] = predicted
    return energy


def _chosen(found: Found, kept: Candidates, known: Known) -> Found:
    if not kept.new or not len(found):
        return found
    new = np.array([text not in known.formulas for text in found.formulas()])
    return found.take(new)
