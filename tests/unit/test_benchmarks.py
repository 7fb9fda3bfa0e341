"""benchmarks/loader.py: that it runs and leaves no line of its table out. Figures are not judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "loader.py"
DENSE = ("86 float32", "60x60 float32", "51x51x51 uint8")
LARGE = DENSE[1:]
WANTED = (  # beginning of a line and its bound: the figures that the project promises
    *((f"{data}: shuffled vs gather from RAM", ">= 0.85x") for data in DENSE),
    *((f"{data}: sequential vs memcpy", ">= 0.8x") for data in LARGE),
    *((f"{data}: shuffled vs the best other loader", ">= 10x") for data in DENSE),
    *((f"{data}: 64 shards vs one", "") for data in DENSE),
    *((f"{data}: cost of checksums while reading, 10 epochs", "< 10%") for data in DENSE),
    ("graphs", ">= 5x"),
    ("memory of the sampler at 1e9", "< 1 MB"),
    ("build, 4 processes vs 1", ">= 3x"),
    ("data wait in a DeepSpeed run", "< 2%"),
)
NEED_MORE = ("best other loader", "graphs", "data wait")  # other packages, a table
MAY_BE_SHORT = "build, 4 processes vs 1"  # processes take longer to start than a small set


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    data = folder / "data"
    data.mkdir()
    command = [sys.executable, str(BENCHMARK), "--quick", "--folder", str(data)]
    command += ["--json", str(folder / "found.json"), "--markdown", str(folder / "found.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(data.iterdir()) == []  # cleaned up
    assert (folder / "found.md").read_text() == done.stdout
    return done.stdout, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(("words", "bound"), WANTED)
def test_every_figure_has_its_line_with_its_bound(made, words, bound):
    lines = [line.strip("| ").split(" | ") for line in made[0].splitlines() if " | " in line]
    matching = [cells for cells in lines if cells[0].startswith(words)]
    assert [cells[2].strip() for cells in matching] == [bound]


def test_what_can_be_measured_is(made):
    for figure in made[1]["figures"]:
        if any(words in figure["what"] for words in NEED_MORE):
            assert figure["value"] is None and figure["detail"], figure
        elif not figure["what"].startswith(MAY_BE_SHORT):
            assert isinstance(figure["value"], float), figure


def test_rates_of_all_repetitions_are_kept(made):
    repetitions = made[1]["settings"]["repetitions"]
    for case in ("a", "b", "c"):
        rates = made[1]["rates"][case]
        assert {"gather", "memcpy", "shuffled, 0 threads", "sequential, 2 threads"} <= set(rates)
        assert all(len(found) == repetitions and min(found) > 0 for found in rates.values())
