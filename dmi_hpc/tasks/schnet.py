"""SchNet (Schuett et al. 2017): energy of atoms and the forces on them, from their positions.

Data: configurations with an energy per atom and forces, imported by ``dmi data import --cutoff``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
from pydantic import Field as Option

from dmi_hpc.config import Config
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.data.ragged import Ragged, row_of_entry
from dmi_hpc.errors import DataError
from dmi_hpc.models.space import SearchSpace
from dmi_hpc.models.spec import (
    Activation,
    CFConv,
    Dense,
    GraphInput,
    GraphReadout,
    NetworkSpec,
    RadialBasis,
    Residual,
)
from dmi_hpc.tasks.base import Array, Baseline, BuildContext, Fields, Published, Quantity, Task

if TYPE_CHECKING:
    from dmi_hpc.models.graphs import Graphs

ELEMENTS = 100  # that the one-hot vectors know: Z = 1 to 100
_SPACING = 0.25  # angstrom, of the baseline's histogram of distances


class SchNetOptions(Config):
    """[task] of a recipe of energies and forces."""

    energy: str = Option("energy_per_atom", description="field of the energy, eV/atom")
    forces: str = Option("forces", description='field of the forces, eV/angstrom; "": none')
    cutoff: float = Option(5.0, gt=0, description="of the neighbours, angstrom, as imported")
    gaussians: int = Option(50, ge=2, description="of the length of an edge")
    channels: int = Option(64, ge=1)
    interactions: int = Option(3, ge=1)
    atoms: int = Option(50, ge=1, description="typical number in a configuration, for costs alone")
    neighbours: int = Option(40, ge=1, description="typical number of an atom, for costs alone")


class SchNet(Task):
    """The energy of a configuration is the sum over its atoms; forces are minus its gradient."""

    Options = SchNetOptions
    input_fields: ClassVar[tuple[str, ...]] = (
        "atomic_number",
        "position",
        "cell",
        "edge_index",
        "edge_image",
    )
    label_field = "name"

    def __init__(self, name: str, options: Config) -> None:
        super().__init__(name, options)
        self.o = cast(SchNetOptions, options)
        self.quantity = Quantity(self.o.energy, "eV/atom")  # type: ignore[misc]
        self.target_field = self.o.energy  # type: ignore[misc]
        self.force_field = self.o.forces or None  # type: ignore[misc]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (ELEMENTS, self.o.atoms)

    @property
    def graph(self) -> GraphInput:
        return GraphInput(edge_features=3, edges=self.o.atoms * self.o.neighbours)

    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        raise DataError(
            f"{target}: no data here, and quantum mechanics is not computed here. Import "
            f"configurations first: dmi data import FILES --out {target} --cutoff {self.o.cutoff:g}"
        )

    def inputs(self, fields: Fields) -> Graphs:
        """One-hot elements on the nodes; on the edges the vector from an atom to its neighbour,
        angstrom."""
        from dmi_hpc.models.graphs import graphs_of

        numbers, positions, ends, images = (
            cast(Ragged, fields[name])
            for name in ("atomic_number", "position", "edge_index", "edge_image")
        )
        if numbers.values.max(initial=0) > ELEMENTS:
            raise DataError(f"atoms of Z = {numbers.values.max()}: expected at most {ELEMENTS}")
        nodes = np.eye(ELEMENTS, dtype=np.float32)[numbers.values.astype(np.int64) - 1]
        edges = Ragged(
            vectors_of(positions, ends, images, np.asarray(fields["cell"])), ends.offsets
        )
        graphs = graphs_of(Ragged(nodes, numbers.offsets), edges, ends)
        if self.force_field is None or self.force_field not in fields:
            return graphs
        import torch

        forces = cast(Ragged, fields[self.force_field]).values
        return replace(graphs, forces=torch.tensor(forces, dtype=torch.float32))

    def published_network(self) -> NetworkSpec:
        """Embedding, interactions with residual connections, and 32 units for each atom."""
        c = self.o.channels
        block = Residual(layers=(CFConv(channels=c, filters=c),))
        return NetworkSpec(
            input_shape=self.input_shape,
            layers=(
                Dense(units=c),
                *self.o.interactions * (block,),
                Dense(units=max(1, c // 2)),
                Activation(function="shifted_softplus"),
                GraphReadout(),
            ),
            graph=self.graph,
            basis=RadialBasis(
                cutoff=self.o.cutoff,
                count=self.o.gaussians,
                width=self.o.cutoff / (self.o.gaussians - 1),
            ),
            forces=self.force_field is not None,
        )

    def space(self) -> SearchSpace:
        raise DataError(
            "task schnet: networks of forces are not searched yet; vary channels, interactions and "
            "cutoff of [task], or the keys of [train]"
        )

    def baselines(self) -> tuple[Baseline, ...]:
        def histogram(train: Fields, target: Array, test: Fields) -> Array:
            from sklearn.linear_model import RidgeCV
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler

            model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-6, 3, 19)))
            model.fit(self._histogram(train), target)
            return np.asarray(model.predict(self._histogram(test)))

        return (Baseline("pair_histogram", "Ridge on the histogram of distances", histogram),)

    def _histogram(self, fields: Fields) -> Array:
        """(n, bins) neighbours of an atom by their distance, mean over the atoms.

        fields: neighbours are numbered over the atoms of their row, not over all rows.
        """
        numbers, positions, ends, images = (
            cast(Ragged, fields[name])
            for name in ("atomic_number", "position", "edge_index", "edge_image")
        )
        first = numbers.offsets[row_of_entry(ends.offsets)]
        ends = Ragged(ends.values + first[:, None], ends.offsets)
        vectors = vectors_of(positions, ends, images, np.asarray(fields["cell"]))
        bins = round(self.o.cutoff / _SPACING)
        places = np.linalg.norm(vectors, axis=1) / self.o.cutoff * bins
        flat = row_of_entry(ends.offsets) * bins + np.clip(places.astype(np.int64), 0, bins - 1)
        counts = np.bincount(flat, minlength=len(numbers) * bins).reshape(len(numbers), bins)
        return np.asarray(counts / numbers.lengths[:, None])

    def published(self) -> tuple[Published, ...]:
        return ()


def vectors_of(positions: Ragged, ends: Ragged, images: Ragged, cells: Array) -> Array:
    """(E, 3) float32, angstrom: from atom i to its neighbour j in the cell `images`.

    positions: (N, 3); ends: (E, 2), numbered over all rows; images: (E, 3) in cell vectors; cells:
    (rows, 3, 3).
    """
    here, there = ends.values.astype(np.int64).T
    shifts = np.einsum("ek,ekd->ed", images.values, cells[row_of_entry(ends.offsets)])
    found = positions.values[there] + shifts - positions.values[here]
    return np.asarray(found, dtype=np.float32)
