"""What evolution must know of the things it evolves; networks and plain parameters implement it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
G = TypeVar("G", bound=Hashable)


class Space(Protocol[G]):
    """Genomes of type `G`: immutable, valid by construction, always in canonical form.

    All methods are pure; what they return depends on their arguments and the generator alone.
    """

    def founders(self) -> Sequence[G]:
        """Known good genomes, to be evaluated first, in this order."""

    def random(self, rng: np.random.Generator) -> G:
        """A genome from all over the space."""

    def mutated(self, parent: G, rng: np.random.Generator) -> G:
        """A child of one parent: one mutation of any kind, structural ones included."""

    def crossed(self, first: G, second: G, rng: np.random.Generator) -> G:
        """A child of two parents."""

    def stepped(self, parent: G, rng: np.random.Generator) -> G:
        """A near neighbour: the structure stays, at least one gene moves by a small step."""

    def restructured(self, parent: G, rng: np.random.Generator) -> G:
        """A child of one parent whose structure changes: parts come, go or move, kinds are others;
        anything in a space that has no structure."""

    def identity(self, genome: G) -> str:
        """Equal for genomes that mean the same, isomorphic ones included (xxh3-128, hex)."""

    def affordable(self, genome: G) -> bool:
        """False if it costs more than the search may spend on one; founders are not asked."""

    def features(self, genomes: Sequence[G]) -> Vector:
        """(len(genomes), d) float64: numbers of about unit scale for distances between genomes."""

    def to_json(self, genome: G) -> dict[str, Any]:
        """Plain data, read back by `from_json`."""

    def from_json(self, data: Mapping[str, Any]) -> G:
        """Inverse of `to_json`. Raises KeyError, TypeError or ValueError for what is no genome."""

    def fingerprint(self) -> str:
        """Identity of the space and its founders (xxh3-128, hex)."""
