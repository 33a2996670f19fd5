"""How the persistent kernels of rnn, lstm and gru are laid out: a grid of sizes and GPUs, none of which is needed."""

from __future__ import annotations

import itertools

import pytest

from recattn_kernels.ops.gated import launch_plan
from recattn_kernels.ops.gated.launch_plan import Gpu, Plan, Problem, refusal

KB = 1024
A100, H100 = Gpu(108, 163 * KB, (8, 0)), Gpu(132, 227 * KB, (9, 0))
GPUS = {
    "a100": A100,
    "h100": H100,
    "rtx-3060": Gpu(28, 99 * KB, (8, 6)),
    "small": Gpu(4, 48 * KB),
    "one": Gpu(1, 99 * KB),
}
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
HIDDEN = (1, 3, 33, 130, 256, 512, 1000, 1024, 2048)
BATCH = (1, 8, 9, 64, 1000)
TYPES = {"16-bit": (2, False), "tf32": (4, False), "float32": (4, True)}


def check(problem: Problem, B: int, gpu: Gpu, plan: Plan) -> None:
    # Every unit is in one slice, and every row of the batch in one group of one pass.
    assert plan.units * (plan.slices - 1) < problem.H <= plan.units * plan.slices
    assert plan.rows % launch_plan.COLUMN_TILE == 0
    assert plan.groups * plan.rows * (plan.passes(B) - 1) < B <= plan.groups * plan.rows * plan.passes(B)
    assert (plan.groups - 1) * plan.rows < B, "a group that has no rows in any pass"
    # All blocks run at once: one on a multiprocessor.
    assert 1 <= plan.blocks <= gpu.multiprocessors
    # A warp holds all results of a block's weights.
    weight_rows = problem.weight_rows(plan.units)
    assert weight_rows <= launch_plan.ROW_TILE * launch_plan.ROW_TILES
    # Besides its weights, whole, a block has at least the state of each of its units.
    weights = weight_rows * problem.inner * problem.element
    assert weights + plan.units * plan.rows * 4 * (2 if problem.gates == 4 else 1) < plan.shared <= gpu.shared
    exchanged = (problem.inner if problem.backward else problem.H) * plan.rows * plan.groups * problem.element
    assert plan.workspace >= 2 * exchanged + 4 * plan.groups
    assert plan.workspace % 16 == 0


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("op", GATES)
def test_plans(op: str, name: str) -> None:
    gpu, made = GPUS[name], 0
    for H, B, (element, exact), backward in itertools.product(HIDDEN, BATCH, TYPES.values(), (False, True)):
        problem = Problem(GATES[op], H, element, exact, backward)
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
    for gates, H, B, (element, exact), backward in itertools.product(
        GATES.values(), (1, 33, 130, 512), (1, 9, 100), TYPES.values(), (False, True)
    ):
        problem = Problem(gates, H, element, exact, backward)
        for plan in launch_plan.candidates(problem, B, GPUS[name]):
            check(problem, B, GPUS[name], plan)


@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
@pytest.mark.parametrize("gpu", [A100, H100], ids=["a100", "h100"])
def test_sizes_that_must_fit(gpu: Gpu, gates: int) -> None:
    for H in range(1, 1025):
        assert refusal(gates, H, 2, False, gpu) is None
    for H in range(1, 513):
        assert refusal(gates, H, 4, True, gpu) is None
        assert refusal(gates, H, 4, False, gpu) is None


@pytest.mark.parametrize("name", GPUS)
def test_the_batch_decides_nothing(name: str) -> None:
    """Whether a call is refused is asked before its batch is known, and is a constant to a compiled graph."""
    for gates, H, (element, exact) in itertools.product(GATES.values(), HIDDEN, TYPES.values()):
        refused = refusal(gates, H, element, exact, GPUS[name]) is not None
        for B in (1, 100, 100_000):
            plans = (
                launch_plan.launch_plan(Problem(gates, H, element, exact, backward), B, GPUS[name])
                for backward in (False, True)
            )
            assert refused == any(isinstance(plan, str) for plan in plans)


def test_refusals() -> None:
    reason = refusal(4, 4096, 2, False, H100)
    assert reason is not None
    assert "(16384, 4096)" in reason and "132 multiprocessors" in reason
    assert "7.5" in str(refusal(1, 8, 2, False, Gpu(40, 64 * KB, (7, 5))))
    assert refusal(4, 0, 2, False, H100) is None
