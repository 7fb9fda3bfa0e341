"""A crystal's property from its graph: what a task on graphs looks like. Data: imported structures."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from dmi_hpc.config import Config
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import DataError
from dmi_hpc.models.graphs import Graphs, graphs_of
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import (
    Activation,
    Dense,
    GraphConv,
    GraphInput,
    GraphReadout,
    NetworkSpec,
    Norm,
    Residual,
)
from dmi_hpc.tasks.base import BuildContext, Fields, Quantity, Task

ELEMENTS = 100
CENTRES = np.arange(0.0, 8.1, 0.2, dtype=np.float32)  # angstrom


class CrystalOptions(Config):
    target: str = "value"
    log: bool = False
    nodes: int = 8  # nominal
    edges: int = 96


class Crystals(Task):
    Options = CrystalOptions
    input_fields: ClassVar[tuple[str, ...]] = ("atomic_number", "edge_index", "distance")

    def __init__(self, name: str, options: Config) -> None:
        super().__init__(name, options)
        self.target_field = options.target  # type: ignore[misc]
        self.quantity = Quantity(options.target, "1", "log" if options.log else "identity")  # type: ignore[misc]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (ELEMENTS, self.options.nodes)

    @property
    def graph(self) -> GraphInput:
        return GraphInput(edge_features=len(CENTRES), edges=self.options.edges)

    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        raise DataError(f"{target}: import structures first")

    def inputs(self, fields: Fields) -> Graphs:
        """One-hot elements on the nodes; Gaussians of the distance on the edges."""
        numbers, distances = fields["atomic_number"], fields["distance"]
        nodes = np.eye(ELEMENTS, dtype=np.float32)[numbers.values]
        edges = np.exp(-(((distances.values[:, None] - CENTRES) / 0.2) ** 2))
        return graphs_of(
            Ragged(nodes, numbers.offsets), Ragged(edges, distances.offsets), fields["edge_index"]
        )

    def published_network(self) -> NetworkSpec:
        """CGCNN with 64 channels."""
        block = (
            Residual(layers=(GraphConv(channels=64, norm="batch"), Norm())),
            Activation(function="softplus"),
        )
        last = (GraphReadout(), Dense(units=128), Activation(function="softplus"))
        return NetworkSpec(
            input_shape=self.input_shape,
            layers=(Dense(units=64), *3 * block, *last),
            graph=self.graph,
        )

    def space(self) -> SearchSpace:
        return SearchSpace(
            network=NetworkSpace(
                input_shape=self.input_shape,
                graph=self.graph,
                graph_blocks=(1, 4),
                embeddings=(16, 32, 64),
                channels=(16, 32, 64),
                dense_blocks=(0, 2),
                units=(32, 64, 128),
                activations=("softplus", "relu", "silu"),
                norms=(None, "batch"),
                dropouts=(0.0, 0.1),
            ),
            hyper={
                "learning_rate": FloatRange(low=3e-4, high=1e-2, log=True),
                "batch_size": Choice(values=(32, 64, 128), ordered=True),
            },
            founders=(Founder(name="CGCNN", network=self.published_network()),),
        )
