"""READ FIRST. Asynchronous steady-state evolution as ask/tell: no runner, no clock, no files.

    evolution = Evolution(space, EvolutionConfig(seed=1))
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

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import numpy as np
import xxhash
from pydantic import Field

from dmi_hpc.config import Config
from dmi_hpc.errors import FailureKind
from dmi_hpc.models.cost import cost
from dmi_hpc.models.space import HyperValue, SearchSpace
from search.genome import Genome, decode, founder_genome, structural_hash, to_json
from search.operators import crossover, mutate, parametric
from search.population import Population
from search.space import Features, pick, random_genome, require_consistent
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
    max_flops: float | None = Field(None, gt=0, description="of a forward pass; not for founders")


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
class Proposal:
    """A genome to evaluate. origin: founder, random, crossover, mutation or incumbent."""

    id: int
    genome: Genome
    origin: str
    parents: tuple[int, ...]
    hash: str


class SpaceExhausted(Exception):
    """No genome is left that was not proposed already."""


class _Candidate(NamedTuple):
    genome: Genome
    origin: str
    parents: tuple[int, ...]


class Evolution:
    """The search. `proposals` and `outcomes` (in the order of the tells) are its whole history."""

    def __init__(
        self,
        space: SearchSpace,
        config: EvolutionConfig,
        defaults: Mapping[str, HyperValue] | None = None,
    ) -> None:
        """defaults: hyper-parameters for founders that leave them open (the recipe's).

        Raises NetworkError or RunError if the space or a founder makes no sense.
        """
        require_consistent(space)
        self.space = space
        self.config = config
        self.proposals: dict[int, Proposal] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._next = 0
        self._hashes: set[str] = set()
        self._founders = [founder_genome(f, space, defaults or {}) for f in space.founders]
        self._waiting = deque(self._founders)
        self._population = Population(config.population)
        self._surrogate = Surrogate(Features(space)) if config.surrogate else None

    def ask(self) -> Proposal:
        """The next genome to evaluate. Raises SpaceExhausted if there is no new one."""
        rng = np.random.default_rng([self.config.seed, self._next])
        candidate = self._new_founder() or self._bred(rng) or self._random(rng)
        identity = structural_hash(candidate.genome, self.space)
        proposal = Proposal(self._next, *candidate, identity)
        self.restore_ask(proposal)
        return proposal

    def restore_ask(self, proposal: Proposal) -> None:
        """Take over a proposal that an earlier run of this search made."""
        assert proposal.id not in self.proposals, f"proposal {proposal.id} was asked twice"
        self.proposals[proposal.id] = proposal
        self._hashes.add(proposal.hash)
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

    def pending(self) -> list[Proposal]:
        """Proposals without an outcome, oldest first."""
        return [p for number, p in self.proposals.items() if number not in self.outcomes]

    def fingerprint(self) -> str:
        """Identity of the space and its founders (xxh3-128, hex)."""
        content = [self.space.model_dump(mode="json"), [to_json(f) for f in self._founders]]
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())

    def _is_new(self, candidate: _Candidate) -> bool:
        return structural_hash(candidate.genome, self.space) not in self._hashes

    def _is_wanted(self, candidate: _Candidate) -> bool:
        """New, and cheap enough: a network over the limit is not even proposed."""
        limit = self.config.max_flops
        affordable = (
            limit is None or cost(decode(candidate.genome, self.space.network)).flops <= limit
        )
        return affordable and self._is_new(candidate)

    def _new_founder(self) -> _Candidate | None:
        while self._waiting:
            candidate = _Candidate(self._waiting.popleft(), "founder", ())
            if self._is_new(candidate):
                return candidate
        return None

    def _random(self, rng: np.random.Generator) -> _Candidate:
        for _ in range(RANDOM_TRIES):
            candidate = self._stranger(rng)
            if self._is_wanted(candidate):
                return candidate
        raise SpaceExhausted(
            f"{len(self.proposals)} networks were proposed and {RANDOM_TRIES} random ones brought "
            "no new one: the search space is exhausted, or its networks exceed max_flops"
        )

    def _bred(self, rng: np.random.Generator) -> _Candidate | None:
        """A new child; None before breeding starts, or if only known genomes come out."""
        if len(self.proposals) < self.config.initial or len(self._population) < 2:
            return None
        if self._surrogate is not None and rng.random() >= self.config.unfiltered:
            screened = self._screened(self._surrogate, rng)
            if screened is not None:
                return screened
        children = (self._child(rng) for _ in range(BREEDING_TRIES))
        return next(filter(self._is_wanted, children), None)

    def _screened(self, surrogate: Surrogate, rng: np.random.Generator) -> _Candidate | None:
        """The new candidate that the surrogate likes best."""
        pool = [self._candidate(rng) for _ in range(self.config.pool)]
        order = surrogate.screen([candidate.genome for candidate in pool])
        if order is None:
            return None
        return next(filter(self._is_wanted, (pool[index] for index in order)), None)

    def _candidate(self, rng: np.random.Generator) -> _Candidate:
        kind = rng.random()
        if kind < RANDOM_SHARE:
            return self._stranger(rng)
        if kind < RANDOM_SHARE + INCUMBENT_SHARE:
            return self._near_best(rng)
        return self._child(rng)

    def _stranger(self, rng: np.random.Generator) -> _Candidate:
        return _Candidate(random_genome(self.space, rng), "random", ())

    def _near_best(self, rng: np.random.Generator) -> _Candidate:
        _, parent = pick(self._population.members[:INCUMBENTS], rng)
        genome = mutate([self.proposals[parent].genome], self.space, rng)
        return _Candidate(genome, "incumbent", (parent,))

    def _child(self, rng: np.random.Generator) -> _Candidate:
        first = self._population.tournament(self.config.tournament, rng)
        second = self._population.tournament(self.config.tournament, rng)
        if first == second or rng.random() >= self.config.crossover:
            genome = mutate([self.proposals[first].genome], self.space, rng)
            return _Candidate(genome, "mutation", (first,))
        parents = (first, second)
        genome = crossover([self.proposals[p].genome for p in parents], self.space, rng)
        if rng.random() < MUTATED_CROSSOVER:
            genome = parametric([genome], self.space, rng)
        return _Candidate(genome, "crossover", parents)
