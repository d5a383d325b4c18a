"""The least work of the layers, counted by hand, and the floor that follows from it."""

import torch

from alexnet_triton.bench import checks, floors
from alexnet_triton.bench.checks import Conv, Linear, Pool
from alexnet_triton.stages import ConvStage, PoolStage

ROOFS = {"copy_gbs": 10.0, "tflops": {"float32": 0.1, "bfloat16": 0.2}}


def test_the_operations_of_a_network_are_its_multiply_adds_twice():
    total = sum(floors.least(layer, "forward", 4)[0] for _, layer in checks.layers("paper", 1, checks.FULL))
    assert round(total / 2e6, 1) == 724.4  # million for one image


def test_the_bytes_are_each_tensor_once():
    conv = Conv((2, 8, 5, 5), (12, 4, 3, 3), ConvStage((1, 1), (1, 1), 2, True, True))
    x, weight, y = 2 * 8 * 25, 12 * 4 * 9, 2 * 12 * 25
    assert floors.least(conv, "forward", 2)[1] == 2 * (x + weight + 12 + y)
    assert floors.least(conv, "data gradient", 2)[1] == floors.least(conv, "weight gradient", 2)[1]
    assert floors.least(conv, "data gradient", 2)[1] == 2 * (x + weight + y)
    assert floors.least(Linear(2, 16, 9, 0.5, True), "forward", 4) == (2 * 2 * 16 * 9, 4 * (32 + 16 * 9 + 9 + 18))
    for size, again in ((5, 1), (0, 0)):  # a maximum's gradient does not depend on the map, LRN's does
        pool = Pool((2, 12, 7, 7), PoolStage(size, 1e-3, 0.75, 2.0, (3, 3), (2, 2), (0, 0), False, 2))
        assert floors.least(pool, "forward", 4) == (0, 4 * 24 * (49 + 9))
        assert floors.least(pool, "data gradient", 4) == (0, 4 * 24 * (49 + 9 + 49 * again))


def test_the_floor_is_the_longer_of_arithmetic_and_memory():
    assert floors.floor(10**11, 10, torch.float32, ROOFS) == 1.0
    assert floors.floor(10, 10**10, torch.bfloat16, ROOFS) == 1.0
    assert floors.floor(10**11, 10, torch.bfloat16, ROOFS) == 0.5
