"""A search is its journal: interrupted anywhere and replayed, it goes on as if it had not been."""

import json
from math import inf, nan

import pytest

from dmi_hpc.errors import FormatVersionError, RunError
from dmi_hpc.models.space import Choice, FloatRange, NetworkSpace, SearchSpace
from search.evolution.evolve import Evolution, EvolutionConfig, Failure, Proposal, Success
from search.records.journal import Journal, adopt, header, outcome_of, replay
from search.records.lines import decode, encode
from search.spaces.genome import to_json
from search.spaces.networks import Networks

SPACE = SearchSpace(
    network=NetworkSpace(input_shape=(1, 15, 15, 15), conv_blocks=(1, 4)),
    hyper={
        "batch_size": Choice(values=(8, 16, 32), ordered=True),
        "learning_rate": FloatRange(low=1e-5, high=1e-1, log=True),
    },
)
CONFIG = EvolutionConfig(seed=3, initial=6, population=6, pool=8)
EVALUATIONS = 18


def fresh(config=CONFIG):
    return Evolution(Networks(SPACE), config)


def outcome(proposal):
    if proposal.id % 5 == 2:
        return Failure("memory", "too large", "Traceback ...")
    return Success(float(int(proposal.hash[:6], 16)))


def work(journal, evolution, pending, outstanding=1):
    """Go on until EVALUATIONS are told; every ask and tell is journalled as a driver would."""
    running = list(pending)
    while len(evolution.outcomes) < EVALUATIONS:
        while len(running) < outstanding and len(evolution.proposals) < EVALUATIONS:
            running.append(evolution.ask())
            journal.ask(running[-1], to_json(running[-1].genome))
        proposal = running.pop(0)
        journal.tell(proposal.id, outcome(proposal), 1.5, {"epochs": 3})
        evolution.tell(proposal.id, outcome(proposal))


def finished(path, outstanding=1):
    evolution = fresh()
    work(Journal.create(path, evolution), evolution, [], outstanding)
    return evolution


def resume(path):
    journal, evolution = Journal.open(path), fresh()
    pending = replay(journal, evolution)
    work(journal, evolution, pending)
    return evolution


def test_replay_after_every_prefix_continues_identically(tmp_path):
    whole = finished(tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * EVALUATIONS
    assert "incumbent" in {p.origin for p in whole.proposals.values()}  # the surrogate was in use
    for count in range(1, len(lines) + 1):
        path = tmp_path / f"{count}.jsonl"
        path.write_bytes(b"".join(lines[:count]))
        resumed = resume(path)
        assert resumed.proposals == whole.proposals
        assert resumed.outcomes == whole.outcomes
        tells = [e["id"] for e in Journal.open(path).events() if e["event"] == "tell"]
        assert sorted(tells) == list(range(EVALUATIONS))  # none repeated


@pytest.mark.parametrize("lost", [1, 20, 200])
def test_a_kill_in_the_middle_of_a_line_costs_that_line_alone(tmp_path, lost):
    whole = finished(tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for count in (10, 11):  # a torn tell, a torn ask
        path = tmp_path / f"{count}-{lost}.jsonl"
        path.write_bytes(b"".join(lines[:count])[: -min(lost, len(lines[count - 1]) - 1)])
        resumed = resume(path)
        assert resumed.proposals == whole.proposals
        assert resumed.outcomes == whole.outcomes
        # the torn line stays in the file, and a second resume passes over it
        assert resume(path).proposals == whole.proposals


def test_pending_proposals_of_many_workers_come_back_with_their_numbers(tmp_path):
    finished(tmp_path / "whole.jsonl", outstanding=5)
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:12]))
    events = [json.loads(line) for line in lines[:12]]
    asked = [e["id"] for e in events if e["event"] == "ask"]
    told = {e["id"] for e in events if e["event"] == "tell"}
    evolution = fresh()
    pending = replay(Journal.open(tmp_path / "cut.jsonl"), evolution)
    assert len(pending) >= 4
    assert [p.id for p in pending] == [number for number in asked if number not in told]
    assert [evolution.proposals[p.id] for p in pending] == pending


def test_a_tell_without_its_ask_is_passed_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(path, fresh())
    journal.tell(7, Success(1.0), 1.0)
    evolution = fresh()
    assert replay(journal, evolution) == []
    assert evolution.best() is None


def test_outcomes_are_recorded_whole(tmp_path):
    evolution = fresh()
    journal = Journal.create(tmp_path / "journal.jsonl", evolution, {"workers": 2})
    for told in (Success(0.125), Failure("exception", "boom", "Traceback"), Success(nan)):
        proposal = evolution.ask()
        journal.ask(proposal, to_json(proposal.genome))
        journal.tell(proposal.id, told, 2.5, {"mae": inf, "curve": [1.0, nan]})
        evolution.tell(proposal.id, told)
    journal.resumed()
    text = (tmp_path / "journal.jsonl").read_text()
    assert "NaN" not in text.replace('"the fitness is nan"', "") and "Infinity" not in text
    events = journal.events()
    tells = [event for event in events if event["event"] == "tell"]
    assert events[0]["config"]["workers"] == 2
    assert events[-1]["event"] == "resume"
    assert tells[0]["status"] == "ok" and tells[0]["fitness"] == 0.125
    assert tells[0]["seconds"] == 2.5 and tells[0]["metrics"] == {"mae": None, "curve": [1.0, None]}
    assert [outcome_of(event) for event in tells] == list(evolution.outcomes.values())
    assert tells[2]["failure"] == "nan"


def test_a_journal_is_never_overwritten(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal.create(path, fresh())
    with pytest.raises(RunError, match="recorded here already"):
        Journal.create(path, fresh())


def test_a_missing_journal_or_header_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no journal"):
        Journal.open(tmp_path / "none.jsonl")
    (tmp_path / "odd.jsonl").write_text('{"event":"tell","id":0}\n')
    with pytest.raises(RunError, match="not the header"):
        Journal.open(tmp_path / "odd.jsonl")


def test_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(encode({**header(fresh()), "version": 3}))
    with pytest.raises(FormatVersionError, match=r"version 3.*up to 2"):
        Journal.open(path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (fresh(EvolutionConfig(seed=4, initial=6, population=6, pool=8)), "seed is 3 .* 4 now"),
        (
            fresh(EvolutionConfig(seed=3, initial=6, population=9, pool=8)),
            "config.population is 6 .* 9 now",
        ),
        (Evolution(Networks(SPACE.model_copy(update={"hyper": {}})), CONFIG), "space is"),
    ],
)
def test_the_journal_of_another_search_is_refused_by_its_difference(tmp_path, other, message):
    journal = Journal.create(tmp_path / "journal.jsonl", fresh(), {"workers": 2})
    with pytest.raises(RunError, match=message):
        replay(journal, other)
    assert not other.proposals


def edited(event):
    return {**event, "genome": {**event["genome"], "conv": event["genome"]["conv"] * 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited, "has hash"),
        (lambda event: {**event, "genome": {}}, "event 2 cannot be replayed"),
        (lambda event: {"event": "ask"}, "KeyError"),
    ],
)
def test_an_edited_journal_is_refused(tmp_path, change, message):
    path = tmp_path / "journal.jsonl"
    finished(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = encode(change(decode(lines[1].rstrip())))
    path.write_bytes(b"".join(lines))
    with pytest.raises(RunError, match=message):
        replay(Journal.open(path), fresh())


def test_two_searches_in_one_journal_are_noticed(tmp_path):
    path = tmp_path / "journal.jsonl"
    evolution = fresh()
    journal = Journal.create(path, evolution)
    proposal = evolution.ask()
    journal.ask(proposal, to_json(proposal.genome))
    journal.ask(proposal, to_json(proposal.genome))
    with pytest.raises(RunError, match="asked twice"):
        replay(journal, fresh())


def test_a_changed_byte_costs_its_line_alone_and_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    whole = finished(path)
    lines = path.read_bytes().splitlines(keepends=True)
    number = next(
        n for n, line in enumerate(lines) if b'"tell","time"' in line and b'"id":4' in line
    )
    lines[number] = lines[number].replace(b'"fitness":', b'"fitness":1')
    path.write_bytes(b"".join(lines))
    journal, evolution = Journal.open(path), fresh()
    pending = replay(journal, evolution)
    assert journal.damaged == (number + 1,)
    assert [proposal.id for proposal in pending] == [4]
    assert set(whole.outcomes) - set(evolution.outcomes) == {4}
    assert all(evolution.outcomes[n] == whole.outcomes[n] for n in evolution.outcomes)


def test_a_damaged_header_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    finished(path)
    text = path.read_bytes()
    path.write_bytes(text.replace(b'"seed":3', b'"seed":4', 1))
    with pytest.raises(RunError, match="damaged"):
        Journal.open(path)
    path.write_bytes(text.replace(b',"sum":"', b',"some":"', 1))
    with pytest.raises(RunError, match="checksum is missing"):
        Journal.open(path)


def test_every_session_tells_its_code_and_every_ask_its_lineage(tmp_path):
    path = tmp_path / "journal.jsonl"
    whole = finished(path)
    Journal.open(path).resumed({"workers": 3})
    first, *events, last = Journal.open(path).events()
    for session in (first, last):
        assert set(session["code"]) == {"dmi_hpc", "git", "torch", "python"}
        assert session["process"]["host"]
    asks = {event["id"]: event for event in events if event["event"] == "ask"}
    for number, proposal in whole.proposals.items():
        assert asks[number]["parents"] == list(proposal.parents)
        assert all(parent in asks for parent in proposal.parents)
        assert asks[number].get("predicted") == proposal.predicted


OLD = """\
{"event":"header","version":1,"seed":3,"space":"c0b1a9f30a1f677a046242548c1f5e12","config":\
{"population":6,"tournament":3,"initial":6,"crossover":0.5,"surrogate":true,"pool":8,"unfiltered":0.1,\
"workers":2,"data":"aa"},"time":1795371382.6182942}
{"event":"ask","time":1795371382.6257634,"id":0,"genome":{"conv":[{"filters":24,"kernel":5,"padding":\
"circular","norm":null,"activation":"elu","pool":"max","dropout":0.0},{"filters":128,"kernel":1,"padding":\
"zeros","norm":"batch","activation":"elu","pool":"max","dropout":0.3}],"readout":"flatten","dense":[],\
"hyper":{"batch_size":16,"learning_rate":2.31e-05}},"hash":"235c1bb6eecf68204ce67adcb0470178","origin":"random","parents":[]}
{"event":"tell","time":1795371382.6291604,"id":0,"status":"ok","fitness":0.25,"seconds":1.5,"metrics":{}}
{"event":"ask","time":1795371382.6496077,"id":1,"genome":{"conv":[{"filters":128,"kernel":5,"padding":\
"zeros","norm":null,"activation":"relu","pool":"max","dropout":0.1}],"readout":"flatten","dense":[],\
"hyper":{"batch_size":16,"learning_rate":8.61e-05}},"hash":"093747a35bacea55690a39e89241b28c","origin":"random","parents":[]}
{"event":"resume","time":1795371382.6456652,"config":{"workers":2}}
{"event":"ask","ti"""


def test_version_1_is_read_and_continued(tmp_path):
    """Written by the first DMI-HPC: no checksums, no code, other constants; torn at its end."""
    path = tmp_path / "journal.jsonl"
    path.write_text(OLD)
    journal, evolution = Journal.open(path), fresh()
    assert [proposal.id for proposal in replay(journal, evolution)] == [1]
    assert evolution.outcomes == {0: Success(0.25)}
    journal.resumed()
    journal.tell(1, Success(0.5), 1.0)
    again, evolution = Journal.open(path), fresh()
    assert replay(again, evolution) == []
    assert evolution.outcomes == {0: Success(0.25), 1: Success(0.5)}
    assert again.damaged == (6,)  # the torn one


def larger(**changes):
    network = SPACE.network.model_copy(update={"conv_blocks": (1, 6), **changes})
    return Evolution(Networks(SPACE.model_copy(update={"network": network})), CONFIG)


def test_a_larger_space_takes_the_journal_over_if_it_is_asked_for(tmp_path):
    path = tmp_path / "journal.jsonl"
    whole = finished(path)
    with pytest.raises(RunError, match=r"space is .*--larger-space"):
        replay(Journal.open(path), larger())
    evolution = larger()
    assert replay(Journal.open(path), evolution, larger_space=True) == []
    assert evolution.outcomes == whole.outcomes
    journal, proposal = Journal.open(path), evolution.ask()
    journal.ask(proposal, to_json(proposal.genome))
    again = larger()  # the journal is that of the larger space now
    assert [p.id for p in replay(Journal.open(path), again)] == [proposal.id]
    with pytest.raises(RunError, match="space is"):
        replay(Journal.open(path), fresh())


def test_a_space_that_does_not_contain_the_old_genomes_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    finished(path)
    less = SPACE.model_copy(update={"hyper": {"batch_size": SPACE.hyper["batch_size"]}})
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"genome 0 is not valid in the new space .*--from"):
        replay(Journal.open(path), Evolution(Networks(less), CONFIG), larger_space=True)
    assert path.read_bytes() == before


def test_migrants_are_replayed_and_meet_no_own_number(tmp_path):
    path, evolution = tmp_path / "journal.jsonl", fresh()
    journal = Journal.create(path, evolution)
    other = Evolution(Networks(SPACE), EvolutionConfig(seed=9, initial=6, population=6, pool=8))
    for number in range(3):
        foreign = other.ask()
        told = Success(0.1 + number)
        journal.record(
            "migrant",
            id=-1 - number,
            **{"from": {"island": "b", "id": foreign.id}},
            genome=to_json(foreign.genome),
            hash=foreign.hash,
            status="ok",
            fitness=told.fitness,
        )
        adopt(evolution, Proposal(-1 - number, foreign.genome, "migrant", (), foreign.hash), told)
    work(journal, evolution, [])
    assert evolution.best() is not None and min(evolution.proposals) == -3
    again = fresh()
    assert replay(Journal.open(path), again) == []
    assert again.proposals == evolution.proposals
    assert again.outcomes == evolution.outcomes
    assert again.ask() == evolution.ask()
