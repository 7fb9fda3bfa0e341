"""The log of a rank above zero keeps its last words, however it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import ctypes, faulthandler, os, sys
from pathlib import Path
from dmi_hpc.errors import Interrupted
from dmi_hpc.records import rank_log
from dmi_hpc.world import World

with rank_log(Path(sys.argv[1]), World(int(sys.argv[2]), 2)):
    print("said by Python", file=sys.stderr)
    print("no end of line", end="", file=sys.stderr)
    os.write(2, b"said by C\\n")
    exec(sys.argv[3])
print("after", file=sys.stderr)
"""


def run(folder: Path, rank: int, ends: str, stderr: int = subprocess.PIPE) -> tuple[int, str]:
    """(exit code, what the rank wrote to its old stderr)"""
    done = subprocess.run(
        [sys.executable, "-c", RANK, str(folder), str(rank), ends],
        stderr=stderr,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


def log_of(folder: Path) -> str:
    return (folder / "logs" / "rank-1.log").read_text()


def test_what_a_rank_says_is_kept_and_still_heard(tmp_path: Path) -> None:
    for _ in range(2):
        code, heard = run(tmp_path, 1, "pass")
        assert code == 0
        assert heard.splitlines() == ["said by Python", "no end of lineafter"]
    text = log_of(tmp_path)
    assert text.count("rank 1 of 2: process ") == 2
    assert text.count("said by Python\nno end of linesaid by C\n") == 2
    assert "after" not in text


@pytest.mark.parametrize(
    ("ends", "last"),
    [
        ("faulthandler._sigsegv()", "Fatal Python error: Segmentation fault"),
        ("os.abort()", "Fatal Python error: Aborted"),
        ("os._exit(3)", "said by C"),
        ("os.kill(os.getpid(), 9)", "said by C"),
        ("ctypes.string_at(8)", "Fatal Python error: Segmentation fault"),
        ("raise ZeroDivisionError('of the task')", "ZeroDivisionError: of the task"),
        ("sys.exit('no')", "SystemExit: no"),
        ("raise Interrupted('at step 3')", "\ninterrupted: at step 3"),
    ],
)
def test_the_last_words_of_a_rank_are_in_its_log(tmp_path: Path, ends: str, last: str) -> None:
    code, heard = run(tmp_path, 1, ends)
    assert code != 0
    assert "said by Python\n" in heard
    assert last in log_of(tmp_path)


def test_rank_zero_has_no_log(tmp_path: Path) -> None:
    code, heard = run(tmp_path, 0, "pass")
    assert code == 0
    assert heard.startswith("said by Python\n")
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_the_launcher_writes_already_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with (tmp_path / "logs" / "rank-1.log").open("ab") as log:
        run(tmp_path, 1, "pass", stderr=log.fileno())
    assert log_of(tmp_path).count("said by Python") == 1
    assert "rank 1 of 2" not in log_of(tmp_path)
