"""benchmarks/checkpointing.py: that it runs and cleans up. Figures are not judged."""

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "checkpointing.py"


def test_every_figure_has_its_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [line[2:-2].split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [cells[0].partition(": ")[2] for cells in lines] == [
        "stall of the steps vs write and fsync",
        "slow-down of its steps meanwhile",
        "all that it costs vs write and fsync",
        "slow-down meanwhile of steps that are all interpreter",
    ]
    assert [cells[2] for cells in lines] == ["< 10%", "", "", ""]
    assert list(tmp_path.iterdir()) == []
