"""What a search may vary, as plain data: a task states it, the search package explores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dmi_hpc.models.spec import (
    ActivationName,
    NetworkSpec,
    NormName,
    PaddingName,
    PoolName,
    ReadoutName,
    Shape,
)

HyperValue = float | int | str | bool


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FloatRange(_Plain):
    """A real number in [low, high]; `log` samples its logarithm uniformly."""

    kind: Literal["float"] = "float"
    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> FloatRange:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"expected low < high (and low > 0 if log), found {self!r}")
        return self


class Choice(_Plain):
    """One of some values; `ordered` if neighbours are alike (batch sizes), else a set."""

    kind: Literal["choice"] = "choice"
    values: tuple[HyperValue, ...] = Field(min_length=1)
    ordered: bool = False


Parameter = Annotated[FloatRange | Choice, Field(discriminator="kind")]


class NetworkSpace(_Plain):
    """Blocks a network may be made of.

    A convolution block is: convolution, [norm], activation, [pool], [dropout]; then one readout;
    then dense blocks: dense, [norm], activation, [dropout]; then the linear head.
    Vector inputs have ``conv_blocks = (0, 0)``. `None` among the choices means "without".
    """

    input_shape: Shape
    outputs: int = 1
    conv_blocks: tuple[int, int] = (0, 0)  # least and most
    filters: tuple[int, ...] = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # ascending
    kernels: tuple[Literal[1, 3, 5, 7], ...] = (1, 3, 5)
    paddings: tuple[PaddingName, ...] = ("zeros", "circular")
    pools: tuple[PoolName | None, ...] = (None, "max", "mean")  # window 2
    readouts: tuple[ReadoutName, ...] = ("flatten", "mean")
    dense_blocks: tuple[int, int] = (0, 3)
    units: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048)  # ascending
    norms: tuple[NormName | None, ...] = (None, "batch", "group")
    activations: tuple[ActivationName, ...] = ("relu", "leaky_relu", "elu", "gelu", "silu")
    dropouts: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5)  # ascending


class Founder(_Plain):
    """A known good network, with hyper-parameters that differ from the recipe's."""

    name: str
    network: NetworkSpec
    hyper: Mapping[str, HyperValue] = {}


class SearchSpace(_Plain):
    """The whole space: networks, training hyper-parameters (fields of `TrainConfig`), founders."""

    network: NetworkSpace
    hyper: Mapping[str, Parameter]
    founders: tuple[Founder, ...] = ()
