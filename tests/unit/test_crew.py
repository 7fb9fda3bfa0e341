"""Threads and a caller that share one line of tasks."""

import gc
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from dmi_hpc.data.crew import Crew

LIMIT_S = 30


def crew_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("crew-test")]


def test_each_task_is_run_once_and_gives_its_own_result():
    runs = []
    with Crew(3, "crew-test") as crew:
        tasks = [crew.submit(partial(lambda k: runs.append(k) or k * k, k)) for k in range(200)]
        assert [crew.result(task) for task in tasks] == [k * k for k in range(200)]
    assert sorted(runs) == list(range(200))
    assert not crew_threads()


def test_an_error_is_raised_where_its_result_is_asked_for():
    def fail():
        raise ValueError("this one")

    with Crew(1, "crew-test") as crew:
        first, second, third = crew.submit(int), crew.submit(fail), crew.submit(lambda: 3)
        assert crew.result(third) == 3
        assert crew.result(first) == 0
        with pytest.raises(ValueError, match="this one"):
            crew.result(second)


def test_the_caller_works_along():
    """The only thread is held up: what is behind it in the line is run by the caller."""
    begun, go = threading.Event(), threading.Event()

    def held():
        begun.set()
        assert go.wait(LIMIT_S)

    with Crew(1, "crew-test") as crew:
        slow = crew.submit(held)
        assert begun.wait(LIMIT_S)
        where = [crew.submit(threading.get_ident) for _ in range(3)]
        last = crew.submit(go.set)
        crew.result(slow)
        assert {crew.result(task) for task in where} == {threading.get_ident()}
        crew.result(last)


def test_an_interrupt_that_hits_a_task_of_another_is_raised_at_once():
    begun, go = threading.Event(), threading.Event()

    def held():
        begun.set()
        assert go.wait(LIMIT_S)

    def interrupted():
        go.set()
        raise KeyboardInterrupt

    with Crew(1, "crew-test") as crew:
        slow = crew.submit(held)
        assert begun.wait(LIMIT_S)
        crew.submit(interrupted)
        with pytest.raises(KeyboardInterrupt):
            crew.result(slow)


def test_after_a_slow_task_the_caller_only_waits(monkeypatch):
    """It would keep a batch that is ready from the training for as long as another one takes."""
    monkeypatch.setattr("dmi_hpc.data.crew._QUICK_S", 0.0)
    with Crew(1, "crew-test") as crew:
        crew.result(crew.submit(int))
        tasks = [crew.submit(threading.get_ident) for _ in range(50)]
        assert threading.get_ident() not in {crew.result(task) for task in tasks[1:]}


def test_what_was_not_begun_is_dropped_at_the_end():
    ran, begun, go = [], threading.Event(), threading.Event()

    def held():
        begun.set()
        assert go.wait(LIMIT_S)
        ran.append("begun")

    with Crew(1, "crew-test") as crew:
        crew.submit(held)
        assert begun.wait(LIMIT_S)
        for _ in range(5):
            crew.submit(partial(ran.append, "not begun"))
        threading.Timer(0.05, go.set).start()
    assert ran == ["begun"]
    assert not crew_threads()


def test_threads_end_with_the_last_reference():
    crew = Crew(2, "crew-test")
    crew.result(crew.submit(int))
    assert crew_threads()
    del crew
    gc.collect()
    deadline = time.monotonic() + LIMIT_S
    while crew_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not crew_threads()


@pytest.mark.parametrize("how", ["", "raise RuntimeError('in the loop')", "sys.exit(0)"])
def test_a_program_ends_where_a_loop_was_left_in_the_middle(how):
    """The iterator is still there when the interpreter shuts down; its threads must not keep it."""
    code = f"""
import sys
from dmi_hpc.data.crew import Crew
def loop():
    with Crew(2, "crew") as crew:
        while True:
            yield crew.result(crew.submit(int))
held = loop()
next(held)
{how}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == (1 if "raise" in how else 0), done.stderr
    assert done.stderr.count("Traceback") == done.returncode
