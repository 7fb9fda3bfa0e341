"""Transfer learning: weights of another training to start from, weights that stay as they are, and
rates that fall with the distance from the output.

Names are those of ``module.state_dict()``: in a network of a recipe the number of the layer, from 0,
then ``weight`` or ``bias``; the linear layer at the end has the highest number. Activations and dropout
count there, so weights from a network of a recipe are matched by their place among those with weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dmi_hpc import checkpoint
from dmi_hpc.config import StartConfig
from dmi_hpc.errors import CheckpointError, RecipeError, counted
from dmi_hpc.export import SPEC, load_export
from dmi_hpc.models.build import build
from dmi_hpc.models.vectors import Standardize
from dmi_hpc.targets import Scale

_SHOWN = 60  # names in a message


@dataclass(frozen=True)
class Source:
    """A trained network to start from."""

    path: Path
    module: nn.Module
    scale: Scale
    head: str  # name of its last layer


@dataclass(frozen=True)
class Report:
    """What became of each weight; names are those of the network that starts."""

    source: Path
    copied: tuple[str, ...]
    new: tuple[str, ...]  # not there, or excluded
    left_out: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # shapes there and here
    unused: tuple[str, ...]  # there only, as named there
    moved: Mapping[str, str]  # of those copied: names there and here, if they differ
    head: str  # what became of the last layer

    def __str__(self) -> str:
        lines = [f"weights from {self.source}: {counted(len(self.copied), 'tensor')} copied"]
        if self.moved:
            layers = {old.rpartition(".")[0]: new for old, new in self.moved.items()}
            steps = (f"{old} to {new.rpartition('.')[0]}" for old, new in layers.items())
            lines.append(f"  layers moved: {_listed(steps)}")
        if self.new:
            lines.append(f"  new here: {_listed(self.new)}")
        if self.left_out:
            sizes = (
                f"{name} ({_size(there)} there, {_size(here)} here)"
                for name, (there, here) in self.left_out.items()
            )
            lines.append(f"  left out, other shape: {_listed(sizes)}")
        if self.unused:
            lines.append(f"  not used: {_listed(self.unused)}")
        return "\n".join([*lines, f"  {self.head}"])


def start_from(
    module: nn.Module,
    config: StartConfig,
    scale: Scale,
    warn: Callable[[str], None],
) -> Report:
    """Copy the weights that fit `module` by name and shape from the training at `config.path`.

    scale: of the new target; with rescale_head the last layer, if copied, is changed such that the
    network first predicts the same values in the target's unit as it did. Every rank calls this, for
    itself, before its engine is made. Raises CheckpointError if nothing fits or there is nothing,
    RecipeError if rename or exclude fit nothing, or the head cannot be rescaled.
    """
    source = read_source(config.path, warn)
    renamed = _names_here(source, module, config.rename)
    weights = source.module.state_dict()
    there = {new: weights[old] for old, new in renamed.items() if new is not None}
    here = module.state_dict()
    excluded = matching(here, config.exclude, key="train.start.exclude")
    shared = [name for name in here if name in there and name not in excluded]
    copied = tuple(name for name in shared if there[name].shape == here[name].shape)
    # biases fit by chance: the head has one of one number everywhere
    if not any(here[name].ndim > 1 for name in copied):
        raise CheckpointError(
            f"{source.path}: no weight of it fits by name and shape. There: {_shapes(there)}. Here: "
            f"{_shapes(here)}. Set train.start.rename, or start without it"
        )
    with torch.no_grad():
        for name in copied:
            here[name].copy_(there[name])
    return Report(
        source=source.path,
        copied=copied,
        new=tuple(name for name in here if name not in shared),
        left_out={
            name: (tuple(there[name].shape), tuple(here[name].shape))
            for name in shared
            if name not in copied
        },
        unused=tuple(old for old, new in renamed.items() if new not in here),
        moved={old: new for old, new in renamed.items() if new in copied and new != old},
        head=_fit_head(module, source, renamed, scale, copied, config.rescale_head),
    )


def read_source(path: Path, warn: Callable[[str], None]) -> Source:
    """The training at `path`: a run folder (its best checkpoint), a checkpoint or exported folder.

    Raises CheckpointError if it is none of these or damaged; a damaged checkpoint of a run is passed
    over and told to `warn`.
    """
    with torch.random.fork_rng(devices=[]):  # the networks that are built draw weights
        if (path / SPEC).exists():
            spec, module = load_export(path)
            return Source(path, module, spec.scale, str(len(spec.network.layers)))
        if (path / "run.json").exists():
            path, meta = checkpoint.best(path / "train" / "checkpoints", warn)
        elif (path / checkpoint.META).exists():
            meta = checkpoint.read_meta(path)
        else:
            raise CheckpointError(
                f"{path}: nothing to start from; expected a run folder (run.json), a checkpoint "
                f"folder ({checkpoint.META}) or an exported one ({SPEC}). Correct train.start.path, or "
                "train that run first"
            )
        module = build(meta.network)
        checkpoint.load_weights(path, module)
    return Source(path, module, meta.scale, str(len(meta.network.layers)))


def matching(names: Iterable[str], patterns: Sequence[str], *, key: str) -> set[str]:
    """Names that fit one of the fnmatch `patterns`. RecipeError naming `key` if one fits nothing."""
    names, found = list(names), set[str]()
    for pattern in patterns:
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            raise RecipeError(f"{key}: '{pattern}' fits no weight; there are {_listed(names)}")
        found |= fitting
    return found


def freeze(module: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Let the parameters whose names fit `patterns` stay as they are; returns their names.

    Before the engine is made: its optimiser takes what requires a gradient. RecipeError if a pattern
    fits nothing or nothing is left to train.
    """
    parameters = dict(module.named_parameters())
    frozen = matching(parameters, patterns, key="train.freeze")
    if len(frozen) == len(parameters):
        raise RecipeError(f"train.freeze: {', '.join(patterns)} leave nothing to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return tuple(name for name in parameters if name in frozen)


def train_mode(module: nn.Module) -> None:
    """``module.train()``, but frozen batch normalisations keep and use their running statistics."""
    module.train()
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            own = list(part.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                part.eval()


def layer_scales(module: nn.Module, decay: float) -> dict[str, float]:
    """Factor of the learning rate of each parameter: decay ** (layers between it and the output).

    A layer is a module with a weight of two or more axes (dense, convolution), with the norms that
    follow it; layers follow each other as in ``module.modules()``. Howard and Ruder 2018
    (arXiv:1801.06146) take 1 / 2.6.
    """
    places = _places(module)
    last = max(layer for layer, _ in places.values())
    return {
        name: decay ** (last - places[name.rpartition(".")[0]][0])
        for name, _ in module.named_parameters()
    }


def _places(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(layer, number within it) of each part with tensors of its own, by name; but of none that only
    standardizes."""
    places: dict[str, tuple[int, int]] = {}
    layer = number = 0
    for name, part in module.named_modules():
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if not own or isinstance(part, Standardize):
            continue
        if places:
            begins = any(p.ndim > 1 for p in own)
            layer, number = (layer + 1, 0) if begins else (layer, number + 1)
        places[name] = layer, number
    return places


def _names_here(
    source: Source, module: nn.Module, rename: Mapping[str, str]
) -> dict[str, str | None]:
    """Name there -> name here; None if its layer has no counterpart."""
    names = list(source.module.state_dict())
    if rename:
        return _renamed(names, rename, source.path)
    there, here = _places(source.module), _places(module)
    if not all(name.isdecimal() for name in (*there, *here)):
        return dict(zip(names, names, strict=True))
    at = {place: name for name, place in here.items()}
    found: dict[str, str | None] = {}
    for name in names:
        layer, _, key = name.rpartition(".")
        new = at.get(there[layer]) if layer in there else layer
        found[name] = None if new is None else f"{new}.{key}"
    return found


def _renamed(names: Sequence[str], rename: Mapping[str, str], path: Path) -> dict[str, str | None]:
    """`names` with their beginnings changed, whole parts at a time."""
    for old in rename:
        if not any(_begins(name, old) for name in names):
            raise RecipeError(
                f"train.start.rename: no weight there begins with '{old}'; {path} has "
                f"{_listed(names)}"
            )
    renamed: dict[str, str | None] = {name: _new_name(name, rename) for name in names}
    for new, count in Counter(renamed.values()).items():
        if count > 1:
            both = [name for name in names if renamed[name] == new]
            raise RecipeError(f"train.start.rename: {' and '.join(both)} both become {new}")
    return renamed


def _begins(name: str, beginning: str) -> bool:
    beginning = beginning.rstrip(".")
    return not beginning or f"{name}.".startswith(f"{beginning}.")


def _new_name(name: str, rename: Mapping[str, str]) -> str:
    fitting = [old for old in rename if _begins(name, old)]
    if not fitting:
        return name
    old = max(fitting, key=len)
    rest = name[len(old.rstrip(".")) :].lstrip(".")
    return ".".join(part for part in (rename[old].rstrip("."), rest) if part)


def _fit_head(
    module: nn.Module,
    source: Source,
    renamed: Mapping[str, str | None],
    scale: Scale,
    copied: Sequence[str],
    rescale: bool,
) -> str:
    """Fit the last layer to the new target's scale if it is the source's; returns what was done."""
    name = list(_places(module))[-1]
    head = module.get_submodule(name)
    if not {f"{name}.{key}" for key, _ in head.named_parameters(recurse=False)} <= set(copied):
        return f"last layer {name}: begins anew"
    if renamed.get(f"{source.head}.weight") != f"{name}.weight":
        return f"last layer {name}: not rescaled, as it was not the last one there"
    if not rescale:
        return f"last layer {name}: as it was, in units of each target's own deviation"
    kinds = [", ".join(h.transform for h in each.heads) for each in (source.scale, scale)]
    if kinds[0] != kinds[1]:
        raise RecipeError(
            f"train.start: the target there is on the scale '{kinds[0]}', here on '{kinds[1]}': set "
            f'rescale_head = false, or exclude = ["{name}.*"]'
        )
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise RecipeError(
            f"train.start.rescale_head: the last layer {name} is {type(head).__name__}, expected a "
            "linear one with bias: set rescale_head = false"
        )
    there, here = source.scale.heads, scale.heads
    ratios = torch.tensor([a.std / b.std for a, b in zip(there, here, strict=True)])
    shifts = torch.tensor([(a.mean - b.mean) / b.std for a, b in zip(there, here, strict=True)])
    with torch.no_grad():
        head.weight.mul_(ratios[:, None])
        head.bias.mul_(ratios).add_(shifts)
    if len(here) > 1:
        return f"last layer {name}: rescaled to the means and deviations of {len(here)} targets"
    return (
        f"last layer {name}: rescaled from mean {there[0].mean:.4g}, deviation "
        f"{there[0].std:.4g} to {here[0].mean:.4g}, {here[0].std:.4g}"
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shapes(weights: Mapping[str, torch.Tensor]) -> str:
    return _listed(f"{name} {_size(tuple(tensor.shape))}" for name, tensor in weights.items())


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
