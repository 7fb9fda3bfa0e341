"""Who is missing, from what the ranks say of themselves."""

import threading
from dataclasses import replace

import pytest

from dmi_hpc.heartbeat import Beat, Heartbeat, RollCall, message

TIMEOUT = 10.0


class Calls:
    """Rank 0's roll call of four ranks that all have entered five collectives."""

    def __init__(self):
        self.calls = RollCall(0, 4, TIMEOUT, now=0.0)
        self.beats = [Beat(f"n{rank}", collectives=5, at="step 5") for rank in range(4)]

    def pass_to(self, now, mine, changes=None, beating=(0, 1, 2, 3)):
        """Second by second until `now`; changes: of some ranks' beats, at once."""
        for rank, change in (changes or {}).items():
            self.beats[rank] = replace(self.beats[rank], **change)
        for second in range(int(now) + 1):
            for rank in beating:
                self.beats[rank] = replace(self.beats[rank], count=self.beats[rank].count + 1)
            self.calls.stands(mine, float(second))
            self.calls.hears(self.beats, float(second))
        return self.calls.missing(float(now))


def test_nobody_is_missing_while_all_compute():
    assert Calls().pass_to(1000, mine=5) == ""


def test_nobody_is_missed_by_who_is_behind_himself():
    assert Calls().pass_to(1000, mine=4) == ""


def test_who_has_not_come_for_the_timeout_is_named_with_host_and_place():
    assert Calls().pass_to(9, mine=6, changes={2: {"collectives": 6}}) == ""
    found = Calls().pass_to(12, mine=6, changes={2: {"collectives": 6}, 3: {"collectives": 6}})
    assert found == "rank 1 (host n1) is alive, but for 12 s it has not come from step 5"


def test_of_those_behind_only_the_last_are_named():
    """Rank 1 waits for rank 3 as well."""
    found = Calls().pass_to(12, mine=7, changes={2: {"collectives": 7}, 1: {"collectives": 6}})
    assert "rank 3" in found
    assert "rank 1" not in found


def test_who_moves_is_not_missing_yet():
    calls = Calls()
    assert calls.pass_to(9, mine=9, changes={r: {"collectives": 9} for r in (2, 3)}) == ""
    calls.beats[1] = replace(calls.beats[1], collectives=6, count=99)
    calls.calls.hears(calls.beats, 9.5)
    assert calls.calls.missing(15.0) == ""


def test_who_is_busy_is_waited_for_as_long_as_he_beats():
    busy = {
        1: {"excused": True, "at": "a checkpoint"},
        2: {"collectives": 6},
        3: {"collectives": 6},
    }
    assert Calls().pass_to(1000, mine=6, changes=busy) == ""
    found = Calls().pass_to(12, mine=6, changes=busy, beating=(0, 2, 3))
    assert found == "rank 1 (host n1) was last heard of 12 s ago, at a checkpoint"


def test_who_no_longer_beats_is_named_though_he_had_come():
    assert Calls().pass_to(12, mine=5, beating=(0, 1, 2)).startswith("rank 3 (host n3) was last")


@pytest.mark.parametrize(
    ("state", "collectives", "found"),
    [
        ("failed", 5, "rank 1 (host n1) has ended: KeyError: 'x'"),
        ("done", 4, "rank 1 (host n1) has ended: KeyError: 'x'"),
        ("done", 5, ""),  # as all will
        ("bereft", 4, "KeyError: 'x'"),  # what it has found out counts for all
    ],
)
def test_who_has_left_is_missing_at_once_unless_he_was_done(state, collectives, found):
    gone = {"state": state, "at": "KeyError: 'x'", "collectives": collectives}
    assert Calls().pass_to(1, mine=5, changes={1: gone}) == found


def test_after_a_broken_connection_less_patience_is_needed():
    calls = Calls()
    assert calls.pass_to(4, mine=5, beating=(0, 1, 2)) == ""
    assert "rank 3" in calls.calls.missing(4.0, 3.0)


def test_a_process_that_was_stopped_itself_blames_nobody():
    calls = Calls()
    calls.pass_to(1, mine=6)
    calls.calls.restart(100.0)
    assert calls.calls.missing(101.0) == ""


def test_reading_begins_with_what_is_said_now():
    calls = Calls()
    calls.pass_to(1, mine=5)
    calls.calls.listens(100.0)
    assert calls.calls.missing(100.0, 3.0) == ""


def test_the_message_of_the_missing_one_itself():
    assert message(1, "rank 1 (host a) is alive").startswith("the other ranks have given up")
    assert message(2, "rank 1 (host a) is alive").startswith("rank 2 lost another rank: rank 1 (")


class Memory:
    """A store in this process; `silent` ones never answer."""

    def __init__(self):
        self.values, self.silent = {}, threading.Event()

    def set(self, key, value):
        if self.silent.is_set():
            raise RuntimeError("connection reset by peer")
        self.values[key] = value

    def check(self, keys):
        return all(key in self.values for key in keys)

    def multi_get(self, keys):
        return [self.values[key] for key in keys]


def test_two_hearts_and_one_that_fails():
    store = Memory()
    hearts = [Heartbeat(store, r, 2, 2.0, lambda: 1, None) for r in range(2)]
    for heart in hearts:
        heart.start()
    hearts[1].leave("failed", "KeyError: 'x'")
    found = hearts[0].lost()
    hearts[0].leave("done")
    assert "has ended: KeyError: 'x'" in found
    assert threading.active_count() == 1 or not any(
        thread.name == "dmi-heartbeat" for thread in threading.enumerate()
    )


def test_a_lost_store_is_the_loss_of_the_rank_that_holds_it():
    store = Memory()
    heart = Heartbeat(store, 1, 2, 1.0, lambda: 1, 0)
    heart.start()
    store.silent.set()
    assert heart.lost().startswith("rank 0 no longer answers")
    heart.leave("done")
