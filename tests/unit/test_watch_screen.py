"""A training as lines of text, at any width of the terminal."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from dmi_hpc.meters import Reading
from dmi_hpc.screen import Screen, duration, percent, pieces, scaled, wrapped

READING = Reading(
    epoch=1,
    step=120,
    steps_per_epoch=1300,
    total_step=1420,
    loss=0.5,
    learning_rate=1e-3,
    gradient_norm=0.5,
    samples_per_s=12345.6,
    data_wait=0.012,
    flops=1.214e12,
    mfu=0.34,
    noise_scale=512.0,
    skipped=3,
    left_s=500.0,
)
UNKNOWN = dataclasses.replace(
    READING,
    gradient_norm=None,
    samples_per_s=None,
    data_wait=None,
    flops=None,
    mfu=None,
    noise_scale=None,
    skipped=0,
    left_s=None,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00 "), (999.6, "1.00 k"), (1.214e12, "1.21 T"), (34.56e9, "34.6 G"), (5e21, "5000 E")],
)
def test_numbers_are_scaled_to_three_digits(value, text):
    assert scaled(value) == text


def test_shares_and_durations():
    assert [percent(x) for x in (0.0, 0.0123, 0.0996, 0.34)] == ["0%", "1.2%", "10%", "34%"]
    assert duration(500.4) == "0:08:20"
    assert duration(2 * 86400 + 3600) == "2 days, 1:00:00"


def test_lines_break_between_pieces_only():
    group = ("loss 0.5", "12 samples/s", "x" * 30)
    assert wrapped(group, 22) == ["loss 0.5  12 samples/s", "x" * 30]
    assert wrapped(group, 21) == [*group]
    assert wrapped((), 10) == []


def test_what_is_not_known_is_not_said():
    assert pieces(UNKNOWN) == ("loss 0.5", "learning rate 0.001")
    assert pieces(READING)[3:] == (
        "1.21 TFLOP/s (34% of peak)",
        "learning rate 0.001",
        "gradient norm 0.5",
        "noise scale 512",
        "3 steps skipped",
    )


@pytest.mark.parametrize("width", [30, 80, 160])
def test_the_screen_keeps_within_the_terminal_and_cuts_nothing_it_has_room_for(width: int):
    out = Console(file=io.StringIO(), width=width)
    screen = Screen(epochs=2)
    out.print(screen)
    screen.reading, screen.scores = READING, ("validation MAE 0.1 GPa (best 0.1)",)
    out.print(screen)
    lines = out.file.getvalue().splitlines()
    assert lines[0].startswith("starting")
    assert all(len(line.rstrip()) <= width for line in lines)
    assert any(line.startswith("validation MAE 0.1 GPa") for line in lines)
    if width >= 80:
        assert re.fullmatch(
            r"epoch 2/2  ━+[╸ ]+  step 120/1,300  \S+  0:08:20 left", lines[1].rstrip()
        )
    if width == 160:
        assert lines[2].rstrip() == "  ".join(pieces(READING))
