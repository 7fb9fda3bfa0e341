"""MPNN (Gilmer et al. 2017, arXiv:1704.01212): a molecule's property from its graph of atoms and bonds.

Messages depend on the bond by a network of its own, states change by a GRU, and set2set reads the
graph. Graphs are of two dimensions: bonds, no distances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, cast

import numpy as np
from pydantic import Field as Option

from dmi_hpc.config import Config
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import (
    Activation,
    Dense,
    Dropout,
    GraphConv,
    GraphInput,
    GraphReadout,
    Layer,
    MessagePassing,
    NetworkSpec,
    Norm,
    Parallel,
    Residual,
)
from dmi_hpc.tasks.base import Array, Fields
from dmi_hpc.tasks.molecules import MoleculeOptions, MoleculeTask

if TYPE_CHECKING:
    from dmi_hpc.models.graphs import Graphs

# elements of organic molecules by Z; all others share one place
_ELEMENTS = (1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 35, 53)
# of each feature of an atom that is one of a few: its place in `atom_features`, and how many it has
_NEIGHBOURS, _HYBRIDISATIONS, _HYDROGENS, _CHIRALITIES = (0, 7), (2, 8), (4, 5), (5, 3)
_CHARGE, _AROMATIC, _RING = 1, 3, 6
_NODE = len(_ELEMENTS) + 1 + 7 + 8 + 5 + 3 + 3
_ORDERS, _STEREO = (0, 5), (3, 6)
_EDGE = 5 + 6 + 2


class MPNNOptions(MoleculeOptions):
    """[task] of an MPNN recipe."""

    units: int = Option(64, ge=1, description="channels of the messages")
    steps: int = Option(3, ge=1, description="of message passing")
    readout: Literal["set2set", "sum"] = Option(
        "set2set", description="the paper's; a sum over the atoms knows how many there are"
    )
    dropout: float = Option(0.0, ge=0, lt=1, description="before the last layer")
    atoms: int = Option(16, ge=1, description="typical number of heavy atoms, for costs alone")


class MPNN(MoleculeTask):
    Options = MPNNOptions
    input_fields: ClassVar[tuple[str, ...]] = (
        *("atomic_number", "atom_features", "edge_index", "bond_features"),
        *MoleculeTask.input_fields,
    )

    def __init__(self, name: str, options: Config) -> None:
        super().__init__(name, options)
        self.o = cast(MPNNOptions, options)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (_NODE, self.o.atoms)

    @property
    def graph(self) -> GraphInput:
        return GraphInput(edge_features=_EDGE, edges=2 * self.o.atoms + 2)

    def inputs(self, fields: Fields) -> Graphs:
        """Elements, numbers of neighbours and hydrogens, hybridisation and chirality one-hot on the
        nodes, beside charge, aromaticity and rings; order and stereo one-hot on the edges."""
        from dmi_hpc.models.graphs import graphs_of

        numbers, atoms, bonds, ends = (
            cast(Ragged, fields[name])
            for name in ("atomic_number", "atom_features", "bond_features", "edge_index")
        )
        of_atom = atoms.values.astype(np.float32)
        nodes = [_one_hot_elements(numbers.values)]
        for place, count in (_NEIGHBOURS, _HYBRIDISATIONS, _HYDROGENS, _CHIRALITIES):
            nodes.append(_one_hot(atoms.values[:, place], count))
        nodes.append(of_atom[:, [_CHARGE, _AROMATIC, _RING]])
        edges = [_one_hot(bonds.values[:, place], count) for place, count in (_ORDERS, _STEREO)]
        edges.append(bonds.values[:, 1:3].astype(np.float32))
        return graphs_of(
            Ragged(np.concatenate(nodes, axis=1), numbers.offsets),
            Ragged(np.concatenate(edges, axis=1), bonds.offsets),
            ends,
        )

    def published_network(self) -> NetworkSpec:
        """Message passing, set2set over the last states beside the first, one hidden layer."""
        n = self.o.units
        passing = MessagePassing(units=n, steps=self.o.steps)
        layers: tuple[Layer, ...] = (
            *(Dense(units=n), Activation()),
            *(Parallel(branches=((), (passing,))), Dense(units=n)),
            *(() if self.o.readout == "set2set" else (Activation(), Dense(units=n), Activation())),
            GraphReadout(op=self.o.readout),
            *(Dense(units=2 * n), Activation()),
        )
        if self.o.dropout:
            layers += (Dropout(rate=self.o.dropout),)
        return self._network(layers)

    def _network(self, layers: tuple[Layer, ...]) -> NetworkSpec:
        return NetworkSpec(input_shape=self.input_shape, layers=layers, graph=self.graph)

    def space(self) -> SearchSpace:
        """Of graph convolutions; message passing that shares weights over its steps is no part of it."""
        block = (
            Residual(layers=(GraphConv(channels=64, norm="batch"), Norm())),
            Activation(function="softplus"),
        )
        last = (GraphReadout(op="set2set"), Dense(units=128), Activation())
        founder = self._network((Dense(units=64), *3 * block, *last))
        return SearchSpace(
            network=NetworkSpace(
                input_shape=self.input_shape,
                graph=self.graph,
                graph_blocks=(1, 6),
                embeddings=(32, 64, 128),
                channels=(32, 64, 96, 128),
                graph_readouts=("mean", "sum", "max", "set2set"),
                dense_blocks=(0, 3),
                units=(32, 64, 128, 256),
                norms=(None, "batch"),
                activations=("relu", "softplus", "silu"),
                dropouts=(0.0, 0.1, 0.2),
            ),
            hyper={
                "learning_rate": FloatRange(low=3e-4, high=1e-2, log=True),
                "weight_decay": FloatRange(low=1e-6, high=1e-1, log=True),
                "batch_size": Choice(values=(16, 32, 64, 128), ordered=True),
            },
            founders=(Founder(name="gated convolutions, set2set", network=founder),),
        )


def _one_hot(values: Array, count: int) -> Array:
    """(n,) whole numbers -> (n, count) float32; those above share the last place."""
    rows: Array = np.eye(count, dtype=np.float32)[np.clip(values, 0, count - 1)]
    return rows


def _one_hot_elements(numbers: Array) -> Array:
    """(n,) Z -> (n, elements + 1) float32."""
    places = np.full(256, len(_ELEMENTS))
    places[list(_ELEMENTS)] = np.arange(len(_ELEMENTS))
    return _one_hot(places[numbers], len(_ELEMENTS) + 1)
