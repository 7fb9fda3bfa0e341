"""What any ``search.base.Space`` must do, as tests to inherit; nothing here needs pytest.

class TestMySpace(SpaceConformance):
    def make_space(self) -> Space:
        return MySpace(...)
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from search.base import Space
from search.evolution.evolve import Evolution, EvolutionConfig, SpaceExhausted, Success

GENOMES = 60


class SpaceConformance(ABC):
    """Subclass it, say how the space is made, and let your test runner find the ``test_`` methods."""

    @abstractmethod
    def make_space(self) -> Space[Any]:
        """The space, the same every time."""

    def make_genomes(self, space: Space[Any], seed: int = 0) -> list[Any]:
        """Founders, random genomes, and what chains of all operators make of them."""
        rng = np.random.default_rng(seed)
        genomes = [*space.founders(), *(space.random(rng) for _ in range(GENOMES // 3))]
        while len(genomes) < GENOMES:
            first, second = (genomes[int(rng.integers(len(genomes)))] for _ in range(2))
            made = (
                space.mutated(first, rng),
                space.stepped(first, rng),
                space.crossed(first, second, rng),
                space.restructured(second, rng),
            )
            genomes += made
        return genomes

    def test_genomes_are_hashable_and_equal_ones_have_one_identity(self) -> None:
        space = self.make_space()
        identities: dict[Any, str] = {}
        for genome in self.make_genomes(space):
            assert identities.setdefault(genome, space.identity(genome)) == space.identity(genome)

    def test_operators_leave_their_parents_alone(self) -> None:
        space, rng = self.make_space(), np.random.default_rng(1)
        for genome in self.make_genomes(space):
            before = json.dumps(space.to_json(genome))
            space.mutated(genome, rng)
            space.stepped(genome, rng)
            space.restructured(genome, rng)
            space.crossed(genome, space.random(rng), rng)
            assert json.dumps(space.to_json(genome)) == before

    def test_json_gives_the_genome_back(self) -> None:
        space = self.make_space()
        for genome in self.make_genomes(space):
            again = space.from_json(json.loads(json.dumps(space.to_json(genome))))
            assert again == genome
            assert space.identity(again) == space.identity(genome)

    def test_equal_generators_give_equal_genomes(self) -> None:
        space, other = self.make_space(), self.make_space()
        assert self.make_genomes(space, 2) == self.make_genomes(other, 2)
        assert self.make_genomes(space, 2) != self.make_genomes(other, 3)

    def test_operators_change_something(self) -> None:
        """Most of the time: a repair may undo a change."""
        space, rng = self.make_space(), np.random.default_rng(4)
        genomes = self.make_genomes(space)
        for operator in (space.mutated, space.stepped, space.restructured):
            changed = [space.identity(operator(g, rng)) != space.identity(g) for g in genomes]
            assert np.mean(changed) > 0.5, operator

    def test_features_are_a_finite_matrix_of_unit_scale(self) -> None:
        space = self.make_space()
        genomes = self.make_genomes(space)
        features = space.features(genomes)
        assert features.shape == (len(genomes), features.shape[1])
        assert features.dtype == np.float64
        assert np.isfinite(features).all()
        assert np.abs(features).max() < 100
        alone = np.concatenate([space.features([genome]) for genome in genomes])
        assert np.array_equal(alone, features)

    def test_equal_identities_have_equal_features(self) -> None:
        space = self.make_space()
        known: dict[str, Any] = {}
        for genome in self.make_genomes(space):
            row = space.features([genome])[0]
            assert np.array_equal(known.setdefault(space.identity(genome), row), row)

    def test_fingerprints_are_of_the_space_alone(self) -> None:
        assert self.make_space().fingerprint() == self.make_space().fingerprint()

    def test_a_search_of_it_never_repeats_itself(self) -> None:
        space = self.make_space()
        evolution = Evolution(space, EvolutionConfig(initial=8, pool=16))
        for number in range(GENOMES):
            try:
                proposal = evolution.ask()
            except SpaceExhausted:
                break
            evolution.tell(proposal.id, Success(float(number % 7)))
        hashes = [proposal.hash for proposal in evolution.proposals.values()]
        assert len(hashes) >= 2
        assert len(set(hashes)) == len(hashes)
