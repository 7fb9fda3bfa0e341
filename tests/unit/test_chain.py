"""What follows a session: pure decisions."""

from pathlib import Path

import pytest

from launch.chain import Outcome, Situation, following
from launch.job import describe
from launch.machines import load_machine

INTERRUPTED = Outcome("interrupted", 75)


def job(**changes):
    values = {
        "stage": "search",
        "recipe": Path("/r.toml"),
        "out": Path("/runs/r"),
        "machine": load_machine("cpu"),
        "python": Path("/bin/python"),
        "nodes": 2,
        "time_s": 3600,
    }
    return describe({**values, **changes})


def situation(**changes):
    return Situation(**{"sessions": 1, "used_h": 2.0, "idle": 0, **changes})


@pytest.mark.parametrize(
    ("chain", "successor", "follows"),
    [
        ("requeue", None, "requeue"),
        ("dependency", "17", "17"),
        ("dependency", None, "requeue"),  # it could not be submitted
        ("off", None, "none"),
    ],
)
def test_a_session_short_of_its_goal_goes_on_as_the_chain_says(chain, successor, follows):
    outcome, next_job = following(job(chain=chain), INTERRUPTED, situation(successor=successor))
    assert (outcome.how, next_job) == ("interrupted", follows)


@pytest.mark.parametrize("how", ["finished", "failed"])
def test_nothing_follows_a_session_that_has_come_to_its_end(how):
    outcome = Outcome(how, 0)
    assert following(job(), outcome, situation(successor="17")) == (outcome, "none")


@pytest.mark.parametrize(
    ("changes", "now", "how", "said"),
    [
        ({}, {"cancelled": True}, "cancelled", "cancelled"),
        ({"max_node_hours": 2.01}, {}, "budget", "2.00 of 2.01 node-hours"),
        ({"max_jobs": 3}, {"sessions": 3}, "budget", "3 jobs have run"),
        ({}, {"idle": 2}, "stuck", "finished nothing new"),
    ],
)
def test_a_chain_ends_where_it_must(changes, now, how, said):
    outcome, next_job = following(job(**changes), INTERRUPTED, situation(**now))
    assert (outcome.how, outcome.code, next_job) == (how, 75, "none")
    assert said in outcome.why


def test_one_idle_session_is_no_reason_yet():
    assert following(job(), INTERRUPTED, situation(idle=1))[1] == "requeue"


def test_what_the_scheduler_has_requeued_goes_on_by_itself_even_without_a_chain():
    now = situation(requeued=True, successor="17", sessions=30)
    assert following(job(chain="off"), INTERRUPTED, now)[1] == "requeue"
    assert following(job(), INTERRUPTED, situation(requeued=True, cancelled=True))[1] == "none"
