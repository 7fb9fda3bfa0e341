"""What a search may vary, as plain data: a task states it, the search package explores it."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmi_hpc.models.spec import (
    ActivationName,
    CellName,
    GraphConvName,
    GraphInput,
    GraphReadoutName,
    NetworkSpec,
    NormName,
    PaddingName,
    Plain,
    PoolName,
    ReadoutName,
    Shape,
)

HyperValue = float | int | str | bool | None
ReadoutChoice = ReadoutName | Literal["last"]  # last: the final state of the last recurrent block
Kernel = Literal[1, 3, 5, 7]
# around a block: its input is added to its output (ResNet), or stays beside it (DenseNet)
SkipName = Literal["residual", "dense"]
# of an encoder-decoder: maps of equal extents are handed across to the decoder (U-Net), or not
DecoderName = Literal["skip", "plain"]


class _Parameter(Plain):
    """when: other hyper-parameter -> its values for which this one exists, all of them; it has no
    value else (momentum: ``when={"optimizer": ("sgd",)}``)."""

    added = frozenset({"when"})

    when: Mapping[str, tuple[HyperValue, ...]] = {}


class FloatRange(_Parameter):
    """A real number in [low, high]; `log` samples its logarithm uniformly."""

    kind: Literal["float"] = "float"
    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> FloatRange:
        _require_ordered(self)
        return self


class IntRange(_Parameter):
    """An integer in [low, high], both included; `log` samples its logarithm uniformly."""

    kind: Literal["int"] = "int"
    low: int
    high: int
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> IntRange:
        _require_ordered(self)
        return self


def _require_ordered(found: FloatRange | IntRange) -> None:
    if not found.low < found.high or (found.log and found.low <= 0):
        raise ValueError(f"expected low < high (and low > 0 if log), found {found!r}")


class Choice(_Parameter):
    """One of some values; `ordered` if neighbours are alike (batch sizes), else a set."""

    kind: Literal["choice"] = "choice"
    values: tuple[HyperValue, ...] = Field(min_length=1)
    ordered: bool = False


Parameter = Annotated[FloatRange | IntRange | Choice, Field(discriminator="kind")]


class NetworkSpace(Plain):
    """Blocks a network may be made of.

    A convolution block is: convolution, [norm], activation, [pool], [dropout]; a recurrent block: GRU
    or LSTM, [dropout], over sequences (C, T) alone; then one readout; then dense blocks: dense,
    [norm], activation, [dropout]; then the linear head. Vector inputs have ``conv_blocks = (0, 0)``.
    `None` among the choices means "without".

    A block with a skip connection has it around its weights, norm and activation. One with
    `branches` has convolutions of these kernels beside that of its own, which share its filters.

    With `map_output` the network is an encoder-decoder: the convolution blocks, and after the last of
    them, for each pool from the innermost to the outermost: upsampling to what was there before, and
    the block before that pool once more, with weights of its own; `decoders` say whether the maps
    before the pool stay beside the upsampled ones. It has neither recurrent nor dense blocks.

    With `graph` the inputs are graphs, and a network is: a linear layer on each node of one of the
    `embeddings`, graph blocks, one of the `graph_readouts`, then dense blocks. A graph block is: graph
    convolution, [norm], activation, [dropout]; its skip connection is around convolution and norm. The
    norm of a gated convolution is before its gates, too.
    """

    added = frozenset(
        {
            "skips",
            "branches",
            "dense_skips",
            "recurrent_blocks",
            "cells",
            "recurrent_units",
            "bidirectional",
            "map_output",
            "decoders",
            "graph",
            "graph_blocks",
            "graph_convs",
            "embeddings",
            "channels",
            "graph_norms",
            "graph_activations",
            "graph_skips",
            "graph_readouts",
            "standardize",
        }
    )

    input_shape: Shape
    outputs: int = 1
    conv_blocks: tuple[int, int] = (0, 0)  # least and most
    filters: tuple[int, ...] = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # ascending
    kernels: tuple[Kernel, ...] = (1, 3, 5)
    paddings: tuple[PaddingName, ...] = ("zeros", "circular")
    pools: tuple[PoolName | None, ...] = (None, "max", "mean")  # window 2
    readouts: tuple[ReadoutChoice, ...] = ("flatten", "mean")
    dense_blocks: tuple[int, int] = (0, 3)
    units: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048)  # ascending
    norms: tuple[NormName | None, ...] = (None, "batch", "group")
    activations: tuple[ActivationName, ...] = ("relu", "leaky_relu", "elu", "gelu", "silu")
    dropouts: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5)  # ascending
    skips: tuple[SkipName | None, ...] = (None,)  # of convolution blocks
    branches: tuple[tuple[Kernel, ...], ...] = ((),)  # of convolution blocks
    dense_skips: tuple[SkipName | None, ...] = (None,)
    recurrent_blocks: tuple[int, int] = (0, 0)
    cells: tuple[CellName, ...] = ("gru", "lstm")
    recurrent_units: tuple[int, ...] = (8, 16, 32, 64, 128, 256)  # ascending
    bidirectional: tuple[bool, ...] = (False, True)
    map_output: bool = False
    decoders: tuple[DecoderName, ...] = ("skip", "plain")
    graph: GraphInput | None = None
    graph_blocks: tuple[int, int] = (1, 5)  # of spaces with `graph` alone, as all that follows
    graph_convs: tuple[GraphConvName, ...] = ("gated", "sum", "mean")
    embeddings: tuple[int, ...] = (16, 32, 64, 128)  # ascending
    channels: tuple[int, ...] = (16, 32, 64, 128)  # ascending
    graph_norms: tuple[NormName | None, ...] = (None, "batch", "group")
    graph_activations: tuple[ActivationName, ...] = ("softplus", "relu", "silu")
    graph_skips: tuple[SkipName | None, ...] = (None, "residual", "dense")
    graph_readouts: tuple[GraphReadoutName, ...] = ("mean", "sum", "max")
    standardize: bool = False  # all networks, of vectors alone


class Founder(Plain):
    """A known good network, with hyper-parameters that differ from the recipe's."""

    name: str
    network: NetworkSpec
    hyper: Mapping[str, HyperValue] = {}


class SearchSpace(Plain):
    """The whole space: networks, training hyper-parameters (fields of `TrainConfig`), founders."""

    network: NetworkSpace
    hyper: Mapping[str, Parameter]
    founders: tuple[Founder, ...] = ()

    @model_validator(mode="after")
    def _conditions_make_sense(self) -> SearchSpace:
        for name, parameter in self.hyper.items():
            for other, wanted in parameter.when.items():
                if other not in self.hyper:
                    known = ", ".join(self.hyper)
                    raise ValueError(f"{name}: when names '{other}', expected one of {known}")
                if strange := [v for v in wanted if not holds(self.hyper[other], v)]:
                    raise ValueError(f"{name}: when {other} is {strange[0]!r}, which it never is")
        try:
            TopologicalSorter({n: sorted(p.when) for n, p in self.hyper.items()}).prepare()
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            raise ValueError(f"conditions that depend on each other: {circle}") from None
        return self


def holds(parameter: Parameter, value: HyperValue) -> bool:
    """Whether `value` is one that `parameter` can have."""
    if isinstance(parameter, Choice):
        return any(value == v and type(value) is type(v) for v in parameter.values)
    whole = isinstance(parameter, IntRange)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return parameter.low <= value <= parameter.high


def is_active(name: str, values: Mapping[str, HyperValue], space: SearchSpace) -> bool:
    """Whether hyper-parameter `name` exists beside `values` of the others."""
    return all(
        other in values and values[other] in wanted and is_active(other, values, space)
        for other, wanted in space.hyper[name].when.items()
    )
