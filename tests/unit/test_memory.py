"""Freed memory stays with the process: seen by the pages that the system clears for it."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """\
import resource, sys
import numpy as np
from dmi_hpc.memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)

def step():
    for array in [np.empty(2**18) for _ in range(8)]:  # 8 of 2 MB, all freed at the end
        array.fill(1.0)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    step()
before = faults()
for _ in range(10):
    step()
print((faults() - before) / 10)
"""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)


def run(mode: str, **environment: str) -> tuple[str, float]:
    """(what keep_freed_memory returned, page faults a step)"""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    returned, faults = done.stdout.split()
    return returned, float(faults)


def test_a_step_finds_the_memory_of_the_step_before():
    returned, kept = run("keep")
    _, given_back = run("leave")
    assert returned == "True"
    assert given_back > 1000  # else this machine keeps it anyway, and nothing was tested
    assert kept < 10


def test_the_users_own_settings_stay():
    returned, faults = run("keep", MALLOC_TRIM_THRESHOLD_="100000")
    assert returned == "False"
    assert faults > 1000
