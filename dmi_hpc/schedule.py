"""Learning-rate schedules as pure functions of the share of steps done: nothing to save or resume."""

from __future__ import annotations

from math import cos, pi

from dmi_hpc.config import TrainConfig

FLOOR = 1e-3  # of the peak, at the end of a decaying schedule


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Rate at `progress` in [0, 1]: a linear warm-up, then constant or half-cosine decay.

    one_cycle starts at 1/25 of the peak and shares its warm-up and cosine decay with Smith and
    Topin (arXiv:1708.07120); cosine starts at zero.
    """
    start = 1 / 25 if config.schedule == "one_cycle" else 0.0
    if progress < config.warmup:
        return config.learning_rate * (start + (1 - start) * progress / config.warmup)
    if config.schedule == "constant":
        return config.learning_rate
    decay = (progress - config.warmup) / (1 - config.warmup)
    return config.learning_rate * (FLOOR + (1 - FLOOR) * 0.5 * (1 + cos(pi * min(decay, 1.0))))
