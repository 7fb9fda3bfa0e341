"""ElemNet (Jha et al. 2018): a property of a compound from its composition alone.

Input: the fractions of 86 elements. Data: a user's CSV of formulas and values, imported by
``dmi data import``. Baseline: a random forest on the same fractions and split.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from pydantic import Field as Option

from dmi_hpc.data.elements import ELEMENTS
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import Activation, Dense, Dropout, Layer, NetworkSpec
from dmi_hpc.tasks.base import Array, Fields, Published
from dmi_hpc.tasks.composition import CompositionOptions, CompositionTask

# (units, how many, dropout after the group): Jha et al., Sci. Rep. 8 (2018) 17593; the paper's
# repository writes keep rates .8 .9 .7 .8, these are the dropped shares
GROUPS = ((1024, 4, 0.2), (512, 3, 0.1), (256, 3, 0.3), (128, 3, 0.2), (64, 2, 0.0), (32, 1, 0.0))


class ElemNetOptions(CompositionOptions):
    """[task] of a recipe of ElemNet."""

    dropout: bool = Option(True, description="the published dropout; it slows short trainings")


class ElemNet(CompositionTask):
    Options = ElemNetOptions

    @property
    def o(self) -> ElemNetOptions:
        return cast(ElemNetOptions, self.options)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (len(ELEMENTS),)

    def inputs(self, fields: Fields) -> Array:
        """(n, 86) float32: share of atoms of each element, in the order of `dmi_hpc.data.elements`."""
        return np.asarray(fields["fractions"], dtype=np.float32)

    def published_network(self) -> NetworkSpec:
        """17 dense layers of ReLU, 4.63 M parameters."""
        layers: list[Layer] = []
        for units, count, rate in GROUPS:
            for _ in range(count):
                layers += [Dense(units=units), Activation()]
            if rate and self.o.dropout:
                layers.append(Dropout(rate=rate))
        return NetworkSpec(input_shape=self.input_shape, layers=tuple(layers))

    def space(self) -> SearchSpace:
        return SearchSpace(
            network=NetworkSpace(
                input_shape=self.input_shape,
                dense_blocks=(3, 20),
                units=(32, 64, 128, 256, 512, 1024),
                norms=(None, "batch"),
                dropouts=(0.0, 0.05, 0.1, 0.2, 0.3),
            ),
            hyper={
                "learning_rate": FloatRange(low=1e-4, high=1e-2, log=True),
                "weight_decay": FloatRange(low=1e-7, high=1e-1, log=True),
                "batch_size": Choice(values=(64, 128, 256, 512), ordered=True),
                "optimizer": Choice(values=("adam", "adamw")),
                "loss": Choice(values=("mae", "huber", "mse")),
            },
            founders=(Founder(name="ElemNet", network=self.published_network()),),
        )

    def published(self) -> tuple[Published, ...]:
        if self.o.quantity != "formation_enthalpy":
            return ()
        source = "Jha et al., Sci. Rep. 8 (2018) 17593; about 276,000 OQMD compounds"
        return (
            Published("ElemNet", 0.055, None, source),
            Published("Random forest on element fractions", 0.157, None, source),
        )
