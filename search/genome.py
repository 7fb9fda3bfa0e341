"""A network and its training hyper-parameters as a short chain of genes.

`decode` and `encode` translate to and from ``NetworkSpec``; `canonical` gives the one normal form
of all genomes that compute the same family of functions, and `structural_hash` its identity: the
search never evaluates two genomes with the same hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import xxhash

from dmi_hpc.errors import NetworkError, RunError
from dmi_hpc.models.space import (
    FloatRange,
    Founder,
    HyperValue,
    NetworkSpace,
    Parameter,
    SearchSpace,
)
from dmi_hpc.models.spec import (
    Activation,
    ActivationName,
    Conv,
    Dense,
    Dropout,
    Layer,
    NetworkSpec,
    Norm,
    NormName,
    PaddingName,
    Pool,
    PoolName,
    Readout,
    ReadoutName,
    Shape,
    shapes,
)

Kernel = Literal[1, 3, 5, 7]
KERNELS: tuple[Kernel, ...] = (1, 3, 5, 7)
POOL_SIZE = 2


@dataclass(frozen=True, slots=True)
class ConvGene:
    """Convolution, [norm], activation, [pool by 2], [dropout]; ``None`` and 0 mean "without"."""

    filters: int
    kernel: Kernel
    padding: PaddingName
    norm: NormName | None
    activation: ActivationName
    pool: PoolName | None
    dropout: float


@dataclass(frozen=True, slots=True)
class DenseGene:
    """Dense, [norm], activation, [dropout]."""

    units: int
    norm: NormName | None
    activation: ActivationName
    dropout: float


@dataclass(frozen=True, slots=True)
class Genome:
    """Convolution blocks, readout (``None`` for vector inputs), dense blocks, hyper-parameters.

    hyper: (name, value) pairs, sorted by name.
    """

    conv: tuple[ConvGene, ...]
    readout: ReadoutName | None
    dense: tuple[DenseGene, ...]
    hyper: tuple[tuple[str, HyperValue], ...]


def decode(genome: Genome, network: NetworkSpace) -> NetworkSpec:
    """The network of `genome`. Its layers fit each other if `genome` is in canonical form."""
    layers: list[Layer] = []
    for conv in genome.conv:
        layers.append(Conv(filters=conv.filters, kernel=conv.kernel, padding=conv.padding))
        layers += _after_weights(conv.norm, conv.activation)
        if conv.pool:
            layers.append(Pool(op=conv.pool, size=POOL_SIZE))
        if conv.dropout:
            layers.append(Dropout(rate=conv.dropout))
    if genome.readout:
        layers.append(Readout(op=genome.readout))
    for dense in genome.dense:
        layers.append(Dense(units=dense.units))
        layers += _after_weights(dense.norm, dense.activation)
        if dense.dropout:
            layers.append(Dropout(rate=dense.dropout))
    return NetworkSpec(
        input_shape=network.input_shape, layers=tuple(layers), outputs=network.outputs
    )


def _after_weights(norm: NormName | None, activation: ActivationName) -> list[Layer]:
    normalisation: list[Layer] = [Norm(op=norm)] if norm else []
    return [*normalisation, Activation(function=activation)]


def encode(
    spec: NetworkSpec, network: NetworkSpace, hyper: Mapping[str, HyperValue] | None = None
) -> Genome:
    """Genome of a known network; its sizes may lie outside the choices of the space.

    Raises NetworkError if `spec` cannot be built, has another input or output than `network`, or
    its layers do not follow the block grammar (see ``NetworkSpace``).
    """
    shapes(spec)
    for name in ("input_shape", "outputs"):
        found, expected = getattr(spec, name), getattr(network, name)
        if found != expected:
            raise NetworkError(f"{name} of the network is {found}, the search space has {expected}")
    layers = _Layers(spec.layers)
    conv: list[ConvGene] = []
    while (convolution := layers.take(Conv)) is not None:
        conv.append(_conv_gene(convolution, layers))
    readout = layers.take(Readout)
    dense: list[DenseGene] = []
    while (weights := layers.take(Dense)) is not None:
        norm, activation = layers.after_weights()
        dense.append(DenseGene(weights.units, norm, activation, layers.dropout()))
    layers.require_end()
    pairs = tuple(sorted((hyper or {}).items()))
    return Genome(tuple(conv), readout.op if readout else None, tuple(dense), pairs)


L = TypeVar("L", Conv, Pool, Norm, Activation, Dropout, Readout, Dense)


class _Layers:
    """A cursor over the layers of a specification."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        self._layers = layers
        self._next = 0

    def take(self, kind: type[L]) -> L | None:
        """The next layer if it is of `kind`, else nothing is taken."""
        if self._next == len(self._layers):
            return None
        layer = self._layers[self._next]
        if not isinstance(layer, kind):
            return None
        self._next += 1
        return layer

    def after_weights(self) -> tuple[NormName | None, ActivationName]:
        norm, activation = self.take(Norm), self.take(Activation)
        if activation is None:
            raise self.error("expected an activation")
        return norm.op if norm else None, activation.function

    def dropout(self) -> float:
        layer = self.take(Dropout)
        return layer.rate if layer else 0.0

    def require_end(self) -> None:
        if self._next < len(self._layers):
            raise self.error("expected the next block")

    def error(self, problem: str) -> NetworkError:
        at_end = self._next == len(self._layers)
        found = "the end" if at_end else f"'{self._layers[self._next].kind}'"
        return NetworkError(
            f"layer {self._next + 1}: {problem}, found {found}. A searchable network is blocks of "
            "conv, [norm], activation, [pool], [dropout]; one readout; blocks of dense, [norm], "
            "activation, [dropout]"
        )


def _conv_gene(layer: Conv, layers: _Layers) -> ConvGene:
    if layer.stride != 1:
        raise layers.error(f"a searchable convolution has stride 1 (found {layer.stride})")
    norm, activation = layers.after_weights()
    pool = layers.take(Pool)
    if pool and pool.size != POOL_SIZE:
        raise layers.error(f"a searchable pool has size {POOL_SIZE} (found {pool.size})")
    op = pool.op if pool else None
    dropout = layers.dropout()
    return ConvGene(layer.filters, layer.kernel, layer.padding, norm, activation, op, dropout)


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
    if missing := sorted(set(space.hyper) - set(values)):
        raise RunError(
            f"founder '{founder.name}' has no value for {', '.join(missing)}: set it in the "
            "founder or in the recipe's [train]"
        )
    hyper = {name: values[name] for name in space.hyper}
    for name, value in hyper.items():
        if not _fits(value, space.hyper[name]):
            raise RunError(f"founder '{founder.name}': {name} must be a number, found {value!r}")
    try:
        return encode(founder.network, space.network, hyper)
    except NetworkError as error:
        raise NetworkError(f"founder '{founder.name}': {error}") from None


def _fits(value: HyperValue, parameter: Parameter) -> bool:
    """Whether `value` can be placed on the scale of `parameter` (perhaps outside its range)."""
    scale = isinstance(parameter, FloatRange) or (
        parameter.ordered and value not in parameter.values
    )
    return not scale or (isinstance(value, int | float) and not isinstance(value, bool))


def to_json(genome: Genome) -> dict[str, Any]:
    """Plain data, read back by `from_json`."""
    return {
        "conv": [asdict(gene) for gene in genome.conv],
        "readout": genome.readout,
        "dense": [asdict(gene) for gene in genome.dense],
        "hyper": dict(genome.hyper),
    }


def from_json(data: Mapping[str, Any]) -> Genome:
    """Inverse of `to_json`. Raises KeyError or TypeError if a gene is missing or unknown."""
    return Genome(
        tuple(ConvGene(**gene) for gene in data["conv"]),
        data["readout"],
        tuple(DenseGene(**gene) for gene in data["dense"]),
        tuple(sorted(data["hyper"].items())),
    )


def canonical(genome: Genome, space: SearchSpace) -> Genome:
    """The normal form of all genomes that compute the same family of functions; always buildable.

    Pools vanish where an extent is below 2; kernels are cut to what the map can feel; a kernel of 1
    has the first padding and a map of one voxel the first readout (they make no difference there);
    real hyper-parameters have 3 significant digits. Idempotent.
    """
    extents = space.network.input_shape[1:]
    conv: list[ConvGene] = []
    for gene in genome.conv:
        normal = _normal_conv(gene, extents, space.network)
        extents = pooled(extents, normal)
        conv.append(normal)
    readout = genome.readout
    if readout and max(extents) == 1:
        readout = space.network.readouts[0]
    hyper = tuple((name, _normal_hyper(name, value, space)) for name, value in genome.hyper)
    return Genome(tuple(conv), readout, genome.dense, hyper)


def pooled(extents: Shape, gene: ConvGene) -> Shape:
    """Spatial extents after a block; a remainder is dropped."""
    return tuple(n // POOL_SIZE for n in extents) if gene.pool else extents


def _normal_conv(gene: ConvGene, extents: Shape, network: NetworkSpace) -> ConvGene:
    kernel = min(gene.kernel, _widest_kernel(gene.padding, extents))
    padding = gene.padding if kernel > 1 else network.paddings[0]
    pool = gene.pool if min(extents) >= POOL_SIZE else None
    if (kernel, padding, pool) == (gene.kernel, gene.padding, gene.pool):
        return gene
    return replace(gene, kernel=kernel, padding=padding, pool=pool)


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
    if not isinstance(parameter, FloatRange):
        return value
    number = float(value)
    rounded = float(f"{number:.3g}")
    if parameter.low <= number <= parameter.high:
        return min(max(rounded, parameter.low), parameter.high)
    return rounded


def structural_hash(genome: Genome, space: SearchSpace) -> str:
    """xxh3-128 (hex) of the canonical form: equal for networks with the same function family."""
    text = json.dumps(to_json(canonical(genome, space)), separators=(",", ":"), sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())
