"""Random microstructures: reproducible, of the drawn fraction, with the drawn correlation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.errors import DMIError
from dmi_hpc.physics.microstructure import GaussianField, sample
from dmi_hpc.physics.statistics import two_point


@settings(deadline=None, max_examples=40)
@given(
    voxels=st.integers(2, 12),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**63),
    index=st.integers(0, 10**6),
)
def test_fraction_is_exact_to_a_voxel_and_both_phases_are_present(
    voxels: int, fraction: float, seed: int, index: int
) -> None:
    spec = GaussianField(voxels, volume_fraction=(fraction, fraction))
    phase = sample(spec, seed, index)
    assert phase.shape == (voxels,) * 3
    assert phase.dtype == np.uint8
    assert set(np.unique(phase)) == {0, 1}
    assert abs(int(phase.sum()) - fraction * phase.size) <= 1
    assert np.array_equal(phase, sample(spec, seed, index))


def test_seed_and_index_both_matter() -> None:
    spec = GaussianField(8)
    assert not np.array_equal(sample(spec, 0, 0), sample(spec, 0, 1))
    assert not np.array_equal(sample(spec, 0, 1), sample(spec, 1, 0))


def test_fractions_fill_their_range() -> None:
    spec = GaussianField(6, volume_fraction=(0.2, 0.6))
    fractions = np.array([sample(spec, 5, i).mean() for i in range(200)])
    assert 0.19 < fractions.min() < 0.23
    assert 0.57 < fractions.max() < 0.61
    assert fractions.mean() == pytest.approx(0.4, abs=0.03)


def neighbour_correlation(spec: GaussianField, samples: int = 20) -> np.ndarray:
    """(samples, 3) correlation of next neighbours along each axis."""
    s2 = two_point(np.stack([sample(spec, 2, i) for i in range(samples)]))
    f = s2[:, 0, 0, 0]
    next_lags = np.stack([s2[:, 1, 0, 0], s2[:, 0, 1, 0], s2[:, 0, 0, 1]], axis=1)
    return (next_lags - f[:, None] ** 2) / (f - f**2)[:, None]


def test_correlation_grows_with_the_filter_and_white_noise_has_none() -> None:
    white = neighbour_correlation(GaussianField(12, correlation_voxels=(0, 0)))
    fine = neighbour_correlation(GaussianField(12, correlation_voxels=(0.7, 0.7)))
    coarse = neighbour_correlation(GaussianField(12, correlation_voxels=(2, 2)))
    assert abs(white.mean()) < 0.02
    assert 0.2 < fine.mean() < coarse.mean() - 0.2


def test_a_filtered_field_is_as_correlated_across_the_border_as_inside() -> None:
    spec = GaussianField(12, correlation_voxels=(1.5, 1.5))
    phase = np.stack([sample(spec, 4, i) for i in range(60)])
    changes = np.abs(phase - np.roll(phase.astype(int), -1, axis=1)).mean((0, 2, 3))
    assert changes[-1] == pytest.approx(changes[:-1].mean(), rel=0.15)


def test_isotropic_share_decides_whether_axes_differ() -> None:
    def spread(share: float) -> float:
        spec = GaussianField(12, correlation_voxels=(0.4, 2.5), isotropic_share=share)
        return float(np.ptp(neighbour_correlation(spec), axis=1).mean())

    assert spread(0.0) > 2 * spread(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"voxels": 1}, "voxels is 1"),
        ({"volume_fraction": (0.5, 0.2)}, "volume_fraction"),
        ({"volume_fraction": (0.0, 0.2)}, "volume_fraction"),
        ({"correlation_voxels": (0.0, 2.0)}, "correlation_voxels"),
        ({"isotropic_share": 1.5}, "isotropic_share"),
    ],
)
def test_impossible_distributions(changes: dict, message: str) -> None:
    with pytest.raises(DMIError, match=message):
        GaussianField(**{"voxels": 8, **changes})
