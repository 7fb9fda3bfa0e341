"""Small checkpoints, and processes killed while they write one; a JSON line about each, to stdout.

    python checkpoint_victims.py FOLDER events   by themselves, at each file operation in turn
    python checkpoint_victims.py FOLDER times    by their parent, at moments all over the write

Each is forked from this process, which has imported all: that takes milliseconds. Before each the
folder holds the whole checkpoint of step 1; each writes step 2, of 10 MB, and then removes step 1.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from dmi_hpc import checkpoint
from dmi_hpc.files import remove_stale
from dmi_hpc.models.spec import Dense, NetworkSpec
from dmi_hpc.targets import TargetScale
from dmi_hpc.writer import Writer

MOMENTS, NUMBERS = 80, 800_000
OPERATIONS = ("open", "os.", "shutil.")


def meta_of(step, mae=None, **more):
    return checkpoint.Meta(
        step=step,
        epoch=0,
        network=NetworkSpec(input_shape=(3,), layers=(Dense(units=2),)),
        scale=TargetScale(transform="identity", mean=0.0, std=1.0),
        task={},
        metrics={} if mae is None else {"validation_error": mae},
        **more,
    )


def weights_of(value):
    return {"0.weight": torch.full((2, 3), float(value)), "0.bias": torch.full((2,), -float(value))}


def contents(step):
    numbers = torch.full((NUMBERS,), float(step))
    return {"weight": numbers}, {"step": step, "moments": [numbers, numbers + 1]}


def write(folder, event, ready):
    """Save step 2; killed at file operation number `event` if that is not None."""
    seen = 0

    def kill(name, arguments):
        nonlocal seen
        if name.startswith(OPERATIONS):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    writer = Writer(folder, keep=1)
    if event is not None:
        sys.addaudithook(kill)
    os.write(ready, b"r")
    writer.save(meta_of(2), *contents(2), best_step=-1)
    writer.close()


def victim(folder, event=None, delay=None):
    """Seconds from its start to its end, and whether it was killed."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write(folder, event, send)
            code = 0
        finally:
            os._exit(code)
    os.close(send)
    assert os.read(receive, 1) == b"r"
    os.close(receive)
    started = time.perf_counter()
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return time.perf_counter() - started, os.WIFSIGNALED(status)


def outcome(folder, at, killed):
    """What a training that goes on would find."""
    told = []
    litter = [path.name for path in folder.iterdir() if not path.name.startswith("step-")]
    found = checkpoint.latest(folder, told.append)
    meta, state = checkpoint.read_meta(found), checkpoint.load_state(found)
    values = {float(t.min()) for t in state["moments"]} | {float(t.max()) for t in state["moments"]}
    assert values == {float(meta.step), meta.step + 1.0}
    there = [path.name for path in checkpoint.all_in(folder)]
    record = {"at": at, "killed": killed, "step": meta.step, "told": told, "there": there}
    sys.stdout.write(json.dumps({**record, "litter": litter}) + "\n")
    sys.stdout.flush()


def prepare(folder):
    remove_stale(folder)
    for path in checkpoint.all_in(folder):
        if path.name != "step-00000001":
            checkpoint.prune(folder, 1, folder / "step-00000001")
            path.rename(folder / ".tmp-step-1-0123abcd")
            remove_stale(folder)
    checkpoint.save(folder, meta_of(1), *contents(1))


def main(folder, way):
    torch.set_num_threads(1)
    folder.mkdir()
    prepare(folder)
    if way == "events":
        event, killed = 0, True
        while killed:
            event += 1
            prepare(folder)
            _, killed = victim(folder, event=event)
            outcome(folder, event, killed)
        return
    taken = []
    for _ in range(3):
        prepare(folder)
        taken.append(victim(folder)[0])
    for moment in range(MOMENTS):
        prepare(folder)
        delay = 1.2 * sorted(taken)[1] * moment / MOMENTS
        _, killed = victim(folder, delay=delay)
        outcome(folder, delay, killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
