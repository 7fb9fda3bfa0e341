"""Periodic homogenisation of 3-D linear elasticity on voxels.

One trilinear hexahedron per voxel with mean dilatation (B-bar: the volumetric strain is constant in
an element, the deviatoric one is integrated by 2x2x2 Gauss points; Hughes, Int. J. Numer. Meth.
Eng. 15 (1980) 1413). The displacement fluctuation is found by conjugate gradients, preconditioned
by the same mesh filled with a homogeneous reference material, which the discrete Fourier transform
inverts exactly (Ladecky et al., Appl. Math. Comput. 446 (2023) 127835): the number of iterations
depends on the contrast, not on the mesh.

The element energy is a sum of squares of 18 generalised strains, s = G u (one dilatation, weighted
by the bulk modulus, and 17 deviatoric ones, weighted by the shear modulus), so the stiffness
is applied as G' m G with nothing stored but two moduli per voxel, for any number of phases.

The reference has the least bulk and the least shear modulus of all materials. The residual is
measured in its energy, |div sigma|_ref / |macro strain|_ref, and as no phase is softer than the
reference this bounds the true error: the strain field is off by at most ``residual`` (root mean
square in the reference energy, relative to the macro strain) and the stiffness seen by the load
by at most a relative ``residual**2``.

Notation: strain and stress are Voigt vectors 11, 22, 33, 23, 13, 12 with engineering shear; axis 1
is array axis 0 of a volume; B microstructures, V = N1 N2 N3 voxels of unit size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dmi_hpc.errors import DMIError
from dmi_hpc.physics.hexahedron import (
    CORNERS,
    affine_displacement,
    element_modes,
    inverse_symbol,
    isotropic_stiffness,
    strain_matrix,
)

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

# A CPU takes one microstructure at a time: that stays in its caches and makes every sample bitwise
# independent of the batch it came in. A GPU wants many; work arrays take about 600 bytes a voxel.
_GPU_CHUNK_VOXELS = 1 << 22


class SolverError(DMIError):
    """The iteration did not reach its tolerance; names the sample and its residual."""


@dataclass(frozen=True)
class Material:
    """An isotropic elastic phase; all moduli in GPa."""

    youngs_GPa: float
    poisson: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.youngs_GPa) and self.youngs_GPa > 0):
            raise DMIError(f"youngs_GPa is {self.youngs_GPa}; expected a positive finite number")
        if not -1 < self.poisson < 0.5:
            raise DMIError(f"poisson is {self.poisson}; expected more than -1 and less than 0.5")

    @property
    def shear_GPa(self) -> float:
        return self.youngs_GPa / (2 * (1 + self.poisson))

    @property
    def bulk_GPa(self) -> float:
        return self.youngs_GPa / (3 * (1 - 2 * self.poisson))

    def stiffness_GPa(self) -> FloatArray:
        """(6, 6) Voigt stiffness: stress = stiffness @ strain."""
        return isotropic_stiffness(self.bulk_GPa, self.shear_GPa)


@dataclass(frozen=True)
class Solution:
    """Response of B microstructures to one macroscopic strain."""

    stress_GPa: FloatArray  # (B, 6) volume average
    strain: FloatArray  # (B, 6, N1, N2, N3) element averages
    residual: FloatArray  # (B,) see the module docstring
    iterations: npt.NDArray[np.int64]  # (B,)


def solve(
    phase: Array | Tensor,
    materials: Sequence[Material],
    macro_strain: Sequence[float],
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 500,
    device: str | torch.device = "cpu",
) -> Solution:
    """Strain each periodic microstructure by `macro_strain` and return its stress and strain.

    phase: (B, N1, N2, N3) integers, indices into `materials`. tolerance: of the residual; 1e-5
    gives the strains to about 1e-5 of the macro strain and C1111 to 1e-10 of itself.
    A microstructure's solution does not depend on the others of its batch.
    Raises SolverError if `max_iterations` are not enough, DMIError for unusable input.
    """
    load = _checked_load(macro_strain)
    volumes = _checked_phase(phase, len(materials))
    mesh = _Mesh(tuple(volumes.shape[1:]), materials, torch.device(device))
    parts = []
    for start, chunk in _chunks(volumes, mesh.device):
        displacement, residual, iterations = _conjugate_gradient(
            mesh, chunk, load, tolerance, max_iterations
        )
        _require_converged(residual, tolerance, max_iterations, start)
        strain = mesh.mean_strain(displacement, load)
        stress = mesh.mean_stress(chunk, strain)
        parts.append([t.cpu().numpy() for t in (stress, strain, residual, iterations)])
    return Solution(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def effective_stiffness(
    phase: Array | Tensor,
    materials: Sequence[Material],
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 500,
    device: str | torch.device = "cpu",
) -> FloatArray:
    """(B, 6, 6) effective stiffness in GPa, one column per unit load; symmetric to `tolerance`."""
    columns = [
        solve(
            phase,
            materials,
            unit,
            tolerance=tolerance,
            max_iterations=max_iterations,
            device=device,
        ).stress_GPa
        for unit in np.eye(6).tolist()
    ]
    return np.stack(columns, axis=-1)


def _checked_load(macro_strain: Sequence[float]) -> FloatArray:
    load = np.asarray(macro_strain, dtype=np.float64)
    if load.shape != (6,) or not np.isfinite(load).all() or not load.any():
        raise DMIError(
            f"macro_strain is {list(macro_strain)}; expected six finite numbers "
            "(11, 22, 33, 23, 13, 12), not all zero"
        )
    return load


def _checked_phase(phase: Array | Tensor, materials: int) -> Tensor:
    volumes = phase.cpu().numpy() if isinstance(phase, Tensor) else np.asarray(phase)
    if volumes.ndim != 4 or volumes.size == 0 or volumes.dtype.kind not in "iub":
        raise DMIError(
            f"phase has shape {volumes.shape} and type {volumes.dtype}; "
            "expected integers of shape (B, N1, N2, N3)"
        )
    low, high = int(volumes.min()), int(volumes.max())
    if low < 0 or high >= materials:
        raise DMIError(f"phase holds {low}..{high}; expected 0..{materials - 1}, one per material")
    return torch.from_numpy(volumes.astype(np.int64))


def _chunks(volumes: Tensor, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    per_chunk = 1 if device.type == "cpu" else max(1, _GPU_CHUNK_VOXELS // volumes[0].numel())
    for start in range(0, len(volumes), per_chunk):
        yield start, volumes[start : start + per_chunk].to(device)


def _require_converged(
    residual: Tensor, tolerance: float, max_iterations: int, first_sample: int
) -> None:
    worst = int(residual.argmax())
    if not float(residual[worst]) <= tolerance:
        raise SolverError(
            f"sample {first_sample + worst}: residual {float(residual[worst]):.2e} after "
            f"{max_iterations} iterations; expected {tolerance:.1e} or less. Raise max_iterations "
            "(they grow with the square root of the contrast) or the tolerance"
        )


class _Mesh:
    """The hexahedral mesh of one grid: its forces, its reference material, its averages."""

    def __init__(
        self, shape: tuple[int, ...], materials: Sequence[Material], device: torch.device
    ) -> None:
        self.shape = shape
        self.device = device
        self._bulk = self._tensor([m.bulk_GPa for m in materials])
        self._shear = self._tensor([m.shear_GPa for m in materials])
        self._stiffness = self._tensor([m.stiffness_GPa() for m in materials])
        modes = element_modes()
        self._modes = self._tensor(modes)  # (18, 24)
        self._centre = self._tensor(strain_matrix((0.5, 0.5, 0.5)))  # (6, 24)
        self._affine = self._tensor(affine_displacement())  # (24, 6)
        bulk, shear = float(self._bulk.min()), float(self._shear.min())
        self._reference = isotropic_stiffness(bulk, shear)
        weighted = np.array([[bulk]] + [[shear]] * 17) * modes
        self._inverse = self._tensor(inverse_symbol(modes.T @ weighted, shape))

    def moduli(self, phase: Tensor) -> tuple[Tensor, Tensor]:
        """Bulk (B, 1, V) and shear (B, 1, V) modulus of every voxel."""
        flat = phase.flatten(1)[:, None]
        return self._bulk[flat], self._shear[flat]

    def force(self, u: Tensor, moduli: tuple[Tensor, Tensor], load: FloatArray | None) -> Tensor:
        """Nodal forces (B, 3, N1, N2, N3) of the fluctuation u, plus those of a macro strain."""
        strains = self._modes @ _gather(u)  # (B, 18, V)
        if load is not None:
            strains += (self._modes @ (self._affine @ self._tensor(load)))[:, None]
        strains[:, :1] *= moduli[0]
        strains[:, 1:] *= moduli[1]
        return _scatter(self._modes.T @ strains, self.shape)

    def precondition(self, r: Tensor) -> Tensor:
        """Fluctuation of zero mean that the reference material answers to the forces r."""
        axes = (2, 3, 4)
        spectrum = torch.view_as_real(torch.fft.rfftn(r, dim=axes))  # (B, 3, N1, N2, N3/2+1, 2)
        inverse = self._inverse
        product = inverse[:, 0] * spectrum[:, :1]
        product.addcmul_(inverse[:, 1], spectrum[:, 1:2])
        product.addcmul_(inverse[:, 2], spectrum[:, 2:])
        answer: Tensor = torch.fft.irfftn(torch.view_as_complex(product), s=self.shape, dim=axes)
        return answer

    def reference_energy(self, load: FloatArray) -> float:
        """Twice the energy of the homogeneous reference under the macro strain."""
        return float(load @ self._reference @ load) * math.prod(self.shape)

    def mean_strain(self, u: Tensor, load: FloatArray) -> Tensor:
        """(B, 6, N1, N2, N3) average of the strain in each element."""
        strain: Tensor = self._centre @ _gather(u) + self._tensor(load)[:, None]
        return strain.view(len(u), 6, *self.shape)

    def mean_stress(self, phase: Tensor, strain: Tensor) -> Tensor:
        """(B, 6) volume average of the stress."""
        stress = torch.zeros(len(phase), 6, dtype=torch.float64, device=self.device)
        for index, stiffness in enumerate(self._stiffness):
            total = (strain * (phase == index)[:, None]).sum((2, 3, 4))
            stress += total @ stiffness
        return stress / math.prod(self.shape)

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=torch.float64, device=self.device)


def _conjugate_gradient(
    mesh: _Mesh, phase: Tensor, load: FloatArray, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fluctuation (B, 3, N1, N2, N3), residual (B,) and iterations (B,); each sample stops alone."""
    moduli = mesh.moduli(phase)
    load_energy = mesh.reference_energy(load)
    iterations = torch.zeros(len(phase), dtype=torch.int64, device=mesh.device)
    u = torch.zeros(len(phase), 3, *mesh.shape, dtype=torch.float64, device=mesh.device)
    r = -mesh.force(u, moduli, load)
    z = mesh.precondition(r)
    p, rz = z, _dot(r, z)
    for _ in range(max_iterations):
        going = ~(_relative(rz, load_energy) <= tolerance)  # NaN goes on, to be reported
        if not bool(going.any()):
            break
        q = mesh.force(p, moduli, None)
        step = _per_sample(torch.where(going, rz / _dot(p, q), 0.0))
        u.addcmul_(step, p)
        r.addcmul_(step, q, value=-1.0)
        z = mesh.precondition(r)
        previous, rz = rz, _dot(r, z)
        p = torch.addcmul(z, _per_sample(torch.where(going, rz / previous, 0.0)), p)
        iterations += going
    return u, _relative(rz, load_energy), iterations


def _relative(rz: Tensor, load_energy: float) -> Tensor:
    # Round-off may leave a negative product where the residual is zero.
    return (rz.clamp(min=0.0) / load_energy).sqrt()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None, None]


def _gather(u: Tensor) -> Tensor:
    """(B, 3, N1, N2, N3) nodal values -> (B, 24, V): those of the 8 corners of every element."""
    batch, _, n1, n2, n3 = u.shape
    padded = u.new_empty(batch, 3, n1 + 1, n2 + 1, n3 + 1)
    padded[..., :-1, :-1, :-1] = u
    padded[..., :-1, :-1, -1] = u[..., 0]
    padded[..., :-1, -1, :] = padded[..., :-1, 0, :]
    padded[..., -1, :, :] = padded[..., 0, :, :]
    corners = u.new_empty(batch, 8, 3, n1, n2, n3)
    for corner, (i, j, k) in enumerate(CORNERS):
        corners[:, corner] = padded[..., i : i + n1, j : j + n2, k : k + n3]
    return corners.view(batch, 24, n1 * n2 * n3)


def _scatter(corners: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Transpose of _gather: (B, 24, V) corner forces -> (B, 3, N1, N2, N3) nodal sums."""
    n1, n2, n3 = shape
    corners = corners.view(len(corners), 8, 3, n1, n2, n3)
    padded = corners.new_zeros(len(corners), 3, n1 + 1, n2 + 1, n3 + 1)
    for corner, (i, j, k) in enumerate(CORNERS):
        padded[..., i : i + n1, j : j + n2, k : k + n3] += corners[:, corner]
    padded[..., 0, :, :] += padded[..., -1, :, :]
    padded[..., 0, :] += padded[..., -1, :]
    padded[..., 0] += padded[..., -1]
    return padded[..., :-1, :-1, :-1].contiguous()
