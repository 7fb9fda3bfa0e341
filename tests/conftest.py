"""Makes tests/support importable, and keeps every library at one thread.

The networks of the tests are tiny: on a busy machine several threads a test cost 20 times their gain.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
sys.path.insert(0, str(Path(__file__).parent / "support"))


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Signals as a terminal has them: in the background, or under nohup, some are ignored.

    And none is blocked: a command called in this process leaves that to its end, which is not ours,
    and what is started later would inherit it.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
