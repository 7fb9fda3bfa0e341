"""The one way to DeepSpeed: without its start-up lines and, on CPU, without its compiler."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch

# said by the engine's notes and updates, or held by tests: not by lines between a user's own
_SAID_ELSEWHERE = ("untested optimizer", "OVERFLOW! Skipping step")


def import_deepspeed() -> Any:
    """DeepSpeed itself.

    On CPU its first start would build a shared-memory collective with g++ (30 s, or a failure where
    there is no compiler) that measures no faster than gloo at these sizes.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # its calls of newer torch's old names: nothing a user could mend
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning
    )
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.utils.logger.addFilter(_is_news)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    return not any(said in record.getMessage() for said in _SAID_ELSEWHERE)
