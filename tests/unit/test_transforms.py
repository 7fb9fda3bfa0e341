"""Batched transforms: exact, reversible, and the same at any number of ranks and threads."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.data import BuildPlan, Field, Ragged, ShardLoader, ShardSet, ShardWriter, SplitRule
from dmi_hpc.data.loader import Batch, random_bits
from dmi_hpc.data.transforms import (
    Cast,
    Compose,
    CrystalRotation,
    Normalise,
    Symmetry,
    VoxelSymmetry,
    cube_symmetries,
    random_rotations,
)
from dmi_hpc.errors import DataError

ROWS = 90


def make_batch(fields, seed=0, rows=None):
    rows = len(next(iter(fields.values()))) if rows is None else rows
    numbers = np.arange(rows)
    weights = np.ones(rows, dtype=np.float32)
    return Batch(fields, numbers, numbers, weights, seed, 0, 0, rows)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    plan = BuildPlan(
        task="toy",
        rows_per_shard=25,
        fields=(
            Field(name="phase", dtype="uint8", shape=(5, 5, 5), unit="", description="0 or 1"),
            Field(
                name="cell", dtype="float64", shape=(3, 3), unit="nm", description="a row a vector"
            ),
            Field(name="stress", dtype="float32", shape=(3, 3), unit="GPa", description="tensor"),
            Field(name="pos", dtype="float32", shape=(3,), unit="nm", description="", axis="node"),
            Field(name="y", dtype="float64", unit="eV", description="energy"),
            Field(name="same", dtype="int64", unit="1", description="constant"),
            Field(name="name", dtype="S3", unit="", description="text"),
        ),
        split_rule=SplitRule(seed=0, validation=0.2, test=0, key="row number"),
        seed=0,
    )
    rng = np.random.default_rng(0)
    stress = rng.normal(size=(ROWS, 3, 3))
    folder = tmp_path_factory.mktemp("set") / "data"
    with ShardWriter(folder, plan) as writer:
        writer.append(
            {
                "phase": rng.integers(0, 2, (ROWS, 5, 5, 5)).astype(np.uint8),
                "cell": rng.normal(size=(ROWS, 3, 3)),
                "stress": (stress + stress.transpose(0, 2, 1)).astype(np.float32),
                "pos": Ragged.from_rows(
                    [rng.normal(size=(i % 4, 3)).astype(np.float32) for i in range(ROWS)]
                ),
                "y": rng.normal(1e6, 0.5, ROWS),
                "same": np.full(ROWS, 7),
                "name": np.full(ROWS, b"Fe", dtype="S3"),
            }
        )
    with ShardSet.open(folder) as opened:
        yield opened


@pytest.mark.parametrize("threads", [0, 2])
def test_ranks_and_threads_do_not_change_what_a_row_becomes(shards, threads):
    """By its place in the epoch: at 1 and 3 ranks, in other batches, and after a resume."""
    transform = Compose(
        (
            VoxelSymmetry(("phase",), shifts=True),
            CrystalRotation(("cell", "pos"), tensors=("stress",)),
            Normalise.of(shards.manifest, ("y",)),
        )
    )
    fields = ("phase", "cell", "stress", "pos", "y")

    def rows_of(batches):
        found = {}
        for batch in batches:
            ends = batch["_offsets.node"]
            for i, row in enumerate(batch["_rows"].tolist()):
                parts = [batch[name][i] for name in fields if name != "pos"]
                parts.append(batch["pos"][ends[i] : ends[i + 1]])
                found[row] = b"".join(part.numpy().tobytes() for part in parts)
        return found

    def loader(**options):
        return ShardLoader(
            shards, fields, transform=transform, threads=threads, shuffle="global", **options
        )

    whole = rows_of(loader(batch_size=16))
    assert len(whole) == len(shards.rows("train"))
    ranks = [rows_of(loader(batch_size=7, rank=rank, size=3)) for rank in range(3)]
    assert {k: v for rank in ranks for k, v in rank.items()} == whole
    resumed = loader(batch_size=5)
    resumed.load_state_dict(loader(batch_size=5).state_dict() | {"position": 13})
    rest = rows_of(resumed)
    assert rest == {row: whole[row] for row in rest}
    assert len(rest) == len(whole) - 13
    again = loader(batch_size=16)
    again.set_epoch(1)
    assert rows_of(again) != whole


# numbers


def test_normalise(shards):
    rows = np.asarray(shards.rows("train"))
    fields = shards.fields(("y", "pos", "same"), rows)
    found = Normalise.of(shards.manifest, ("y", "pos", "same"))(make_batch(fields))
    for values in (found["y"], found["pos"].values):
        assert values.dtype == np.float32
        # of each component in y; over all three in pos
        assert abs(values.mean(dtype=float)) < 1e-6
        assert values.std(dtype=float) == pytest.approx(1, rel=1e-5)
    assert (found["same"] == 0).all()
    back = found["y"].astype(float) * shards.manifest.statistics["y"].std
    back += shards.manifest.statistics["y"].mean
    np.testing.assert_allclose(back, fields["y"], atol=1e-6)  # 1e6 + 0.5: more than float32 holds
    with pytest.raises(DataError, match="'name' has no statistics"):
        Normalise.of(shards.manifest, ("name",))
    with pytest.raises(DataError, match="no field 'z'"):
        Normalise.of(shards.manifest, ("z",))


def test_cast_and_compose_leave_the_batch_alone():
    fields = {"a": np.arange(3), "r": Ragged(np.arange(4), np.array([0, 1, 1, 4])), "b": np.ones(3)}
    batch = make_batch(fields)
    found = Compose((Cast({"a": "float64", "r": "float32"}), Cast({"a": "float16"})))(batch)
    assert [found["a"].dtype, found["r"].values.dtype] == [np.float16, np.float32]
    np.testing.assert_array_equal(found["r"].offsets, [0, 1, 1, 4])
    assert found["b"] is fields["b"]
    assert batch.fields is fields
    assert fields["a"].dtype == np.int64


# voxels


def test_the_symmetries_are_the_groups_of_the_cube():
    grid = np.arange(27).reshape(3, 3, 3)
    every = cube_symmetries()
    assert every[0](grid).tolist() == grid.tolist()
    images = {symmetry(grid).tobytes() for symmetry in every}
    assert len(images) == 48
    for keep, proper, order in ((None, True, 24), (0, False, 16), (1, True, 8), (2, False, 16)):
        some = cube_symmetries(keep, proper=proper)
        mine = {symmetry(grid).tobytes() for symmetry in some}
        assert len(mine) == order
        # closed under composition, so also under inversion: a finite group
        assert {a(b(grid)).tobytes() for a, b in itertools.product(some, some)} == mine
    for symmetry in every:  # as a matrix: proper ones have determinant 1
        matrix = np.zeros((3, 3))
        for i, (axis, flip) in enumerate(zip(symmetry.axes, symmetry.flips, strict=True)):
            matrix[i, axis] = -1 if flip else 1
        assert np.linalg.det(matrix) == pytest.approx(1 if symmetry.proper else -1)
    with pytest.raises(DataError, match="keep: expected an axis 0, 1 or 2, found 3"):
        cube_symmetries(3)


@given(
    st.integers(0, 100),
    st.sampled_from([None, 0, 1, 2]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), (2,)]),
)
@settings(deadline=None, max_examples=30)
def test_each_row_is_changed_by_one_operation_of_the_group(seed, keep, proper, shifts, channels):
    rng = np.random.default_rng(seed)
    volumes = rng.integers(0, 255, (20, *channels, 4, 4, 4)).astype(np.uint8)
    transform = VoxelSymmetry(("v", "w"), keep=keep, proper=proper, shifts=shifts)
    before = volumes.copy()
    found = transform(make_batch({"v": volumes, "w": volumes.astype(np.float32)}, seed))
    np.testing.assert_array_equal(volumes, before)
    np.testing.assert_array_equal(found["v"], found["w"])  # all fields alike
    assert (found["v"].dtype, found["v"].shape) == (volumes.dtype, volumes.shape)
    moves = itertools.product(range(4), repeat=3) if shifts else [(0, 0, 0)]
    allowed = list(itertools.product(cube_symmetries(keep, proper=proper), moves))
    for row, image in zip(volumes[:3], found["v"][:3], strict=True):
        assert any(
            np.array_equal(np.roll(symmetry(row), move, axis=(-3, -2, -1)), image)
            for symmetry, move in allowed
        )


def test_operations_and_shifts_are_equally_frequent():
    volumes = np.zeros((24_000, 3, 3, 3), dtype=np.uint8)
    volumes[:] = np.arange(27).reshape(3, 3, 3)
    found = VoxelSymmetry(("v",))(make_batch({"v": volumes}))["v"].reshape(-1, 27)
    counts = np.unique(found, axis=0, return_counts=True)[1]
    assert len(counts) == 48
    assert ((counts - 500) ** 2 / 500).sum() < 47 + 6 * np.sqrt(2 * 47)  # chi square, 6 sigma
    moved = VoxelSymmetry(("v",), keep=0, shifts=True)(make_batch({"v": volumes}))["v"]
    places = np.bincount(np.argmax(moved.reshape(-1, 27) == 13, axis=1), minlength=27)
    assert ((places - 24_000 / 27) ** 2 / (24_000 / 27)).sum() < 26 + 6 * np.sqrt(2 * 26)


def test_volumes_that_a_symmetry_does_not_fit():
    batch = make_batch(
        {"v": np.zeros((2, 4, 5, 5)), "x": np.zeros((2, 3)), "w": np.zeros((2, 8, 5, 5))}
    )
    with pytest.raises(DataError, match=r"'v': axes of \(4, 5, 5\) voxels cannot be exchanged"):
        VoxelSymmetry(("v",))(batch)
    assert VoxelSymmetry(("v", "w"), keep=0)(batch)["v"].shape == (2, 4, 5, 5)
    with pytest.raises(DataError, match="'w': shifts need equally many voxels"):
        VoxelSymmetry(("v", "w"), keep=0, shifts=True)(batch)
    with pytest.raises(DataError, match="'x': expected dense entries"):
        VoxelSymmetry(("x",))(batch)


def test_a_symmetry_has_an_inverse_that_restores_every_voxel():
    volume = np.random.default_rng(0).random((3, 4, 4, 4))
    for symmetry in cube_symmetries():
        axes = tuple(int(i) for i in np.argsort(symmetry.axes))
        inverse = Symmetry(axes, tuple(symmetry.flips[i] for i in axes))
        np.testing.assert_array_equal(inverse(symmetry(volume)), volume)


# crystals


def test_rotations_are_rotations_and_uniform():
    rotations = random_rotations(random_bits(1, 2, np.arange(20_000)))
    for some in (slice(7, 8), slice(3, 12), slice(100, 20_000, 3)):  # whatever rows are beside
        alone = random_rotations(random_bits(1, 2, np.arange(20_000)[some]))
        assert alone.tobytes() == rotations[some].tobytes()
    unit = np.einsum("nij,nkj->nik", rotations, rotations)
    np.testing.assert_allclose(unit, np.broadcast_to(np.eye(3), unit.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-12)
    # uniform over SO(3): means of the entries 0, of their products 1/3 where equal, else 0
    flat = rotations.reshape(-1, 9)
    assert np.abs(flat.mean(axis=0)).max() < 6 / np.sqrt(3 * 20_000)
    np.testing.assert_allclose(flat.T @ flat / 20_000, np.eye(9) / 3, atol=6 / np.sqrt(20_000))
    angles = np.arccos(np.clip((np.trace(rotations, axis1=1, axis2=2) - 1) / 2, -1, 1))
    assert angles.mean() == pytest.approx(np.pi / 2 + 2 / np.pi, abs=0.03)  # of (1 - cos a) / pi


def test_a_crystal_is_turned_as_a_whole():
    rng = np.random.default_rng(0)
    lengths = np.array([3, 0, 5, 1])
    places = Ragged(rng.normal(size=(9, 3)), np.concatenate([[0], np.cumsum(lengths)]))
    cell, dipole = rng.normal(size=(4, 3, 3)), rng.normal(size=(4, 3))
    stress = rng.normal(size=(4, 3, 3))
    fields = {"pos": places, "cell": cell, "dipole": dipole, "stress": stress, "y": np.ones(4)}
    batch = make_batch(fields, rows=4)
    found = CrystalRotation(("pos", "cell", "dipole"), tensors=("stress",))(batch)
    rotations = random_rotations(batch.bits(2))
    for i in range(4):
        turn = rotations[i]
        np.testing.assert_allclose(found["pos"][i], places[i] @ turn.T, atol=1e-12)
        np.testing.assert_allclose(found["cell"][i], cell[i] @ turn.T, atol=1e-12)
        np.testing.assert_allclose(found["dipole"][i], turn @ dipole[i], atol=1e-12)
        np.testing.assert_allclose(found["stress"][i], turn @ stress[i] @ turn.T, atol=1e-12)
        # nothing physical has changed: fractional coordinates, work of a stress on a strain
        np.testing.assert_allclose(
            found["pos"][i] @ np.linalg.inv(found["cell"][i]), places[i] @ np.linalg.inv(cell[i])
        )
        np.testing.assert_allclose(found["pos"][i] @ turn, places[i], atol=1e-12)  # the inverse
    assert found["y"] is fields["y"]
    assert batch.fields["pos"] is places


def test_what_cannot_be_rotated():
    batch = make_batch(
        {"z": np.ones((2, 3), dtype=np.int64), "v": np.ones((2, 2)), "t": np.ones((2, 3))}
    )
    for names, tensors in ((("z",), ()), (("v",), ()), ((), ("t",))):
        with pytest.raises(DataError, match=r"expected float entries \(\.\.\., 3"):
            CrystalRotation(names, tensors)(batch)
