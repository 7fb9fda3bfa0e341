"""CGCNN (Xie and Grossman 2018): properties of a crystal from the graph of its atoms and neighbours.

Nodes carry the element, edges Gaussians of the distance. Data: structures imported by ``dmi data
import --cutoff 8 --max-neighbours 12``. Baseline: a random forest on composition and density.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

import numpy as np
from pydantic import AfterValidator, model_validator
from pydantic import Field as Option

from dmi_hpc.config import Config
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.data.ragged import Ragged, row_of_entry
from dmi_hpc.errors import DataError
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import (
    Activation,
    Dense,
    GraphConv,
    GraphInput,
    GraphReadout,
    Layer,
    NetworkSpec,
    Norm,
    Residual,
)
from dmi_hpc.tasks.base import (
    Array,
    Baseline,
    BuildContext,
    Fields,
    Published,
    Quantity,
    Task,
)
from dmi_hpc.tasks.forests import Forest

if TYPE_CHECKING:
    from dmi_hpc.models.graphs import Graphs

ELEMENTS = 100  # that the one-hot vectors know: Z = 1 to 100
_ROUNDING = 1e-4  # of stored distances, angstrom
_MANY = 60  # neighbours of an atom within 5 or 6 angstrom, for costs alone
_HEAD = (Dense(units=128), Activation(function="softplus"))
_PAPER = "Xie and Grossman, Phys. Rev. Lett. 120 (2018) 145301"
_MATBENCH = "matbench, mean of 5 folds"
_PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    "e_form": (
        Published("CGCNN", 0.039, None, f"{_PAPER}; 28,046 training rows"),
        Published("CGCNN, weights shared by all neighbours", 0.108, None, _PAPER),
        Published("CGCNN", 0.0337, None, f"{_MATBENCH} mp_e_form, 132,752 rows"),
        Published("ALIGNN", 0.0215, None, f"{_MATBENCH} mp_e_form, 132,752 rows"),
        Published("Random forest", 0.1165, None, f"{_MATBENCH} mp_e_form, 132,752 rows"),
    ),
    "gap": (
        Published("CGCNN", 0.388, None, f"{_PAPER}; 16,458 training rows"),
        Published("CGCNN", 0.2972, None, f"{_MATBENCH} mp_gap, 106,113 rows"),
        Published("ALIGNN", 0.1861, None, f"{_MATBENCH} mp_gap, 106,113 rows"),
        Published("Random forest", 0.3452, None, f"{_MATBENCH} mp_gap, 106,113 rows"),
    ),
    "log10_k": (
        Published("CGCNN", 0.054, None, f"{_PAPER}; 2,041 training rows"),
        Published("CGCNN", 0.0712, None, f"{_MATBENCH} log_kvrh, 10,987 rows"),
        Published("Random forest", 0.0820, None, f"{_MATBENCH} log_kvrh, 10,987 rows"),
    ),
    "log10_g": (
        Published("CGCNN", 0.087, None, f"{_PAPER}; 2,041 training rows"),
        Published("CGCNN", 0.0895, None, f"{_MATBENCH} log_gvrh, 10,987 rows"),
        Published("Random forest", 0.1040, None, f"{_MATBENCH} log_gvrh, 10,987 rows"),
    ),
}


class CrystalOptions(Config):
    """[task] of a recipe on crystals."""

    targets: Mapping[str, str] = Option(
        {"value": ""}, min_length=1, description="field = unit of what is predicted, one or several"
    )
    log: tuple[str, ...] = Option((), description="targets that are positive with a wide range")
    convolution: Literal["gated", "sum"] = Option(
        "gated", description="sum: the paper's first one, the same weights for all neighbours"
    )
    atom_vectors: Annotated[Path, AfterValidator(Path.resolve)] | None = Option(
        None, description="JSON of each element's vector by Z (atom_init.json); default: one-hot"
    )
    cutoff: float = Option(8.0, gt=0, description="of the neighbours, angstrom")
    max_neighbours: int | None = Option(12, ge=1, description="nearest ones of each atom")
    step: float = Option(0.2, gt=0, description="between the Gaussians, and their width, angstrom")
    nodes: int = Option(30, ge=1, description="typical number of atoms, for costs alone")
    forest_trees: int = Option(100, ge=1, description="of the random-forest baseline")

    @model_validator(mode="after")
    def _known(self) -> CrystalOptions:
        if unknown := sorted(set(self.log) - set(self.targets)):
            raise ValueError(
                f"log names {', '.join(unknown)}, expected some of {', '.join(self.targets)}"
            )
        return self


class Crystals(Task):
    Options = CrystalOptions
    input_fields: ClassVar[tuple[str, ...]] = ("atomic_number", "edge_index", "distance", "cell")
    label_field = "name"

    def __init__(self, name: str, options: Config) -> None:
        super().__init__(name, options)
        self.o = cast(CrystalOptions, options)
        self.quantity = self.quantities[0]  # type: ignore[misc]
        self.target_field = self.target_fields[0]  # type: ignore[misc]

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        return tuple(
            Quantity(name, unit, "log" if name in self.o.log else "identity")
            for name, unit in self.o.targets.items()
        )

    @property
    def target_fields(self) -> tuple[str, ...]:
        return tuple(self.o.targets)

    @cached_property
    def _centres(self) -> Array:
        """(K,) angstrom, from 0 to the cutoff."""
        count = round(self.o.cutoff / self.o.step) + 1
        return np.linspace(0.0, self.o.cutoff, count, dtype=np.float32)

    @cached_property
    def _vectors(self) -> Array:
        """(1 + Z, F): a vector of each element; NaN where there is none."""
        if self.o.atom_vectors is not None:
            return read_vectors(self.o.atom_vectors)
        return np.concatenate([np.full((1, ELEMENTS), np.nan), np.eye(ELEMENTS)]).astype(np.float32)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self._vectors.shape[1], self.o.nodes)

    @property
    def graph(self) -> GraphInput:
        edges = self.o.nodes * (self.o.max_neighbours or _MANY)
        return GraphInput(edge_features=len(self._centres), edges=edges)

    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        nearest = f" --max-neighbours {self.o.max_neighbours}" if self.o.max_neighbours else ""
        raise DataError(
            f"{target}: no data here, and properties of crystals cannot be computed. Import structures "
            f"first: dmi data import FILES --out {target} --cutoff {self.o.cutoff:g}{nearest}"
        )

    def inputs(self, fields: Fields) -> Graphs:
        """Vectors of the elements on the nodes; Gaussians of the distance on the edges."""
        from dmi_hpc.models.graphs import graphs_of

        numbers, distances, ends = (
            cast(Ragged, fields[name]) for name in ("atomic_number", "distance", "edge_index")
        )
        if distances.values.max(initial=0.0) > self.o.cutoff + _ROUNDING:
            raise DataError(
                f"neighbours {distances.values.max():.2f} angstrom away, the task's cutoff is "
                f"{self.o.cutoff:g}: give it that of the import"
            )
        nodes = self._vectors.take(numbers.values, axis=0, mode="clip")
        if np.isnan(nodes[:, 0]).any() or numbers.values.max() >= len(self._vectors):
            self._refuse(numbers)
        edges = np.subtract.outer(distances.values, self._centres)
        edges /= np.float32(self.o.step)
        np.exp(-(edges * edges), out=edges)
        return graphs_of(Ragged(nodes, numbers.offsets), Ragged(edges, distances.offsets), ends)

    def published_network(self) -> NetworkSpec:
        """CGCNN as its authors' code has it: 64 channels, 3 convolutions, 128 units."""
        head = (GraphReadout(), Activation(function="softplus"), *_HEAD)
        return self._network((*self._blocks(), *head))

    def _blocks(self) -> tuple[Layer, ...]:
        if self.o.convolution == "gated":
            inner = (GraphConv(channels=64, norm="batch"), Norm())
            block: tuple[Layer, ...] = (Residual(layers=inner), Activation(function="softplus"))
        else:
            block = (GraphConv(op="sum", channels=64), Norm(), Activation(function="softplus"))
        return (Dense(units=64), *3 * block)

    def _network(self, layers: tuple[Layer, ...]) -> NetworkSpec:
        return NetworkSpec(
            input_shape=self.input_shape,
            layers=layers,
            outputs=len(self.quantities),
            graph=self.graph,
        )

    def space(self) -> SearchSpace:
        # the softplus after the readout, of what is positive anyway, is no part of the space
        founder = self._network((*self._blocks(), GraphReadout(), *_HEAD))
        return SearchSpace(
            network=NetworkSpace(
                input_shape=self.input_shape,
                outputs=len(self.quantities),
                graph=self.graph,
                graph_blocks=(1, 6),
                embeddings=(16, 32, 64, 128),
                channels=(16, 32, 64, 96, 128),
                graph_readouts=("mean", "max"),  # a sum grows with the cell, no property here does
                dense_blocks=(0, 3),
                units=(32, 64, 128, 256),
                norms=(None, "batch"),
                activations=("softplus", "relu", "silu"),
                dropouts=(0.0, 0.1, 0.2),
            ),
            hyper={
                "learning_rate": FloatRange(low=3e-4, high=1e-2, log=True),
                "weight_decay": FloatRange(low=1e-6, high=1e-1, log=True),
                "batch_size": Choice(values=(32, 64, 128, 256), ordered=True),
                "loss": Choice(values=("mse", "mae", "huber")),
            },
            founders=(Founder(name="CGCNN", network=founder),),
        )

    def baselines(self) -> tuple[Baseline, ...]:
        forest = Forest(composition_density, self.o.forest_trees, share=1 / 3)
        return (Baseline("forest", "Random forest on composition and density", forest),)

    def published(self) -> tuple[Published, ...]:
        found = [
            (name, figure) for name in self.target_fields for figure in _PUBLISHED.get(name, ())
        ]
        if len(self.target_fields) == 1:
            return tuple(figure for _, figure in found)
        return tuple(replace(figure, label=f"{name}: {figure.label}") for name, figure in found)

    def read_inputs(self, path: Path) -> tuple[list[str], dict[str, Array]]:
        """CIF, POSCAR, extended XYZ, JSON or JSON Lines, or a folder of such."""
        from dmi_hpc.data.importing.structures import read_structures

        names, fields = read_structures(path, self.o.cutoff, self.o.max_neighbours)
        return names, {name: cast(Array, fields[name]) for name in self.input_fields}

    def _refuse(self, numbers: Ragged) -> None:
        known = np.flatnonzero(~np.isnan(self._vectors[:, 0]))
        for row, atoms in enumerate(numbers):
            if strange := sorted(set(atoms.tolist()) - set(known.tolist())):
                raise DataError(
                    f"row {row} of {len(numbers)}: atoms of Z = {strange[0]}, of which this network has "
                    f"no vector; it knows {len(known)} elements, the last of Z = {known[-1]}"
                )


def read_vectors(path: Path) -> Array:
    """(1 + Z, F) float32 from JSON {"1": [...], "2": [...], ...}; NaN where an element has none.

    Raises DataError.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = {int(z): np.array(vector, dtype=np.float32) for z, vector in found.items()}
        values = np.stack([rows[z] for z in sorted(rows)])
        if (
            values.ndim != 2
            or not np.isfinite(values).all()
            or not 0 < min(rows) <= max(rows) < 119
        ):
            raise ValueError("not finite numbers, as many of each element from 1 to 118")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a file of element vectors ({error}); expected JSON "
            '{"1": [0, 1, ...], "2": [...], ...}, as many numbers of each element'
        ) from None
    table = np.full((max(rows) + 1, values.shape[1]), np.nan, dtype=np.float32)
    table[sorted(rows)] = values
    return table


def composition_density(fields: Fields) -> Array:
    """(n, D) descriptors of crystals that know nothing of the places of their atoms.

    Fractions of the elements; mean, deviation, least and largest of their properties; how many elements
    there are; volume of an atom (cubic angstrom) and density (unified atomic mass units per cubic
    angstrom), both 0 without a cell.
    """
    numbers, cells = cast(Ragged, fields["atomic_number"]), np.asarray(fields["cell"])
    n, table = len(numbers), _element_properties()
    flat = row_of_entry(numbers.offsets) * len(table) + numbers.values
    counts = np.bincount(flat, minlength=n * len(table)).reshape(n, len(table))
    shares = counts / numbers.lengths[:, None]
    mean = shares @ table
    deviation = np.sqrt(np.maximum(shares @ table**2 - mean**2, 0.0))
    present = counts > 0
    least = [np.where(present, column, np.inf).min(axis=1) for column in table.T]
    largest = [np.where(present, column, -np.inf).max(axis=1) for column in table.T]
    volume = np.abs(np.linalg.det(cells)) / numbers.lengths
    mass = mean[:, _PROPERTIES.index("atomic_mass")]
    density = np.divide(mass, volume, out=np.zeros(n), where=volume > 0)
    several = present.sum(axis=1)
    return np.column_stack([shares, mean, deviation, *least, *largest, several, volume, density])


_PROPERTIES = ("X", "atomic_radius", "atomic_mass", "group", "row", "mendeleev_no")


@cache
def _element_properties() -> Array:
    """(119, P) by Z; the mean over the elements where one has none (noble gases: no X)."""
    from pymatgen.core import Element

    with warnings.catch_warnings(action="ignore"):  # of each property that an element has not
        found = [[getattr(Element.from_Z(z), name) for name in _PROPERTIES] for z in range(1, 119)]
    table = np.array([[np.nan if v is None else float(v) for v in row] for row in found])
    table = np.where(np.isnan(table), np.nanmean(table, axis=0), table)
    return np.concatenate([np.zeros((1, len(_PROPERTIES))), table])
