"""Writers killed (SIGKILL) at any instant: a folder holds the old set or the new one, whole.

One warm process forks a writer a trial, so that hundreds of kills take seconds. The pool of build()
is forked, too, instead of spawned: what its processes do to the disk is the same.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import toy_build as toy

from dmi_hpc.data.manifest import read_manifest
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.errors import DataError

pytestmark = pytest.mark.slow

ROWS = 90
SHARDS = 3
FOLLOW = 1.04  # how instants follow the speed of a machine that has other work, too
SERVER = """
import ctypes, json, multiprocessing, os, select, signal, sys, tempfile, time, traceback
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import toy_build as toy

fork = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method: fork
with tempfile.TemporaryDirectory() as folder:  # what is made once a process is made before forks
    toy.write_set(Path(folder))
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # adopts the workers of the killed

def work(job):
    target, seed = Path(job["target"]), job["seed"]
    steps = [0]
    def watch(event, arguments):
        file = arguments[0] if event in ("open", "os.rename", "os.remove", "os.mkdir") else None
        if job["target"] in str(file):
            steps[0] += 1
            if steps[0] == job["step"]:
                os.kill(os.getpid(), signal.SIGKILL)
    if job["step"]:
        sys.addaudithook(watch)
    if job["what"] == "append":
        toy.write_set(target, rows=job["rows"], seed=seed, rows_per_shard=job["rows"] // job["shards"])
    else:
        plan = toy.make_plan(job["rows"], job["rows"] // job["shards"], seed=seed)
        rows = toy.Rows(seed=seed, calls=job["calls"])
        toy.build_alone(target, plan, rows, processes=job["processes"])

for line in sys.stdin:
    job = json.loads(line)
    ours, theirs = os.pipe()  # all processes of a trial hold `theirs`
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(ours)
            work(job)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(theirs)
    started = time.monotonic()
    done = os.pidfd_open(child)
    if not select.select([done], [], [], job["kill_after"])[0]:
        os.kill(child, signal.SIGKILL)
    os.close(done)
    status = os.waitpid(child, 0)[1]
    took = time.monotonic() - started
    gone = bool(select.select([ours], [], [], 30)[0])  # the end of the pipe: none is left
    os.close(ours)
    while gone:  # adopted workers, too: their files close one after the other
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    code = os.waitstatus_to_exitcode(status)
    print(json.dumps({"code": code, "gone": gone, "took": took}), flush=True)
"""


class Writers:
    """Starts writers and kills them."""

    def __init__(self, process, log):
        self._process, self._log = process, log

    def run(self, target, seed, what="append", *, kill_after=60.0, step=0, calls="", processes=2):
        """True if it ended by itself, and how long it took."""
        job = {
            "target": str(target),
            "seed": seed,
            "what": what,
            "kill_after": kill_after,
            "step": step,
            "calls": str(calls),
            "processes": processes,
            "rows": ROWS,
            "shards": SHARDS,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        assert found["gone"], "a process outlives its killed parent"
        assert found["code"] in (0, -9), (found, self._log.read_text())
        return found["code"] == 0, found["took"]


@contextmanager
def server(log):
    command = [sys.executable, "-c", SERVER, str(Path(toy.__file__).parent)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            yield Writers(process, log)
        finally:
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    with server(tmp_path_factory.mktemp("server") / "stderr") as found:
        yield found


EXPECTED = {}


def check_whole(folder):
    """The seed of the set in a folder; every byte of it is right."""
    with ShardSet.open(folder, verify="open", backend="mmap") as shards:
        seed = shards.manifest.plan.seed
        if seed not in EXPECTED:
            EXPECTED[seed] = toy.make_rows(range(ROWS), seed)
        found = toy.stored_rows(shards)
    for name, made in EXPECTED[seed].items():
        assert toy.equal(found[name], made), name
    return seed


def check_clean(folder):
    named = {shard.file for shard in read_manifest(folder).shards}
    assert {path.name for path in folder.iterdir()} == named | {"manifest.json"}


def time_of(writers, folder, **options):
    """Of a whole write: the middle one of three."""
    return sorted(writers.run(folder, k, **options)[1] for k in range(3))[1]


def test_a_writer_killed_at_any_instant_leaves_the_old_set_or_the_new_one(writers, tmp_path):
    """Each trial finds the folder as the killed one before it left it."""
    target, chance = tmp_path / "set", random.Random(1)
    whole = time_of(writers, target)
    current, ended = check_whole(target), Counter()
    for trial in range(10, 160):
        # half of them around the commit, which is the last part
        late = chance.random() < 0.5
        instant = whole * (chance.uniform(0.7, 1.3) if late else chance.uniform(0, 1))
        finished, _ = writers.run(target, trial, kill_after=instant)
        found = check_whole(target)
        assert found in (current, trial)
        assert found == trial or not finished
        ended["finished" if finished else "new" if found == trial else "old"] += 1
        whole *= FOLLOW if found != trial else 1 / FOLLOW
        current = found
        if trial % 15 == 0:  # the next writer succeeds and leaves no stray file
            assert writers.run(target, trial + 1000)[0]
            check_clean(target)
            current = check_whole(target)
            assert current == trial + 1000
    assert ended["old"] > 20
    assert ended["new"] + ended["finished"] > 20


def test_a_writer_killed_before_each_of_its_steps(writers, tmp_path):
    """Every file opened, renamed or removed is a step: none is left out."""
    old, ended, step, finished = tmp_path / "old", [], 0, False
    toy.write_set(old, rows=ROWS, seed=1)
    while not finished:
        step += 1
        assert step < 200
        target = tmp_path / str(step)
        shutil.copytree(old, target)
        finished, _ = writers.run(target, 2, step=step)
        ended.append(check_whole(target))
        assert writers.run(target, 3)[0]
        assert check_whole(target) == 3
        check_clean(target)
    assert ended == sorted(ended)  # old until the commit, new from then on
    assert 2 * SHARDS < ended.count(1) < step - SHARDS
    assert ended.count(2) >= 2


def without_maker(folder):
    """The manifest but for what made it: its source may be edited while this runs."""
    return read_manifest(folder).model_copy(update={"made_with": {}})


def check_resumed(writers, target, calls, seed):
    """A killed build goes on: only shards that were not noted are made."""
    noted = {path.name.removesuffix(".part.json") for path in target.glob("*.part.json")}
    complete = (target / "manifest.json").exists()
    times = {name: (target / name).stat().st_mtime_ns for name in noted}
    calls.unlink(missing_ok=True)
    assert writers.run(target, seed, "build", calls=calls, processes=1)[0]
    lines = calls.read_text().splitlines() if calls.exists() else []
    made = {f"shard-{int(line.split()[0]) * SHARDS // ROWS:05d}.h5" for line in lines}
    shards = {f"shard-{k:05d}.h5" for k in range(SHARDS)}
    assert made == (set() if complete else shards - noted)
    assert all((target / name).stat().st_mtime_ns == then for name, then in times.items())
    assert check_whole(target) == seed
    if complete:  # then nothing needed the lock, whose file a killed holder leaves
        (target / ".dmi-lock").unlink(missing_ok=True)
    check_clean(target)


def test_a_build_killed_at_any_instant_goes_on(writers, tmp_path):
    reference = tmp_path / "reference"
    assert writers.run(reference, 7, "build")[0]
    whole = sorted(writers.run(tmp_path / f"t{k}", 7, "build")[1] for k in range(3))[1]
    chance, ended = random.Random(2), Counter()
    for trial in range(50):
        target, calls = tmp_path / f"{trial}", tmp_path / f"{trial}.calls"
        late = chance.random() < 0.4
        instant = whole * (chance.uniform(0.7, 1.3) if late else chance.uniform(0, 1))
        finished, _ = writers.run(target, 7, "build", kill_after=instant)
        try:
            assert check_whole(target) == 7
            ended["new"] += 1
            whole /= FOLLOW
        except DataError as error:
            assert "manifest.json: no such file" in str(error)
            assert not finished
            ended["nothing"] += 1
            whole *= FOLLOW
        target.mkdir(exist_ok=True)
        check_resumed(writers, target, calls, 7)
        assert without_maker(target) == without_maker(reference)
        for shard in read_manifest(target).shards:
            assert (target / shard.file).read_bytes() == (reference / shard.file).read_bytes()
    assert min(ended["nothing"], ended["new"]) > 3


def test_a_build_killed_before_each_of_its_steps_goes_on(writers, tmp_path):
    ended, step, finished = [], 0, False
    while not finished:
        step += 1
        assert step < 200
        target, calls = tmp_path / str(step), tmp_path / f"{step}.calls"
        finished, _ = writers.run(target, 7, "build", step=step, processes=1)
        ended.append((target / "manifest.json").exists())
        target.mkdir(exist_ok=True)
        check_resumed(writers, target, calls, 7)
    assert ended == sorted(ended)
    assert ended.count(False) > 4 * SHARDS
    assert ended.count(True) > 2


def test_a_build_refuses_the_folder_of_another_set_alive_or_killed(writers, tmp_path):
    """Over an older set build() does nothing, whenever it is killed."""
    toy.build_alone(tmp_path, toy.make_plan(ROWS, ROWS // SHARDS, seed=1), toy.Rows(seed=1))
    before = toy.content(tmp_path)
    with pytest.raises(DataError, match="holds another data set"):
        toy.build_alone(tmp_path, toy.make_plan(ROWS, ROWS // SHARDS, seed=2), toy.Rows(seed=2))
    assert toy.content(tmp_path) == before
    for name in list(before)[:2]:
        if name != "manifest.json":
            (tmp_path / name).unlink()
    lost = toy.content(tmp_path)
    with pytest.raises(DataError, match="holds another data set"):
        toy.build_alone(tmp_path, toy.make_plan(ROWS, ROWS // SHARDS, seed=2), toy.Rows(seed=2))
    assert toy.content(tmp_path) == lost
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # mended in steps, each of them killed
        finished, _ = writers.run(tmp_path, 1, "build", kill_after=0.05, processes=1)
        if finished:
            break
    assert finished or writers.run(tmp_path, 1, "build")[0]
    assert check_whole(tmp_path) == 1
    assert {n: c for n, c in toy.content(tmp_path).items() if n != "manifest.json"} == {
        n: c for n, c in before.items() if n != "manifest.json"
    }
