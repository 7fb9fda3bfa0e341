"""The data package alone: light to import, and at work in other people's training loops."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runner import environment

from search.cluster.environment import ray_environment

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
LIMIT_S = 120


def run(*arguments, **changes):
    done = subprocess.run(
        [sys.executable, "-P", *map(str, arguments)],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


LOADED = """
import json, sys
{code}
heavy = ("torch", "h5py", "pandas", "pymatgen", "deepspeed", "ray", "hdf5plugin", "zstandard", "blosc2")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import dmi_hpc.data", []),
        ("import dmi_hpc.data as d; d.BuildPlan, d.Field, d.Compression, d.Ragged", []),
        ("from dmi_hpc.data import ShardSet, ShardWriter", ["h5py"]),
        ("from dmi_hpc.data import ShardLoader", ["torch", "h5py"]),
    ],
)
def test_what_an_import_brings(code, allowed):
    found = json.loads(run("-c", LOADED.format(code=code)).stdout)
    assert set(found) <= set(allowed)


@pytest.mark.slow
def test_the_lightning_example():
    pytest.importorskip("lightning", reason="not at hand: pip install lightning")
    run(EXAMPLES / "with_lightning.py")


@pytest.mark.slow
def test_the_ray_example():
    with ray_environment() as folder:
        settings = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
        run(
            EXAMPLES / "with_ray.py",
            **settings,
            RAY_TMPDIR=str(folder),
            RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
        )
