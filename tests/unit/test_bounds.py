"""Closed-form bounds against each other and against solved microstructures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.errors import DMIError
from dmi_hpc.physics.bounds import hashin_shtrikman, isotropic_part, reuss, voigt
from dmi_hpc.physics.elasticity import Material, effective_stiffness, solve
from dmi_hpc.physics.microstructure import GaussianField, sample

UNIAXIAL = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
SOFT, STIFF = Material(2.4, 0.3), Material(120.0, 0.3)
materials = st.builds(Material, st.floats(0.1, 1000), st.floats(-0.5, 0.49))


@settings(deadline=None, max_examples=200)
@given(soft=materials, stiff=materials, f=st.floats(0, 1))
def test_bounds_are_nested_and_meet_the_pure_phases(
    soft: Material, stiff: Material, f: float
) -> None:
    hs = hashin_shtrikman(f, soft, stiff)
    ordered = [reuss(f, soft, stiff), hs.lower, hs.mean, hs.upper, voigt(f, soft, stiff)]
    assert (np.diff(ordered) >= -1e-9 * ordered[-1]).all()
    for pure, material in ((0.0, soft), (1.0, stiff)):
        expected = pytest.approx(material.stiffness_GPa()[0, 0])
        bounds = hashin_shtrikman(pure, soft, stiff)
        assert reuss(pure, soft, stiff) == expected
        assert voigt(pure, soft, stiff) == expected
        assert (bounds.lower, bounds.upper) == (expected, expected)


def test_published_form_of_hashin_and_shtrikman() -> None:
    f1, f2 = 0.7, 0.3
    k1, g1, k2, g2 = SOFT.bulk_GPa, SOFT.shear_GPa, STIFF.bulk_GPa, STIFF.shear_GPa
    hs = hashin_shtrikman(f2, SOFT, STIFF)
    assert hs.bulk_lower == pytest.approx(k1 + f2 / (1 / (k2 - k1) + 3 * f1 / (3 * k1 + 4 * g1)))
    assert hs.bulk_upper == pytest.approx(k2 + f1 / (1 / (k1 - k2) + 3 * f2 / (3 * k2 + 4 * g2)))
    lower = 1 / (g2 - g1) + 6 * f1 * (k1 + 2 * g1) / (5 * g1 * (3 * k1 + 4 * g1))
    upper = 1 / (g1 - g2) + 6 * f2 * (k2 + 2 * g2) / (5 * g2 * (3 * k2 + 4 * g2))
    assert hs.shear_lower == pytest.approx(g1 + f2 / lower)
    assert hs.shear_upper == pytest.approx(g2 + f1 / upper)


def test_bounds_are_vectorised() -> None:
    f = np.linspace(0, 1, 6).reshape(2, 3)
    hs = hashin_shtrikman(f, SOFT, STIFF)
    for values in (voigt(f, SOFT, STIFF), reuss(f, SOFT, STIFF), hs.mean, hs.bulk_lower):
        assert values.shape == (2, 3)
    with pytest.raises(DMIError, match=r"expected 0\.\.1"):
        voigt(np.array([0.5, 1.2]), SOFT, STIFF)


def test_isotropic_part_of_an_isotropic_stiffness_and_under_rotation() -> None:
    bulk, shear = isotropic_part(STIFF.stiffness_GPa())
    assert (bulk, shear) == pytest.approx((STIFF.bulk_GPa, STIFF.shear_GPa))
    cubic = np.diag([170.0, 170, 170, 80, 80, 80])
    cubic[:3, :3] += 120 * (1 - np.eye(3))
    # The same crystal turned by 45 degrees about axis 3.
    turned = cubic.copy()
    turned[0, 0] = turned[1, 1] = (170 + 120) / 2 + 80
    turned[0, 1] = turned[1, 0] = (170 + 120) / 2 - 80
    turned[5, 5] = (170 - 120) / 2
    np.testing.assert_allclose(isotropic_part(turned), isotropic_part(cubic))


@pytest.mark.parametrize(
    ("soft", "stiff"), [(SOFT, STIFF), (Material(1, 0.45), Material(70, 0.17))]
)
def test_every_sample_lies_between_reuss_and_voigt(soft: Material, stiff: Material) -> None:
    """Fine and coarse, isotropic and not, over almost all fractions."""
    spec = GaussianField(7, volume_fraction=(0.02, 0.98), correlation_voxels=(0.3, 4.0))
    phase = np.stack([sample(spec, 1, i) for i in range(16)])
    c1111 = solve(phase, (soft, stiff), UNIAXIAL).stress_GPa[:, 0]
    f = phase.mean((1, 2, 3))
    assert (reuss(f, soft, stiff) < c1111).all()
    assert (c1111 < voigt(f, soft, stiff)).all()


def symmetric_stiffness(phase: np.ndarray) -> np.ndarray:
    stiffness = effective_stiffness(phase, (SOFT, STIFF), tolerance=1e-4)
    return (stiffness + stiffness.swapaxes(1, 2)) / 2


def test_every_stiffness_tensor_obeys_its_bounds() -> None:
    """Reuss and Voigt as tensors; Hashin-Shtrikman for the isotropic part (see bounds.py)."""
    phase = np.stack([sample(GaussianField(9), 1, i) for i in range(10)])
    stiffness = symmetric_stiffness(phase)
    f = phase.mean((1, 2, 3))
    share = f[:, None, None]
    upper = (1 - share) * SOFT.stiffness_GPa() + share * STIFF.stiffness_GPa()
    soft, stiff = (np.linalg.inv(m.stiffness_GPa()) for m in (SOFT, STIFF))
    lower = np.linalg.inv((1 - share) * soft + share * stiff)
    assert (np.linalg.eigvalsh(upper - stiffness) > 0).all()
    assert (np.linalg.eigvalsh(stiffness - lower) > 0).all()

    hs = hashin_shtrikman(f, SOFT, STIFF)
    bulk, shear = isotropic_part(stiffness)
    mean_c1111 = bulk + 4 / 3 * shear
    assert ((hs.bulk_lower < bulk) & (bulk < hs.bulk_upper)).all()
    assert ((hs.shear_lower < shear) & (shear < hs.shear_upper)).all()
    assert ((hs.lower < mean_c1111) & (mean_c1111 < hs.upper)).all()


def test_unresolved_white_noise_obeys_the_bounds_once_its_voxels_are_subdivided() -> None:
    spec = GaussianField(6, volume_fraction=(0.75, 0.75), correlation_voxels=(0, 0))
    phase = sample(spec, 1, 0)
    fine = phase.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    upper = hashin_shtrikman(phase.mean(), SOFT, STIFF).bulk_upper
    coarse_bulk, fine_bulk = (
        isotropic_part(symmetric_stiffness(p[None])[0])[0] for p in (phase, fine)
    )
    assert fine_bulk < upper < coarse_bulk


def test_c1111_of_a_laminate_is_outside_the_isotropic_bounds() -> None:
    """Why Hashin-Shtrikman is not asserted of a single load case."""
    layers = np.zeros((1, 8, 8, 8), np.uint8)
    layers[:, :, ::2] = 1
    c1111 = solve(layers, (SOFT, STIFF), UNIAXIAL).stress_GPa[0, 0]
    assert hashin_shtrikman(0.5, SOFT, STIFF).upper < c1111 < voigt(0.5, SOFT, STIFF)


def test_c1111_of_an_isotropic_ensemble_obeys_hashin_shtrikman() -> None:
    spec = GaussianField(
        11, volume_fraction=(0.5, 0.5), correlation_voxels=(0.8, 0.8), isotropic_share=1.0
    )
    ensemble = np.stack([sample(spec, 3, i) for i in range(8)])
    c1111 = solve(ensemble, (SOFT, STIFF), UNIAXIAL).stress_GPa[:, 0].mean()
    hs = hashin_shtrikman(ensemble.mean(), SOFT, STIFF)
    assert hs.lower < c1111 < hs.upper
