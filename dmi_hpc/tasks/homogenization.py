"""Homogenisation of high-contrast two-phase composites (Yang et al. 2018).

From a periodic voxel microstructure to its effective stiffness C1111 (uniaxial strain along axis 0).
Data: our elasticity solver on thresholded Gaussian random fields. Network: Yang et al., Comput.
Mater. Sci. 151 (2018) 278; baselines: rule of mixtures, Hashin-Shtrikman mean, PCA of two-point
statistics with regression.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from pydantic import Field as Option

from dmi_hpc.config import Config
from dmi_hpc.data.build import BuildPlan, build
from dmi_hpc.data.manifest import Field, Manifest, SplitRule
from dmi_hpc.errors import DataError
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import Activation, Conv, Dense, Layer, NetworkSpec, Norm, Pool, Readout
from dmi_hpc.physics.bounds import hashin_shtrikman, voigt
from dmi_hpc.physics.elasticity import Material, solve
from dmi_hpc.physics.microstructure import GaussianField, sample
from dmi_hpc.physics.statistics import TwoPointRegression
from dmi_hpc.tasks.base import (
    Array,
    Baseline,
    BuildContext,
    Fields,
    Picture,
    Published,
    Quantity,
    Task,
)

UNIAXIAL = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
FILTERS = (16, 32, 64, 128, 256)  # Yang et al. 2018
SOLVE_AT_ONCE = 16  # volumes of one solver batch: larger ones leave the cache


class HomogenizationOptions(Config):
    """[task] of a homogenisation recipe."""

    voxels: int = Option(21, ge=5, description="a side of the cubic volume")
    samples: int = Option(2000, ge=10)
    contrast: float = Option(50.0, gt=1, description="ratio of Young's moduli")
    youngs_GPa: float = Option(120.0, gt=0, description="of the stiff phase")
    poisson: float = Option(0.3, gt=-1, lt=0.5, description="of both phases")
    volume_fraction: tuple[float, float] = (0.25, 0.75)
    correlation_voxels: tuple[float, float] = (0.5, 4.0)
    strain_field: bool = Option(False, description="store the strain e11 of every voxel too")

    @property
    def tolerance(self) -> float:
        """Of the solver: C1111 is right to its square, a strain field to itself."""
        return 1e-5 if self.strain_field else 1e-4

    @property
    def materials(self) -> tuple[Material, Material]:
        """(soft, stiff): phase 1 is the stiff one."""
        soft = Material(self.youngs_GPa / self.contrast, self.poisson)
        return soft, Material(self.youngs_GPa, self.poisson)


@dataclass(frozen=True)
class _Solve:
    """Rows of the data set from their numbers alone: microstructure and its solution."""

    options: HomogenizationOptions
    seed: int

    def __call__(self, ids: Array) -> dict[str, Array]:
        o = self.options
        field = GaussianField(
            voxels=o.voxels,
            volume_fraction=o.volume_fraction,
            correlation_voxels=o.correlation_voxels,
        )
        phase = np.stack([sample(field, self.seed, int(i)) for i in ids])
        parts = [
            solve(phase[k : k + SOLVE_AT_ONCE], o.materials, UNIAXIAL, tolerance=o.tolerance)
            for k in range(0, len(phase), SOLVE_AT_ONCE)
        ]
        rows = {
            "phase": phase,
            "C1111": np.concatenate([p.stress_GPa[:, 0] for p in parts]),
            "volume_fraction": phase.mean(axis=(1, 2, 3), dtype=np.float64),
            "residual": np.concatenate([p.residual for p in parts]),
            "iterations": np.concatenate([p.iterations for p in parts]).astype(np.int32),
        }
        if o.strain_field:
            rows["strain_11"] = np.concatenate([p.strain[:, 0] for p in parts]).astype(np.float32)
        return rows


class Homogenization(Task):
    Options = HomogenizationOptions
    quantity = Quantity("C1111", "GPa", transform="log")
    input_fields = ("phase",)
    target_field = "C1111"

    @property
    def o(self) -> HomogenizationOptions:
        return cast(HomogenizationOptions, self.options)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1, self.o.voxels, self.o.voxels, self.o.voxels)

    def rows(self) -> int:
        return self.o.samples

    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        shape, config = self.input_shape[1:], context.config
        fields = [
            Field(name="phase", dtype="uint8", shape=shape, unit="1", description="1 = stiff"),
            Field(
                name="C1111",
                dtype="float64",
                shape=(),
                unit="GPa",
                description="effective stiffness, uniaxial strain along axis 0",
            ),
            Field(name="volume_fraction", dtype="float64", shape=(), unit="1", description="stiff"),
            Field(
                name="residual", dtype="float64", shape=(), unit="1", description="of the solver"
            ),
            Field(
                name="iterations", dtype="int32", shape=(), unit="1", description="of the solver"
            ),
        ]
        if self.o.strain_field:
            fields.append(
                Field(
                    name="strain_11",
                    dtype="float32",
                    shape=shape,
                    unit="1",
                    description="strain e11 for unit macroscopic e11",
                )
            )
        plan = BuildPlan(
            task=self.name,
            rows=self.o.samples,
            rows_per_shard=config.rows_per_shard,
            fields=tuple(fields),
            split_rule=SplitRule(
                seed=context.seed, validation=config.validation, test=config.test, key="row number"
            ),
            seed=context.seed,
            provenance={
                "generator": "dmi_hpc.physics: B-bar hexahedra, Fourier-preconditioned CG",
                "options": self.o.model_dump(mode="json"),
            },
        )
        return build(
            target,
            plan,
            _Solve(self.o, context.seed),
            context.communicator,
            context.processes,
            context.progress,
        )

    def inputs(self, fields: Fields) -> Array:
        """Phases shifted to +-0.5, as in the paper."""
        return np.asarray(fields["phase"][:, None], dtype=np.float32) - np.float32(0.5)

    def augment(self, inputs: Array, bits: Array) -> Array:
        """Random periodic shift, mirrors, and exchange of axes 1 and 2.

        All leave C1111 unchanged: the 16 point symmetries that keep the load axis, and translations
        of the periodic cell.
        """
        n = inputs.shape[2]
        steps = np.arange(n)
        flips = [np.where((bits >> np.uint64(k)) & np.uint64(1), -1, 1) for k in range(3)]
        shifts = [
            ((bits >> np.uint64(8 + 16 * k)) % np.uint64(n)).astype(np.int64) for k in range(3)
        ]
        i, j, k = (
            (f[:, None] * steps + s[:, None]) % n for f, s in zip(flips, shifts, strict=True)
        )
        b = np.arange(len(inputs))[:, None, None, None]
        moved = inputs[b, 0, i[:, :, None, None], j[:, None, :, None], k[:, None, None, :]]
        swap = ((bits >> np.uint64(3)) & np.uint64(1)).astype(bool)
        moved[swap] = moved[swap].transpose(0, 1, 3, 2)
        return np.asarray(moved[:, None])

    def published_network(self) -> NetworkSpec:
        """16-32-64-128-256 convolutions with 2^3 pooling, dense 2048 and 1024 (3.8 M parameters).

        Volumes under 32 voxels run out of voxels to pool: the last poolings are then left out,
        which keeps the parameter count.
        """
        layers: list[Layer] = []
        extent = self.o.voxels
        for filters in FILTERS:
            layers += [Conv(filters=filters), Activation()]
            if extent >= 2:
                layers.append(Pool())
                extent //= 2
        layers.append(Readout())
        for units in (2048, 1024):
            layers += [Dense(units=units), Activation()]
        return NetworkSpec(input_shape=self.input_shape, layers=tuple(layers))

    def space(self) -> SearchSpace:
        periodic = self._periodic_network()
        return SearchSpace(
            network=NetworkSpace(
                input_shape=self.input_shape,
                conv_blocks=(1, 6),
                filters=(8, 12, 16, 24, 32, 48, 64, 96, 128),
                kernels=(1, 3, 5),
                dense_blocks=(0, 2),
                units=(16, 32, 64, 128, 256, 512),
                norms=(None, "group"),
                dropouts=(0.0, 0.05, 0.1),
            ),
            hyper={
                "learning_rate": FloatRange(low=3e-4, high=1e-2, log=True),
                "weight_decay": FloatRange(low=1e-6, high=1e-1, log=True),
                "batch_size": Choice(values=(8, 16, 32, 64), ordered=True),
                "loss": Choice(values=("mse", "mae", "huber")),
            },
            founders=(
                Founder(name="Yang 2018", network=self.published_network()),
                Founder(name="periodic", network=periodic, hyper={"learning_rate": 3e-3}),
            ),
        )

    def _periodic_network(self) -> NetworkSpec:
        """A second founder that knows the cell is periodic.

        Periodic padding, mean pooling and a mean readout keep translations of the cell exact up to
        the pooling; group normalisation does not depend on the batch, so trials on one rank and the
        training on many see the same network. A twentieth of the published parameters.
        """
        layers: list[Layer] = []
        extent = self.o.voxels
        for filters in (16, 32, 64, 64):
            layers += [Conv(filters=filters, padding="circular"), Norm(op="group")]
            layers.append(Activation(function="silu"))
            if extent >= 4:
                layers.append(Pool(op="mean"))
                extent //= 2
        layers += [Readout(op="mean"), Dense(units=64), Activation(function="silu")]
        return NetworkSpec(input_shape=self.input_shape, layers=tuple(layers))

    def baselines(self) -> tuple[Baseline, ...]:
        soft, stiff = self.o.materials

        def fraction(fields: Fields) -> Array:
            return np.asarray(fields["phase"].mean(axis=(1, 2, 3), dtype=np.float64))

        def two_point(symmetrise: bool) -> Callable[[Fields, Array, Fields], Array]:
            def predict(train: Fields, target: Array, test: Fields) -> Array:
                model = TwoPointRegression(symmetrise=symmetrise).fit(train["phase"], target)
                return model.predict(test["phase"])

            return predict

        return (
            Baseline(
                "voigt",
                "Rule of mixtures (Voigt)",
                lambda train, target, test: voigt(fraction(test), soft, stiff),
            ),
            Baseline(
                "hashin_shtrikman",
                "Hashin-Shtrikman mean",
                lambda train, target, test: hashin_shtrikman(fraction(test), soft, stiff).mean,
            ),
            Baseline("two_point", "PCA of two-point statistics + regression", two_point(False)),
            Baseline(
                "two_point_symmetric",
                "Two-point PCA, load-axis symmetries averaged",
                two_point(True),
            ),
        )

    def published(self) -> tuple[Published, ...]:
        source = "Yang et al., Comput. Mater. Sci. 151 (2018) 278; 51³ voxels, 8,550 volumes"
        return (
            Published("3-D CNN", 1.04, 3.10, source),
            Published("PCA of two-point statistics + regression", 2.28, 6.79, source),
            Published("Rule of mixtures", 15.68, 46.66, source),
        )

    def read_inputs(self, path: Path) -> tuple[list[str], dict[str, Array]]:
        """A .npy file of (n, v, v, v) or (v, v, v) phases, 0 soft and 1 stiff."""
        try:
            volumes = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: expected a .npy file of phases: {error}") from None
        if volumes.ndim == 3:
            volumes = volumes[None]
        side = self.o.voxels
        if volumes.shape[1:] != (side, side, side) or not np.isin(volumes, (0, 1)).all():
            raise DataError(
                f"{path}: expected phases 0 and 1 of shape (n, {side}, {side}, {side}); "
                f"found shape {volumes.shape}, values {np.unique(volumes)[:5].tolist()}"
            )
        return [str(i) for i in range(len(volumes))], {"phase": volumes.astype(np.uint8)}

    def pictures(self, fields: Fields, truth: Array, prediction: Array) -> tuple[Picture, ...]:
        """Four volumes: the best and worst predicted, and two between; three faces of each."""
        order = np.argsort(np.abs(prediction - truth) / truth)
        picks = order[np.linspace(0, len(order) - 1, min(4, len(order))).astype(int)]
        return tuple(
            Picture(
                name=f"volume-{row}",
                caption=(
                    f"truth {truth[row]:.2f} GPa, predicted {prediction[row]:.2f} GPa "
                    f"({100 * (prediction[row] / truth[row] - 1):+.1f} %)"
                ),
                png=_cube_png(fields["phase"][row]),
            )
            for row in picks
        )


def _cube_png(phase: Array) -> bytes:
    """Three visible faces of a voxel cube, stiff phase dark; load axis points up."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = phase.shape[0]
    figure = Figure(figsize=(2.6, 2.6), dpi=120)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), projection="3d")
    grid = np.arange(n + 1)
    a, b = np.meshgrid(grid, grid, indexing="ij")
    palette = np.array([[0.87, 0.9, 0.94], [0.16, 0.3, 0.5]])
    top, front, side = phase[-1].T, phase[:, 0], phase[:, :, -1]
    full = np.full_like(a, n)
    for (x, y, z), face, shade in (
        ((a, b, full), top, 1.0),
        ((a, np.zeros_like(a), b), front.T, 0.88),
        ((full, a, b), side.T, 0.76),
    ):
        axes.plot_surface(  # type: ignore[attr-defined]
            x, y, z, facecolors=palette[face] * shade, rstride=1, cstride=1, shade=False
        )
    axes.set_axis_off()
    axes.set_box_aspect((1, 1, 1), zoom=1.15)  # type: ignore[arg-type, call-arg]
    axes.view_init(elev=28, azim=-55)  # type: ignore[attr-defined]
    stream = io.BytesIO()
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.savefig(stream, format="png", transparent=True)
    return stream.getvalue()
