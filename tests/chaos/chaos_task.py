"""The toy task with code that fails in every way there is, for some networks: by their batch size."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
from toy_task import SLOW_S, Toy

from dmi_hpc.models.space import Choice, Founder, SearchSpace

FAULTS = {11: "raise", 12: "memory", 13: "hang", 14: "exit", 15: "nan", 16: "garbage"}
ROWS = (
    145,
    30,
)  # of the splits: the last batch of one is smaller, and must not be taken for a fault
SIZES = tuple(
    size
    for size in range(11, 131)
    if size in FAULTS or not any(rows % size in FAULTS for rows in ROWS)
)


class Chaos(Toy):
    def inputs(self, fields):
        x = fields["x"]
        time.sleep(SLOW_S)
        match FAULTS.get(len(x)):
            case "raise":
                raise ZeroDivisionError("the user's own bug")
            case "memory":
                raise MemoryError("cannot allocate 99 TB")
            case "hang":
                time.sleep(3600)
            case "exit":
                sys.stderr.flush()
                os._exit(3)
            case "nan":
                return np.full_like(x, np.nan)
            case "garbage":
                return np.array([["what", None]] * len(x), dtype=object)
        return x

    def space(self):
        space = super().space()
        sizes = Choice(values=SIZES, ordered=True)
        # each kind at least once, among the first: a fifth of 30 in all
        founders = [
            Founder(name=kind, network=self.published_network(), hyper={"batch_size": size})
            for size, kind in FAULTS.items()
        ]
        return SearchSpace(
            network=space.network,
            hyper={**space.hyper, "batch_size": sizes},
            founders=(*space.founders, *founders),
        )
