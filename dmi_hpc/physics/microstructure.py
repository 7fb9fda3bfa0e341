"""Two-phase periodic microstructures: filtered Gaussian random fields, cut at a quantile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmi_hpc.errors import DMIError


@dataclass(frozen=True)
class GaussianField:
    """Distribution of microstructures of `voxels`^3 voxels (cf. Yang et al. 2018).

    volume_fraction: range of the stiff phase's fraction, drawn uniformly.
    correlation_voxels: range of the Gaussian filter's standard deviation, drawn log-uniformly;
    (0, 0) is white noise. From about 0.6 on, a voxel mesh resolves the structure well enough for
    every solved sample to obey the bounds of a continuum (bounds.py); finer ones come out too stiff.
    isotropic_share: probability of one deviation for all axes; else each axis draws its own.
    """

    voxels: int
    volume_fraction: tuple[float, float] = (0.25, 0.75)
    correlation_voxels: tuple[float, float] = (0.6, 3.0)
    isotropic_share: float = 0.5

    def __post_init__(self) -> None:
        if self.voxels < 2:
            raise DMIError(f"voxels is {self.voxels}; two phases need at least 2 voxels a side")
        low, high = self.volume_fraction
        if not 0 < low <= high < 1:
            raise DMIError(f"volume_fraction is {low}..{high}; expected a range within (0, 1)")
        low, high = self.correlation_voxels
        if not (0 < low <= high < math.inf or low == high == 0):
            raise DMIError(
                f"correlation_voxels is {low}..{high}; expected a positive range, or 0..0 "
                "for white noise"
            )
        if not 0 <= self.isotropic_share <= 1:
            raise DMIError(f"isotropic_share is {self.isotropic_share}; expected 0..1")


def sample(spec: GaussianField, seed: int, index: int) -> npt.NDArray[np.uint8]:
    """Microstructure `index` of the series `seed`: (N, N, N), 1 = stiff; a pure function.

    The fraction of stiff voxels is the drawn one to within half a voxel, and never 0 or 1.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(index,))))
    fraction = rng.uniform(*spec.volume_fraction)
    deviations = _draw_deviations(spec, rng)
    noise = rng.standard_normal((spec.voxels,) * 3)
    field = _gaussian_filter(noise, deviations).ravel()
    stiff = min(max(round(fraction * field.size), 1), field.size - 1)
    phase = np.zeros(field.size, dtype=np.uint8)
    phase[np.argsort(field, kind="stable")[-stiff:]] = 1
    return phase.reshape(noise.shape)


def _draw_deviations(spec: GaussianField, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    if spec.correlation_voxels[1] == 0:
        return np.zeros(3)
    low, high = spec.correlation_voxels
    isotropic = rng.random() < spec.isotropic_share
    deviations = low * (high / low) ** rng.random(3)
    return deviations[[0, 0, 0]] if isotropic else deviations


def _gaussian_filter(
    noise: npt.NDArray[np.float64], deviations: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Periodic Gaussian filter, by its transfer function exp(-2 (pi sigma k)^2)."""
    spectrum = np.fft.rfftn(noise)
    for axis, deviation in enumerate(deviations):
        n = noise.shape[axis]
        k = np.fft.rfftfreq(n) if axis == 2 else np.fft.fftfreq(n)
        transfer = np.exp(-2 * (np.pi * deviation * k) ** 2)
        spectrum *= np.expand_dims(transfer, [other for other in range(3) if other != axis])
    return np.fft.irfftn(spectrum, s=noise.shape, axes=(0, 1, 2))
