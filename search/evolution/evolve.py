"""READ FIRST. Asynchronous steady-state evolution as ask/tell: no runner, no clock, no files.

    evolution = Evolution(Networks(space), EvolutionConfig(seed=1))   # any ``search.base.Space``
    proposal = evolution.ask()                      # any number may be outstanding
    evolution.tell(proposal.id, Success(fitness))   # or Failure("memory"); in any order

1. `ask` proposes the founders in their order, then random genomes until `initial`.
2. Then it breeds: parents win tournaments in a bounded population, children come from crossover
   and mutation. With the surrogate, many candidates (children, mutations of the best, random ones)
   are made, the most wanted ones are mutated again, and the most wanted of all is proposed: the one
   with the lowest rank that it might have, as far as the support vector machine can tell.
3. `tell` puts a fitness (lower is better) into the population, where the worst makes room; with
   further objectives, the worst is the last in NSGA-II's order. A failure teaches the surrogate alone.
4. No two proposals have the same structural hash, finished or not.

The random numbers of proposal k depend on (seed, k) alone, so that replaying the asks and tells of
a journal (`restore_ask`, `tell`) continues as if there had been no interruption.

Asynchronous steady-state evolution is old (e.g. Whitley's GENITOR, 1989); in architecture search:
Young et al., MLHPC 2015; Real et al., ICML 2017. Acquisition by mutating incumbents: "Mutation is
all you need", arXiv:2107.07343. A confidence bound whose weight is drawn from an exponential
distribution for every worker: Hutter et al., "Parallel algorithm configuration", LION 2012.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Generic, NamedTuple

import numpy as np
from pydantic import Field

from dmi_hpc.config import Config
from dmi_hpc.errors import TRANSIENT, FailureKind
from search.base import G, Space, Vector
from search.evolution.population import Population
from search.evolution.surrogate import Judgement, Surrogate, Values
from search.spaces.space import pick

INCUMBENTS = 3  # best members whose mutations are candidates
INCUMBENT_SHARE = 0.4
RANDOM_SHARE = 0.1
MUTATED_CROSSOVER = 0.5
CLIMBERS = 4  # candidates of which a climb makes more
CLIMB_SHARE = 8  # of each a pool / 8
FULL_POOL = 1000  # evaluations; with more, pools shrink and do not climb: an ask stays cheap
LEAST_POOL = 10
BREEDING_TRIES = 20
RANDOM_TRIES = 200
FAILING = 1e3  # more than any difference of bounds


class EvolutionConfig(Config):
    """Constants of one search."""

    seed: int = Field(0, ge=0)
    population: int = Field(16, ge=2)
    tournament: int = Field(3, ge=1, description="contestants for one parent")
    initial: int = Field(16, ge=1, description="founders and random genomes before breeding")
    crossover: float = Field(0.5, ge=0, le=1, description="share of children with two parents")
    surrogate: bool = True
    pool: int = Field(64, ge=1, description="candidates among which the surrogate chooses")
    climbs: int = Field(2, ge=0, description="rounds of mutating the most wanted candidates")
    exploration: float = Field(
        2.0, ge=0, description="mean weight of uncertainty; every proposal draws its own"
    )
    unfiltered: float = Field(0.0, ge=0, le=1, description="share of children it does not see")


@dataclass(frozen=True)
class Success:
    """fitness: lower is better; others: further objectives, all minimised."""

    fitness: float
    others: tuple[float, ...] = ()


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
    """A genome to evaluate. origin: founder, random, crossover, mutation, incumbent or climb.

    predicted: what the surrogate expected, if it was asked: the share of what was known that is
    better, about 0 to 1.
    """

    id: int
    genome: G
    origin: str
    parents: tuple[int, ...]
    hash: str
    predicted: float | None = None


class SpaceExhausted(Exception):
    """No genome is left that was not proposed already."""


class _Candidate(NamedTuple, Generic[G]):
    genome: G
    origin: str
    parents: tuple[int, ...]


class Evolution(Generic[G]):
    """The search. `proposals` and `outcomes` (in the order of the tells) are its whole history.

    Proposals that others made and evaluated are taken in with `restore_ask` and `tell` as well, under
    numbers below 0.
    """

    def __init__(self, space: Space[G], config: EvolutionConfig) -> None:
        self.space = space
        self.config = config
        self.proposals: dict[int, Proposal[G]] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._next = 0
        self._identities: set[str] = set()
        self._pending: dict[int, Proposal[G]] = {}
        self._fitness: dict[int, float] = {}
        self._best: tuple[int, float] | None = None
        self._objectives = 0  # of the first success
        self._waiting = deque(space.founders())
        self._population = Population(config.population)
        self._surrogate = Surrogate(space) if config.surrogate else None

    def ask(self) -> Proposal[G]:
        """The next genome to evaluate. Raises SpaceExhausted if there is no new one."""
        rng = np.random.default_rng([self.config.seed, self._next])
        predicted = None
        candidate = self._new_founder()
        if candidate is None and self._breeds:
            candidate, predicted = self._bred(rng)
        candidate = candidate or self._random(rng)
        identity = self.space.identity(candidate.genome)
        proposal = Proposal(self._next, *candidate, identity, predicted)
        self.restore_ask(proposal)
        return proposal

    def restore_ask(self, proposal: Proposal[G]) -> None:
        """Take over a proposal that an earlier run of this search made."""
        assert proposal.id not in self.proposals, f"proposal {proposal.id} was asked twice"
        self.proposals[proposal.id] = self._pending[proposal.id] = proposal
        self._identities.add(proposal.hash)
        self._next = max(self._next, proposal.id + 1)
        if self._surrogate is not None:
            self._surrogate.asked(proposal.id, proposal.genome)

    def tell(self, identifier: int, outcome: Outcome) -> Outcome:
        """Report a finished evaluation; returns the outcome as it was taken (see `checked`)."""
        assert identifier in self.proposals, f"proposal {identifier} was never asked"
        assert identifier not in self.outcomes, f"proposal {identifier} was told twice"
        outcome = self.outcomes[identifier] = checked(outcome)
        del self._pending[identifier]
        values: Values | None = None
        if isinstance(outcome, Success):
            values = (outcome.fitness, *outcome.others)
            self._objectives = self._objectives or len(values)
            assert len(values) == self._objectives, (
                f"{len(values)} objectives, {self._objectives} so far"
            )
            self._fitness[identifier] = outcome.fitness
            self._population.add(identifier, outcome.fitness, outcome.others)
            if self._best is None or outcome.fitness < self._best[1]:
                self._best = identifier, outcome.fitness
        if self._surrogate is not None:
            if isinstance(outcome, Failure) and outcome.kind in TRANSIENT:
                self._surrogate.forget(identifier)  # that says nothing of it
            else:
                self._surrogate.add(identifier, values)
        return outcome

    def revise(self, fitness: Mapping[int, float]) -> None:
        """Give proposals that succeeded another fitness, where it is a place among all others.

        Not together with further objectives.
        """
        self._fitness.update(fitness)
        self._population.revise(self._fitness)
        value, identifier = self._population.members[0]
        self._best = identifier, value
        if self._surrogate is not None:
            for number, value in fitness.items():
                self._surrogate.revise(number, (value,))

    def best(self) -> tuple[int, float] | None:
        """(id, fitness) of the best network so far; None if none has succeeded."""
        return self._best

    @property
    def breeding(self) -> tuple[int, ...]:
        """Ids of the population, best first."""
        return tuple(identifier for _, identifier in self._population.members)

    def pending(self) -> list[Proposal[G]]:
        """Proposals without an outcome, oldest first."""
        return list(self._pending.values())

    def _is_new(self, candidate: _Candidate[G]) -> bool:
        return self.space.identity(candidate.genome) not in self._identities

    def _is_wanted(self, candidate: _Candidate[G]) -> bool:
        """New, and cheap enough: a network over the limit is not even proposed."""
        return self._is_new(candidate) and self.space.affordable(candidate.genome)

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

    @property
    def _breeds(self) -> bool:
        return len(self.proposals) >= self.config.initial and len(self._population) >= 2

    def _bred(self, rng: np.random.Generator) -> tuple[_Candidate[G] | None, float | None]:
        """A new child and what the surrogate expects; None if only known genomes come out."""
        if self._surrogate is not None and rng.random() >= self.config.unfiltered:
            screened, expected = self._screened(self._surrogate, rng)
            if screened is not None:
                return screened, expected
        children = (self._child(rng) for _ in range(BREEDING_TRIES))
        return next(filter(self._is_wanted, children), None), None

    def _screened(
        self, surrogate: Surrogate[G], rng: np.random.Generator
    ) -> tuple[_Candidate[G] | None, float | None]:
        """The new candidate that is wanted most: likely to be good, or little known."""
        weight = self.config.exploration * float(rng.exponential())
        size, climbs = self._effort
        pool: list[_Candidate[G]] = []
        bounds, expected = np.empty(0), np.empty(0)
        fresh = [self._candidate(rng) for _ in range(size)]
        for climb in range(climbs + 1):
            judged = surrogate.judge([candidate.genome for candidate in fresh])
            if judged is None:
                return None, None
            pool += fresh
            bounds = np.append(bounds, _bounds(judged, weight))
            expected = np.append(expected, judged.expected)
            if climb < climbs:
                tops = np.argsort(bounds, kind="stable")[:CLIMBERS]
                steps = max(1, size // CLIMB_SHARE)
                fresh = [self._climbed(pool[top], rng) for top in tops for _ in range(steps)]
        order = np.argsort(bounds, kind="stable")
        best = next((i for i in order if self._is_wanted(pool[i])), None)
        return (None, None) if best is None else (pool[best], float(expected[best]))

    @property
    def _effort(self) -> tuple[int, int]:
        """Candidates and climbs of one proposal."""
        known, pool = len(self.outcomes), self.config.pool
        if known <= FULL_POOL:
            return pool, self.config.climbs
        return min(pool, max(LEAST_POOL, pool * FULL_POOL // known)), 0

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

    def _climbed(self, below: _Candidate[G], rng: np.random.Generator) -> _Candidate[G]:
        change = self.space.stepped if rng.random() < 0.5 else self.space.mutated
        return _Candidate(change(below.genome, rng), "climb", below.parents)

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


def _bounds(judged: Judgement, weight: float) -> Vector:
    """Lower confidence bound; what is likely to fail comes after all else."""
    bound: Vector = judged.expected - weight * judged.deviation
    return np.where(judged.fails, bound + FAILING, bound)
