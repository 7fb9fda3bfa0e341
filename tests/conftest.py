"""Makes tests/support importable, and keeps every library at one thread.

The networks of the tests are tiny: on a busy machine several threads a test cost 20 times their gain.
"""

import os
import sys
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
sys.path.insert(0, str(Path(__file__).parent / "support"))
