"""The commands of Slurm and PBS, by stand-ins that say what the real ones say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dmi_hpc.errors import LaunchError
from launch.pbs import PBS
from launch.pbs import job_details as pbs_details
from launch.scheduler import Unreachable, job_argument, scheduler_of
from launch.slurm import Slurm, job_details, query_environment, queue_line, submit_environment

Fake = Callable[[str, str], Path]

# scontrol show job, Slurm 22.05.8
SHOWN = """JobId=7 JobName={name}
   UserId=me(1) GroupId=me(1) MCS_label=N/A
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime={ran} TimeLimit=00:30:00 TimeMin=N/A
   SubmitTime=2026-11-23T00:40:48 EligibleTime=2026-11-23T00:40:48
   StartTime=2026-11-23T00:40:48 EndTime={end} Deadline=N/A
   PreemptEligibleTime=2026-11-23T00:40:48 PreemptTime={preempt}
   Partition=debug AllocNode:Sid=localhost:12015
   NodeList={nodes}
   Command=/run/job.sh JobState=COMPLETED
"""
DEFAULTS = {
    "name": "dmi",
    "state": "RUNNING",
    "reason": "None",
    "restarts": "0",
    "ran": "00:00:02",
    "end": "2026-11-23T01:10:48",
    "preempt": "None",
    "nodes": "node[1-2]",
}


def shown(**changes: str) -> str:
    return SHOWN.format(**{**DEFAULTS, **changes})


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a command in front of the path; what it was called with is kept in the file returned."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, body: str) -> Path:
        calls = tmp_path / f"{name}.calls"
        (folder / name).write_text(f"#!/bin/sh\nprintf '%s\\n' \"$*\" >> {calls}\n{body}\n")
        (folder / name).chmod(0o700)
        return calls

    return make


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "job.sh"
    path.write_text("#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --account=mine\n#SBATCH --time=5:00\n")
    return path


def test_submit_hands_over_script_dependency_and_tasks(
    fake: Fake, script: Path, tmp_path: Path
) -> None:
    calls = fake("sbatch", "echo '42;cluster'")
    fake("scontrol", f"cat <<'E'\n{shown(state='PENDING', reason='Priority', nodes='')}E")
    assert Slurm(0).submit(script, cwd=tmp_path, after="7", array="1") == "42"
    expected = f"--parsable --dependency=afterany:7 --array=1 -- {script}\n"
    assert calls.read_text() == expected


@pytest.mark.parametrize(
    ("words", "todo"),
    [
        ("invalid partition specified: nix", "-p"),
        ("Batch job submission failed: Invalid account or account/partition combination", "-A"),
        ("Batch job submission failed: Invalid qos specification", "-q"),
        ("Batch job submission failed: Node count specification invalid", "-N"),
        ("Batch job submission failed: Requested time limit is invalid", "-t"),
        ("Batch job submission failed: Job violates accounting/QOS policy", "limits"),
        ("Batch job submission failed: Requested reservation is invalid", "--reservation"),
        ("Batch job submission failed: Invalid feature specification", "-C"),
    ],
)
def test_refusals_say_the_schedulers_words_and_what_to_do(
    fake: Fake, script: Path, tmp_path: Path, words: str, todo: str
) -> None:
    fake("sbatch", f"echo 'sbatch: error: {words}' >&2; exit 1")
    with pytest.raises(LaunchError) as error:
        Slurm(0).submit(script, cwd=tmp_path)
    assert words in str(error.value)
    assert todo in str(error.value).partition(words)[2]
    assert not isinstance(error.value, Unreachable)


def test_a_job_that_would_wait_for_ever_is_taken_back(
    fake: Fake, script: Path, tmp_path: Path
) -> None:
    fake("sbatch", "echo 42")
    fake("scontrol", f"cat <<'E'\n{shown(state='PENDING', reason='PartitionNodeLimit', nodes='')}E")
    cancelled = fake("scancel", "")
    with pytest.raises(LaunchError, match=r"PartitionNodeLimit.*fewer nodes"):
        Slurm(0).submit(script, cwd=tmp_path)
    assert cancelled.read_text() == "42\n"


def test_a_missing_command_is_named(
    fake: Fake, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"sbatch: no such command.*login node"):
        Slurm(0).submit(script, cwd=tmp_path)


def test_a_controller_that_restarts_is_asked_again(fake: Fake, tmp_path: Path) -> None:
    down = "Unable to contact slurm controller (connect failure)"
    once = tmp_path / "once"
    body = f"[ -e {once} ] && exit 0; touch {once}; echo 'scancel: error: {down}' >&2; exit 1"
    calls = fake("scancel", body)
    Slurm(60).cancel("7")
    assert calls.read_text() == "7\n7\n"


def test_patience_has_an_end(fake: Fake) -> None:
    fake(
        "scontrol",
        "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1",
    )
    with pytest.raises(Unreachable, match="Socket timed out"):
        Slurm(0).details("7")


def test_a_submission_that_was_heard_without_an_answer_is_not_repeated(
    fake: Fake, script: Path, tmp_path: Path
) -> None:
    timeout = "Batch job submission failed: Socket timed out on send/recv operation"
    calls = fake("sbatch", f"echo 'sbatch: error: {timeout}' >&2; exit 1")
    fake(
        "squeue",
        f"echo '8|2099-01-01T00:00:00|/other/job.sh'; echo '9|2099-01-01T00:00:00|{script}'",
    )
    fake("scontrol", f"cat <<'E'\n{shown(nodes='')}E")
    assert Slurm(60).submit(script, cwd=tmp_path) == "9"
    assert len(calls.read_text().splitlines()) == 1


def test_details_of_a_running_job(fake: Fake) -> None:
    fake("scontrol", f"[ $2 = hostnames ] && printf 'node1\\nnode2\\n' || cat <<'E'\n{shown()}E")
    details = Slurm(0).details("7")
    assert (details.phase, details.nodes, details.restarts) == ("running", ("node1", "node2"), 0)
    assert details.end == 1795396248  # 2026-11-23T01:10:48 UTC
    assert details.time_limit_s == 1800
    assert not (details.preempted or details.requeued or details.cancelled)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        # as a real Slurm 22.05.8 said it, each while the job's processes still lived
        ({"preempt": "2026-11-23T00:41:00", "end": "2026-11-23T00:41:20"}, "preempted"),
        ({"state": "COMPLETING", "end": "2026-11-23T00:40:50", "ran": "00:00:00"}, "cancelled"),
        ({"state": "COMPLETING", "end": "Unknown", "ran": "00:00:00", "restarts": "1"}, "requeued"),
        ({"state": "COMPLETING", "ran": "00:00:00", "restarts": "1"}, "requeued"),
        ({"state": "CANCELLED", "end": "2026-11-23T00:40:50"}, "cancelled"),
        ({"state": "COMPLETING", "reason": "TimeLimit", "ran": "00:30:01"}, ""),
    ],
)
def test_why_a_job_is_being_ended(changes: dict[str, str], told: str) -> None:
    details, _ = job_details("7", shown(**changes))
    found = [n for n in ("preempted", "requeued", "cancelled") if getattr(details, n)]
    assert found == ([told] if told else [])


def test_a_jobs_name_cannot_pretend_to_be_its_state() -> None:
    details, nodes = job_details("7", shown(name="x JobState=FAILED NodeList=evil Restarts=9"))
    assert (details.words, nodes, details.restarts) == ("RUNNING", "node[1-2]", 0)


def test_a_reason_with_spaces_is_whole() -> None:
    reason = "ReqNodeNotAvail, UnavailableNodes:node[3-4]"
    details, _ = job_details("7", shown(state="PENDING", reason=reason))
    assert (details.phase, details.reason, details.end) == ("queued", reason, None)


def test_jobs_that_slurm_has_forgotten(fake: Fake) -> None:
    words = "slurm_load_jobs error: Invalid job id specified"
    fake("scontrol", f"echo '{words}' >&2; exit 1")
    fake("squeue", f"echo '{words}' >&2; exit 1")
    assert Slurm(0).details("7").phase == "unknown"
    assert Slurm(0).states(["7"]) == {}


def test_states_of_an_arrays_tasks() -> None:
    state = queue_line("12_3|PENDING|2026-11-23T00:40:48|4|Dependency")
    assert (state.job, state.phase, state.reason, state.nodes) == (
        "12_3",
        "queued",
        "Dependency",
        4,
    )
    assert state.start == 1795394448
    assert queue_line("12|RUNNING|N/A|1|None").start is None


def test_lost_nodes(fake: Fake) -> None:
    fake("sinfo", "printf 'n1 allocated\\nn2 down*\\nn3 mixed*\\nn4 idle\\n'")
    assert Slurm(0).lost(["n1", "n2", "n3", "n4", "n5"]) == ("n2", "n3", "n5")


def test_a_requeue_that_slurm_has_made_already_is_none_too_many(fake: Fake) -> None:
    waiting = shown(state="COMPLETING", end="Unknown", ran="00:00:00", nodes="")
    fake("scontrol", f"[ $1 = show ] && cat <<'E' || exit 1\n{waiting}E")
    Slurm(0).requeue("7")


@pytest.mark.parametrize("job", ["", "--all", "7;rm", "7 8", "x", "7\n"])
def test_what_is_no_job_id_reaches_no_command_line(job: str) -> None:
    with pytest.raises(LaunchError, match="id of a job"):
        job_argument(job)


def test_the_script_has_the_last_word_over_the_users_variables(script: Path) -> None:
    env = {
        "SBATCH_ACCOUNT": "other",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_QOS": "kept",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_CONF": "/etc/slurm.conf",
        "HOME": "/home/me",
    }
    kept = {"SBATCH_QOS": "kept", "SLURM_CONF": "/etc/slurm.conf", "HOME": "/home/me"}
    assert submit_environment(env, script) == kept


def test_the_users_own_formats_do_not_change_the_answers() -> None:
    env = query_environment(
        {"SQUEUE_FORMAT": "x", "SLURM_TIME_FORMAT": "relative", "TZ": "Asia/Tokyo"}
    )
    assert env == {"SLURM_TIME_FORMAT": "standard", "TZ": "UTC", "LC_ALL": "C"}


def test_unknown_schedulers_are_refused() -> None:
    with pytest.raises(LaunchError, match="'lsf'; known: slurm, pbs"):
        scheduler_of("lsf")


ENTRY = {
    "job_state": "R",
    "stime": "Mon Nov 23 00:40:48 2026",
    "Resource_List": {"walltime": "00:30:00", "nodect": 2},
    "exec_host": "x1/0*64+x2/0*64",
    "run_count": 2,
}


def test_pbs_details() -> None:
    details = pbs_details("5.server", ENTRY)
    assert (details.phase, details.nodes, details.restarts) == ("running", ("x1", "x2"), 1)
    assert details.end == 1795396248
    ended = pbs_details("5.server", {**ENTRY, "job_state": "F", "Exit_status": 271})
    assert (ended.phase, ended.cancelled, ended.nodes) == ("ended", True, ())


def test_pbs_submits_asks_and_cancels(fake: Fake, script: Path, tmp_path: Path) -> None:
    calls = fake("qsub", "echo 5.server")
    fake("qstat", f"cat <<'E'\n{json.dumps({'Jobs': {'5.server': ENTRY}})}\nE")
    fake("qdel", "echo 'qdel: Unknown Job Id 5.server' >&2; exit 153")
    pbs = PBS(0)
    assert pbs.submit(script, cwd=tmp_path, after="4.server") == "5.server"
    assert calls.read_text() == f"-W depend=afterany:4.server {script}\n"
    assert pbs.states(["5.server"])["5.server"].phase == "running"
    pbs.cancel("5.server")


def test_pbs_refusals(fake: Fake, script: Path, tmp_path: Path) -> None:
    fake("qsub", "echo 'qsub: Unknown queue' >&2; exit 170")
    with pytest.raises(LaunchError, match=r"Unknown queue.*-p"):
        PBS(0).submit(script, cwd=tmp_path)


def test_pbs_lost_nodes(fake: Fake) -> None:
    nodes = {"x1": {"state": "job-busy"}, "x2": {"state": "down,offline"}}
    fake("pbsnodes", f"cat <<'E'\n{json.dumps({'nodes': nodes})}\nE")
    assert PBS(0).lost(["x1.site", "x2.site"]) == ("x2.site",)
