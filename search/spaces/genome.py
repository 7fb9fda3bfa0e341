"""A network and its training hyper-parameters as a short chain of genes.

`decode` and `encode` translate to and from ``NetworkSpec``; `canonical` gives the one normal form
of all genomes that compute the same family of functions, and `structural_hash` its identity: the
search never evaluates two genomes with the same hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import xxhash

from dmi_hpc.errors import NetworkError, RunError
from dmi_hpc.models.space import (
    Choice,
    DecoderName,
    Founder,
    HyperValue,
    IntRange,
    Kernel,
    NetworkSpace,
    Parameter,
    ReadoutChoice,
    SearchSpace,
    is_active,
)
from dmi_hpc.models.spec import PaddingName, Shape
from search.spaces.genes import (
    KERNELS,
    ConvGene,
    DenseGene,
    Genome,
    GraphGene,
    GraphPart,
    RecurrentGene,
    from_json,
    parallel_kernels,
    to_json,
)
from search.spaces.grammar import POOL_SIZE, decode, encode

__all__ = [
    "POOL_SIZE",
    "ConvGene",
    "DenseGene",
    "Genome",
    "GraphGene",
    "GraphPart",
    "RecurrentGene",
    "canonical",
    "decode",
    "encode",
    "founder_genome",
    "from_json",
    "pooled",
    "structural_hash",
    "to_json",
]


def founder_genome(
    founder: Founder, space: SearchSpace, defaults: Mapping[str, HyperValue]
) -> Genome:
    """Genome of `founder`; hyper-parameters it leaves open are taken from `defaults`.

    Raises NetworkError (network, see `encode`) or RunError (hyper-parameters), naming the founder.
    """
    known = ", ".join(sorted(space.hyper)) or "none"
    if unknown := sorted(set(founder.hyper) - set(space.hyper)):
        raise RunError(
            f"founder '{founder.name}' sets {', '.join(unknown)}, which the search does not vary. "
            f"Varied hyper-parameters: {known}"
        )
    values = {**defaults, **founder.hyper}
    active = [name for name in space.hyper if is_active(name, values, space)]
    if missing := sorted(set(active) - set(values)):
        raise RunError(
            f"founder '{founder.name}' has no value for {', '.join(missing)}: set it in the "
            "founder or in the recipe's [train]"
        )
    hyper = {name: values[name] for name in active}
    for name, value in hyper.items():
        if not _fits(value, space.hyper[name]):
            raise RunError(f"founder '{founder.name}': {name} must be a number, found {value!r}")
    try:
        return encode(founder.network, space.network, hyper)
    except NetworkError as error:
        raise NetworkError(f"founder '{founder.name}': {error}") from None


def _fits(value: HyperValue, parameter: Parameter) -> bool:
    """Whether `value` can be placed on the scale of `parameter` (perhaps outside its range)."""
    scale = not isinstance(parameter, Choice) or (
        parameter.ordered and value not in parameter.values
    )
    return not scale or (isinstance(value, int | float) and not isinstance(value, bool))


def canonical(genome: Genome, space: SearchSpace) -> Genome:
    """The normal form of all genomes that compute the same family of functions; always buildable.

    Pools vanish where an extent is below 2; kernels are cut to what the map can feel; parallel
    convolutions of equal kernels become one, the others stand in ascending order; kernels of 1 have
    the first padding, a map of one voxel the first readout and an encoder-decoder without pool the
    first decoder (they make no difference there); hyper-parameters without effect vanish; real ones
    have 3 significant digits. Idempotent.
    """
    network = space.network
    extents = network.input_shape[1:]
    conv: list[ConvGene] = []
    for gene in genome.conv:
        normal = _normal_conv(gene, extents, network)
        extents = pooled(extents, normal)
        conv.append(normal)
    values = dict(genome.hyper)
    return Genome(
        tuple(conv),
        _normal_readout(genome, extents, network),
        genome.dense,
        tuple(
            (name, _normal_hyper(name, value, space))
            for name, value in genome.hyper
            if name not in space.hyper or is_active(name, values, space)
        ),
        genome.recurrent,
        _normal_decoder(genome, conv, network),
        genome.graph,
    )


def _normal_decoder(
    genome: Genome, conv: Sequence[ConvGene], network: NetworkSpace
) -> DecoderName | None:
    if not network.map_output or any(gene.pool for gene in conv):
        return genome.decoder
    return network.decoders[0]


def _normal_readout(genome: Genome, extents: Shape, network: NetworkSpace) -> ReadoutChoice | None:
    """The readout, if it makes a difference; a final state needs a recurrent block."""
    readout = genome.readout
    if readout is None:
        return None
    if max(extents) > 1 and (readout != "last" or genome.recurrent):
        return readout
    return next((r for r in network.readouts if r != "last" or genome.recurrent), "mean")


def pooled(extents: Shape, gene: ConvGene) -> Shape:
    """Spatial extents after a block; a remainder is dropped."""
    return tuple(n // POOL_SIZE for n in extents) if gene.pool else extents


def _normal_conv(gene: ConvGene, extents: Shape, network: NetworkSpace) -> ConvGene:
    widest = _widest_kernel(gene.padding, extents)
    felt = [min(kernel, widest) for kernel in (gene.kernel, *gene.branches)]
    kernel, *others = parallel_kernels(felt, gene.filters)
    branches = tuple(others)
    padding = gene.padding if kernel > 1 or branches else network.paddings[0]
    pool = gene.pool if min(extents) >= POOL_SIZE else None
    if (kernel, branches, padding, pool) == (gene.kernel, gene.branches, gene.padding, gene.pool):
        return gene
    return replace(gene, kernel=kernel, branches=branches, padding=padding, pool=pool)


def _widest_kernel(padding: PaddingName, extents: Shape) -> Kernel:
    """Widest kernel whose every weight can matter (and, if circular, that torch can pad).

    Zero padding: offsets beyond n - 1 see only zeros, so 2 n - 1. Circular: n offsets reach every
    voxel, so the next odd number from n on; torch wraps around at most once, so k // 2 <= n.
    """
    largest = max(extents)
    limit = 2 * largest - 1
    if padding == "circular":
        limit = min(largest | 1, 2 * min(extents) + 1)
    return max(k for k in KERNELS if k <= limit)


def _normal_hyper(name: str, value: HyperValue, space: SearchSpace) -> HyperValue:
    parameter = space.hyper.get(name)
    if parameter is None or isinstance(parameter, Choice):
        return value
    number = as_number(value)
    if isinstance(parameter, IntRange):
        return round(number)
    rounded = float(f"{number:.3g}")
    if parameter.low <= number <= parameter.high:
        return min(max(rounded, parameter.low), parameter.high)
    return rounded


def as_number(value: HyperValue) -> float:
    """`value` of a range; that it is a number was checked when it came in."""
    assert isinstance(value, int | float), value
    return float(value)


def structural_hash(genome: Genome, space: SearchSpace) -> str:
    """xxh3-128 (hex) of the canonical form: equal for networks with the same function family."""
    text = json.dumps(to_json(canonical(genome, space)), separators=(",", ":"), sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())
