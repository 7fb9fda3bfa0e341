"""Benchmarks: that they run and leave no line of their tables out. Figures are not judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(450)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
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
    return run_quick("loader.py", folder, data)


def run_quick(program, folder, data, *arguments):
    """(text, JSON) that it made; data: where it may write, and leaves nothing."""
    command = [sys.executable, str(BENCHMARKS / program), "--quick", "--folder", str(data)]
    command += ["--json", str(folder / "found.json"), "--markdown", str(folder / "found.md")]
    command += arguments
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert list(data.iterdir()) == []  # cleaned up
    assert (folder / "found.md").read_text() == done.stdout
    return done.stdout, json.loads((folder / "found.json").read_text())


def lines_of(text, words):
    """Cells of the table's lines that begin so."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if " | " in line]
    return [cells for cells in lines if cells[0].startswith(words)]


@pytest.mark.parametrize(("words", "bound"), WANTED)
def test_every_figure_has_its_line_with_its_bound(made, words, bound):
    assert [cells[2].strip() for cells in lines_of(made[0], words)] == [bound]


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


TRAINER = (
    ("1 rank, batch 256: ours vs by hand", ">= 0.97x"),
    ("1 rank, batch 1024: ours vs by hand", ">= 0.97x"),
    ("2 ranks, batch 256: ours vs DDP", ">= 1x"),
    ("2 ranks, batch 256: bytes on the wire of a step, ours", ""),
    ("start of dmi train to its first step", "< 8 s"),
    ("checkpoint of 0.198 M parameters with Adam: stall", "< 10%"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Not the rivals that take seconds to import or gigabytes of buffers."""
    folder = tmp_path_factory.mktemp("bench-trainer")
    data = folder / "data"
    data.mkdir()
    return run_quick("trainer.py", folder, data, "--only", "hand", "ranks", "start", "checkpoints")


@pytest.mark.parametrize(("words", "bound"), TRAINER)
def test_every_figure_of_the_trainer_is_measured(trained, words, bound):
    (cells,) = lines_of(trained[0], words)
    assert cells[2].strip() == bound
    assert cells[1].strip() and "not measured" not in cells[3], cells


def test_the_ranks_send_what_a_ring_must(trained):
    sent = {
        f["what"]: f["value"] for f in trained[1]["figures"] if "bytes on the wire" in f["what"]
    }
    assert len(sent) == 2
    assert all(value >= 1 for value in sent.values()), sent


def test_the_benchmark_of_the_gpu_ends_well_without_one():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py")],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["No GPU that torch can use here: nothing to measure."]
