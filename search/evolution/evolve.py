"""READ FIRST. Asynchronous steady-state evolution as ask/tell: no runner, no clock, no files.

    evolution = Evolution(Networks(space), EvolutionConfig(seed=1))   # any ``search.base.Space``
    proposal = evolution.ask()                      # any number may be outstanding
    evolution.tell(proposal.id, Success(fitness))   # or Failure("memory"); in any order

1. `ask` proposes the founders in their order, then random genomes until `initial`.
2. Then it breeds: parents win tournaments in a bounded population, children come from crossover
   and mutation. With the surrogate, many candidates (children, mutations of the best, random ones)
   are made, the most wanted ones are mutated again, and the most wanted of all is proposed: the one
   with the lowest rank that it might have, as far as the support vector machine can tell.
3. `tell` puts a fitness (lower is better) into the population, where the worst makes room (or the
   oldest); with further objectives, the worst is the last in NSGA-II's order. A failure teaches the
   surrogate alone.
4. No two proposals have the same structural hash, finished or not.
5. If so configured, kinds of change get shares by what they lately brought, and a population that
   brings nothing better and has become alike makes room for strangers.

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
from itertools import islice
from math import isfinite
from typing import Generic

import numpy as np
from pydantic import Field

from dmi_hpc.config import Config
from dmi_hpc.errors import TRANSIENT, FailureKind
from search.base import G, Space, Vector
from search.evolution.breeding import CLIMBERS, Breeder, Candidate, Effort
from search.evolution.population import Population, Replacement
from search.evolution.rates import WINDOW, adapted
from search.evolution.restarts import Restarts
from search.evolution.surrogate import Judgement, Surrogate, Values

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
    adaptive: bool = Field(
        False, description="kinds of change get their shares by what they lately brought"
    )
    replacement: Replacement = Field(
        "worst", description="who makes room in the population: the worst, or by age the oldest"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="results without improvement after which a population that has become alike "
        "makes room for strangers; None: never",
    )


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
    """A genome to evaluate. origin: founder, random, crossover, mutation, incumbent or climb; step or
    structure (mutations, where rates adapt); restart (a stranger that a restart brings).

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
        self._population = Population(config.population, config.replacement)
        self._surrogate = Surrogate(space) if config.surrogate else None
        self._breeder = Breeder(
            space,
            self._population,
            lambda number: self.proposals[number].genome,
            tournament=config.tournament,
            crossover=config.crossover,
        )
        self._restarts: Restarts[G] | None = None
        if config.patience is not None:
            self._restarts = Restarts(space, self._population, config.population, config.patience)

    def ask(self) -> Proposal[G]:
        """The next genome to evaluate. Raises SpaceExhausted if there is no new one."""
        rng = np.random.default_rng([self.config.seed, self._next])
        predicted = None
        candidate = self._new_founder() or self._immigrant(rng)
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
        if self._restarts is not None:
            self._restarts.asked(proposal.id, proposal.genome, proposal.origin)

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
        if self._restarts is not None:
            self._restarts.told(identifier, values)
        return outcome

    def revise(self, fitness: Mapping[int, float]) -> None:
        """Give proposals that succeeded another fitness, where it is a place among all others."""
        self._fitness.update(fitness)
        self._population.revise(self._fitness)
        value, identifier = min((value, number) for number, value in self._fitness.items())
        self._best = identifier, value
        values = {number: self._valued(number) for number in fitness}
        if self._restarts is not None:
            self._restarts.revised(values)
        if self._surrogate is not None:
            for number, found in values.items():
                self._surrogate.revise(number, found)

    def _valued(self, number: int) -> Values:
        """Fitness and further objectives of a success."""
        outcome = self.outcomes[number]
        assert isinstance(outcome, Success), f"proposal {number} has no fitness"
        return (self._fitness[number], *outcome.others)

    def best(self) -> tuple[int, float] | None:
        """(id, fitness) of the best network so far; None if none has succeeded."""
        return self._best

    @property
    def restarts(self) -> int:
        """How often strangers took the place of a population."""
        return 0 if self._restarts is None else self._restarts.count

    @property
    def breeding(self) -> tuple[int, ...]:
        """Ids of the population, best first."""
        return tuple(identifier for _, identifier in self._population.members)

    def pending(self) -> list[Proposal[G]]:
        """Proposals without an outcome, oldest first."""
        return list(self._pending.values())

    def _is_new(self, candidate: Candidate[G]) -> bool:
        return self.space.identity(candidate.genome) not in self._identities

    def _is_wanted(self, candidate: Candidate[G]) -> bool:
        """New, and cheap enough: a network over the limit is not even proposed."""
        return self._is_new(candidate) and self.space.affordable(candidate.genome)

    def _new_founder(self) -> Candidate[G] | None:
        while self._waiting:
            candidate = Candidate(self._waiting.popleft(), "founder", ())
            if self._is_new(candidate):
                return candidate
        return None

    def _random(self, rng: np.random.Generator) -> Candidate[G]:
        for _ in range(RANDOM_TRIES):
            candidate = self._breeder.stranger(rng)
            if self._is_wanted(candidate):
                return candidate
        raise SpaceExhausted(
            f"{len(self.proposals)} networks were proposed and {RANDOM_TRIES} random ones brought "
            "no new one: the search space is exhausted, or its networks cost more than they may"
        )

    @property
    def _breeds(self) -> bool:
        return len(self.proposals) >= self.config.initial and len(self._population) >= 2

    def _immigrant(self, rng: np.random.Generator) -> Candidate[G] | None:
        """The most novel of some strangers, if a restart is due."""
        if self._restarts is None:
            return None
        (own,) = rng.spawn(1)  # looking costs the children no random numbers
        strangers = (Candidate(g, Restarts.ORIGIN, ()) for g in self._restarts.immigrants(own))
        return next(filter(self._is_wanted, strangers), None)

    def _bred(self, rng: np.random.Generator) -> tuple[Candidate[G] | None, float | None]:
        """A new child and what the surrogate expects; None if only known genomes come out."""
        if self._surrogate is not None and rng.random() >= self.config.unfiltered:
            screened, expected = self._screened(self._surrogate, rng)
            if screened is not None:
                return screened, expected
        shares = self._shares
        children = (self._breeder.child(rng, shares) for _ in range(BREEDING_TRIES))
        return next(filter(self._is_wanted, children), None), None

    def _screened(
        self, surrogate: Surrogate[G], rng: np.random.Generator
    ) -> tuple[Candidate[G] | None, float | None]:
        """The new candidate that is wanted most: likely to be good, or little known."""
        weight = self.config.exploration * float(rng.exponential())
        shares = self._shares
        effort = Effort.of(len(self.outcomes), self.config.pool, self.config.climbs, shares)
        pool: list[Candidate[G]] = []
        bounds, expected = np.empty(0), np.empty(0)
        fresh = [self._breeder.mixed(rng, shares) for _ in range(effort.size)]
        for climb in range(effort.climbs + 1):
            judged = surrogate.judge([candidate.genome for candidate in fresh])
            if judged is None:
                return None, None
            pool += fresh
            bounds = np.append(bounds, _bounds(judged, weight))
            expected = np.append(expected, judged.expected)
            if climb < effort.climbs:
                tops = np.argsort(bounds, kind="stable")[:CLIMBERS]
                climbers = [pool[top] for top in tops for _ in range(effort.steps)]
                fresh = [self._breeder.climbed(below, rng) for below in climbers]
        order = np.argsort(bounds, kind="stable")
        best = next((i for i in order if self._is_wanted(pool[i])), None)
        return (None, None) if best is None else (pool[best], float(expected[best]))

    @property
    def _shares(self) -> dict[str, float] | None:
        """Of the kinds of change, by what they lately brought; None if they do not adapt."""
        if not self.config.adaptive:
            return None
        newest = islice(reversed(self.outcomes), WINDOW)
        results = [(self.proposals[number].origin, self._values(number)) for number in newest]
        return adapted(self._breeder.shares, results)

    def _values(self, number: int) -> Values | None:
        outcome = self.outcomes[number]
        if isinstance(outcome, Failure):
            return None
        return (self._fitness[number], *outcome.others)


def _bounds(judged: Judgement, weight: float) -> Vector:
    """Lower confidence bound; what is likely to fail comes after all else."""
    bound: Vector = judged.expected - weight * judged.deviation
    return np.where(judged.fails, bound + FAILING, bound)
