"""The published systems as tasks: inputs, symmetries, networks, pictures, a user's files."""

import numpy as np
import pytest

from dmi_hpc.data.loader import random_bits
from dmi_hpc.errors import DataError
from dmi_hpc.models.cost import cost
from dmi_hpc.models.spec import Conv, Dense, Pool, shapes
from dmi_hpc.physics.elasticity import solve
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.homogenization import UNIAXIAL

SIDE = 6


def homogenization(voxels=SIDE, **options):
    return make_task({"name": "homogenization", "voxels": voxels, **options})


def volumes(n, side=SIDE, seed=0):
    return (np.random.default_rng(seed).random((n, side, side, side)) < 0.5).astype(np.uint8)


def images(task, phase, n, epoch=0):
    """n augmented copies of one volume, as phases."""
    copies = task.inputs({"phase": np.repeat(phase[None], n, axis=0)})
    moved = task.augment(copies, random_bits(1, epoch, np.arange(n)))
    return (moved[:, 0] > 0).astype(np.uint8)


def test_phases_enter_the_network_centred():
    task = homogenization()
    inputs = task.inputs({"phase": volumes(3)})
    assert inputs.shape == (3, *task.input_shape) == (3, 1, SIDE, SIDE, SIDE)
    assert inputs.dtype == np.float32
    assert set(np.unique(inputs)) == {-0.5, 0.5}


def test_augmentation_leaves_the_stiffness_unchanged():
    """Solved for real: C1111 of every image is that of the volume."""
    task, phase = homogenization(), volumes(1)[0]
    batch = np.concatenate([phase[None], images(task, phase, 12)])
    found = solve(batch, task.o.materials, UNIAXIAL, tolerance=1e-8).stress_GPa[:, 0]
    np.testing.assert_allclose(found, found[0], rtol=1e-6)
    turned = phase.transpose(1, 0, 2)[None]  # this one does not keep the load axis
    assert solve(turned, task.o.materials, UNIAXIAL).stress_GPa[0, 0] != pytest.approx(
        found[0], rel=1e-3
    )


def test_augmentation_is_a_pure_function_of_its_bits_and_finds_all_images():
    task, phase = homogenization(voxels=5), volumes(1, side=5)[0]
    some = images(task, phase, 50)
    np.testing.assert_array_equal(some, images(task, phase, 50))
    assert (some != images(task, phase, 50, epoch=1)).any()
    distinct = {image.tobytes() for image in images(task, phase, 20_000)}
    assert len(distinct) == 5**3 * 16


def test_augmentation_treats_each_row_alone():
    task, bits = homogenization(), random_bits(3, 0, np.arange(4))
    inputs = task.inputs({"phase": volumes(4)})
    together = task.augment(inputs, bits)
    for row in range(4):
        alone = task.augment(inputs[row : row + 1], bits[row : row + 1])
        np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.parametrize(("voxels", "poolings"), [(15, 3), (21, 4), (51, 5)])
def test_the_published_network_fits_every_size(voxels, poolings):
    """Yang et al. 2018: 16-32-64-128-256 filters, dense 2048 and 1024, 3.8 M parameters."""
    network = homogenization(voxels).published_network()
    layers = network.layers
    assert [layer.filters for layer in layers if isinstance(layer, Conv)] == [16, 32, 64, 128, 256]
    assert [layer.units for layer in layers if isinstance(layer, Dense)] == [2048, 1024]
    assert sum(isinstance(layer, Pool) for layer in layers) == poolings
    assert shapes(network)[-1] == (1024,)
    assert cost(network).parameters == pytest.approx(3.8e6, rel=0.02)


def test_baselines_of_homogenization_are_in_the_order_of_the_paper():
    task = homogenization()
    phase = volumes(40)
    truth = solve(phase, task.o.materials, UNIAXIAL, tolerance=1e-4).stress_GPa[:, 0]
    train, test = {"phase": phase[:30]}, {"phase": phase[30:]}
    errors = {
        b.name: np.abs(b.predict(train, truth[:30], test) - truth[30:]).mean()
        for b in task.baselines()
    }
    assert set(errors) == {"voigt", "hashin_shtrikman", "two_point", "two_point_symmetric"}
    assert errors["voigt"] > errors["hashin_shtrikman"]
    assert errors["voigt"] > 3 * errors["two_point_symmetric"]


def test_pictures_are_png_and_name_truth_and_prediction():
    phase, truth = volumes(6), np.linspace(20, 70, 6)
    pictures = homogenization().pictures({"phase": phase}, truth, truth * 1.1)
    assert len(pictures) == 4
    assert len({picture.name for picture in pictures}) == 4
    for picture in pictures:
        assert picture.png.startswith(b"\x89PNG\r\n\x1a\n")
        assert "GPa" in picture.caption
        assert "+10.0 %" in picture.caption


def test_a_users_volumes_are_read_or_refused(tmp_path):
    task, path = homogenization(), tmp_path / "phases.npy"
    np.save(path, volumes(3))
    labels, fields = task.read_inputs(path)
    assert labels == ["0", "1", "2"]
    np.testing.assert_array_equal(fields["phase"], volumes(3))
    np.save(path, volumes(1)[0])
    assert task.read_inputs(path)[1]["phase"].shape == (1, SIDE, SIDE, SIDE)
    for wrong in (volumes(2, side=5), volumes(2) * 3, np.float64(1.0)):
        np.save(path, wrong)
        with pytest.raises(DataError, match="expected phases 0 and 1 of shape"):
            task.read_inputs(path)
    path.write_text("1 0 1")
    with pytest.raises(DataError, match=r"expected a \.npy file"):
        task.read_inputs(path)
    with pytest.raises(DataError, match="absent"):
        task.read_inputs(tmp_path / "absent.npy")


def test_elemnet_is_the_published_network():
    layers = make_task({"name": "elemnet"}).published_network().layers
    units = [layer.units for layer in layers if isinstance(layer, Dense)]
    assert units == [1024] * 4 + [512] * 3 + [256] * 3 + [128] * 3 + [64] * 2 + [32]
    plain = make_task({"name": "elemnet", "dropout": False}).published_network()
    assert len(layers) - len(plain.layers) == 4
    assert cost(plain).parameters == pytest.approx(4.63e6, rel=0.01)


def test_elemnet_learns_from_its_range_only():
    target = np.array([-6.0, -5.0, 0.0, 5.0, 43.0])
    limited = make_task({"name": "elemnet", "train_range": [-5.0, 5.0]})
    assert limited.in_training(target).tolist() == [False, True, True, True, False]
    assert make_task({"name": "elemnet"}).in_training(target).all()


def test_elemnet_forests_learn_from_compositions():
    task = make_task({"name": "elemnet", "forest_trees": 20})
    x = np.random.default_rng(0).dirichlet(np.ones(task.input_shape[0]), 300).astype(np.float32)
    y = 10 * x[:, 0] - x[:, 1]
    for forest, share in zip(task.baselines(), (0.7, 0.9), strict=True):
        predicted = forest.predict({"fractions": x[:200]}, y[:200], {"fractions": x[200:]})
        error, spread = np.abs(predicted - y[200:]).mean(), np.abs(y[200:] - y[:200].mean()).mean()
        assert error < share * spread, forest.name


def test_elemnet_reads_formulas_by_line(tmp_path):
    task, path = make_task({"name": "elemnet"}), tmp_path / "formulas.csv"
    path.write_text("formula,note\nNaCl,salt\n\nNaN,not a missing value\nNa2Cl2,salt too\n")
    labels, fields = task.read_inputs(path)
    assert labels == ["NaCl", "NaN", "Na2Cl2"]
    assert fields["fractions"].shape == (3, *task.input_shape)
    np.testing.assert_array_equal(fields["fractions"][0], fields["fractions"][2])
    for text, said in (
        ("formula\nNaCl\n\nXyz\n", "line 4: 'Xyz'"),
        ("formula,note\nNaCl,a\n,b\n", "line 3"),
        ("compound\nNaCl\n", "expected a column 'formula', found columns: compound"),
        ("formula\n\n", "no formulas"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            task.read_inputs(path)
