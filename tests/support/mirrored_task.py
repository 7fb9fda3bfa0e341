"""The toy task with a symmetry to train with: x1 and x2 change their signs together."""

from __future__ import annotations

import numpy as np
from toy_task import Toy

from dmi_hpc.tasks.base import Array


class Mirrored(Toy):
    def augment(self, inputs: Array, bits: Array) -> Array:
        signs = np.ones_like(inputs)
        signs[:, 1:3] = np.where(bits & np.uint64(1), -1, 1)[:, None]
        return inputs * signs
