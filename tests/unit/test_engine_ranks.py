"""DeepSpeed and plain torch over real ranks: one process tree compares, these tests judge."""

import json
import subprocess
import sys

import pytest
from runner import SUPPORT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENGINES = ["torch", "stage 0", "stage 1", "stage 2", "stage 3"]
CHAINS = [
    "2 0 3 1",
    "torch 3 2 torch",
    "3 torch 1 3",
    "1 2 torch 0",
    "layers 1 3 2 0",
    "frozen 3 2 torch 1",
    "offload 3 2 1 3",
]
ROUNDING = 1e-5  # weights are about 0.1, and move by 0.01 a step


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-P", SUPPORT / "engine_ranks.py"],
        cwd=tmp_path_factory.mktemp("ranks"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout
    assert "FutureWarning" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_equal_to_plain_torch(found, engine, ranks):
    for precision in ("fp32", "bf16"):
        for accumulation in (1, 4):
            case = f"{ranks} ranks: {engine} {precision} x{accumulation}"
            assert found[case] < ROUNDING, case


@pytest.mark.parametrize("engine", ENGINES)
def test_four_ranks_equal_plain_torch(found, engine):
    assert found[f"4 ranks: {engine} fp32 x4"] < ROUNDING


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_traps_of_defaults(found, engine, ranks):
    """DeepSpeed's "Adam" is AdamW, and it clips unless told not to."""
    assert found[f"{ranks} ranks: adam - adamw"] > 100 * ROUNDING
    assert found[f"{ranks} ranks: clipped - unclipped"] > 100 * ROUNDING
    assert found[f"{ranks} ranks: clipped by default - unclipped"] > 100 * ROUNDING
    for case in ("adamw", "clipped", "unclipped"):
        assert found[f"{ranks} ranks: {engine} {case}"] < ROUNDING, case


def test_every_engine_reports_the_same_norm_of_the_whole_gradient(found):
    for ranks in (1, 2):
        norms = [found[f"{ranks} ranks: {engine} norm"] for engine in ENGINES]
        assert norms == pytest.approx([norms[0]] * len(ENGINES), rel=1e-6)
        assert norms[0] > 0.1


@pytest.mark.parametrize("chain", CHAINS)
def test_resumed_at_other_ranks_and_stages(found, chain):
    """4 -> 2 -> 1 -> 4 ranks, an engine each: as if never interrupted."""
    for leg, ranks in enumerate((4, 2, 1, 4)):
        case = f"{ranks} ranks: {chain} leg {leg}"
        assert found[f"{case} trained"] < ROUNDING, case
        if leg:
            assert found[f"{case} loaded"] == 0, case


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpointed_activations_change_nothing(found, engine):
    assert found[f"2 ranks: {engine} activations"] < ROUNDING


@pytest.mark.parametrize("engine", ENGINES)
def test_fp16_scales_the_loss_and_leaves_out_what_overflows(found, engine):
    assert found[f"2 ranks: {engine} fp16"] < 1e-3  # half precision has 3 digits
    assert found[f"2 ranks: {engine} fp16 overflown"] == [True, True, True, True, False]
    assert found[f"2 ranks: {engine} fp16 finite"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(found, engine):
    assert found[f"2 ranks: {engine} skipped"] == [False, False, True, False, False]
    assert found[f"2 ranks: {engine} skip"] < ROUNDING


def test_a_step_may_have_fewer_micro_batches(found):
    offloads = [f"stage {stage} offload" for stage in (1, 2, 3)]
    for engine in [*ENGINES, *offloads]:
        assert found[f"2 ranks: {engine} fewer parts"] < ROUNDING, engine


def test_offload_changes_nothing(found):
    for case in (
        "1 offload optimizer",
        "2 offload optimizer",
        "3 offload optimizer",
        "3 offload all",
    ):
        for accumulation in (1, 4):
            assert found[f"2 ranks: stage {case} x{accumulation}"] < ROUNDING, case


@pytest.mark.parametrize(
    ("case", "parts"),
    {
        "unknown": ["'gradient_cliping'", "Did you mean 'gradient_clipping'", "flops_profiler"],
        "unknown in zero": [
            "'zero_optimization.reduce_bucket'",
            "Did you mean 'reduce_bucket_size'",
        ],
        "unknown deeper": ["'zero_optimization.offload_optimizer.pin'", "pin_memory"],
        "unknown in a lenient section": ["'flops_profiler.top'", "top_modules"],
        "removed": ["Elastic training has been removed"],
        "given up": ["zero_optimization.cpu_offload", "train.offload"],
        "contradiction": ["gradient_clipping is 1.0", "train.clip_norm"],
        "contradiction in zero": ["zero_optimization.stage is 2", "train.zero_stage"],
        "another optimiser": ["optimizer.type", "train.optimizer"],
        "another precision": ["bf16.enabled", "train.precision"],
        "no effect": ["data_efficiency", "no effect"],
        "auto": ['"auto"', "reduce_bucket_size"],
        "out of range": ["zero_optimization.reduce_bucket_size", "greater than 0"],
    }.items(),
)
def test_deepspeed_keys_that_would_do_nothing_or_contradict(found, case, parts):
    for part in ["train.deepspeed", *parts]:
        assert part in found["refused"][case]


def test_deepspeed_keys_are_merged_by_the_name_that_counts(found):
    assert found["refused"]["accepted"] == ""
    merged = found["merged"]
    assert merged["zero_optimization"]["stage3_prefetch_bucket_size"] == 1000
    assert merged["flops_profiler"] == {"enabled": False, "top_modules": 3}
    # defaults that change numbers or memory
    assert merged["gradient_clipping"] == 0.0
    assert merged["zero_optimization"]["reduce_bucket_size"] < 2_000_000
