"""What the networks of a space cost, found block by block.

A block costs the same in every network where the same shape enters it, and children share most blocks
with their parents: a search wants the cost of a hundred candidates for every proposal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from dmi_hpc.models.cost import Cost, cost
from dmi_hpc.models.space import NetworkSpace, ReadoutChoice
from dmi_hpc.models.spec import NetworkSpec, Shape, shape_after
from search.spaces.genes import ConvGene, DenseGene, Genome, RecurrentGene
from search.spaces.grammar import decode

KEPT = 20_000  # blocks, or networks that are no chain of them, whose cost is not reckoned again
SHAPES_KEPT = 4096

Block = ConvGene | RecurrentGene | DenseGene | ReadoutChoice


class Sizes:
    """``cost(decode(genome, network))`` for genomes of a space: the same integers."""

    def __init__(self, network: NetworkSpace) -> None:
        self._network = network
        self._blocks: dict[tuple[Block, bool, Shape], tuple[Cost, Shape]] = {}
        self._nested: dict[Genome, Cost] = {}

    def __call__(self, genome: Genome) -> Cost:
        """Cost of a genome in canonical form. Raises NetworkError if its layers do not fit."""
        if self._network.map_output or self._network.graph is not None:
            return self._of_nested(genome)
        if len(self._blocks) > KEPT:
            self._blocks.clear()
        shape, parameters, flops, activations = self._network.input_shape, 0, 0, 0
        for block, last in _blocks(genome):
            key = (block, last, shape)
            found = self._blocks.get(key)
            if found is None:
                found = self._blocks[key] = self._added(block, last, shape)
            more, shape = found
            parameters += more.parameters
            flops += more.flops
            activations += more.activations
        rest = _bare(shape, self._network.outputs)
        return Cost(
            parameters + rest.parameters, flops + rest.flops, activations + rest.activations
        )

    def _added(self, block: Block, last: bool, shape: Shape) -> tuple[Cost, Shape]:
        """(more than without it that a network costs which begins with `block`, what it leaves)."""
        layers = decode(_alone(block, last), self._network).layers
        after = shape_after(layers, shape)
        found = cost(NetworkSpec(input_shape=shape, layers=layers, map_output=len(after) > 1))
        rest = _bare(after, outputs=1)
        more = Cost(
            found.parameters - rest.parameters,
            found.flops - rest.flops,
            found.activations - rest.activations,
        )
        return more, after

    def _of_nested(self, genome: Genome) -> Cost:
        network = replace(genome, hyper=())
        found = self._nested.get(network)
        if found is None:
            if len(self._nested) >= KEPT:
                self._nested.clear()
            found = self._nested[network] = cost(decode(network, self._network))
        return found


@lru_cache(SHAPES_KEPT)
def _bare(shape: Shape, outputs: int) -> Cost:
    """Of a network without layers."""
    spec = NetworkSpec(input_shape=shape, layers=(), outputs=outputs, map_output=len(shape) > 1)
    return cost(spec)


def _blocks(genome: Genome) -> Iterator[tuple[Block, bool]]:
    """Blocks in the order of their layers; whether one leaves its final state."""
    for conv in genome.conv:
        yield conv, False
    ends = genome.readout == "last"
    for number, cell in enumerate(genome.recurrent, start=1):
        yield cell, ends and number == len(genome.recurrent)
    if genome.readout and not ends:
        yield genome.readout, False
    for dense in genome.dense:
        yield dense, False


def _alone(block: Block, last: bool) -> Genome:
    """The genome of a network with this block alone."""
    match block:
        case ConvGene():
            return Genome((block,), None, (), ())
        case RecurrentGene():
            return Genome((), "last" if last else None, (), (), (block,))
        case DenseGene():
            return Genome((), None, (block,), ())
        case _:
            return Genome((), block, (), ())
