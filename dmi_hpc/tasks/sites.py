"""Which element stands on a site: Ryan, Lengyel and Shatruk, J. Am. Chem. Soc. 140 (2018) 10158.

Input: the atomic fingerprint of a symmetry-distinct site (`dmi_hpc.physics.fingerprints`), which knows
geometry alone. Output: a probability of each of 118 elements. Data: fingerprints made by
recipes/prepare/sites.py, imported by ``dmi data import``. `dmi rank` makes compounds of them.
Baselines: how often each element occurs; the nearest fingerprints.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, cast

import numpy as np
from pydantic import Field as Option

from dmi_hpc.config import Config
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.errors import DataError
from dmi_hpc.models.layers import Activation, Conv, Dense, Dropout, Layer, Norm, Readout
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import NetworkSpec, Pool
from dmi_hpc.physics.fingerprints import PIXELS, VIEWS
from dmi_hpc.tasks.base import Array, Baseline, BuildContext, Fields, Quantity, Task

_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm "
    "Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No "
    "Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)
SYMBOLS: tuple[str, ...] = tuple(_SYMBOLS.split())  # Z = 1 to 118
_FITTED = 10_000  # pictures held as float at once, and those that the components are found from


class SitesOptions(Config):
    """[task] of a recipe of sites."""

    filters: tuple[int, ...] = Option(
        (64, 128, 192), min_length=1, max_length=4, description="of convolutions of stride 2"
    )
    units: tuple[int, ...] = Option((384,), description="of the dense layers behind them")
    dropout: float = Option(0.2, ge=0, lt=1, description="before each dense layer")
    neighbours: int = Option(10, ge=1, description="of the baseline of nearest fingerprints")


class Sites(Task):
    Options = SitesOptions
    quantity = Quantity("element", "", "category", SYMBOLS)
    input_fields: ClassVar[tuple[str, ...]] = ("fingerprint",)
    target_field = "element"
    label_field = "structure"

    def __init__(self, name: str, options: Config) -> None:
        super().__init__(name, options)
        self.o = cast(SitesOptions, options)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (VIEWS, PIXELS, PIXELS)

    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        raise DataError(
            f"{target}: no data here, and fingerprints need structures. Make them with "
            f"recipes/prepare/sites.py, then: dmi data import sites.h5 --out {target} --group formula"
        )

    def inputs(self, fields: Fields) -> Array:
        """(n, 12, 16, 16) float32 from bytes; 0 is empty, 1 as bright as it gets."""
        return np.asarray(fields["fingerprint"], dtype=np.float32) / np.float32(255)

    def published_network(self) -> NetworkSpec:
        """Convolutions of stride 2 and a dense layer: the paper's 42 layers, sized for a CPU."""
        layers: list[Layer] = []
        for filters in self.o.filters:
            layers += [Conv(filters=filters, stride=2), Norm(), Activation()]
        layers.append(Readout())
        for units in self.o.units:
            layers += [Dropout(rate=self.o.dropout), Dense(units=units), Norm(), Activation()]
        layers.append(Dropout(rate=self.o.dropout))
        return NetworkSpec(input_shape=self.input_shape, layers=tuple(layers), outputs=len(SYMBOLS))

    def space(self) -> SearchSpace:
        # a block of the space pools where the default network has a stride
        layers: list[Layer] = []
        for filters in self.o.filters:
            layers += [Conv(filters=filters), Norm(), Activation(), Pool()]
        layers.append(Readout())
        for units in self.o.units:
            layers += [Dense(units=units), Norm(), Activation(), Dropout(rate=self.o.dropout)]
        pooled = NetworkSpec(
            input_shape=self.input_shape, layers=tuple(layers), outputs=len(SYMBOLS)
        )
        return SearchSpace(
            network=NetworkSpace(
                input_shape=self.input_shape,
                outputs=len(SYMBOLS),
                conv_blocks=(1, 5),
                filters=(16, 32, 64, 128, 256),
                kernels=(1, 3, 5),
                dense_blocks=(0, 3),
                units=(128, 256, 512, 1024),
                norms=(None, "batch"),
                dropouts=(0.0, 0.1, 0.3, 0.5),
                skips=(None, "residual"),
            ),
            hyper={
                "learning_rate": FloatRange(low=1e-4, high=1e-2, log=True),
                "weight_decay": FloatRange(low=1e-6, high=1.0, log=True),
                "batch_size": Choice(values=(128, 256, 512), ordered=True),
            },
            founders=(Founder(name="convolutions", network=pooled),),
        )

    def baselines(self) -> tuple[Baseline, ...]:
        def frequency(train: Fields, target: Array, test: Fields) -> Array:
            shares = np.bincount(target.astype(np.int64), minlength=len(SYMBOLS)) / len(target)
            return np.tile(shares, (len(test["fingerprint"]), 1))

        def nearest(train: Fields, target: Array, test: Fields) -> Array:
            count = min(self.o.neighbours, len(target))
            return _nearest(train["fingerprint"], target, test["fingerprint"], count)

        return (
            Baseline("frequency", "How often each element occurs", frequency),
            Baseline("nearest", "Nearest fingerprints", nearest),
        )


def _nearest(train: Array, target: Array, test: Array, neighbours: int) -> Array:
    """(n, 118): shares of the elements of the nearest ones, by the main components of the pictures."""
    from sklearn.decomposition import PCA
    from sklearn.neighbors import KNeighborsClassifier

    def components(pictures: Array) -> Array:
        parts = range(0, len(pictures), _FITTED)
        found = [pca.transform(_flat(pictures[start : start + _FITTED])) for start in parts]
        return np.concatenate(found)

    some = np.sort(np.random.default_rng(0).permutation(len(train))[:_FITTED])
    pca = PCA(min(48, len(some)), svd_solver="randomized", random_state=0).fit(_flat(train[some]))
    model = KNeighborsClassifier(neighbours, weights="distance", algorithm="brute")
    model.fit(components(train), target.astype(np.int64))
    found = np.zeros((len(test), len(SYMBOLS)))
    found[:, model.classes_] = model.predict_proba(components(test))
    return found


def _flat(pictures: Array) -> Array:
    return pictures.reshape(len(pictures), -1).astype(np.float32)
