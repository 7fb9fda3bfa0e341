"""What a trained network makes of its inputs, layer by layer, seen in two dimensions.

The activations of each layer for given inputs, projected on their two principal components: as for
ElemNet in Jha et al., Sci. Rep. 8 (2018) 17593, figure 6, where elements of a group come to lie
together in early layers and charge-balanced mixtures apart from others in later ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn

from dmi_hpc.data.manifest import MANIFEST
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.stage import find_staged
from dmi_hpc.errors import DataError
from dmi_hpc.models.spec import NetworkSpec, NodeShape, shapes
from dmi_hpc.predict import Model

Array = np.ndarray[Any, np.dtype[Any]]

_SAME = ("norm", "activation", "dropout")  # the layer before goes on in these


@dataclass(frozen=True)
class Projection:
    """n activations of a layer in two dimensions.

    layer: counted from 1; units: of the layer; points: (n, 2), mean 0; explained: (2,) shares of the
    variance of the activations.
    """

    layer: int
    units: int
    points: Array
    explained: Array


def layers_of(network: NetworkSpec) -> tuple[int, ...]:
    """Places in `network.layers` after which there is one vector for each input: the layers to look at.

    A dense layer with its norm, activation and dropout is one; so is a readout of a map or a graph,
    and a residual layer or branches of vectors. Values on nodes or voxels before a readout are none.
    """
    places: list[int] = []
    for place, (layer, shape) in enumerate(zip(network.layers, shapes(network), strict=True)):
        if len(shape) > 1 or isinstance(shape, NodeShape):
            continue
        if places and places[-1] == place - 1 and layer.kind in _SAME:
            places[-1] = place
        else:
            places.append(place)
    return tuple(places)


def activations(
    model: Model, fields: Mapping[str, ArrayLike], layers: Sequence[int]
) -> dict[int, Array]:
    """{layer: (n, units) float32} for fields of n rows; layers as `layers_of`, counted from 1.

    Raises DataError if the network has no such layer.
    """
    places = layers_of(model.network)
    if wrong := [layer for layer in layers if not 1 <= layer <= len(places)]:
        raise DataError(
            f"layer {wrong[0]}: the network has {len(places)} layers of one vector an input"
        )
    modules = dict(model.module.named_children())
    names = {layer: str(places[layer - 1]) for layer in layers}
    if not set(names.values()) <= set(modules):
        raise DataError(f"{model.checkpoint} has no layers of its own: choose one of its networks")
    taken: dict[int, list[Array]] = {layer: [] for layer in layers}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            taken[layer].append(output.float().cpu().numpy())

        return hook

    hooks = [modules[names[layer]].register_forward_hook(keep(layer)) for layer in taken]
    try:
        model.predict(fields)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: np.concatenate(parts) for layer, parts in taken.items()}


def project(activations: Array, layer: int = 1) -> Projection:
    """(n, units) activations, n >= 3, on their first two principal components."""
    from sklearn.decomposition import PCA

    n, units = activations.shape
    if n < 3:
        raise DataError(f"{n} inputs: principal components need at least 3")
    pca = PCA(min(2, units), random_state=0)
    points = pca.fit_transform(activations.astype(np.float64))
    return Projection(layer, units, _two(points), _two(pca.explained_variance_ratio_))


def _two(values: Array) -> Array:
    """Of a layer of one unit the second component is 0."""
    missing = 2 - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def read_inputs(model: Model, path: Path) -> tuple[list[str], dict[str, Any]]:
    """(label, fields) of a user's file, as the task reads it, or of a shard set. Raises DataError."""
    if not (path / MANIFEST).exists():
        return model.task.read_inputs(path)
    task = model.task
    with ShardSet.open(find_staged(path), verify="read") as shards:
        rows = np.asarray(shards.rows("all"))
        fields = shards.fields(task.input_fields, rows)
        if task.label_field is None:  # their number
            return [str(row) for row in rows], fields
        labels = shards.gather(task.label_field, rows)
        return [bytes(text).decode() for text in labels], fields
