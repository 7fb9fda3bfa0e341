"""``@ranks(2, 4)``: the body of a test in real processes that form one gloo group.

    @ranks(1, 2, 4)
    def test_sum(world, tmp_path):
        assert collectives.sum_(torch.ones(1)) == world.size

The body runs on every rank, with the group's World first; its other arguments (fixtures, parameters)
are the same on all and must pickle. The test fails if any rank does, and shows what each one said.
"""

from __future__ import annotations

import ast
import inspect
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import types
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

SUPPORT = Path(__file__).parent
LIMIT_S = 90
GRACE_S = 15  # for the others, once a rank has failed: they say whom they miss
SKIPPED = 5


def ranks(*sizes, limit_s=LIMIT_S, timeout_s=30, **environment):
    """Parametrise a test by the number of its ranks; timeout_s: of their collectives."""

    def decorate(body):
        def test(ranks_size, **arguments):
            ended = outcomes(
                body,
                ranks_size,
                arguments,
                limit_s=limit_s,
                timeout_s=timeout_s,
                environment=environment,
            )
            _judge(ended)

        first, *others = inspect.signature(body).parameters.values()
        assert first.name == "world", "the first argument of a test of ranks is its world"
        size = inspect.Parameter("ranks_size", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([size, *others])
        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        test.body = body
        test.pytestmark = list(getattr(body, "pytestmark", []))
        return pytest.mark.parametrize("ranks_size", sizes, ids=lambda n: f"{n}ranks")(test)

    return decorate


def outcomes(
    body,
    size,
    arguments=None,
    *,
    limit_s=LIMIT_S,
    timeout_s=30,
    environment=None,
):
    """(exit code, all it said) of each rank that ran body(world, **arguments)."""
    task = inspect.getfile(body), body.__name__, arguments or {}
    processes = []
    with tempfile.TemporaryDirectory(prefix="dmi-ranks-") as folder:
        try:
            for rank in range(size):
                processes.append(_start(folder, rank, size, timeout_s, environment or {}))
                pickle.dump((*task, _ready(folder, rank)), processes[-1].stdin)
                processes[-1].stdin.flush()
            _begin(processes, [_ready(folder, rank) for rank in range(size)], limit_s)
            _wait(processes, limit_s)
        finally:
            for process in processes:
                _kill(process)
        said = [Path(folder, f"rank-{rank}").read_text() for rank in range(size)]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def _judge(ended):
    if all(code == SKIPPED for code, _ in ended):
        pytest.skip(ended[0][1].strip().splitlines()[-1])
    if any(code for code, _ in ended):
        shown = (f"--- rank {r}, exit code {c} ---\n{text}" for r, (c, text) in enumerate(ended))
        pytest.fail("\n".join(shown), pytrace=False)


def _start(folder, rank, size, timeout_s, environment):
    base = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "OMPI_"))}
    with Path(folder, f"rank-{rank}").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-P", __file__],
            env={
                **base,
                "PYTHONPATH": str(SUPPORT),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
                "DMI_RENDEZVOUS": f"file://{folder}/store",
                "DMI_COLLECTIVE_TIMEOUT_S": str(timeout_s),
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _ready(folder, rank):
    return Path(folder, f"ready-{rank}")


def _begin(processes, ready, limit_s):
    """Let all go on at once when each has its libraries: on a busy machine they have them at times
    that differ by more than a collective waits."""
    end = time.monotonic() + limit_s
    while not all(map(Path.exists, ready)) and time.monotonic() < end:
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.02)
    for process in processes:
        process.stdin.close()


def _wait(processes, limit_s):
    """Until all have ended or stand still, some time after one has failed, or the limit."""
    end, failed = time.monotonic() + limit_s, False
    while False in [_is_over(p) for p in processes] and time.monotonic() < end:
        if any(p.returncode for p in processes) and not failed:
            end, failed = min(end, time.monotonic() + GRACE_S), True
        time.sleep(0.05)


def _is_over(process):
    if process.poll() is not None:
        return True
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


def _kill(process):
    """The whole session, also what the rank has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)


def _load(path):
    """The test module, its asserts as telling as under pytest."""
    from _pytest.assertion.rewrite import rewrite_asserts

    text = Path(path).read_bytes()
    tree = ast.parse(text)
    rewrite_asserts(tree, text, path)
    module = types.ModuleType(Path(path).stem)
    module.__file__ = path
    sys.modules[module.__name__] = module
    exec(compile(tree, path, "exec"), module.__dict__)
    return module


def main():
    path, name, arguments, ready = pickle.load(sys.stdin.buffer)
    import torch

    from dmi_hpc import collectives
    from dmi_hpc.world import detect

    torch.set_num_threads(1)
    test, world = getattr(_load(path), name), detect()
    body = getattr(test, "body", test)
    ready.touch()
    sys.stdin.buffer.read()  # to its end, which comes when all are here
    try:
        with collectives.group(world, torch.device("cpu")):
            body(world, **arguments)
    except pytest.skip.Exception as skipped:
        sys.stderr.write(f"{skipped}\n")
        sys.exit(SKIPPED)


if __name__ == "__main__":
    main()
