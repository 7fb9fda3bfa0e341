"""Real ranks over gloo, and real kills: the sequence of global batches stays the same."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runner import (
    assert_gone,
    dmi,
    ended,
    environment,
    epochs_told,
    family,
    members,
    start,
    toy_recipe,
    wait_for,
)
from shard_sets import make_set

from dmi_hpc.config import DataConfig
from dmi_hpc.data import ShardLoader
from dmi_hpc.data.build import Alone
from dmi_hpc.files import read_json_lines
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import BuildContext

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EPOCHS, BATCH = 2, 12

# One rank: ShardLoader finds rank and size by itself. Each line: epoch, step's rows without padding.
RANK = """
import json, os, sys, time
from pathlib import Path
import torch
from torch import distributed
from dmi_hpc.data import ShardLoader
folder, out, size, rank, speed, batch = sys.argv[1:]
out, size, rank = Path(out), int(size), int(rank)
distributed.init_process_group(
    "gloo", init_method=f"file://{out}/meet-{size}", rank=rank, world_size=size
)
loader = ShardLoader(folder, ("n", "z"), batch_size=int(batch), shuffle="block", seed=5, parts=2)
state = out / "state.json"
if state.exists():
    loader.load_state_dict(json.loads(state.read_text()))
with (out / f"rows-{size}-{rank}.jsonl").open("a", buffering=1) as lines:
    for epoch in range(loader.epoch, 2):
        for batch in loader:
            rows = batch["_rows"][batch["_weights"] == 1]
            total = len(rows) * torch.ones(())
            distributed.all_reduce(total)  # a step that all ranks take together
            line = {"epoch": epoch, "total": int(total), "rows": rows.tolist()}
            lines.write(json.dumps(line) + "\\n")
            if speed == "slow":
                distributed.barrier()  # all have written their line
                if rank == 0:
                    state.with_suffix(".new").write_text(json.dumps(loader.state_dict()))
                    state.with_suffix(".new").rename(state)
                distributed.barrier()
                time.sleep(0.02)
distributed.destroy_process_group()
"""


def ranks(folder, out, size, speed="fast"):
    return [
        subprocess.Popen(
            [sys.executable, "-P", "-c", RANK]
            + [str(word) for word in (folder, out, size, rank, speed, BATCH)],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def lines_of(out, size):
    """Steps of all ranks together: (epoch, rows of the global batch)."""
    each = [read_json_lines(out / f"rows-{size}-{rank}.jsonl") for rank in range(size)]
    steps = []
    for step in zip(*each, strict=False):
        rows = [row for line in step for row in line["rows"]]
        assert {line["total"] for line in step} == {len(rows)}
        steps.append((step[0]["epoch"], rows))
    return steps


def finish(processes):
    for process in processes:
        ended(process, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "data"
    make_set(folder, 203, 40)
    return folder


def test_four_ranks_see_what_one_sees_and_a_killed_job_of_two_continues_on_three(folder, tmp_path):
    killed = tmp_path / "killed"
    killed.mkdir()
    four, two = ranks(folder, tmp_path, 4), ranks(folder, killed, 2, "slow")
    first = killed / "rows-2-0.jsonl"
    wait_for(lambda: first.exists() and len(first.read_bytes().splitlines()) >= 5, two[0], 60)
    for process in two:
        process.kill()
    for process in two:
        ended(process, -signal.SIGKILL)
    finish(four)
    loader = ShardLoader(folder, ("n",), batch_size=BATCH, shuffle="block", seed=5, parts=2)
    expected = [(epoch, batch["_rows"].tolist()) for epoch in range(EPOCHS) for batch in loader]
    assert lines_of(tmp_path, 4) == expected
    for epoch in range(EPOCHS):
        rows = [row for e, step in expected if e == epoch for row in step]
        assert sorted(rows) == np.asarray(loader.shards.rows("train")).tolist()
    loader.shards.close()
    state = json.loads((killed / "state.json").read_text())
    assert (state["epoch"], state["position"] % BATCH) == (0, 0)
    done = state["position"] // BATCH
    assert 4 <= done < len(expected) // EPOCHS
    assert lines_of(killed, 2)[:done] == expected[:done]
    finish(ranks(folder, killed, 3))
    assert lines_of(killed, 3) == expected[done:]


def epochs_of(run):
    """(train loss, validation error) by epoch; one that was told twice counts as told last."""
    told = epochs_told(run)
    return {line["epoch"]: (line["train_loss"], line["validation_error"]) for line in told}


def told(run):
    return len(epochs_told(run))


def test_a_training_killed_on_two_ranks_in_mid_epoch_continues_on_one(tmp_path):
    """With DeepSpeed; and what two ranks continue is a mid-epoch checkpoint of one."""
    data, run = tmp_path / "data", tmp_path / "run"
    toy = make_task({"name": "toy_task:Toy", "samples": 2000})
    toy.build_data(data, BuildContext(DataConfig(rows_per_shard=64), 3, Alone(), 1, lambda _: None))
    fast = toy_recipe(tmp_path / "fast.toml", data)
    whole = start("train", fast, "--out", tmp_path / "whole", cwd=tmp_path)
    recipe = toy_recipe(tmp_path / "toy.toml", data, 'fault = "slow"')
    slowly = {"TOY_SLOW_S": "0.03"}
    process = start("train", recipe, "--out", run, cwd=tmp_path, **slowly)
    wait_for(lambda: told(run) >= 1, process)
    time.sleep(0.5)  # of an epoch of more than 2 s, the judging of it not counted
    process.send_signal(signal.SIGTERM)
    epoch, step = map(int, re.findall(r"stopped at epoch (\d+), step (\d+)", ended(process, 75))[0])
    ended(whole, 0)
    per_epoch = json.loads((tmp_path / "whole" / "train" / "status.json").read_text())["steps"] / 6
    assert epoch * per_epoch < step < (epoch + 1) * per_epoch
    before = told(run)
    process = start("launch", "train", recipe, "--out", run, "-n", 2, cwd=tmp_path, **slowly)
    wait_for(lambda: told(run) > before, process)
    everyone = family(process)
    killed = members(process, lambda member: "RANK" in member.environ())
    for rank in killed:
        rank.kill()
    process.communicate(timeout=60)
    assert_gone(everyone)
    assert {p.pid for p in killed} <= {p.pid for p in everyone}
    assert json.loads((run / "train" / "status.json").read_text()) == {"state": "running"}
    dmi("train", recipe, "--out", run, "--resume", cwd=tmp_path)
    found, expected = epochs_of(run), epochs_of(tmp_path / "whole")
    assert sorted(found) == sorted(expected) == list(range(6))
    for epoch, pair in expected.items():
        assert found[epoch] == pytest.approx(pair, rel=1e-6)
