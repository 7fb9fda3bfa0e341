"""Our arms of the table benchmark: the search as it ships, and with one part taken away each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from search.evolution.evolve import Evolution, EvolutionConfig, Failure, SpaceExhausted, Success
from search.spaces.parameters import Value
from searching.structure import plain, structured
from searching.tables import Problem


@dataclass(frozen=True)
class Arm:
    """constants: of `EvolutionConfig`; graphs: whether it sees the networks behind a table."""

    constants: Mapping[str, Any] = field(default_factory=dict)
    graphs: bool = False


class Ours:
    """`Evolution` as ``benchmarks.searching.tables.Optimiser``."""

    def __init__(self, problem: Problem, arm: Arm, seed: int) -> None:
        space, self._config = (structured if arm.graphs else plain)(problem)
        self.evolution = Evolution(space, EvolutionConfig(seed=seed, **arm.constants))

    def ask(self) -> tuple[int, Mapping[str, Value]] | None:
        try:
            proposal = self.evolution.ask()
        except SpaceExhausted:
            return None
        return proposal.id, self._config(proposal.genome)

    def tell(self, token: int, score: float | None) -> None:
        self.evolution.tell(token, Failure("invalid") if score is None else Success(-score))
