"""ShardLoader as PyTorch users meet it: passes, state, tensors, devices, and a clean end."""

import contextlib
import gc
import json
import pickle
import signal
import subprocess
import sys
import threading
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runner import environment
from shard_sets import NUMERIC, make_set
from torch.utils.data import DataLoader

from dmi_hpc.data import Ragged, ShardLoader, ShardSet
from dmi_hpc.errors import DataError

ROWS = 103
FIELDS = ("n", "x", "z", "edge")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "data"
    make_set(folder, ROWS, 40)
    return folder


@pytest.fixture(scope="module")
def shards(folder):
    with ShardSet.open(folder) as opened:
        yield opened


def rows_of(batches):
    return [batch["_rows"].tolist() for batch in batches]


def threads_of_loaders():
    return [t.name for t in threading.enumerate() if t.name.startswith("dmi-loader")]


# passes and state


def test_each_pass_is_an_epoch(shards):
    loader = ShardLoader(shards, FIELDS, batch_size=16)
    train = np.asarray(shards.rows("train")).tolist()
    first, second = rows_of(loader), rows_of(loader)
    assert len(first) == len(loader) == -(-len(train) // 16)
    assert sorted(chain(*first)) == sorted(chain(*second)) == train
    assert first != second
    loader.set_epoch(0)
    assert rows_of(loader) == first
    assert (loader.epoch, loader.position) == (1, 0)


def test_a_pass_that_is_left_is_over(shards):
    """As everywhere in PyTorch: a look at the first batch takes nothing away from the next pass."""
    loader = ShardLoader(shards, FIELDS, batch_size=16)
    epochs = [rows_of(loader) for _ in range(4)]
    loader.set_epoch(0)
    assert next(iter(loader))["_rows"].tolist() == epochs[0][0]
    assert rows_of(loader) == epochs[1]
    # one that knows the length never asks for more than the last batch (Lightning)
    for epoch in (2, 3):
        passing = iter(loader)
        assert [next(passing)["_rows"].tolist() for _ in range(len(loader))] == epochs[epoch]


def test_an_epoch_without_batches_ends(shards):
    loader = ShardLoader(shards, FIELDS, batch_size=500, tail="drop")
    assert [len(list(loader)), len(list(loader)), loader.epoch] == [0, 0, 2]


@given(
    batch_size=st.integers(1, 40),
    later=st.integers(1, 40),
    taken=st.integers(0, 120),
    size=st.integers(1, 3),
    threads=st.integers(0, 3),
    shuffle=st.sampled_from(["global", "block", "none"]),
    tail=st.sampled_from(["keep", "drop"]),
)
@settings(deadline=None, max_examples=50)
def test_a_state_continues_anywhere(shards, batch_size, later, taken, size, threads, shuffle, tail):
    """What is left after a state, through JSON, at another batch size and number of ranks."""
    options = {"shuffle": shuffle, "seed": 3, "parts": 1}  # with parts the batch size must stay
    whole = ShardLoader(shards, ("n",), batch_size=1, **options)
    sequence = [row for _ in range(3) for [row] in rows_of(whole)]
    loader = ShardLoader(shards, ("n",), batch_size=batch_size, tail="keep", threads=0, **options)
    seen, state = [], loader.state_dict()
    for _ in range(2):
        for batch in loader:
            if taken == 0:
                break
            taken -= 1
            seen += batch["_rows"].tolist()
            state = loader.state_dict()  # as the loop's body would save it
    state = json.loads(json.dumps(state))
    assert seen == sequence[: len(seen)]
    rest = []
    for rank in range(size):
        # of another seed: the state's order counts
        other = ShardLoader(
            shards,
            ("n",),
            batch_size=later,
            shuffle="global",
            rank=rank,
            size=size,
            threads=threads,
            tail=tail,
            seed=9,
        )
        other.load_state_dict(state)
        assert other.state_dict() == state
        steps = [(b["_rows"][b["_weights"] == 1].tolist(), other.position) for b in other]
        rest.append([rows for rows, _ in steps])
    remaining = [row for step in zip(*rest, strict=True) for rows in step for row in rows]
    left = len(shards.rows("train")) - state["position"]
    expected = left - left % later if tail == "drop" else left
    assert len(remaining) == expected
    assert seen + remaining == sequence[: len(seen) + expected]


def test_a_state_of_other_data_is_refused(shards, tmp_path):
    make_set(tmp_path / "other", 90, 40)
    loader = ShardLoader(shards, ("n",), batch_size=16)
    other = ShardLoader(tmp_path / "other", ("n",), batch_size=16)
    with pytest.raises(DataError, match=r"loader state: made from data set .*, found data set"):
        other.load_state_dict(loader.state_dict())
    validation = ShardLoader(shards, ("n",), batch_size=16, split="validation")
    with pytest.raises(DataError, match=r"of the rows 'train', this loader of 'validation'"):
        validation.load_state_dict(loader.state_dict())
    some, others = (
        ShardLoader(shards, ("n",), batch_size=4, rows=np.arange(k, k + 9)) for k in (0, 9)
    )
    with pytest.raises(DataError, match=r"a checksum of row numbers"):
        others.load_state_dict(some.state_dict())
    with pytest.raises(DataError, match=r"not the state of a ShardLoader: data, epoch"):
        loader.load_state_dict({"order": {}, "position": 3})


def test_ranks_without_torch_distributed_must_say_the_shuffle(shards):
    """Each would choose by the memory and the storage of its own node."""
    with pytest.raises(DataError, match=r"each rank would choose a shuffle of its own"):
        ShardLoader(shards, ("n",), batch_size=8, rank=0, size=2)
    small = shards.access.__class__("pread", "block", 2**14, "little memory here")
    loaders = []
    for access in (shards.access, small):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "access", access)
            options = {"batch_size": 8, "size": 2, "shuffle": "block"}
            loaders.append(ShardLoader(shards, ("n",), rank=len(loaders), **options))
    assert loaders[0].order == loaders[1].order


def test_weights_of_a_batch_are_its_own(shards):
    sums = []
    for batch in ShardLoader(shards, ("n",), batch_size=16, tail="drop"):
        batch["_weights"].mul_(2)
        sums.append(float(batch["_weights"].sum()))
    assert set(sums) == {32.0}


# tensors


def test_tensors_of_every_kind_of_field(shards):
    loader = ShardLoader(shards, NUMERIC, batch_size=16, split="all")
    for batch in loader:
        assert set(batch) == {*NUMERIC, "_offsets.node", "_offsets.edge", "_weights", "_rows"}
        found = {name: tensor.numpy() for name, tensor in batch.items()}
        expected = shards.fields(NUMERIC, found["_rows"])
        for name, values in expected.items():
            if isinstance(values, Ragged):
                axis = "edge" if name == "edge" else "node"
                np.testing.assert_array_equal(found[f"_offsets.{axis}"], values.offsets)
                values = values.values
            if name == "edge":
                base = np.repeat(found["_offsets.node"][:-1], np.diff(found["_offsets.edge"]))
                values = values.astype(np.int64) + base[:, None]
            np.testing.assert_array_equal(found[name], values, strict=True)
        assert (found["_weights"] == 1).all()


def test_chosen_rows_and_wrong_ones(shards):
    rows = np.array([5, 90, 17, 17])
    loader = ShardLoader(shards, ("n",), rows=rows, batch_size=3, shuffle="none")
    assert rows_of(loader) == [[5, 90, 17], [17]]
    with pytest.raises(IndexError, match="rows -1 to 3 of a set of 103"):
        ShardLoader(shards, ("n",), rows=np.array([-1, 3]), batch_size=3)
    with pytest.raises(IndexError, match="expected an array of row numbers, found bool"):
        ShardLoader(shards, ("n",), rows=np.ones(ROWS, dtype=bool), batch_size=3)
    with pytest.raises(DataError, match="field 'name' is text"):
        ShardLoader(shards, ("name",), batch_size=3)
    with pytest.raises(DataError, match="no field 'y'"):
        ShardLoader(shards, ("y",), batch_size=3)
    with pytest.raises(DataError, match="batch_size is 0; it must be at least 1"):
        ShardLoader(shards, ("n",), batch_size=0)
    with pytest.raises(IndexError, match="rank 2 of 2"):
        ShardLoader(shards, ("n",), batch_size=4, rank=2, size=2, shuffle="global")


def test_data_loader_of_torch(shards):
    plain = ShardLoader(shards, FIELDS, batch_size=16)
    wrapped = DataLoader(ShardLoader(shards, FIELDS, batch_size=16), batch_size=None, num_workers=0)
    assert len(wrapped) == len(plain)
    for _ in range(2):
        for a, b in zip(wrapped, plain, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_workers_of_a_data_loader_are_refused(folder):
    loader = DataLoader(
        ShardLoader(folder, FIELDS, batch_size=16, threads=0),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
    )
    reading = iter(loader)
    with pytest.raises(DataError, match=r"would read every batch once more.*num_workers=0"):
        next(reading)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in reading._workers:  # after an error torch waits 5 s for each
        worker.kill()
    reading._shutdown_workers()
    signal.signal(signal.SIGCHLD, handler)
    with pytest.raises(DataError, match="works in the process that has made it"):
        pickle.dumps(loader)  # where workers are spawned


# ends


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_the_loop_may_be_left(shards, threads):
    loader = ShardLoader(shards, FIELDS, batch_size=2, threads=threads)
    for _ in loader:
        assert bool(threads_of_loaders()) == (threads > 0)
        break
    assert threads_of_loaders() == []
    with pytest.raises(ZeroDivisionError):
        for _ in loader:
            raise ZeroDivisionError
    gc.collect()
    assert threads_of_loaders() == []
    passing = iter(loader)
    next(passing)
    passing.close()
    assert threads_of_loaders() == []
    list(loader)
    assert threads_of_loaders() == []


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_in_a_transform_reaches_the_loop(shards, threads):
    def failing(batch):
        if batch.start >= 40:
            raise ZeroDivisionError(f"the user's own bug at {batch.start}")
        return batch.fields

    loader = ShardLoader(shards, FIELDS, batch_size=8, threads=threads, transform=failing)
    got = []
    with pytest.raises(ZeroDivisionError, match="the user's own bug at 40"):
        got.extend(batch["_rows"] for batch in loader)
    assert [len(rows) for rows in got] == [8, 8, 8]  # two more were to be read together with it
    gc.collect()
    assert threads_of_loaders() == []
    assert loader.position == 24


@pytest.mark.parametrize("backend", ["mmap", "pread", "direct", "ram", "h5py"])
def test_no_file_stays_open(folder, backend):
    def mine():
        links = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
        return [link for link in links if link.is_relative_to(folder.resolve())]

    with contextlib.suppress(DataError), ShardSet.open(folder, backend=backend) as shards:
        for _ in ShardLoader(shards, FIELDS, batch_size=2):
            break
    assert mine() == []


CHILD = """
import sys
from dmi_hpc.data import ShardLoader, ShardSet
loader = ShardLoader(ShardSet.open(sys.argv[1], backend=sys.argv[2]), ("n", "x", "z"), batch_size=2)
"""
ENDS = {
    "in the middle of a pass": ("kept = iter(loader); next(kept)", 0),
    "by exit": ("for _ in loader: sys.exit(7)", 7),
    "by an error": ("for _ in loader: raise ValueError('left')", 1),
    "in a function": ("def f():\n    for b in loader: return b\nprint(f()['n'].shape)", 0),
}


def child(folder, code, backend="pread", **options):
    return subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD + code, folder, backend],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_the_interpreter_ends_while_a_loader_is_at_work(folder):
    started = {how: child(folder, code) for how, (code, _) in ENDS.items()}
    for how, process in started.items():
        _, err = process.communicate(timeout=60)
        assert process.returncode == ENDS[how][1], f"{how}: {err}"
        assert how == "by an error" or err == ""


@pytest.mark.parametrize("backend", ["mmap", "pread", "ram"])
def test_no_shared_memory_that_a_kill_would_leave(folder, backend):
    process = child(
        folder,
        "next(iter(loader)); print('reading', flush=True); input()",
        backend,
        stdin=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == "reading\n", process.stderr.read()
        inside = psutil.Process(process.pid)
        maps = [m.path for m in inside.memory_maps(grouped=False)]
        links = [str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        named = [
            path
            for path in [*maps, *links]
            if path.startswith("/dev/shm") and not Path(path).is_relative_to(folder)
        ]
        assert named == []
        assert inside.children(recursive=True) == []
        written = [p for p in folder.iterdir() if p.name != "manifest.json" and p.suffix != ".h5"]
        assert written == []
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
