"""How the persistent CUDA kernels of rnn, lstm and gru are laid out on a GPU, or why they cannot be.

A block has `units` of the H hidden units and `rows` of the batch. As many blocks as there are `slices` cover H
together, exchange what they compute, and wait for each other in every step, once or more (Problem.meetings); each group
of them has rows of its own and knows nothing of the others. There are two forms of it:
- across the grid: the exchange is in global memory. All blocks of a launch run at once, one on a multiprocessor at
  most, and a batch that needs more groups than fit is taken in several passes.
- in clusters, from compute capability 9.0 on: a group is a thread-block cluster, of which each block has an exchange of
  its own in shared memory. One pass takes any batch, as clusters need not run at once.

Forward, a block's weights are the rows of W_hh of its units, of all gates; backward, the columns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from recattn_kernels.ops.gpu import Gpu

# As csrc/cuda/gated_product.cuh has them; the launcher refuses a plan that counts other bytes than it does.
WARPS = 8
ROW_TILE, ROW_TILES = 16, 4  # weights' rows of a matrix instruction, and tiles of them that a warp holds at once
COLUMN_TILE, COLUMN_TILES = 8, 4  # the same of the batch
SEGMENT = 64  # bytes of the inner dimension that a warp takes at a time
COUNTER = 128  # bytes of a group's counter
PAIR = 8  # bytes that a block leaves of a row when it is normalised
STATISTICS = 3 * PAIR  # bytes of a row that is
THREADS = 32 * WARPS
BATCH = COLUMN_TILE * COLUMN_TILES
ROWS = 256  # of the batch in a block at most
UNITS = ROW_TILE * ROW_TILES  # in a block at most: backward, a warp holds all their sums

# A cluster lies within a GPC, of which capabilities 9 and 10 have 8 at most, of 16 or 18 multiprocessors as a rule.
GPC, GPCS = 16, 8  # multiprocessors that are counted on in one, and the most that there are
PORTABLE, LARGEST = 8, 16  # blocks of a cluster: where there are clusters at all, and where a GPC allows it


class Problem(NamedTuple):
    """What a kernel is to be laid out for."""

    gates: int
    H: int
    element: int  # bytes of a weight
    exact: bool  # float32 that is not multiplied as TF32: without matrix instructions
    backward: bool
    normed: bool = False  # with layer normalisation
    twice: bool = False  # gru_before: two products in a step, one after the other

    def weight_rows(self, units: int) -> int:
        return units if self.backward else self.gates * units

    @property
    def inner(self) -> int:
        """The length of each of them."""
        return self.gates * self.H if self.backward else self.H

    @property
    def segments(self) -> int:
        return ceil_div(self.inner * self.element, SEGMENT)

    @property
    def states(self) -> int:
        return 2 if self.gates == 4 or self.twice else 1

    @property
    def norms(self) -> int:
        """How often the blocks meet in a step to normalise a row: also over c in the lstm."""
        return (2 if self.gates == 4 else 1) if self.normed else 0

    @property
    def pairs(self) -> int:
        """What they leave of each row then. The lstm's backward also needs c's mean again."""
        return self.norms + (self.backward and self.norms > 1)

    @property
    def meetings(self) -> int:
        """How often a block waits for the others in a step."""
        return 1 + self.twice + self.norms

    def __str__(self) -> str:
        direction = "backward" if self.backward else "forward"
        return f"the {direction} of weight_hh ({self.gates * self.H}, {self.H}), {self.element} bytes each"


class Plan(NamedTuple):
    units: int
    rows: int  # a multiple of COLUMN_TILE
    slices: int
    groups: int
    shared: int  # bytes of a block
    # Bytes of global memory: what rows are normalised by and, across the grid, what is multiplied and groups' counters.
    workspace: int
    cluster: bool = False  # whether a group is one

    @property
    def blocks(self) -> int:
        return self.slices * self.groups

    def passes(self, B: int) -> int:
        return ceil_div(B, self.groups * self.rows)


def ceil_div(n: int, by: int) -> int:
    return -(-n // by)


def cluster_limit(gpu: Gpu) -> int:
    """How many blocks a cluster may have, 0 where there are none.

    More than 8 are not portable. They are taken where some GPC must have 16 multiprocessors, which come in pairs: where
    there are more than 14 for each. That holds for whole GPUs and for few parts of one, and no launch is refused."""
    if gpu.capability < (9, 0):
        return 0
    return LARGEST if gpu.capability[0] in (9, 10) and gpu.multiprocessors > GPCS * (GPC - 2) else PORTABLE


def rounds(plan: Plan, B: int, gpu: Gpu) -> int:
    """How often all multiprocessors take their share of the groups, one after the other."""
    if not plan.cluster:
        return plan.passes(B)
    at_once = max(gpu.multiprocessors // GPC, 1) * (GPC // plan.slices)
    return ceil_div(plan.groups, at_once)


def exchange_bytes(problem: Problem, rows: int) -> int:
    """Of a group, at two turns. A row is an odd number of segments long, for the sake of banks of shared memory."""
    return 2 * rows * (problem.segments | 1) * SEGMENT


def shared_bytes(problem: Problem, units: int, rows: int, cluster: bool) -> int:
    """As Layout of csrc/cuda/gated_product.cuh has it: weights, parts of sums, stages, states, biases, lengths, what is
    normalised, and in a cluster the exchange."""
    weight_rows = ceil_div(problem.weight_rows(units), ROW_TILE) * ROW_TILE
    weights = weight_rows * problem.segments * SEGMENT
    parts = WARPS * min(rows, BATCH) * (weight_rows + 4) * 4
    stages = WARPS * BATCH * SEGMENT if problem.exact else 0
    biases = (not problem.backward) * problem.gates * units
    table = 0
    if problem.normed:
        biases += (problem.gates + 2 * (problem.norms - 1)) * units
        table = (2 if problem.backward else 1) * problem.gates * units * rows * 4 + rows * STATISTICS
    exchange = exchange_bytes(problem, rows) if cluster else 0
    states = problem.states * rows * units * 4
    return weights + parts + stages + states + ceil_div(biases, 4) * 16 + rows * 4 + table + exchange


def laid_out(problem: Problem, units: int, rows: int, groups: int, cluster: bool = False) -> Plan:
    slices = ceil_div(problem.H, units)
    workspace = groups * rows * problem.pairs * ceil_div(slices, 2) * 2 * PAIR
    if not cluster:
        workspace += groups * (exchange_bytes(problem, rows) + COUNTER)
    return Plan(units, rows, slices, groups, shared_bytes(problem, units, rows, cluster), workspace, cluster)


def candidates(problem: Problem, B: int, gpu: Gpu) -> Iterator[Plan]:
    row_tiles = range(1, problem.weight_rows(UNITS) // ROW_TILE + 1)
    fewest = {ceil_div(problem.H, tiles * ROW_TILE // problem.weight_rows(1)) for tiles in row_tiles}
    for units in sorted({ceil_div(problem.H, slices) for slices in fewest}):
        slices = ceil_div(problem.H, units)
        if slices > gpu.multiprocessors:
            continue
        for rows in range(COLUMN_TILE, min(ROWS, ceil_div(B, COLUMN_TILE) * COLUMN_TILE) + 1, COLUMN_TILE):
            groups = ceil_div(B, rows)
            plans = [laid_out(problem, units, rows, min(gpu.multiprocessors // slices, groups))]
            if slices <= cluster_limit(gpu):
                plans.append(laid_out(problem, units, rows, groups, cluster=True))
            fitting = [plan for plan in plans if plan.shared <= gpu.shared]
            if not fitting:
                break
            yield from fitting


def step_cycles(problem: Problem, plan: Plan) -> float:
    """About what a step takes: an estimate by the hardware's rates, as nothing has run on a GPU."""
    row_tiles = ceil_div(problem.weight_rows(plan.units), ROW_TILE)
    chunks, column_tiles = ceil_div(plan.rows, BATCH), plan.rows // COLUMN_TILE
    norms = problem.norms * ceil_div(plan.rows, WARPS) * 500
    states = plan.rows * problem.segments * SEGMENT
    states_read = states * ceil_div(row_tiles, ROW_TILES)
    read = chunks * row_tiles * problem.segments * ROW_TILE * SEGMENT  # of shared memory
    if plan.cluster:
        # From one multiprocessor to another 180 cycles, and 3 TB/s or a little less of all together: Luo et al. 2024,
        # "Benchmarking and dissecting the Nvidia Hopper GPU architecture". A barrier is two such ways after what was
        # sent has gone one, and first waits until what the block wrote to global memory is in the second-level cache.
        exchange = problem.meetings * (3 * 180 + 260) + states * (plan.slices - 1) / plan.slices / 12
        read += states_read
    else:
        # 40 bytes a cycle from the second-level cache
        exchange = problem.meetings * (2000 + 10 * plan.slices) + states_read / 40
    products = row_tiles * column_tiles * problem.segments * (16 if problem.exact else 4)
    cells = chunks * (200 + 300 * ceil_div(min(plan.rows, BATCH) * plan.units, THREADS))
    return exchange + norms + max(read / 128, products) + cells  # 128 bytes a cycle


@functools.lru_cache(maxsize=4096)
def launch_plan(problem: Problem, B: int, gpu: Gpu) -> Plan | str:
    """The plan with the least estimated time, or the reason why there is none: that does not depend on B."""
    plans = list(candidates(problem, max(B, 1), gpu))
    if plans:
        return min(plans, key=lambda plan: (rounds(plan, B, gpu) * step_cycles(problem, plan), plan.blocks))
    return (
        f"{problem}, does not fit in the shared memory of {gpu.multiprocessors} multiprocessors,"
        f" {gpu.shared} bytes each, {UNITS} units each at most"
    )


def refusal(problem: Problem, gpu: Gpu) -> str | None:
    """Why the problem cannot be laid out, in either direction."""
    if gpu.capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or newer, this one has {'.'.join(map(str, gpu.capability))}"
    if problem.H == 0:
        return None  # nothing is launched
    for backward in (False, True):
        plan = launch_plan(problem._replace(backward=backward), 1, gpu)
        if isinstance(plan, str):
            return plan
    return None
