"""No trial starts that can neither finish nor go on."""

import pytest

from dmi_hpc.deadline import End
from dmi_hpc.errors import LaunchError
from search.cluster.allocation import WORTH_S, Allocation

END = End(1000.0, "SLURM_JOB_END_TIME")


def test_without_an_end_everything_may_start():
    allocation = Allocation()
    allocation.finished(1e9)
    assert allocation.may_start(1e12)
    assert allocation.is_over(1e12) is None
    assert allocation.closed is None


def test_the_first_trials_start_as_long_as_there_is_time():
    allocation = Allocation(END)
    assert allocation.may_start(989)
    assert not allocation.may_start(991)


LIMIT = End(1000.0, "time_limit_s")


def test_a_trial_must_end_before_the_users_limit_as_nine_of_ten_before_it():
    allocation = Allocation(limit=LIMIT)
    for seconds in (100.0,) * 9 + (200.0, 5000.0):  # one outlier closes nothing
        allocation.finished(seconds)
    assert allocation.predicted_s == 200.0
    assert allocation.may_start(799)
    assert not allocation.may_start(801)
    assert allocation.closed == "199 s are left (time_limit_s), and a trial may take 200 s"
    assert not allocation.may_start(0)  # closed for good: what is left cannot grow


def test_before_the_end_of_the_job_a_minute_is_worth_a_beginning():
    allocation = Allocation(END)
    for _ in range(9):
        allocation.finished(500.0)
    assert allocation.end == END
    assert allocation.may_start(990 - WORTH_S)
    assert not allocation.may_start(991 - WORTH_S)
    assert "59 s are left (SLURM_JOB_END_TIME)" in allocation.closed


def test_in_a_short_job_less_than_a_minute_is_worth_it():
    allocation = Allocation.of({"SLURM_JOB_END_TIME": "1000"}, None, 880.0)
    for _ in range(9):
        allocation.finished(500.0)
    assert allocation.may_start(984)
    assert not allocation.may_start(984.1)


def test_later_durations_count():
    allocation = Allocation(limit=END)
    for seconds in [1.0] * 200 + [50.0] * 60:
        allocation.finished(seconds)
    assert allocation.predicted_s == 50.0


@pytest.mark.parametrize(("now", "over"), [(980, False), (994.9, False), (995.1, True)])
def test_running_ones_are_left_at_the_end(now, over):
    said = Allocation(END).is_over(now)
    assert said == ("the time is over (SLURM_JOB_END_TIME)" if over else None)


def test_the_users_limit_leaves_nothing_and_has_no_margin():
    allocation = Allocation(limit=End(1000.0, "time_limit_s"))
    assert allocation.may_start(999)
    assert not allocation.may_start(1001)
    assert allocation.is_over(5000) is None


def test_the_earlier_end_counts():
    env = {"SLURM_JOB_END_TIME": "1000"}
    assert Allocation.of(env, None, 100.0).end == END
    assert not Allocation.of(env, 50.0, 100.0).may_start(151)
    assert not Allocation.of(env, 5000.0, 100.0).may_start(991)
    assert Allocation.of({}, None, 100.0).end is None
    with pytest.raises(LaunchError, match="expected seconds since 1970"):
        Allocation.of({"SLURM_JOB_END_TIME": "noon"}, None, 100.0)
