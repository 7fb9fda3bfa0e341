"""Layers in a row: what skip connections put around them, and a cursor that takes blocks from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from dmi_hpc.errors import NetworkError
from dmi_hpc.models.space import DecoderName, SkipName
from dmi_hpc.models.spec import (
    Activation,
    ActivationName,
    Dense,
    Dropout,
    GraphReadout,
    Layer,
    Norm,
    NormName,
    Parallel,
    Pool,
    Readout,
    Recurrent,
    Residual,
    Upsample,
)


def around(layers: tuple[Layer, ...], skip: SkipName | None) -> tuple[Layer, ...]:
    match skip:
        case "residual":
            return (Residual(layers=layers),)
        case "dense":
            return (Parallel(branches=((), layers)),)
        case None:
            return layers


def opened(layer: Layer) -> tuple[SkipName | None, tuple[Layer, ...]]:
    """The skip connection that `layer` is, and the layers inside."""
    match layer:
        case Residual():
            return "residual", layer.layers
        case Parallel(branches=((), (_, *_) as inside), merge="concat"):
            return "dense", tuple(inside)
        case _:
            return None, (layer,)


@dataclass(frozen=True)
class Block:
    """A block up to its activation; at: the number of its first layer, from 1."""

    at: int
    skip: SkipName | None
    weights: Layer
    norm: NormName | None
    activation: ActivationName


L = TypeVar("L", Pool, Upsample, Norm, Activation, Dropout, Readout, Recurrent, Dense, GraphReadout)


class Layers:
    """A cursor over layers in a row."""

    def __init__(self, layers: tuple[Layer, ...], where: str = "") -> None:
        self._layers = layers
        self._where = where
        self._next = 0

    def take(self, kind: type[L]) -> L | None:
        """The next layer if it is of `kind`, else nothing is taken."""
        layer = self._peek()
        if not isinstance(layer, kind):
            return None
        self._next += 1
        return layer

    def block(self, begins: Callable[[Layer], bool]) -> Block | None:
        """The next block up to its activation, if `begins` of its weights; else nothing is taken."""
        layer = self._peek()
        if layer is None:
            return None
        skip, inside = opened(layer)
        if not begins(inside[0]):
            return None
        self._next += 1
        at, rest = self._next, self
        if skip is not None:
            rest = self._within(inside)
            rest._next = 1
        norm, activation = rest.take(Norm), rest.take(Activation)
        if activation is None:
            raise rest.error("expected an activation")
        if skip is not None:
            rest.require_end()
        return Block(at, skip, inside[0], norm.op if norm else None, activation.function)

    def below(self) -> tuple[DecoderName, Layers]:
        """Where the next level of an encoder-decoder is, if there is one."""
        layer = self._peek()
        skip, inside = (None, ()) if layer is None else opened(layer)
        if skip != "dense" or not isinstance(inside[0], Pool):
            return "plain", self
        self._next += 1
        return "skip", self._within(inside)

    def take_any(self, begins: Callable[[Layer], bool]) -> Layer | None:
        """The next layer if `begins` of it, else nothing is taken."""
        layer = self._peek()
        if layer is None or not begins(layer):
            return None
        self._next += 1
        return layer

    @property
    def taken(self) -> int:
        """How many layers were taken."""
        return self._next

    def dropout(self) -> float:
        layer = self.take(Dropout)
        return layer.rate if layer else 0.0

    def require_end(self) -> None:
        if self._next < len(self._layers):
            raise self.error("expected the next block")

    def error(self, problem: str) -> NetworkError:
        """The next layer is not what is expected."""
        layer = self._peek()
        found = "the end" if layer is None else f"'{layer.kind}'"
        return self.refused(f"{problem}, found {found}", at=self._next + 1)

    def refused(self, problem: str, *, at: int | None = None) -> NetworkError:
        """Layer `at` cannot be searched; default: the one taken last."""
        return NetworkError(f"{self._where}layer {at or self._next}: {problem}. {GRAMMAR}")

    def _within(self, inside: tuple[Layer, ...]) -> Layers:
        """A cursor over the layers inside the one taken last."""
        return Layers(inside, f"{self._where}inside layer {self._next}, ")

    def _peek(self) -> Layer | None:
        return self._layers[self._next] if self._next < len(self._layers) else None


GRAMMAR = (
    "A searchable network is blocks of conv, [norm], activation, [pool], [dropout]; blocks of "
    "recurrent, [dropout]; one readout; blocks of dense, [norm], activation, [dropout]. On graphs: one "
    "dense; blocks of graph_conv, [norm], activation, [dropout]; one graph_readout; dense blocks. The "
    "first layers of a block may stand in a residual, or in a parallel layer beside an empty branch"
)
