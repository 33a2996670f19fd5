"""How the persistent kernels of rnn, lstm and gru are laid out: a grid of sizes and GPUs, none of which is needed."""

from __future__ import annotations

import itertools

import pytest

from recattn_kernels.ops.gated import launch_plan
from recattn_kernels.ops.gated.launch_plan import Gpu, Plan, Problem, refusal

KB = 1024
A100, H100, H20 = Gpu(108, 163 * KB, (8, 0)), Gpu(132, 227 * KB, (9, 0)), Gpu(78, 227 * KB, (9, 0))
RTX_5090 = Gpu(170, 99 * KB, (12, 0))
GPUS = {
    "a100": A100,
    "h100": H100,
    "h20": H20,
    "rtx-5090": RTX_5090,
    "rtx-3060": Gpu(28, 99 * KB, (8, 6)),
    "small": Gpu(4, 48 * KB),
    "one": Gpu(1, 99 * KB),
}
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
HIDDEN = (1, 3, 33, 130, 256, 512, 1000, 1024, 2048)
BATCH = (1, 8, 9, 64, 1000)
TYPES = {"16-bit": (2, False), "tf32": (4, False), "float32": (4, True)}
PLAIN, NORMED, TWICE = (False, False), (True, False), (False, True)  # as Problem's last fields
VARIANTS = {"rnn": (PLAIN, NORMED), "gru": (PLAIN, NORMED, TWICE), "lstm": (PLAIN, NORMED)}
KINDS = [(GATES[op], *variant) for op, variants in VARIANTS.items() for variant in variants]


def check(problem: Problem, B: int, gpu: Gpu, plan: Plan) -> None:
    # Every unit is in one slice, and every row of the batch in one group of one pass.
    assert plan.units * (plan.slices - 1) < problem.H <= plan.units * plan.slices
    assert plan.rows % launch_plan.COLUMN_TILE == 0
    assert plan.groups * plan.rows * (plan.passes(B) - 1) < B <= plan.groups * plan.rows * plan.passes(B)
    assert (plan.groups - 1) * plan.rows < B, "a group that has no rows in any pass"
    # All blocks run at once, one on a multiprocessor, or those of a cluster do, and one launch takes all groups.
    if plan.cluster:
        assert gpu.capability >= (9, 0) and 1 <= plan.slices <= launch_plan.cluster_limit(gpu) and plan.passes(B) == 1
    else:
        assert 1 <= plan.blocks <= gpu.multiprocessors
    weight_rows = problem.weight_rows(plan.units)
    assert plan.units <= launch_plan.UNITS
    # Besides its weights, whole, a block has at least the state of each of its units, and what it normalises.
    columns = problem.gates * plan.units
    weights = weight_rows * problem.inner * problem.element
    kept = (2 if problem.gates == 4 or problem.twice else 1) * plan.units
    if problem.normed:
        kept += (2 if problem.backward else 1) * columns
    exchanged = 2 * plan.rows * (problem.inner if problem.backward else problem.H) * problem.element
    assert weights + kept * plan.rows * 4 + plan.cluster * exchanged < plan.shared <= gpu.shared
    assert not problem.backward or columns <= launch_plan.THREADS, "columns whose gradients no thread would sum"
    means = {1: 1, 3: 1, 4: 3 if problem.backward else 2}[problem.gates] * problem.normed * plan.slices * 8
    assert plan.workspace >= plan.groups * (plan.rows * means + (not plan.cluster) * (exchanged + 4))
    assert plan.workspace % 16 == 0


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("op", GATES)
def test_plans(op: str, name: str) -> None:
    gpu, made = GPUS[name], 0
    for H, B, (element, exact), backward, variant in itertools.product(
        HIDDEN, BATCH, TYPES.values(), (False, True), VARIANTS[op]
    ):
        problem = Problem(GATES[op], H, element, exact, backward, *variant)
        plan = launch_plan.launch_plan(problem, B, gpu)
        if isinstance(plan, str):
            assert f"({GATES[op] * H}, {H})" in plan
            assert str(gpu.shared) in plan
            continue
        made += 1
        check(problem, B, gpu, plan)
    assert made > len(BATCH)


@pytest.mark.parametrize("name", GPUS)
def test_every_candidate_is_sound(name: str) -> None:
    """Whichever a better estimate of the time will choose."""
    for (gates, *variant), H, B, (element, exact), backward in itertools.product(
        KINDS, (1, 33, 130, 512), (1, 9, 100), TYPES.values(), (False, True)
    ):
        problem = Problem(gates, H, element, exact, backward, *variant)
        for plan in launch_plan.candidates(problem, B, GPUS[name]):
            check(problem, B, GPUS[name], plan)


@pytest.mark.parametrize(("gates", "normed", "twice"), KINDS)
@pytest.mark.parametrize("gpu", [A100, H100], ids=["a100", "h100"])
def test_sizes_that_must_fit(gpu: Gpu, gates: int, normed: bool, twice: bool) -> None:
    for H in range(1, 1025):
        assert refusal(Problem(gates, H, 2, False, False, normed, twice), gpu) is None
    for H in range(1, 513):
        assert refusal(Problem(gates, H, 4, True, False, normed, twice), gpu) is None
        assert refusal(Problem(gates, H, 4, False, False, normed, twice), gpu) is None


@pytest.mark.parametrize("name", GPUS)
def test_the_batch_decides_nothing(name: str) -> None:
    """Whether a call is refused is asked before its batch is known, and is a constant to a compiled graph."""
    for (gates, *variant), H, (element, exact) in itertools.product(KINDS, HIDDEN, TYPES.values()):
        problem = Problem(gates, H, element, exact, False, *variant)
        refused = refusal(problem, GPUS[name]) is not None
        for B in (1, 100, 100_000):
            plans = (
                launch_plan.launch_plan(problem._replace(backward=backward), B, GPUS[name])
                for backward in (False, True)
            )
            assert refused == any(isinstance(plan, str) for plan in plans)


def test_clusters() -> None:
    """Where they are, how large, and for what: a group that one holds has the shorter way."""
    assert [launch_plan.cluster_limit(gpu) for gpu in (A100, H20, RTX_5090, H100)] == [0, 8, 8, 16]
    gru = Problem(3, 256, 2, False, False)
    plans = [launch_plan.launch_plan(gru, 32, gpu) for gpu in (A100, H100)]
    assert [isinstance(plan, Plan) and plan.cluster for plan in plans] == [False, True]
    wide = launch_plan.launch_plan(gru._replace(H=1024), 32, H100)
    assert isinstance(wide, Plan) and not wide.cluster
    assert {plan.cluster for plan in launch_plan.candidates(gru, 32, H100)} == {False, True}


def test_clusters_that_do_not_run_at_once_take_turns() -> None:
    plan = launch_plan.laid_out(Problem(3, 256, 2, False, False), units=16, rows=8, groups=17, cluster=True)
    assert [launch_plan.rounds(plan._replace(groups=groups), 8 * groups, H100) for groups in (8, 9, 17)] == [1, 2, 3]
    pairs_of_four = plan._replace(slices=7, groups=33)
    assert launch_plan.rounds(pairs_of_four, 33 * 8, H100) == 3, "two clusters of 7 in each of 8 GPCs"


@pytest.mark.parametrize("name", GPUS)
def test_clusters_refuse_nothing_and_allow_nothing(name: str) -> None:
    """Kernels that were compiled without them take what the others take."""
    gpu = GPUS[name]
    for (gates, *variant), H, (element, exact) in itertools.product(KINDS, HIDDEN, TYPES.values()):
        problem = Problem(gates, H, element, exact, False, *variant)
        assert (refusal(problem, gpu) is None) == (refusal(problem, gpu._replace(capability=(8, 0))) is None)


def test_refusals() -> None:
    reason = refusal(Problem(4, 4096, 2, False, False), H100)
    assert reason is not None
    assert "(16384, 4096)" in reason and "132 multiprocessors" in reason
    assert "7.5" in str(refusal(Problem(1, 8, 2, False, False), Gpu(40, 64 * KB, (7, 5))))
    assert refusal(Problem(4, 0, 2, False, False), H100) is None
