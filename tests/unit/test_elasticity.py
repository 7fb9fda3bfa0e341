"""The homogenisation solver against closed forms, its own error bound and a published reference."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.errors import DMIError
from dmi_hpc.physics.elasticity import Material, SolverError, effective_stiffness, solve
from dmi_hpc.physics.hexahedron import affine_displacement, element_modes
from dmi_hpc.physics.microstructure import GaussianField, sample

UNIAXIAL = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
SOFT, STIFF = Material(2.4, 0.3), Material(120.0, 0.3)
RUBBERY, CERAMIC = Material(1.0, 0.45), Material(70.0, 0.17)


def random_phase(seed: int, size: int = 4, samples: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (samples, size, size, size), dtype=np.uint8)


def c1111(phase: np.ndarray, materials: tuple[Material, ...], **options: float) -> np.ndarray:
    return solve(phase, materials, UNIAXIAL, **options).stress_GPa[:, 0]


def laminate_stiffness(
    materials: tuple[Material, ...], fractions: tuple[float, ...], axis: int
) -> np.ndarray:
    """Exact (6, 6) stiffness of layers normal to `axis` (Backus average in matrix form)."""
    across = [axis, *(3 + other for other in range(3) if other != axis)]
    within = [i for i in range(6) if i not in across]
    mean = dict.fromkeys(("nn", "nt", "tt", "tnt"), 0.0)
    for material, f in zip(materials, fractions, strict=True):
        c = material.stiffness_GPa()
        flexible = np.linalg.inv(c[np.ix_(across, across)])
        coupling = flexible @ c[np.ix_(across, within)]
        mean["nn"] = mean["nn"] + f * flexible
        mean["nt"] = mean["nt"] + f * coupling
        mean["tt"] = mean["tt"] + f * c[np.ix_(within, within)]
        mean["tnt"] = mean["tnt"] + f * c[np.ix_(within, across)] @ coupling
    nn = np.linalg.inv(mean["nn"])
    result = np.empty((6, 6))
    result[np.ix_(across, across)] = nn
    result[np.ix_(across, within)] = nn @ mean["nt"]
    result[np.ix_(within, across)] = (nn @ mean["nt"]).T
    result[np.ix_(within, within)] = mean["tt"] - mean["tnt"] + mean["nt"].T @ nn @ mean["nt"]
    return result


@pytest.mark.parametrize("materials", [(SOFT, STIFF), (RUBBERY, CERAMIC)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_laminates_are_exact_in_all_21_moduli(
    axis: int, materials: tuple[Material, Material]
) -> None:
    layers = np.array([0, 0, 1, 0, 1, 1, 0], dtype=np.uint8)
    phase = np.broadcast_to(np.moveaxis(layers[:, None, None], 0, axis), (7, 7, 7))
    found = effective_stiffness(phase[None], materials, tolerance=1e-9)[0]
    expected = laminate_stiffness(materials, (4 / 7, 3 / 7), axis)
    np.testing.assert_allclose(found, expected, atol=1e-8 * expected.max())


def test_three_phases_on_a_box_with_unequal_sides() -> None:
    materials = (SOFT, STIFF, CERAMIC)
    layers = np.array([0, 1, 2, 2], dtype=np.uint8)[:, None, None]
    phase = np.broadcast_to(layers, (4, 3, 1))
    expected = laminate_stiffness(materials, (0.25, 0.25, 0.5), 0)[0, 0]
    assert c1111(phase[None], materials)[0] == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(
    youngs=st.floats(1e-3, 1e3),
    poisson=st.floats(-0.9, 0.49),
    load=st.lists(st.floats(-1, 1), min_size=6, max_size=6).filter(
        lambda e: max(map(abs, e)) > 0.1
    ),
)
def test_homogeneous_limit(youngs: float, poisson: float, load: list[float]) -> None:
    material = Material(youngs, poisson)
    solution = solve(random_phase(0), (material, material), load)
    expected = material.stiffness_GPa() @ load
    scale = np.abs(material.stiffness_GPa()).max()
    np.testing.assert_allclose(solution.stress_GPa[0], expected, atol=1e-12 * scale)
    np.testing.assert_allclose(
        solution.strain[0], np.broadcast_to(np.array(load)[:, None, None, None], (6, 4, 4, 4)),
        atol=1e-10,
    )  # fmt: skip
    assert solution.iterations[0] == 0
    assert solution.residual[0] < 1e-12


@pytest.mark.parametrize("materials", [(SOFT, STIFF), (RUBBERY, CERAMIC)])
def test_stiffness_is_symmetric_and_positive_definite(
    materials: tuple[Material, Material],
) -> None:
    stiffness = effective_stiffness(random_phase(1, 5, 2), materials)
    scale = np.abs(stiffness).max()
    np.testing.assert_allclose(stiffness, stiffness.swapaxes(1, 2), atol=1e-6 * scale)
    assert (np.linalg.eigvalsh((stiffness + stiffness.swapaxes(1, 2)) / 2) > 0).all()


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    turns=st.integers(0, 3),
    mirrored=st.sets(st.sampled_from((0, 1, 2))),
    shift=st.tuples(*[st.integers(0, 4)] * 3),
)
def test_symmetries_that_keep_the_load_axis_keep_c1111(
    seed: int, turns: int, mirrored: set[int], shift: tuple[int, int, int]
) -> None:
    phase = random_phase(seed, 5)[0]
    image = np.roll(np.flip(np.rot90(phase, turns, axes=(1, 2)), tuple(mirrored)), shift, (0, 1, 2))
    plain, transformed = c1111(np.stack([phase, image]), (RUBBERY, CERAMIC))
    assert transformed == pytest.approx(plain, rel=1e-9)


def test_axis_0_is_the_load_axis() -> None:
    phase = sample(GaussianField(8, correlation_voxels=(1.0, 3.0), isotropic_share=0.0), 0, 1)
    stiffness = effective_stiffness(phase[None], (SOFT, STIFF))[0]
    turned = c1111(np.stack([phase, phase.swapaxes(0, 1), phase.swapaxes(0, 2)]), (SOFT, STIFF))
    np.testing.assert_allclose(turned, np.diag(stiffness)[:3], rtol=1e-8)
    assert np.ptp(turned) > 0.05 * turned.mean()


def subdivided(phase: np.ndarray, times: int) -> np.ndarray:
    return phase.repeat(times, 0).repeat(times, 1).repeat(times, 2)[None]


def test_error_falls_when_voxels_are_subdivided() -> None:
    phase = sample(GaussianField(4), 3, 0)
    materials = (SOFT, Material(10 * SOFT.youngs_GPa, SOFT.poisson))
    values = [float(c1111(subdivided(phase, n), materials)[0]) for n in (1, 2, 4)]
    assert values[0] > values[1] > values[2]  # displacement elements approach from the stiff side
    assert values[1] - values[2] < 0.7 * (values[0] - values[1])


def test_equal_shear_moduli_approach_the_exact_result_of_hill() -> None:
    """With one shear modulus the bulk modulus is known for every microstructure (Hill 1963)."""
    shear = 10.0
    materials = tuple(Material(2 * shear * (1 + poisson), poisson) for poisson in (0.0, 0.45))
    phase = sample(GaussianField(4), 3, 0)
    f = phase.mean()
    compliances = [
        share / (m.bulk_GPa + 4 / 3 * shear) for share, m in zip((1 - f, f), materials, strict=True)
    ]
    errors = [
        float(c1111(subdivided(phase, n), materials)[0]) * sum(compliances) - 1 for n in (1, 2, 4)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
    assert errors[2] < 0.01


def test_residual_bounds_the_error_of_the_stiffness() -> None:
    phase = random_phase(5, 9, 4)
    exact = c1111(phase, (SOFT, STIFF), tolerance=1e-10)
    for tolerance in (1e-1, 1e-2, 1e-3):
        rough = solve(phase, (SOFT, STIFF), UNIAXIAL, tolerance=tolerance)
        excess = rough.stress_GPa[:, 0] / exact - 1
        assert (rough.residual <= tolerance).all()
        assert (excess > 0).all()  # conjugate gradients approach the energy minimum from above
        assert (excess <= rough.residual**2).all()


def test_residual_bounds_the_error_of_the_strain() -> None:
    phase = random_phase(6, 9)
    exact = solve(phase, (SOFT, STIFF), UNIAXIAL, tolerance=1e-10)
    rough = solve(phase, (SOFT, STIFF), UNIAXIAL, tolerance=1e-2)
    stiffness = SOFT.stiffness_GPa()
    error = (rough.strain - exact.strain)[0].reshape(6, -1)
    energy = np.einsum("iv,ij,jv->", error, stiffness, error) / error.shape[1]
    assert 0 < np.sqrt(energy / stiffness[0, 0]) <= rough.residual[0]


def test_mean_strain_is_the_macro_strain() -> None:
    load = (0.3, -0.2, 0.1, 0.4, -0.5, 0.6)
    strain = solve(random_phase(7, 6), (RUBBERY, CERAMIC), load).strain
    np.testing.assert_allclose(strain.mean((2, 3, 4))[0], load, atol=1e-12)


def test_a_solution_does_not_depend_on_its_batch() -> None:
    phase = random_phase(8, 7, 5)
    together = solve(phase, (SOFT, STIFF), UNIAXIAL)
    alone = solve(phase[3:4], (SOFT, STIFF), UNIAXIAL)
    assert np.array_equal(alone.strain[0], together.strain[3])
    assert np.array_equal(alone.stress_GPa[0], together.stress_GPa[3])
    assert together.stress_GPa.shape == (5, 6)
    assert together.strain.shape == (5, 6, 7, 7, 7)


def test_the_element_has_18_modes_and_no_energy_in_rigid_motions() -> None:
    modes = element_modes()
    assert np.linalg.matrix_rank(modes) == 18
    rotation = np.einsum(
        "cij,j->ci", affine_displacement().reshape(8, 3, 6)[:, :, 3:4], np.ones(1)
    ) * np.array([1.0, 1.0, -1.0])
    assert np.abs(modes @ np.tile([1.0, 2.0, 3.0], 8)).max() < 1e-12
    assert np.abs(modes @ rotation.ravel()).max() < 1e-12


def test_not_converged_is_an_error_that_names_the_sample() -> None:
    phase = np.concatenate([np.zeros((1, 5, 5, 5), np.uint8), random_phase(9, 5)])
    with pytest.raises(SolverError, match=r"sample 1: residual .* after 3 iterations.*Raise"):
        solve(phase, (SOFT, STIFF), UNIAXIAL, max_iterations=3)


def test_views_and_read_only_volumes_are_accepted() -> None:
    phase = random_phase(10, 5)
    view = phase[:, ::-1]
    view.flags.writeable = False
    assert c1111(view, (SOFT, STIFF)) == pytest.approx(c1111(phase, (SOFT, STIFF)))
    assert c1111(torch.from_numpy(phase), (SOFT, STIFF)) == c1111(phase, (SOFT, STIFF))


@pytest.mark.parametrize(
    ("phase", "load", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), UNIAXIAL, "expected integers of shape"),
        (np.zeros((1, 4, 4, 4)), UNIAXIAL, "expected integers of shape"),
        (np.full((1, 4, 4, 4), 2, np.uint8), UNIAXIAL, r"phase holds 2\.\.2; expected 0\.\.1"),
        (np.zeros((1, 4, 4, 4), np.uint8), (0.0,) * 6, "macro_strain"),
        (np.zeros((1, 4, 4, 4), np.uint8), (1.0, 0.0), "macro_strain"),
        (np.zeros((1, 4, 4, 4), np.uint8), (float("nan"),) * 6, "macro_strain"),
    ],
)
def test_unusable_input(phase: np.ndarray, load: tuple[float, ...], message: str) -> None:
    with pytest.raises(DMIError, match=message):
        solve(phase, (SOFT, STIFF), load)


@pytest.mark.parametrize(("youngs", "poisson"), [(0.0, 0.3), (float("inf"), 0.3), (1.0, 0.5)])
def test_unphysical_material(youngs: float, poisson: float) -> None:
    with pytest.raises(DMIError, match="expected"):
        Material(youngs, poisson)


def test_material_moduli_agree() -> None:
    material = Material(100.0, 0.25)
    assert material.shear_GPa == pytest.approx(40.0)
    assert material.bulk_GPa == pytest.approx(200 / 3)
    compliance = np.linalg.inv(material.stiffness_GPa())
    assert 1 / compliance[0, 0] == pytest.approx(100.0)
    assert -compliance[0, 1] / compliance[0, 0] == pytest.approx(0.25)


def localization_data() -> Path:
    root = os.environ.get("DMI_TEST_DATA")
    folder = Path(root) if root else Path(__file__).parents[2].parent / "shared" / "data"
    path = folder / "localization" / "fe_mve_c10_c50.npz"
    if not path.exists():
        pytest.skip(f"real data not at hand: {path.name}")
    return path


def test_reproduces_the_published_finite_element_strains() -> None:
    """Yang et al. (2019), contrast 50; mean absolute strain error below 0.002 % in every volume."""
    with np.load(localization_data()) as data:
        phase, reference = data["c50_phase"], data["c50_strain"]
    reference = reference / reference.mean((1, 2, 3), keepdims=True)
    strain = solve(phase, (SOFT, STIFF), UNIAXIAL).strain[:, 0]
    error_percent = 100 * np.abs(strain - reference).mean((1, 2, 3))
    assert (error_percent < 0.002).all(), error_percent
