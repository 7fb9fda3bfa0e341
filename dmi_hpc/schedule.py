"""Learning-rate schedules as pure functions of the share of steps done and of the validation errors
so far: nothing to save or resume but those.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, inf, pi, sqrt

from dmi_hpc.config import TrainConfig

FLOOR = 1e-3  # of the peak, at the end of a cosine


def learning_rate(config: TrainConfig, progress: float, drops: int = 0) -> float:
    """Rate at `progress` in [0, 1]: a linear warm-up to the peak, then as the schedule says.

    drops: what `drops_after` gives, for step and plateau. one_cycle starts at 1/25 of the peak and
    shares its warm-up and cosine decay with Smith and Topin (arXiv:1708.07120); the others start at
    zero.
    """
    peak = peak_rate(config) * config.decay**drops
    if progress < config.warmup:
        start = 1 / 25 if config.schedule == "one_cycle" else 0.0
        return peak * (start + (1 - start) * progress / config.warmup)
    if config.schedule in ("constant", "step", "plateau"):
        return peak
    done = min((progress - config.warmup) / (1 - config.warmup), 1.0)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + cos(pi * done)))


def peak_rate(config: TrainConfig) -> float:
    """The rate of the recipe, fitted from its reference batch to the batch in use.

    linear: Goyal et al. 2017 (arXiv:1706.02677), for SGD; sqrt keeps the noise of the gradient
    (Krizhevsky 2014, arXiv:1404.5997) and suits Adam and LAMB.
    """
    growth = config.batch_size / (config.reference_batch or config.batch_size)
    return config.learning_rate * (growth if config.batch_scaling == "linear" else sqrt(growth))


def drops_after(config: TrainConfig, validation: Sequence[float]) -> int:
    """How often the rate was multiplied by `decay`, after epochs of these validation errors.

    step: every `decay_epochs` epochs. plateau: once `decay_epochs` epochs in a row were not better
    than the best before them, and again as often; epochs that end in the warm-up count for the best
    only. Other schedules: never.
    """
    if config.schedule == "step":
        return len(validation) // config.decay_epochs
    if config.schedule != "plateau":
        return 0
    drops, waited, best = 0, 0, inf
    for epochs, error in enumerate(validation, start=1):
        if error < best:
            best, waited = error, 0
        elif epochs > config.warmup * config.epochs:
            waited += 1
        if waited == config.decay_epochs:
            drops, waited = drops + 1, 0
    return drops
