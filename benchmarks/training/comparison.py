"""Comparisons as this process sees them: ranks started, waited for, and ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loading.timing import Rates

PROGRAM = Path(__file__).with_name("rank_process.py")
TIMEOUT_S, GRACE_S = 1800, 5


class ComparisonError(Exception):
    """A rank failed or did not end."""


@dataclass(frozen=True)
class Comparison:
    """Contenders on the same data, in turns of `steps` steps."""

    data: Path
    task: Mapping[str, Any]
    contenders: tuple[str, ...]
    batch: int
    steps: int
    repetitions: int
    ranks: int = 1
    small: bool = False
    discarded: int = 3  # more than a loader holds ready

    def run(self) -> tuple[Rates, dict[str, list[float]]]:
        """(steps a second, bytes on the wire a step) of each contender. Raises ComparisonError."""
        asked = json.dumps(asdict(self) | {"data": str(self.data)})
        with tempfile.TemporaryDirectory(prefix="dmi-bench-ranks-") as folder:
            processes = [self._start(rank, Path(folder), asked) for rank in range(self.ranks)]
            try:
                _wait(processes)
            finally:
                for process in processes:
                    _kill(process)
            for rank, process in enumerate(processes):
                if process.returncode:
                    said = (Path(folder) / f"{rank}.err").read_text(errors="replace")
                    raise ComparisonError(
                        f"rank {rank} ended with {process.returncode}: {' '.join(said.split())[-300:]}"
                    )
            found = json.loads((Path(folder) / "0.out").read_text())
        return found["rates"], found["bytes_per_step"]

    def _start(self, rank: int, folder: Path, asked: str) -> subprocess.Popen[bytes]:
        (folder / "asked.json").write_text(asked)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "DMI_RENDEZVOUS": f"file://{folder}/store",
        }
        with (
            (folder / "asked.json").open("rb") as question,
            (folder / f"{rank}.out").open("wb") as answer,
            (folder / f"{rank}.err").open("wb") as log,
        ):
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", str(PROGRAM)],
                env=environment,
                stdin=question,
                stdout=answer,
                stderr=log,
                start_new_session=True,
            )


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or one has failed and the others have had time to."""
    end, failed = time.monotonic() + TIMEOUT_S, False
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < end:
        if any(codes) and not failed:
            end, failed = time.monotonic() + GRACE_S, True
        time.sleep(0.02)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
