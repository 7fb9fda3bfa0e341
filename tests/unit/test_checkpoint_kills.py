"""kill -9 in the middle of a write, many times: the old checkpoint or the new one, never a torn one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

VICTIMS = Path(__file__).parents[1] / "support" / "checkpoint_victims.py"


def killed(folder, way):
    done = subprocess.run(
        [sys.executable, str(VICTIMS), str(folder / "checkpoints"), way],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("way", ["events", "times"])
def test_whatever_is_killed_when_one_whole_checkpoint_is_the_newest(tmp_path, way):
    records = killed(tmp_path, way)
    assert {record["step"] for record in records} <= {1, 2}
    for record in records:
        assert record["told"] == [], record  # none torn was even seen
        assert set(record["there"]) <= {"step-00000001", "step-00000002"}, record
        assert all(name.startswith(".tmp-step-") for name in record["litter"]), record
    assert any(record["litter"] for record in records)  # some in the middle of the write
    if way == "events":
        assert [r["killed"] for r in records] == [True] * (len(records) - 1) + [False]
        steps = [r["step"] for r in records]
        assert (steps[0], steps[-1]) == (1, 2)
        assert steps == sorted(steps)  # one instant at which the new one is there
        assert any(r["litter"] and r["step"] == 2 for r in records)  # and in the pruning
    else:
        assert len(records) >= 50
