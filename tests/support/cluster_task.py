"""The toy task, slow on purpose, which notes on what nodes it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from toy_task import Toy, ToyOptions

from dmi_hpc.data.manifest import Manifest
from dmi_hpc.tasks.base import Array, BuildContext


class SeenOptions(ToyOptions):
    """seen: folder, on all nodes the same; batch_s: what a batch takes longer."""

    seen: str
    batch_s: float = 0.01


class Seen(Toy):
    Options = SeenOptions

    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        ranks = context.communicator
        _note(self.options.seen, f"rank-{ranks.rank}-of-{ranks.size}")
        return super().build_data(target, context)

    def inputs(self, fields: Mapping[str, Array]) -> Array:
        _note(self.options.seen, str(os.getpid()))
        time.sleep(self.options.batch_s)
        return super().inputs(fields)


@cache
def _note(folder: str, what: str) -> None:
    """Once a process: a file NODE.WHAT; for batches its time is that of the first."""
    (Path(folder) / f"{os.uname().nodename}.{what}").touch()
