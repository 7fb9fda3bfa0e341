"""How candidates are made: strangers, mutations of the best, children, climbs; and how much of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple

import numpy as np

from search.base import G, Space
from search.evolution.population import Population
from search.spaces.draw import pick

INCUMBENTS = 3  # best members whose mutations are candidates
INCUMBENT_SHARE = 0.4
RANDOM_SHARE = 0.1
MUTATED_CROSSOVER = 0.5
STRUCTURE_SHARE = 0.4  # of children with one parent, where shares adapt
CLIMB_SHARE = 0.5  # of all candidates of a proposal, where shares adapt
CLIMBERS = 4  # candidates of which a climb makes more
CLIMB_STEPS = 8  # of each a pool / 8
FULL_POOL = 1000  # evaluations; with more, pools shrink and do not climb: an ask stays cheap
LEAST_POOL = 10


class Candidate(NamedTuple, Generic[G]):
    """What may become a proposal."""

    genome: G
    origin: str
    parents: tuple[int, ...]


Shares = Mapping[str, float]  # kind of change -> its part, 1 in all


class Effort(NamedTuple):
    """Of one proposal. size: candidates at first; then `climbs` rounds of so many steps from each of
    the `CLIMBERS` most wanted."""

    size: int
    climbs: int
    steps: int

    @classmethod
    def of(cls, known: int, pool: int, climbs: int, shares: Shares | None) -> Effort:
        """With `known` evaluations. shares: those that adapt, the part of climbs among them."""
        if known > FULL_POOL:
            return cls(min(pool, max(LEAST_POOL, pool * FULL_POOL // known)), 0, 0)
        fixed = cls(pool, climbs, max(1, pool // CLIMB_STEPS))
        if shares is None or not climbs:
            return fixed
        per_step = climbs * CLIMBERS
        total = pool + per_step * fixed.steps
        steps = round(shares["climb"] * total / per_step)
        return cls(max(1, total - per_step * steps), climbs, steps)


class Breeder(Generic[G]):
    """Makes candidates from the members of a population.

    `genome` gives the genome of a member; crossover: share of children with two parents.
    """

    def __init__(
        self,
        space: Space[G],
        population: Population,
        genome: Callable[[int], G],
        *,
        tournament: int,
        crossover: float,
    ) -> None:
        self._space, self._population, self._genome = space, population, genome
        self._tournament, self._crossover = tournament, crossover
        self._makers: Mapping[str, Callable[[np.random.Generator], Candidate[G]]] = {
            "random": self.stranger,
            "incumbent": self._near_best,
            "crossover": self._crossed,
            "step": self._stepped,
            "structure": self._restructured,
        }

    @property
    def shares(self) -> Shares:
        """Of all candidates of a proposal, climbs included: what adapting shares begin with."""
        pool, child = 1 - CLIMB_SHARE, 1 - RANDOM_SHARE - INCUMBENT_SHARE
        alone = child * (1 - self._crossover)
        return {
            "random": pool * RANDOM_SHARE,
            "incumbent": pool * INCUMBENT_SHARE,
            "crossover": pool * child * self._crossover,
            "step": pool * alone * (1 - STRUCTURE_SHARE),
            "structure": pool * alone * STRUCTURE_SHARE,
            "climb": CLIMB_SHARE,
        }

    def mixed(self, rng: np.random.Generator, shares: Shares | None = None) -> Candidate[G]:
        """A stranger, a mutation of one of the best, or a child; shares: if they adapt."""
        if shares is not None:
            return self._drawn(shares, rng)
        kind = rng.random()
        if kind < RANDOM_SHARE:
            return self.stranger(rng)
        if kind < RANDOM_SHARE + INCUMBENT_SHARE:
            return self._near_best(rng)
        return self.child(rng)

    def stranger(self, rng: np.random.Generator) -> Candidate[G]:
        return Candidate(self._space.random(rng), "random", ())

    def child(self, rng: np.random.Generator, shares: Shares | None = None) -> Candidate[G]:
        """Of one or two winners of tournaments; shares: as of `mixed`, strangers included."""
        if shares is not None:
            return self._drawn(shares, rng)
        first, second = self._winner(rng), self._winner(rng)
        if first == second or rng.random() >= self._crossover:
            return Candidate(self._space.mutated(self._genome(first), rng), "mutation", (first,))
        return self._of_two(first, second, rng)

    def climbed(self, below: Candidate[G], rng: np.random.Generator) -> Candidate[G]:
        """A mutation of another candidate."""
        change = self._space.stepped if rng.random() < 0.5 else self._space.mutated
        return Candidate(change(below.genome, rng), "climb", below.parents)

    def _drawn(self, shares: Shares, rng: np.random.Generator) -> Candidate[G]:
        """By a kind of change drawn by its share; climbs are not among them."""
        kinds = list(self._makers)
        ends = np.cumsum([shares[kind] for kind in kinds])
        place = int(np.searchsorted(ends[:-1], rng.random() * ends[-1], side="right"))
        return self._makers[kinds[place]](rng)

    def _near_best(self, rng: np.random.Generator) -> Candidate[G]:
        _, parent = pick(self._population.members[:INCUMBENTS], rng)
        return Candidate(self._space.mutated(self._genome(parent), rng), "incumbent", (parent,))

    def _winner(self, rng: np.random.Generator) -> int:
        return self._population.tournament(self._tournament, rng)

    def _crossed(self, rng: np.random.Generator) -> Candidate[G]:
        first, second = self._winner(rng), self._winner(rng)
        return self._stepped(rng) if first == second else self._of_two(first, second, rng)

    def _of_two(self, first: int, second: int, rng: np.random.Generator) -> Candidate[G]:
        genome = self._space.crossed(self._genome(first), self._genome(second), rng)
        if rng.random() < MUTATED_CROSSOVER:
            genome = self._space.stepped(genome, rng)
        return Candidate(genome, "crossover", (first, second))

    def _stepped(self, rng: np.random.Generator) -> Candidate[G]:
        parent = self._winner(rng)
        return Candidate(self._space.stepped(self._genome(parent), rng), "step", (parent,))

    def _restructured(self, rng: np.random.Generator) -> Candidate[G]:
        parent = self._winner(rng)
        return Candidate(
            self._space.restructured(self._genome(parent), rng), "structure", (parent,)
        )
