"""What `dmi launch` starts: stages, ranks, environments; and what it makes of exit codes."""

import os
import signal
import sys

import pytest

from dmi_hpc import knobs
from dmi_hpc.config import Recipe
from dmi_hpc.errors import LaunchError
from dmi_hpc.watch import StopFlag, stop_on_signals
from dmi_hpc.world import World, detect
from launch import cluster
from launch.cli import ranks_of
from launch.cluster import Command, Part, PartFailed, command_line, rank_environment
from launch.stages import arguments_of, stages_of


def recipe(**tables):
    return Recipe.model_validate({"name": "a", "task": {"name": "toy_task:Toy"}, **tables})


@pytest.mark.parametrize(
    ("tables", "stages"),
    [
        ({}, ("data", "train", "evaluate", "report")),
        ({"data": {"path": "x"}}, ("train", "evaluate", "report")),
        (
            {"model": {"source": "search"}},
            ("data", "search", "train", "evaluate", "report"),
        ),
        (
            {"model": {"source": "search"}, "data": {"path": "x"}},
            ("search", "train", "evaluate", "report"),
        ),
    ],
)
def test_stages_follow_the_recipe(tables, stages):
    assert stages_of(recipe(**tables), "all") == stages
    assert stages_of(recipe(**tables), "train") == ("train",)


def test_ranks_follow_the_recipe_then_the_machine(monkeypatch):
    assert ranks_of(recipe(launch={"ranks": 3})) == 3
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for cores, ranks in ((1, 1), (2, 2), (64, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        assert ranks_of(recipe()) == ranks
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert ranks_of(recipe()) == 4


def test_interrupted_stages_are_resumed(tmp_path):
    file, run = tmp_path / "r.toml", tmp_path / "run"
    assert arguments_of("data", file, run)[:2] == ("data", "build")
    assert arguments_of("train", file, run)[-1] == "--resume"
    island = arguments_of("search", file, run, island="island-3", extra=("--larger-space",))
    assert island[-4:] == ("--resume", "--island", "island-3", "--larger-space")
    assert arguments_of("report", file, run) == ("report", str(run))


def test_each_rank_finds_its_world(tmp_path):
    job = Command(("train",), 3, tmp_path)
    for rank in range(3):
        found = detect(rank_environment(job, rank, "file:///x"))
        assert found == World(rank, 3, rank, 3, "torchrun")
    assert rank_environment(job, 0, "file:///x")["DMI_RENDEZVOUS"] == "file:///x"
    assert command_line(["info"]) == [sys.executable, "-P", "-m", "dmi_hpc", "info"]


@pytest.mark.parametrize(
    "outside",
    [
        {"DMI_WORLD": "single"},
        {"RANK": "3", "WORLD_SIZE": "8"},
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"},
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_world_of_the_launcher_does_not_reach_its_ranks(tmp_path, outside, ranks):
    job = Command(("train",), ranks, tmp_path)
    worlds = [detect({**outside, **rank_environment(job, r, "file:///x")}) for r in range(ranks)]
    assert [(world.rank, world.size) for world in worlds] == [(r, ranks) for r in range(ranks)]


def test_under_a_launcher_only_the_launcher_says_how_to_continue(monkeypatch):
    assert "--resume continues" in knobs.resume_hint()
    monkeypatch.setenv("DMI_LAUNCHED", "2")
    assert knobs.resume_hint() == ""


def job_running(monkeypatch, tmp_path, code, ranks=2):
    """A job whose ranks run this Python code, with `rank` set."""
    head = "import os, signal, sys, time; rank = int(os.environ.get('RANK', 0))\n"
    monkeypatch.setattr(cluster, "command_line", lambda a: [sys.executable, "-c", head + code])
    return Command(("train", "r.toml"), ranks, tmp_path / "logs")


def run(job):
    with stop_on_signals() as stop:
        cluster.run(job, stop)


def test_a_job_that_ends_well_returns(monkeypatch, tmp_path):
    run(job_running(monkeypatch, tmp_path, "time.sleep(rank / 10)"))


def test_the_failed_rank_is_named_with_its_log_and_the_others_are_ended(monkeypatch, tmp_path):
    code = "rank == 1 and sys.exit('no such volume'); time.sleep(60)"
    with pytest.raises(LaunchError) as caught:
        run(job_running(monkeypatch, tmp_path, code))
    assert "'dmi train r.toml': rank 1 of 2 ended with exit code 1" in str(caught.value)
    assert "no such volume" in str(caught.value)


def test_who_serves_the_others_ends_after_them_and_its_log_says_more(tmp_path):
    def part(name, code, **more):
        return Part(
            name, (sys.executable, "-c", f"import os, sys, time\n{code}"), os.environ, **more
        )

    ray = part(
        "Ray", "print('no room', flush=True); time.sleep(60)", log=tmp_path / "l", helper=True
    )
    with stop_on_signals() as stop:
        assert not cluster.stand_by([ray, part("search", "time.sleep(0.3)")], stop)
        with pytest.raises(
            PartFailed, match=r"(?s)search ended with exit code 2.*no room"
        ) as failed:
            cluster.stand_by([ray, part("search", "time.sleep(0.3); sys.exit(2)")], stop)
        assert not failed.value.lost
        cut = part("search", "time.sleep(1); sys.exit(1)")  # as Ray ends who drives it
        killed = part("Ray", "os.kill(os.getpid(), 15)", log=tmp_path / "k", helper=True)
        assert cluster.stand_by([killed, cut], stop)
        broken = part("Ray", "sys.exit(2)", log=tmp_path / "m", helper=True)
        with pytest.raises(PartFailed, match="Ray ended with exit code 2"):
            cluster.stand_by([broken, part("search", "time.sleep(60)")], stop)


def test_a_killed_rank_is_named_before_those_that_failed_for_missing_it(monkeypatch, tmp_path):
    code = "rank == 1 and os.kill(os.getpid(), signal.SIGKILL); time.sleep(0.5); sys.exit(1)"
    monkeypatch.setattr(cluster, "POLL_S", 1.0)
    with pytest.raises(LaunchError, match="rank 1 of 2 was killed by signal 9"):
        run(job_running(monkeypatch, tmp_path, code))


def test_a_rank_that_ignores_the_end_is_killed(monkeypatch, tmp_path):
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); rank and sys.exit(3); time.sleep(60)"
    monkeypatch.setattr(cluster, "GRACE_S", 0.5)
    with pytest.raises(LaunchError, match="rank 1 of 2 ended with exit code 3"):
        run(job_running(monkeypatch, tmp_path, code))


@pytest.mark.parametrize("code", ["time.sleep(60)", "time.sleep(1)"])
def test_a_signal_reaches_the_ranks_and_ends_the_launcher_with_75(monkeypatch, tmp_path, code):
    """By the signal itself too: a stage that has nothing to save does not catch it."""
    job = job_running(monkeypatch, tmp_path, code)
    real = cluster._wait

    def signalled(parts, processes, stop, look):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(parts, processes, stop, look)

    monkeypatch.setattr(cluster, "_wait", signalled)
    with pytest.raises(SystemExit) as ended:
        run(job)
    assert ended.value.code == 75


def test_states_that_ranks_saved_end_the_launcher_with_75(monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as ended:
        run(job_running(monkeypatch, tmp_path, "sys.exit(75)"))
    assert ended.value.code == 75


def test_after_a_signal_no_further_stage_is_started(monkeypatch, tmp_path, capsys):
    """It came between two stages, or while the launcher read its recipe."""
    job, stop = job_running(monkeypatch, tmp_path, "sys.exit('started')"), StopFlag()
    stop.signal = signal.SIGTERM
    with pytest.raises(SystemExit) as ended:
        cluster.run(job, stop)
    assert ended.value.code == 75
    assert capsys.readouterr().err.startswith("launch stopped: finished parts are kept")
    assert not job.logs.exists()
