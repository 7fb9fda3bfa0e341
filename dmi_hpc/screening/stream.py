"""Compositions made on the network's device, block by block, and what the network says of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dmi_hpc.data.elements import ELEMENTS
from dmi_hpc.errors import DataError
from dmi_hpc.models.graphs import inputs_of, tensors_of
from dmi_hpc.screening.enumerate import count, formulas, oxidation_states, stoichiometries, systems
from dmi_hpc.screening.options import Compositions, Precision

if TYPE_CHECKING:
    from dmi_hpc.predict import Model

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK_ROWS = {"cuda": 2**16, "cpu": 2**12}  # a GPU is busy with it for milliseconds; a CPU's cache
_LARGEST_CHARGE = 9  # of an oxidation state


@dataclass(frozen=True)
class Block:
    """All pairs of g systems and s stoichiometries of n elements.

    systems: (g, n) places in ELEMENTS; amounts: (s, n) atoms; neutral: (g, s) bool, those that count,
    None if all do.
    """

    systems: Tensor
    amounts: Tensor
    neutral: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.systems), len(self.amounts)

    def __len__(self) -> int:
        """Compositions that count."""
        if self.neutral is None:
            return self.shape[0] * self.shape[1]
        return int(self.neutral.sum())

    def shares(self) -> Tensor:
        """(s, n) float64 fractions of atoms."""
        return self.amounts.double() / self.amounts.sum(1, keepdim=True)

    def fractions(self) -> Tensor:
        """(k, 86) float32 of the k compositions that count, system by system."""
        (g, s), n = self.shape, self.systems.shape[1]
        made = torch.zeros(g, s, len(ELEMENTS), device=self.systems.device)
        index = self.systems[:, None].expand(g, s, n)
        made.scatter_(2, index, self.shares().float().expand(g, s, n))
        return made.flatten(0, 1) if self.neutral is None else made[self.neutral]

    def formulas(self) -> Array:
        """(k,) text of the same compositions."""
        made = formulas(self.systems.cpu().numpy()[:, None], self.amounts.cpu().numpy()[None])
        return made.ravel() if self.neutral is None else made[self.neutral.cpu().numpy()]


def blocks(wanted: Compositions, device: torch.device, rows: int | None = None) -> Iterator[Block]:
    """All compositions, at most `rows` (by default `BLOCK_ROWS`) at a time."""
    rows = rows or BLOCK_ROWS.get(device.type, BLOCK_ROWS["cpu"])
    states = States(device) if wanted.charge_neutral else None
    for n in wanted.components:
        amounts = torch.from_numpy(stoichiometries(n, wanted.max_atoms)).to(device)
        of_elements = torch.from_numpy(systems(wanted, n)).to(device)
        step = max(1, rows // len(amounts))
        for first in range(0, len(of_elements), step):
            some = of_elements[first : first + step].long()
            for start in range(0, len(amounts), rows):
                part = amounts[start : start + rows]
                neutral = None if states is None else states.neutral(some, part)
                yield Block(some, part, neutral)


def number_of(wanted: Compositions, device: torch.device) -> int:
    """Compositions in all; where charges decide, all of them are looked at."""
    if not wanted.charge_neutral:
        return count(wanted)
    return sum(map(len, blocks(wanted, device)))


class States:
    """Common oxidation states of the elements, on a device."""

    def __init__(self, device: torch.device) -> None:
        states = oxidation_states()
        assert abs(states).max() <= _LARGEST_CHARGE
        self._counts = torch.tensor([len(set(row)) for row in states.tolist()], device=device)
        self._states = torch.from_numpy(states).to(device)
        charges = torch.arange(-_LARGEST_CHARGE, _LARGEST_CHARGE + 1, device=device)
        self._has = (self._states[:, :, None] == charges).any(1)  # (86, charges)

    def neutral(self, systems: Tensor, amounts: Tensor) -> Tensor:
        """(g, s) bool: some choice of one common oxidation state an element adds up to zero."""
        total = torch.zeros(len(systems), len(amounts), 1, dtype=torch.long, device=systems.device)
        for i in range(systems.shape[1] - 1):
            elements = systems[:, i]
            charges = self._states[elements, : int(self._counts[elements].max())]
            steps = amounts[None, :, i, None] * charges[:, None]  # (g, s, states)
            total = (total[..., None] + steps[:, :, None]).flatten(2)
        last = amounts[None, :, -1, None]
        needed = torch.div(-total, last, rounding_mode="floor")
        fits = (total % last == 0) & (needed.abs() <= _LARGEST_CHARGE)
        place = needed.clamp(-_LARGEST_CHARGE, _LARGEST_CHARGE) + _LARGEST_CHARGE
        return (fits & self._has[systems[:, -1, None, None], place]).any(2)


class Network:
    """Compositions in, outputs of the network out. Raises DataError if it reads anything else."""

    def __init__(self, model: Model, precision: Precision = "fp32") -> None:
        self.model, self.precision = model, precision
        fields = model.task.input_fields
        if fields != ("fractions",):
            raise DataError(
                f"task {model.task.name} reads {', '.join(fields)}; compositions are made for networks "
                "that read 'fractions' alone (elemnet)"
            )
        probe = np.random.default_rng(0).dirichlet(np.ones(len(ELEMENTS)), 3).astype(np.float32)
        made = model.task.network_inputs({"fractions": probe})
        # what a task makes of fractions, it makes on the CPU
        self._as_they_are = isinstance(made, np.ndarray) and np.array_equal(made, probe)
        model.module.eval()

    @torch.no_grad()
    def __call__(self, fractions: Tensor) -> Tensor:
        """(k, 86) float32 -> (k,) float32, or (k, outputs) of several; on the same device."""
        model, device = self.model, self.model.device
        inputs: Any = fractions
        if not self._as_they_are:
            made = model.task.network_inputs({"fractions": fractions.cpu().numpy()})
            inputs = inputs_of(tensors_of(made)).to(device)
        with _computing(self.precision, device):
            output: Tensor = model.module(inputs)
        return output.squeeze(1).float()


@contextmanager
def _computing(precision: Precision, device: torch.device) -> Iterator[None]:
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
