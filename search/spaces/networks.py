"""Networks with their training hyper-parameters, as evolution sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import numpy as np
import xxhash

from dmi_hpc.models.cost import cost, parts_that_fit
from dmi_hpc.models.objectives import CostName, broken, named_costs
from dmi_hpc.models.space import HyperValue, SearchSpace
from search.base import Vector
from search.spaces.features import Features
from search.spaces.genome import Genome, decode, founder_genome, from_json, structural_hash, to_json
from search.spaces.operators import crossover, mutate, parametric, restructure
from search.spaces.space import random_genome, require_consistent


class Networks:
    """A task's `SearchSpace` as a ``search.base.Space``."""

    def __init__(
        self,
        space: SearchSpace,
        defaults: Mapping[str, HyperValue] | None = None,
        *,
        max_flops: float | None = None,
        limits: Mapping[CostName, float] | None = None,
        batch_size: int = 1,
        accumulation: int = 1,
        ranks: int = 1,
    ) -> None:
        """defaults: hyper-parameters for founders that leave them open (the recipe's).

        max_flops: of a forward pass of one sample. batch_size: global, of genomes without their own;
        accumulation: parts that a rank computes its share in. Raises NetworkError or RunError if the
        space or a founder makes no sense.
        """
        require_consistent(space)
        self.space, self._max_flops = space, max_flops
        self._limits, self._batch_size = dict(limits or {}), batch_size
        self._accumulation, self._ranks = accumulation, ranks
        self.memory_bytes: float = inf  # of a rank; of the session's machine, not of the space
        self._founders = [founder_genome(f, space, defaults or {}) for f in space.founders]
        self._features = Features(space)

    def founders(self) -> Sequence[Genome]:
        return self._founders

    def random(self, rng: np.random.Generator) -> Genome:
        return random_genome(self.space, rng)

    def mutated(self, parent: Genome, rng: np.random.Generator) -> Genome:
        return mutate([parent], self.space, rng)

    def crossed(self, first: Genome, second: Genome, rng: np.random.Generator) -> Genome:
        return crossover([first, second], self.space, rng)

    def stepped(self, parent: Genome, rng: np.random.Generator) -> Genome:
        return parametric([parent], self.space, rng)

    def restructured(self, parent: Genome, rng: np.random.Generator) -> Genome:
        return restructure([parent], self.space, rng)

    def identity(self, genome: Genome) -> str:
        return structural_hash(genome, self.space)

    def affordable(self, genome: Genome) -> bool:
        network = decode(genome, self.space.network)
        found = cost(network)
        if self._max_flops is not None and found.flops > self._max_flops:
            return False
        hyper = dict(genome.hyper)
        rows = -(-int(hyper.get("batch_size") or self._batch_size) // self._ranks)
        least = int(hyper.get("accumulation") or self._accumulation)
        parts = parts_that_fit(network, found, rows, self.memory_bytes, least)
        return parts is not None and not broken(self._limits, named_costs(found, -(-rows // parts)))

    def features(self, genomes: Sequence[Genome]) -> Vector:
        return self._features.matrix(genomes)

    def to_json(self, genome: Genome) -> dict[str, Any]:
        return to_json(genome)

    def from_json(self, data: Mapping[str, Any]) -> Genome:
        return from_json(data)

    def fingerprint(self) -> str:
        founders = [to_json(f) for f in self._founders]
        content: list[Any] = [self.space.model_dump(mode="json"), founders, self._max_flops]
        if self._limits:  # journals from before there were limits keep their identity
            content += [self._limits, self._batch_size]
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
