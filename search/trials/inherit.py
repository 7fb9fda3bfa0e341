"""A child begins with its parent's weights, where the two networks are alike.

Blocks (a layer with weights and what follows it) are aligned by the cheapest way to edit one chain
into the other. Aligned layers of equal size are copied. A wider layer repeats units, and the layer
after it divides the weights of repeated inputs by their number; an added layer begins as the identity:
both keep the function of the network (Net2Net, Chen et al. 2016, arXiv:1511.05641). A narrower layer
keeps the units with the largest weights. All else begins anew.

The function is kept with batch normalisation too, while training and in evaluation, for repeated
channels have equal statistics; with group normalisation where whole groups are repeated. It is not
kept by an added layer that normalises, or whose activation changes values above zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf, prod
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dmi_hpc.models.build import groups_of
from dmi_hpc.models.spec import (
    Activation,
    Conv,
    Dense,
    Dropout,
    Layer,
    NetworkSpec,
    Norm,
    Pool,
    Readout,
    Shape,
    Upsample,
    shapes,
)
from dmi_hpc.models.vectors import standardizes

Weights = Mapping[str, torch.Tensor]
Fate = Literal["copied", "resized", "identity", "new"]

NOISE = 0.01  # of repeated units, in standard deviations of their layer's weights: they are to part
GAP = 0.6  # cost of a block without partner; that of two unlike ones is 1
NOWHERE = -1
_KEEP_POSITIVE = ("relu", "leaky_relu", "elu")  # change nothing above zero
_Channels = npt.NDArray[np.int64]  # of each channel of the child: the parent's, or NOWHERE


@dataclass(frozen=True)
class Inheritance:
    """fates: of each layer of the child by its number, the head's last; parameters, inherited: its
    numbers; exact: it first computes what its parent does, but for noise and dropout."""

    fates: Mapping[int, Fate]
    parameters: int
    inherited: int
    exact: bool

    @property
    def share(self) -> float:
        """Of its parameters that did not begin anew."""
        return self.inherited / self.parameters


def inherited(
    child: NetworkSpec,
    fresh: Weights,
    parent: NetworkSpec,
    weights: Weights,
    rng: np.random.Generator,
    *,
    noise: float = NOISE,
) -> tuple[dict[str, torch.Tensor], Inheritance]:
    """The weights that `child` begins with, and what became of them.

    fresh, weights: ``state_dict()`` of the child as it was built, and of the trained parent; on the
    CPU. Both networks have the same input shape and outputs.
    """
    assert (child.input_shape, child.outputs) == (parent.input_shape, parent.outputs)
    assert child.standardize == parent.standardize
    transfer = _Transfer(fresh, weights, rng, noise)
    transfer.run(child, parent)
    sizes = {name: tensor.numel() for name, tensor in fresh.items() if _is_trained(name)}
    found = sum(count for name, count in transfer.taken.items() if name in sizes)
    report = Inheritance(transfer.fates, sum(sizes.values()), found, transfer.exact)
    return transfer.result, report


def _is_trained(name: str) -> bool:
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return not standardizes(name) and not name.endswith(statistics)


@dataclass(frozen=True)
class _Block:
    """A layer with weights (None: the section's input) at its number, and what follows it."""

    at: int
    layer: Layer | None
    enters: Shape
    leaves: Shape
    followers: tuple[tuple[int, Layer], ...] = ()  # norms, activations, pools, ...

    @property
    def width(self) -> int:
        return self.leaves[0]

    def after(self) -> list[Layer]:
        return [layer for _, layer in self.followers]


@dataclass
class _Section:
    """Blocks over a map or over vectors. readout: that began it; shape: that entered it."""

    readout: Readout | None
    shape: Shape
    blocks: list[_Block] = field(default_factory=list)


def _sections(spec: NetworkSpec) -> list[_Section]:
    found = [
        _Section(None, spec.input_shape, [_Block(-1, None, spec.input_shape, spec.input_shape)])
    ]
    before = spec.input_shape
    for at, (layer, after) in enumerate(zip(spec.layers, shapes(spec), strict=True)):
        blocks = found[-1].blocks
        match layer:
            case Readout():
                found.append(_Section(layer, before, [_Block(at, None, after, after)]))
            case Norm() | Activation() | Pool() | Upsample():
                last = blocks.pop()
                followers = (*last.followers, (at, layer))
                blocks.append(_Block(last.at, last.layer, last.enters, last.leaves, followers))
            case Dropout():
                pass
            case _:
                blocks.append(_Block(at, layer, before, after))
        before = after
    return found


def _aligned(mine: Sequence[_Block], theirs: Sequence[_Block]) -> list[tuple[int, int | None]]:
    """(number of a block, that of its partner or None) for all of `mine`: the least total cost."""

    @cache
    def rest(i: int, j: int) -> tuple[float, tuple[tuple[int, int | None], ...]]:
        if i == len(mine):
            return GAP * (len(theirs) - j), ()
        options = []  # of equal cost the first: what is added comes late
        if j < len(theirs):
            cost, pairs = rest(i + 1, j + 1)
            options.append((cost + _unlikeness(mine[i], theirs[j]), ((i, j), *pairs)))
            cost, pairs = rest(i, j + 1)
            options.append((cost + GAP, pairs))
        cost, pairs = rest(i + 1, j)
        narrows = mine[i].width < mine[i].enters[0]  # it cannot be the identity
        options.append((cost + GAP + GAP * narrows, ((i, None), *pairs)))
        return min(options, key=lambda option: option[0])

    return list(rest(0, 0)[1])


def _unlikeness(mine: _Block, theirs: _Block) -> float:
    """In [0, 1]; inf if nothing can be taken over."""
    match mine.layer, theirs.layer:
        case (Conv(), Conv()) | (Dense(), Dense()):
            sizes = float(mine.width != theirs.width), float(mine.layer != theirs.layer)
            return 0.4 * sizes[0] + 0.3 * sizes[1] + 0.3 * (mine.after() != theirs.after())
        case _:
            return 0.3 * (mine.after() != theirs.after()) if mine.layer == theirs.layer else inf


class _Transfer:
    """Walks both networks from the input, and knows which channel of the child is which there."""

    def __init__(
        self, fresh: Weights, weights: Weights, rng: np.random.Generator, noise: float
    ) -> None:
        self.result = {name: tensor.clone() for name, tensor in fresh.items()}
        self.taken: Counter[str] = Counter()
        self.fates: dict[int, Fate] = {
            int(name.partition(".")[0]): "new" for name, tensor in fresh.items() if tensor.ndim > 1
        }
        self.exact = True
        self._weights, self._rng, self._noise = weights, rng, noise
        self._channels: _Channels = np.zeros(0, dtype=np.int64)
        self._positive = False  # no value is below zero here

    def run(self, child: NetworkSpec, parent: NetworkSpec) -> None:
        mine, theirs = _sections(child), _sections(parent)
        self._channels = np.arange(child.input_shape[0])
        if len(mine) != len(theirs):  # a layer that only one of them has makes a vector of a map
            self._lose(mine[-1].blocks[-1].width, 0)
            theirs = mine[:0]
        self._standardization()
        for here, there in zip(mine, theirs, strict=False):
            self._read(here, there)
            self._section(here.blocks, there.blocks)
        self._layer(len(child.layers), len(parent.layers), np.arange(child.outputs))

    def _standardization(self) -> None:
        """Weights are worth something for inputs as they were trained on alone."""
        for name in self.result:
            if standardizes(name):
                self.result[name].copy_(self._weights[name])

    def _lose(self, here: int, there: int) -> None:
        """The layers before differ: channels count as the same by their number alone."""
        numbers = np.arange(here)
        self._channels = np.where(numbers < there, numbers, NOWHERE)
        self.exact = False

    def _read(self, here: _Section, there: _Section) -> None:
        if here.readout is None or there.readout is None:
            return
        voxels, before = prod(here.shape[1:]), prod(there.shape[1:])
        if here.readout.op == "mean" and (there.readout.op == "mean" or before == 1):
            return
        if there.readout.op == "mean":  # weights of the mean, divided among all its voxels
            self._channels = np.repeat(self._channels, voxels)
        elif here.readout.op == "flatten" and here.shape[1:] == there.shape[1:]:
            each = self._channels[:, None] * voxels + np.arange(voxels)
            self._channels = np.where(self._channels[:, None] < 0, NOWHERE, each).ravel()
        else:
            self._lose(here.blocks[0].width, 0)

    def _section(self, mine: Sequence[_Block], theirs: Sequence[_Block]) -> None:
        self._follow(mine[0], theirs[0], self._channels)
        last = 0
        for i, j in _aligned(mine[1:], theirs[1:]):
            block = mine[i + 1]
            if j is None:
                self._add(block)
                continue
            partner = theirs[j + 1]
            if j != last:
                self._lose(block.enters[0], partner.enters[0])
            self._take(block, partner)
            last = j + 1
        if last != len(theirs) - 1:
            self._lose(mine[-1].width, theirs[-1].width)

    def _take(self, block: _Block, there: _Block) -> None:
        """An aligned pair."""
        match block.layer:
            case Conv() | Dense():
                kept = self._kept(there.at, block.width, there.width)
                assert isinstance(there.layer, Conv | Dense)
                same = {"filters", "units", "kernel"}  # what is resized, all else must be equal
                self.exact &= block.layer.model_dump(exclude=same) == there.layer.model_dump(
                    exclude=same
                )
                self._layer(block.at, there.at, kept)
            case _:
                kept = np.arange(block.width)
                self._whole(block, there)
        self._channels = kept
        self._follow(block, there, kept)

    def _kept(self, there: int, here_width: int, there_width: int) -> _Channels:
        """Which of the parent's units each unit of the child is: repeated in turn, or the strongest."""
        if here_width >= there_width:
            return np.arange(here_width) % there_width
        self.exact = False
        strength = self._weights[f"{there}.weight"].flatten(1).norm(dim=1).numpy()
        return np.sort(np.argsort(-strength, kind="stable")[:here_width])

    def _layer(self, here: int, there: int, kept: _Channels) -> None:
        """Weights of a convolution or dense layer whose units are those `kept` of the parent's."""
        name, fresh, old = (
            f"{here}.weight",
            self.result[f"{here}.weight"],
            self._weights[f"{there}.weight"],
        )
        known = self._channels >= 0
        inputs = self._channels[known]
        counts = np.bincount(inputs, minlength=old.shape[1])
        self.exact &= bool(known.all() and counts.all() and fresh.shape[2:] >= old.shape[2:])
        if not known.any():
            return
        divisors = torch.from_numpy(counts[inputs]).to(old.dtype).reshape(-1, *[1] * (old.ndim - 2))
        taken = _centred(old, fresh.shape[2:])[kept][:, inputs] / divisors
        repeated = np.arange(len(kept)) >= old.shape[0]
        taken[repeated] += self._noisy(taken[repeated].shape, float(old.std(correction=0)))
        fresh[:, known] = taken
        self.taken[name] += taken.numel()
        if f"{there}.bias" in self._weights:
            self.result[f"{here}.bias"].copy_(self._weights[f"{there}.bias"][kept])
            self.taken[f"{here}.bias"] += len(kept)
        alike = fresh.shape == old.shape and np.array_equal(self._channels, np.arange(old.shape[1]))
        self.fates[here] = "copied" if alike else "resized"

    def _noisy(self, shape: torch.Size, deviation: float) -> torch.Tensor:
        noise = self._rng.standard_normal(tuple(shape), dtype=np.float32)
        return torch.from_numpy(noise * np.float32(self._noise * deviation))

    def _whole(self, block: _Block, there: _Block) -> None:
        """A layer of layers: all of it where it is the same, nothing else."""
        inputs = np.arange(block.enters[0])
        if block.enters[0] != there.enters[0] or not np.array_equal(self._channels, inputs):
            self.exact = False
            return
        for name, tensor in self.result.items():
            number, _, rest = name.partition(".")
            if number == str(block.at):
                tensor.copy_(self._weights[f"{there.at}.{rest}"])
                self.taken[name] += tensor.numel()
        self.fates[block.at] = "copied"

    def _add(self, block: _Block) -> None:
        """A block that the parent does not have: the identity, if it is wide enough."""
        entering, layer = block.enters[0], block.layer
        if not isinstance(layer, Conv | Dense) or block.width < entering:
            known = self._channels[: block.width]  # the same by their number alone
            unknown = np.full(block.width - len(known), NOWHERE)
            self._channels = np.concatenate([known, unknown])
            self.exact = self._positive = False
            return
        stays = isinstance(layer, Dense) or layer.stride == 1
        after = block.after()
        harmless = not after or (
            self._positive
            and len(after) == 1
            and isinstance(after[0], Activation)
            and after[0].function in _KEEP_POSITIVE
        )
        self.exact &= stays and harmless
        source = np.arange(block.width) % entering
        weight = self.result[f"{block.at}.weight"]
        weight.zero_()
        kernels = weight.view(block.width, entering, -1)
        kernels[np.arange(block.width), source, kernels.shape[2] // 2] = 1.0
        deviation = float(weight.std(correction=0))
        weight[entering:] += self._noisy(weight[entering:].shape, deviation)
        self.result[f"{block.at}.bias"].zero_()
        for key in ("weight", "bias"):
            name = f"{block.at}.{key}"
            self.taken[name] += self.result[name].numel()
        self.fates[block.at] = "identity"
        self._channels = self._channels[source]
        self._positive = _positive(after, self._positive)

    def _follow(self, block: _Block, there: _Block, kept: _Channels) -> None:
        """Norms, and what activations and pools mean for what comes next."""
        mine, theirs = block.after(), there.after()
        self.exact &= mine == theirs
        norms = [(at, layer) for at, layer in there.followers if isinstance(layer, Norm)]
        for at, norm in block.followers:
            if not isinstance(norm, Norm):
                continue
            partner = next((other for other, layer in norms if layer == norm), None)
            if partner is not None:
                self._norm(at, partner, kept)
                if norm.op == "group":
                    self.exact &= _repeats_groups(block.width, there.width)
        self._positive = _positive(mine, False)

    def _norm(self, here: int, there: int, kept: _Channels) -> None:
        for name in [name for name in self.result if name.startswith(f"{here}.")]:
            old = self._weights[f"{there}.{name.partition('.')[2]}"]
            self.result[name].copy_(old[kept] if old.ndim else old)
            self.taken[name] += self.result[name].numel()


def _positive(after: Sequence[Layer], before: bool) -> bool:
    """Whether no value is below zero after these layers."""
    for layer in after:
        match layer:
            case Activation():
                before = layer.function == "relu" or (before and layer.function in _KEEP_POSITIVE)
            case Norm():
                before = False
    return before


def _repeats_groups(here: int, there: int) -> bool:
    return here % there == 0 and here // groups_of(here) == there // groups_of(there)


def _centred(weight: torch.Tensor, kernel: Sequence[int]) -> torch.Tensor:
    """(out, in, *kernel): larger kernels have zeros around, smaller ones lose the rim."""
    for axis, size in enumerate(kernel, start=2):
        margin = (size - weight.shape[axis]) // 2
        pads = [0, 0] * (weight.ndim - 1 - axis) + [margin, margin]
        weight = torch.nn.functional.pad(weight, pads)
    return weight
