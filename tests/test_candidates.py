"""Which configs are worth a try, and what speaks against the others."""

import pytest
import torch

from alexnet_triton.kernels import schedule
from alexnet_triton.kernels.config import (
    CONFIGS,
    ConvConfig,
    ConvProblem,
    LinearConfig,
    LinearProblem,
    NormPoolProblem,
    WeightGradientConfig,
    WeightGradientProblem,
)
from alexnet_triton.kernels.target import TARGETS
from alexnet_triton.tuning import candidates

HALF = torch.bfloat16
CONV = ConvProblem(128, 13, 13, 192, 192, 3, 3, 2, True, HALF, False)
PROBLEMS = [
    CONV,
    CONV._replace(images=1, dtype=torch.float32),
    WeightGradientProblem(128, 14, 14, 384, 256, 3, 3, 1, HALF, False),
    LinearProblem(128, 4096, 9216, "forward", False, HALF, False),
    LinearProblem(1, 1000, 4096, "weight gradient", False, HALF, False),
    NormPoolProblem(128, 29, 29, 96, (3, 3), (2, 2), 5, False, HALF),
]
H100 = TARGETS["sm_90"]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_default_comes_first_no_config_twice_and_few_are_left(problem, target):
    found = candidates.candidates(problem, TARGETS[target])
    assert found[0] == problem.default(TARGETS[target])
    assert len(set(found)) == len(found)
    assert all(isinstance(config, CONFIGS[type(problem)]) for config in found)
    against = candidates.objections(problem, found, TARGETS[target])
    assert found[0] not in against
    assert len(found) - len(against) <= candidates.MOST + 1 or isinstance(problem, NormPoolProblem)


def test_waste_is_what_falls_outside_the_answer():
    assert candidates.waste(CONV._replace(filters=128), ConvConfig(13 * 13, 128, 0, 64, 4, 3)) == 0
    assert candidates.waste(CONV, ConvConfig(13 * 13, 128, 0, 64, 4, 3)) == pytest.approx(0.25)  # 256 columns for 192
    assert candidates.waste(CONV, ConvConfig(13 * 13, 128, 64, 64, 4, 3)) == 0
    assert candidates.waste(PROBLEMS[3], LinearConfig(256, 128, 64, 1, 8, 3)) == 0.5


@pytest.mark.parametrize(
    ("problem", "config", "expected"),
    [
        (CONV, ConvConfig(128, 128, 64, 64, 4, 3), 169 * 2),
        (CONV, ConvConfig(128, 128, 64, 64, 4, 3, splits=9), 169 * 2 * 9),
        (CONV, ConvConfig(128, 128, 64, 64, 4, 3, splits=8), 169 * 2 * 7),  # of 27 steps, four a part
        (PROBLEMS[2], WeightGradientConfig(128, 128, 0, 64, 5, 4, 3), 18 * 3 * 5),
        (PROBLEMS[3], LinearConfig(128, 128, 64, 4, 8, 3), 32 * 4),
    ],
    ids=str,
)
def test_programs_are_counted_with_groups_and_with_the_parts_that_are_not_empty(problem, config, expected):
    assert schedule.programs(problem.product, config.tile) == expected


def test_the_shifted_loop_makes_the_borders_rows_too():
    gathered, shifted = (ConvConfig(128, 128, 64, 64, 8, 3, loop=loop) for loop in ("gathered", "shifted"))
    assert candidates.waste(CONV, shifted) == pytest.approx(1 - 13 * 13 / 14**2, abs=0.01)
    assert candidates.waste(CONV, gathered) == 0
    many = CONV._replace(images=1024)
    assert candidates.cycles(many, shifted, H100) > 1.1 * candidates.cycles(many, gathered, H100)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_the_rules_splits_are_the_models_best(target):
    target = TARGETS[target]
    for problem in PROBLEMS[:-1]:
        tile, product = problem.default(target).tile, problem.product
        assert schedule.split(product, tile, target).splits == tile.splits
        undivided = schedule.cycles(product, tile._replace(splits=1), target)
        assert schedule.cycles(product, tile, target) <= undivided


def test_cycles_count_waves_and_what_wide_tiles_save():
    one_wave = CONV._replace(images=1, out_h=132, out_w=128, groups=1, filters=128)
    config = ConvConfig(128, 128, 0, 64, 8, 3)
    once = candidates.cycles(one_wave, config, H100)
    assert candidates.cycles(one_wave._replace(out_h=133), config, H100) == 2 * once  # one program waits for a second
    assert once == 9 * 192 * 128 * 128 / 2048
    narrow = ConvConfig(128, 32, 0, 64, 4, 3)
    assert candidates.cycles(one_wave, narrow, H100) > 2 * once  # it asks L2 for the rows four times


def test_a_loop_that_waits_for_instructions_costs_more_unless_memory_is_what_limits():
    config = ConvConfig(128, 128, 0, 64, 8, 3)
    free, half, waits = (candidates.cycles(CONV, config, H100, share) for share in (0.0, 0.5, 0.8))
    assert (half, waits) == (free, pytest.approx(1.6 * free))
    reads = LinearProblem(1, 4096, 9216, "forward", False, HALF, False)
    one = LinearConfig(16, 32, 128, 1, 4, 3)
    assert candidates.cycles(reads, one, H100, 0.9) == candidates.cycles(reads, one, H100)


def test_splitting_pays_for_its_partial_sums():
    problem = LinearProblem(128, 4096, 9216, "forward", False, HALF, False)
    times = [candidates.cycles(problem, LinearConfig(128, 128, 64, n, 8, 3), H100) for n in (1, 4, 32)]
    assert times[1] < times[0]
    assert times[1] < times[2]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ConvConfig(128, 128, 0, 64, 8, 3), "outside the answer"),
        (ConvConfig(256, 128, 64, 64, 4, 3), "too many sums"),
        (ConvConfig(64, 64, 0, 64, 32, 3), "too few sums"),
        (ConvConfig(128, 128, 64, 64, 8, 9), "more shared memory"),
        (ConvConfig(64, 64, 0, 64, 4, 3), "more cycles"),
    ],
    ids=str,
)
def test_each_objection_is_raised(config, reason):
    default = CONV.default(H100)
    problem = CONV._replace(filters=160) if reason == "outside the answer" else CONV
    against = candidates.objections(problem, [default, config], H100)
    assert reason in str(against[config])
    assert list(against) == [config]


def test_more_than_enough_are_cut_to_those_that_need_the_fewest_cycles():
    found = candidates.candidates(CONV, H100)
    against = candidates.objections(CONV, found, H100)
    left = [config for config in found[1:] if config not in against]
    cut = [config for config, why in against.items() if why.reason.startswith("enough others")]
    assert cut
    worst = max(candidates.cycles(CONV, config, H100) for config in left)
    assert worst <= min(candidates.cycles(CONV, config, H100) for config in cut)
