"""READ FIRST. Asynchronous steady-state evolution as ask/tell: no runner, no clock, no files.

    evolution = Evolution(Networks(space), EvolutionConfig(seed=1))   # any ``search.base.Space``
    proposal = evolution.ask()                      # any number may be outstanding
    evolution.tell(proposal.id, Success(fitness))   # or Failure("memory"); in any order

1. `ask` proposes the founders in their order, then random genomes until `initial`.
2. Then it breeds: parents win tournaments in a bounded population, children come from crossover
   and mutation. With the surrogate, many candidates (children, mutations of the best, random ones)
   are made, and the one that the SVM ranks first is proposed; a share stays unfiltered.
3. `tell` puts a fitness (lower is better) into the population, where the worst makes room.
   A failure teaches the surrogate alone.
4. No two proposals have the same structural hash, finished or not.

The random numbers of proposal k depend on (seed, k) alone, so that replaying the asks and tells of
a journal (`restore_ask`, `tell`) continues as if there had been no interruption.

Asynchronous steady-state evolution is old (e.g. Whitley's GENITOR, 1989); in architecture search:
Young et al., MLHPC 2015; Real et al., ICML 2017. Acquisition by mutating incumbents: "Mutation is
all you need", arXiv:2107.07343.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import isfinite
from typing import Generic, NamedTuple

import numpy as np
from pydantic import Field

from dmi_hpc.config import Config
from dmi_hpc.errors import FailureKind
from search.base import G, Space
from search.population import Population
from search.space import pick
from search.surrogate import Surrogate

INCUMBENTS = 3  # best members whose mutations are candidates
INCUMBENT_SHARE = 0.4
RANDOM_SHARE = 0.1
MUTATED_CROSSOVER = 0.5
BREEDING_TRIES = 20
RANDOM_TRIES = 200


class EvolutionConfig(Config):
    """Constants of one search."""

    seed: int = Field(0, ge=0)
    population: int = Field(16, ge=2)
    tournament: int = Field(3, ge=1, description="contestants for one parent")
    initial: int = Field(12, ge=1, description="founders and random genomes before breeding")
    crossover: float = Field(0.5, ge=0, le=1, description="share of children with two parents")
    surrogate: bool = True
    pool: int = Field(32, ge=1, description="candidates among which the surrogate chooses")
    unfiltered: float = Field(0.1, ge=0, le=1, description="share of children it does not see")


@dataclass(frozen=True)
class Success:
    """fitness: lower is better."""

    fitness: float


@dataclass(frozen=True)
class Failure:
    """Why a genome got no fitness; see ``dmi_hpc.errors.TrialFailure``."""

    kind: FailureKind
    message: str = ""
    traceback: str = ""


Outcome = Success | Failure


def checked(outcome: Outcome) -> Outcome:
    """`outcome`, where a fitness that is not finite has become a failure of kind ``nan``."""
    if isinstance(outcome, Success) and not isfinite(outcome.fitness):
        return Failure("nan", f"the fitness is {outcome.fitness}")
    return outcome


@dataclass(frozen=True)
class Proposal(Generic[G]):
    """A genome to evaluate. origin: founder, random, crossover, mutation or incumbent."""

    id: int
    genome: G
    origin: str
    parents: tuple[int, ...]
    hash: str


class SpaceExhausted(Exception):
    """No genome is left that was not proposed already."""


class _Candidate(NamedTuple, Generic[G]):
    genome: G
    origin: str
    parents: tuple[int, ...]


class Evolution(Generic[G]):
    """The search. `proposals` and `outcomes` (in the order of the tells) are its whole history."""

    def __init__(self, space: Space[G], config: EvolutionConfig) -> None:
        self.space = space
        self.config = config
        self.proposals: dict[int, Proposal[G]] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._next = 0
        self._identities: set[str] = set()
        self._waiting = deque(space.founders())
        self._population = Population(config.population)
        self._surrogate = Surrogate(space) if config.surrogate else None

    def ask(self) -> Proposal[G]:
        """The next genome to evaluate. Raises SpaceExhausted if there is no new one."""
        rng = np.random.default_rng([self.config.seed, self._next])
        candidate = self._new_founder() or self._bred(rng) or self._random(rng)
        identity = self.space.identity(candidate.genome)
        proposal = Proposal(self._next, *candidate, identity)
        self.restore_ask(proposal)
        return proposal

    def restore_ask(self, proposal: Proposal[G]) -> None:
        """Take over a proposal that an earlier run of this search made."""
        assert proposal.id not in self.proposals, f"proposal {proposal.id} was asked twice"
        self.proposals[proposal.id] = proposal
        self._identities.add(proposal.hash)
        self._next = max(self._next, proposal.id + 1)

    def tell(self, identifier: int, outcome: Outcome) -> Outcome:
        """Report a finished evaluation; returns the outcome as it was taken (see `checked`)."""
        assert identifier in self.proposals, f"proposal {identifier} was never asked"
        assert identifier not in self.outcomes, f"proposal {identifier} was told twice"
        outcome = self.outcomes[identifier] = checked(outcome)
        fitness = outcome.fitness if isinstance(outcome, Success) else None
        if fitness is not None:
            self._population.add(identifier, fitness)
        # a process that was lost says nothing about its network
        blameless = isinstance(outcome, Failure) and outcome.kind == "lost"
        if self._surrogate is not None and not blameless:
            self._surrogate.add(self.proposals[identifier].genome, fitness)
        return outcome

    def best(self) -> tuple[int, float] | None:
        """(id, fitness) of the best network so far; None if none has succeeded."""
        if not len(self._population):
            return None
        fitness, identifier = self._population.members[0]
        return identifier, fitness

    def pending(self) -> list[Proposal[G]]:
        """Proposals without an outcome, oldest first."""
        return [p for number, p in self.proposals.items() if number not in self.outcomes]

    def _is_new(self, candidate: _Candidate[G]) -> bool:
        return self.space.identity(candidate.genome) not in self._identities

    def _is_wanted(self, candidate: _Candidate[G]) -> bool:
        """New, and cheap enough: a network over the limit is not even proposed."""
        return self.space.affordable(candidate.genome) and self._is_new(candidate)

    def _new_founder(self) -> _Candidate[G] | None:
        while self._waiting:
            candidate = _Candidate(self._waiting.popleft(), "founder", ())
            if self._is_new(candidate):
                return candidate
        return None

    def _random(self, rng: np.random.Generator) -> _Candidate[G]:
        for _ in range(RANDOM_TRIES):
            candidate = self._stranger(rng)
            if self._is_wanted(candidate):
                return candidate
        raise SpaceExhausted(
            f"{len(self.proposals)} networks were proposed and {RANDOM_TRIES} random ones brought "
            "no new one: the search space is exhausted, or its networks cost more than they may"
        )

    def _bred(self, rng: np.random.Generator) -> _Candidate[G] | None:
        """A new child; None before breeding starts, or if only known genomes come out."""
        if len(self.proposals) < self.config.initial or len(self._population) < 2:
            return None
        if self._surrogate is not None and rng.random() >= self.config.unfiltered:
            screened = self._screened(self._surrogate, rng)
            if screened is not None:
                return screened
        children = (self._child(rng) for _ in range(BREEDING_TRIES))
        return next(filter(self._is_wanted, children), None)

    def _screened(self, surrogate: Surrogate[G], rng: np.random.Generator) -> _Candidate[G] | None:
        """The new candidate that the surrogate likes best."""
        pool = [self._candidate(rng) for _ in range(self.config.pool)]
        order = surrogate.screen([candidate.genome for candidate in pool])
        if order is None:
            return None
        return next(filter(self._is_wanted, (pool[index] for index in order)), None)

    def _candidate(self, rng: np.random.Generator) -> _Candidate[G]:
        kind = rng.random()
        if kind < RANDOM_SHARE:
            return self._stranger(rng)
        if kind < RANDOM_SHARE + INCUMBENT_SHARE:
            return self._near_best(rng)
        return self._child(rng)

    def _stranger(self, rng: np.random.Generator) -> _Candidate[G]:
        return _Candidate(self.space.random(rng), "random", ())

    def _near_best(self, rng: np.random.Generator) -> _Candidate[G]:
        _, parent = pick(self._population.members[:INCUMBENTS], rng)
        genome = self.space.mutated(self.proposals[parent].genome, rng)
        return _Candidate(genome, "incumbent", (parent,))

    def _child(self, rng: np.random.Generator) -> _Candidate[G]:
        first = self._population.tournament(self.config.tournament, rng)
        second = self._population.tournament(self.config.tournament, rng)
        if first == second or rng.random() >= self.config.crossover:
            genome = self.space.mutated(self.proposals[first].genome, rng)
            return _Candidate(genome, "mutation", (first,))
        parents = (first, second)
        genome = self.space.crossed(
            self.proposals[first].genome, self.proposals[second].genome, rng
        )
        if rng.random() < MUTATED_CROSSOVER:
            genome = self.space.stepped(genome, rng)
        return _Candidate(genome, "crossover", parents)
