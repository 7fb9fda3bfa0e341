"""When a training stops: signals, the end of its job, and what is kept for a checkpoint."""

import signal
from types import SimpleNamespace

import pytest

from dmi_hpc.deadline import FLOOR_S, Deadline, End, end_of
from dmi_hpc.errors import LaunchError

NOW = 1_800_000_000.0


def flag(number=None):
    return SimpleNamespace(signal=number)


@pytest.mark.parametrize(
    ("slurm", "limit_s", "end"),
    [
        (None, None, None),
        (None, 60.0, End(NOW + 60, "time_limit_s")),
        (NOW + 90, None, End(NOW + 90, "SLURM_JOB_END_TIME")),
        (NOW + 90, 60.0, End(NOW + 60, "time_limit_s")),
        (NOW + 30, 60.0, End(NOW + 30, "SLURM_JOB_END_TIME")),
        (NOW - 1, None, None),  # another job's, from an old shell
    ],
)
def test_the_earlier_end_counts(slurm, limit_s, end):
    env = {} if slurm is None else {"SLURM_JOB_END_TIME": str(int(slurm))}
    assert end_of(env, limit_s, NOW) == end


def test_an_end_that_is_no_time_is_refused():
    with pytest.raises(LaunchError, match="SLURM_JOB_END_TIME: found 'never', expected seconds"):
        end_of({"SLURM_JOB_END_TIME": "never"}, None, NOW)


def test_without_an_end_only_a_signal_stops():
    stop = flag()
    deadline = Deadline(stop, None)
    assert deadline.must_stop(NOW) is None
    assert deadline.must_stop(NOW + 1e9) is None
    stop.signal = signal.SIGUSR1
    assert deadline.must_stop(NOW + 1e9) == "SIGUSR1"


def test_what_is_kept_follows_the_checkpoints_and_the_questions():
    deadline = Deadline(flag(), End(NOW + 1000, "time_limit_s"))
    assert deadline.must_stop(NOW) is None
    assert deadline.margin_s == FLOOR_S
    deadline.wrote(20)
    deadline.wrote(5)
    assert deadline.must_stop(NOW + 30) is None  # a validation of 30 s in between
    assert deadline.margin_s == FLOOR_S + 2 * 20 + 30
    for asked in range(40, 920, 10):
        assert deadline.must_stop(NOW + asked) is None
    reason = deadline.must_stop(NOW + 920)
    assert "time_limit_s" in reason
    assert "80 s are kept for a checkpoint" in reason


@pytest.mark.parametrize("checkpoint_s", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("every_s", [0.5, 20.0, 90.0])
def test_a_checkpoint_twice_as_long_as_the_longest_is_whole_before_the_end(checkpoint_s, every_s):
    deadline, now = Deadline(flag(), End(NOW + 5000, "time_limit_s")), NOW
    deadline.wrote(checkpoint_s)
    while deadline.must_stop(now) is None:
        now += every_s
    assert now + 2 * checkpoint_s <= NOW + 5000
    assert now > NOW + 5000 - 2 * (FLOOR_S + checkpoint_s + every_s)  # and no time is given away


def test_a_job_that_is_all_but_over_stops_at_once():
    assert Deadline(flag(), End(NOW + 1, "SLURM_JOB_END_TIME")).must_stop(NOW)
