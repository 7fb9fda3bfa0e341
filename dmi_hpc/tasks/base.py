"""What a published system must say to run on this machine.

A task is four things: a data source, a model space with the published network in it, metrics in
field units, and baselines to beat. Trainer, search, evaluation and report know nothing else of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from dmi_hpc import knobs
from dmi_hpc.config import Config, DataConfig
from dmi_hpc.data.build import Communicator
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.errors import DataError, DMIError
from dmi_hpc.models.space import SearchSpace
from dmi_hpc.models.spec import GraphInput, NetworkSpec

if TYPE_CHECKING:
    from dmi_hpc.models.graphs import Graphs

Array = np.ndarray[Any, np.dtype[Any]]
Fields = Mapping[str, Array]
Progress = Callable[[int], None]
# log: positive with a wide range; logit: 0 or 1, predicted as a probability; category: the number of a
# class, predicted as the probabilities of all
Transform = Literal["identity", "log", "logit", "category"]


@dataclass(frozen=True)
class Quantity:
    """The predicted quantity, in the field's own unit."""

    name: str
    unit: str
    transform: Transform = "identity"
    classes: tuple[str, ...] = ()  # of a category: what its numbers stand for


@dataclass(frozen=True)
class Published:
    """A figure of the literature, shown beside ours and never mixed with it."""

    label: str
    mae: float | None
    mae_percent: float | None
    source: str
    rmse: float | None = None
    r2: float | None = None
    auc: float | None = None
    accuracy: float | None = None
    force_mae: float | None = None


@dataclass(frozen=True)
class Baseline:
    """A non-deep method: `predict(train fields, train target, test fields)` -> (n,) field units."""

    name: str
    label: str
    predict: Callable[[Fields, Array, Fields], Array]


@dataclass(frozen=True)
class Picture:
    """A picture for the report: PNG bytes and its caption."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class BuildContext:
    """How and by whom a data set is built."""

    config: DataConfig
    seed: int
    communicator: Communicator
    processes: int  # of this rank
    progress: Progress


class Task(ABC):
    """Base of all tasks. `options` are the recipe's [task] keys besides the name."""

    Options: ClassVar[type[Config]] = Config
    quantity: ClassVar[Quantity]
    input_fields: ClassVar[tuple[str, ...]]
    target_field: ClassVar[str]
    force_field: ClassVar[str | None] = None  # forces on atoms, eV/angstrom, learnt with the energy
    label_field: ClassVar[str | None] = None  # text that names a row; else its number
    # rows of equal text are several computations of one thing: scores are of their lowest value
    group_field: ClassVar[str | None] = None

    def __init__(self, name: str, options: Config) -> None:
        self.name = name
        self.options = options

    def recipe_options(self) -> dict[str, Any]:
        """The recipe's [task] table that makes this task again."""
        return {"name": self.name, **self.options.model_dump(mode="json")}

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input of the network, channels first."""

    @abstractmethod
    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        """Make the shard set `target` from a solver; or a DataError saying how to import it."""

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """All that one network predicts, with an output for each; `quantity` is the first."""
        return (self.quantity,)

    @property
    def target_fields(self) -> tuple[str, ...]:
        """The field of each of `quantities`; nan where it is not known of a row."""
        return (self.target_field,)

    @property
    def measure(self) -> tuple[str, str]:
        """(name, unit) of the error that trainings and searches make small."""
        if len(self.quantities) > 1:
            return "MAE / deviation", ""
        named = {"logit": "1 - AUC", "category": "error rate"}.get(self.quantity.transform)
        if named is not None:
            return named, ""
        return ("MAE + force MAE" if self.force_field else "MAE"), self.quantity.unit

    @property
    def label_fields(self) -> tuple[str, ...]:
        """All fields that are learnt, beside `input_fields`."""
        return (*self.target_fields, *([self.force_field] if self.force_field else ()))

    @property
    def graph(self) -> GraphInput | None:
        """What the edges carry, if inputs are graphs: with ``input_shape`` (node features, nodes)."""
        return None

    def rows(self) -> int | None:
        """Number of rows that `build_data` will make, for its progress bar; None if unknown."""
        return None

    @abstractmethod
    def inputs(self, fields: Fields) -> Array | Graphs:
        """Stored fields of n rows -> network inputs, (n, *input_shape) float32; or n graphs, if the
        task has a `graph`. What refers to entries of another field counts them over all n rows. The
        graphs carry the forces if `force_field` is among the fields."""

    def network_inputs(self, fields: Fields) -> Array | Graphs:
        """`inputs` of n rows, (n, *input_shape); a DataError naming the fields if they do not fit."""
        expected = f"(rows, {', '.join(map(str, self.input_shape))})"
        if self.graph is not None:
            expected = f"graphs of {self.input_shape[0]}, {self.graph.edge_features} features"
        try:
            made = self.inputs(fields)
        except DMIError:
            raise
        # what arrays of another kind raise
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"inputs of task {self.name}: expected {expected}, but its `inputs` fails with "
                f"{type(error).__name__}: {error} ({knobs.DEBUG}=1 shows where), given "
                f"{self._told(fields)}. Choose data of this task"
            ) from error
        if isinstance(made, np.ndarray):
            fits = made.dtype.kind in "biuf" and made.shape[1:] == tuple(self.input_shape)
            fits = fits and self.graph is None
        else:
            fits = self.graph is not None and _features(made) == (
                self.input_shape[0],
                self.graph.edge_features,
            )
        if not fits:
            raise DataError(
                f"inputs of task {self.name}: expected {expected}, found {_kind(made)} from "
                f"{self._told(fields)}. Choose data of this task, or the [task] options of these"
            )
        return made

    def _told(self, fields: Fields) -> str:
        return ", ".join(f"{name} {_kind(fields[name])}" for name in self.input_fields)

    def augment(self, inputs: Array, bits: Array) -> Array:
        """Inputs changed by symmetries that leave the target alone.

        bits: (n,) uint64, uniform, a pure function of seed, epoch and position of each row.
        """
        return inputs

    def in_training(self, target: Array) -> Array:
        """(n,) bool: rows of the train split fit to learn from. Evaluation always uses all rows."""
        return np.ones(len(target), dtype=bool)

    @abstractmethod
    def published_network(self) -> NetworkSpec:
        """The network of the paper; what is trained unless the recipe says otherwise."""

    @abstractmethod
    def space(self) -> SearchSpace:
        """What a search may vary, with known good networks as founders."""

    def baselines(self) -> tuple[Baseline, ...]:
        """Methods to beat, run by us on the same split."""
        return ()

    def published(self) -> tuple[Published, ...]:
        """Figures of the literature."""
        return ()

    def read_inputs(self, path: Path) -> tuple[list[str], dict[str, Array]]:
        """A user's file for prediction -> (label of each row, fields)."""
        raise DataError(f"{path}: this task cannot predict from files")

    def pictures(self, fields: Fields, truth: Array, prediction: Array) -> tuple[Picture, ...]:
        """A few examples with truth and prediction, for the report."""
        return ()


def _features(made: Any) -> tuple[int, int] | None:
    """Numbers on each node and edge of what should be graphs."""
    from dmi_hpc.models.graphs import Graphs  # torch: a command that only lists tasks needs none

    return (made.nodes.shape[1], made.edges.shape[1]) if isinstance(made, Graphs) else None


def _kind(given: Any) -> str:
    """For messages: "(5, 8) float32"."""
    if not isinstance(given, np.ndarray):
        return type(given).__name__
    return f"{given.shape} {'text' if given.dtype.kind in 'SU' else given.dtype.name}"
