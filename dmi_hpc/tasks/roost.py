"""Roost (Goodall and Lee 2020): a property of a compound from a graph of its elements.

The nodes of a graph are the elements of a composition, each weighted by its fraction, and every element
sends messages to every other: R. E. A. Goodall and A. A. Lee, "Predicting materials properties without
crystal structure", Nat. Commun. 11 (2020) 6280.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dmi_hpc.data.elements import ELEMENTS
from dmi_hpc.data.ragged import Ragged, offsets_of, row_of_entry
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import (
    Activation,
    Dense,
    GraphConv,
    GraphInput,
    GraphReadout,
    Layer,
    NetworkSpec,
    Residual,
)
from dmi_hpc.tasks.base import Array, Fields, Published
from dmi_hpc.tasks.composition import CompositionTask

if TYPE_CHECKING:
    from dmi_hpc.models.graphs import Graphs

NODES, EDGES = 4, 12  # of a usual compound, for costs
_MESSAGE = Residual(layers=(GraphConv(op="attention", channels=64),))


class Roost(CompositionTask):
    @property
    def input_shape(self) -> tuple[int, ...]:
        return (len(ELEMENTS) + 1, NODES)

    @property
    def graph(self) -> GraphInput:
        return GraphInput(edge_features=0, edges=EDGES)

    def inputs(self, fields: Fields) -> Graphs:
        """One node for each element that is there: which of the 86, one-hot, and its fraction, which
        is its weight, too; edges between all of them, of a single one to itself."""
        from dmi_hpc.models.graphs import graphs_of

        fractions = np.asarray(fields["fractions"], dtype=np.float32)
        rows, elements = np.nonzero(fractions)
        nodes = np.zeros((len(rows), len(ELEMENTS) + 1), dtype=np.float32)
        nodes[np.arange(len(rows)), elements] = 1.0
        nodes[:, -1] = fractions[rows, elements]
        of_rows = offsets_of(np.bincount(rows, minlength=len(fractions)))
        ends = all_pairs(of_rows)
        of_edges = offsets_of(np.bincount(rows[ends[:, 0]], minlength=len(fractions)))
        none = Ragged(np.empty((len(ends), 0), dtype=np.float32), of_edges)
        graphs = graphs_of(Ragged(nodes, of_rows), none, Ragged(ends, of_edges))
        return replace(graphs, weights=graphs.nodes[:, -1:].clone())

    def published_network(self) -> NetworkSpec:
        """64 channels and three messages as published, with one head of attention instead of three and
        a fifth of the weights of its output network."""
        return self._network((_MESSAGE,))

    def _network(self, block: tuple[Layer, ...]) -> NetworkSpec:
        layers: list[Layer] = [Dense(units=64), *3 * block, GraphReadout(op="attention")]
        for units in (256, 256, 128):
            layers.append(Residual(layers=(Dense(units=units), Activation(function="silu"))))
        return NetworkSpec(input_shape=self.input_shape, layers=tuple(layers), graph=self.graph)

    def space(self) -> SearchSpace:
        return SearchSpace(
            network=NetworkSpace(
                input_shape=self.input_shape,
                graph=self.graph,
                graph_blocks=(1, 5),
                graph_convs=("attention", "gated", "mean"),
                graph_readouts=("attention", "mean"),
                graph_norms=(None, "group"),
                graph_activations=("silu", "relu", "softplus"),
                embeddings=(32, 64, 96, 128),
                channels=(32, 64, 96, 128),
                dense_blocks=(1, 5),
                units=(64, 128, 256, 512),
                dense_skips=(None, "residual"),
                activations=("silu", "relu"),
                norms=(None, "group"),
                dropouts=(0.0, 0.05, 0.1),
            ),
            hyper={
                "learning_rate": FloatRange(low=3e-4, high=5e-3, log=True),
                "weight_decay": FloatRange(low=1e-6, high=1e-1, log=True),
                "batch_size": Choice(values=(128, 256, 512), ordered=True),
            },
            # every block of the space has an activation
            founders=(
                Founder(
                    name="Roost", network=self._network((_MESSAGE, Activation(function="silu")))
                ),
            ),
        )

    def published(self) -> tuple[Published, ...]:
        if self.quantity.name != "formation_enthalpy":
            return ()
        source = "Goodall and Lee, Nat. Commun. 11 (2020) 6280; about 256,000 OQMD compounds"
        return (Published("Roost", 0.0297, None, source), Published("ElemNet", 0.055, None, source))


def all_pairs(offsets: Array) -> Array:
    """(edges, 2) int64: each node with every other of its graph, or with itself if it is alone."""
    sizes = np.diff(offsets)[row_of_entry(offsets)]  # of the graph of each node
    here = np.repeat(np.arange(len(sizes)), sizes)
    first = np.repeat(offsets[:-1][row_of_entry(offsets)], sizes)
    there = first + np.arange(len(here)) - np.repeat(offsets_of(sizes)[:-1], sizes)
    keep = (here != there) | (np.repeat(sizes, sizes) == 1)
    return np.stack([here[keep], there[keep]], axis=1)
