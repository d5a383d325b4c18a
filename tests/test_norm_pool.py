"""Normalisation and pooling in Triton's interpreter: `TRITON_INTERPRET=1` in the environment."""

import math
import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DTYPES, LIMITS, rms_error

from alexnet_triton.kernels import halo, norm_pool
from alexnet_triton.kernels.config import NormPoolConfig


class Case(NamedTuple):
    """A map and what is done to it, in the order of the arguments."""

    shape: tuple[int, ...]
    size: int = 5
    alpha: float = 0.2
    beta: float = 0.75
    k: float = 2.0
    window: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    groups: int = 1

    @property
    def arguments(self):
        return (*self[1:8], self.groups)


def expected(case, x, grad, index):
    """In float64, from torch's own functions: the pooled map, the elements at `index`, and the gradient of `x`.

    Two elements that float32 cannot tell apart may win either way, so the gradient is that of the elements at `index`.
    """
    x = x.detach().double().requires_grad_()
    b = x
    if case.size:
        b = torch.cat([F.local_response_norm(part, *case[1:5]) for part in x.chunk(case.groups, 1)], 1)
    y = F.max_pool2d(b, case.window, case.stride, case.padding, 1, case.ceil_mode)
    p, q = torch.meshgrid(torch.arange(y.shape[2]), torch.arange(y.shape[3]), indexing="ij")
    position = index.long().reshape(case.shape[0], *y.shape[2:], -1).permute(0, 3, 1, 2)
    row = p * case.stride[0] - case.padding[0] + position // case.window[1]
    column = q * case.stride[1] - case.padding[1] + position % case.window[1]
    taken = b.flatten(2).gather(2, (row * case.shape[3] + column).flatten(2)).view_as(y)
    return y.detach(), taken.detach(), torch.autograd.grad(taken, x, grad.double().expand_as(y))[0]


def out_size(case):
    return F.max_pool2d(torch.empty(1, 1, *case.shape[2:]), *case[5:8], 1, case.ceil_mode).shape[2:]


def haloed(images, channels, height, width):
    return halo.for_convolution(images, channels, (height, width), (5, 3), (2, 1), (height, width))


def run(case, x, grad=None, layout=halo.dense, relu=False, config=None):
    """The pooled map, the index, and the gradient of `x` if there is a `grad`; rows that are no pixel are 0."""
    channels = case.shape[1]
    y_layout = layout(case.shape[0], channels, *out_size(case))
    matrix, index = norm_pool.lrn_max_pool(x, *case.arguments, y_layout, grad is not None, config)
    y = only_pixels(matrix, y_layout, x)
    if grad is None:
        assert index is None
        return y, None, None
    x_layout = layout(case.shape[0], channels, *case.shape[2:])
    matrix = norm_pool.lrn_max_pool_backward(x, index, grad, *case.arguments, x_layout, relu, config)
    return y, index, only_pixels(matrix, x_layout, x)


def only_pixels(matrix, layout, x):
    assert matrix.shape == (layout.rows, layout.channels)
    assert matrix.dtype == x.dtype
    pixels = halo.view(matrix, layout).clone()
    halo.view(matrix, layout).zero_()
    assert torch.equal(matrix, torch.zeros_like(matrix)), "a row that is no pixel was not zeroed"
    return pixels


def hold(case, x, grad, **options):
    y, index, dx = run(case, x, grad, **options)
    y64, taken, dx64 = expected(case, x, grad, index)
    assert ((y64 - taken).abs() <= 1e-6 * y64.abs()).all(), "an element won that is not the largest"
    assert rms_error(y, y64) < LIMITS[x.dtype]
    assert rms_error(dx, dx64) < LIMITS[x.dtype]
    return y, index, dx


def same(a, b):
    return torch.equal(
        a.nan_to_num(12345.0, math.inf, -math.inf), b.to(a.dtype).nan_to_num(12345.0, math.inf, -math.inf)
    )


# --- AlexNet's own ------------------------------------------------------------------------------------------

PAPER = {"size": 5, "alpha": 5e-4, "k": 2.0}
POOLS = {
    "merged-1": Case((1, 96, 55, 55), **PAPER),
    "merged-2": Case((1, 256, 27, 27), **PAPER),
    "paper-1": Case((1, 96, 55, 55), **PAPER, groups=2),
    "paper-2": Case((1, 256, 27, 27), **PAPER, groups=2),
    "caffe-1": Case((1, 96, 55, 55), 5, 1e-4, 0.75, 1.0, ceil_mode=True),
    "caffe-2": Case((1, 256, 27, 27), 5, 1e-4, 0.75, 1.0, ceil_mode=True),
    "torchvision-1": Case((1, 64, 55, 55), 0),
    "torchvision-2": Case((1, 192, 27, 27), 0),
    "conv5": Case((1, 256, 13, 13), 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", POOLS)
def test_alexnets_pools_at_full_size(pool, dtype):
    for batch in (1, 3) if dtype == torch.float32 else (1,):
        case = POOLS[pool]._replace(shape=(batch, *POOLS[pool].shape[1:]))
        # Responses large enough for the normalisation to matter, after a ReLU.
        x = (torch.randn(case.shape) * 60).relu().to(dtype).contiguous(memory_format=torch.channels_last)
        hold(case, x, torch.randn(batch, case.shape[1], *out_size(case)).to(dtype), layout=haloed)


# --- every other shape --------------------------------------------------------------------------------------


def draw(seed):
    rng = random.Random(seed)
    groups = rng.choice([1, 1, 2, 3, 4])
    channels = groups * rng.choice([1, 2, 3, 5, 7, 8, 12, 16, 24])
    window = (rng.randint(1, 4), rng.randint(1, 3))
    stride = (rng.randint(1, 5), rng.randint(1, 5))
    padding = tuple(rng.randint(0, w // 2) for w in window)
    height, width = (rng.randint(max(1, w - 2 * p), 11) for w, p in zip(window, padding, strict=True))
    return Case(
        (rng.choice([1, 2, 3]), channels, height, width),
        rng.randint(0, 7), rng.choice([0.05, 1.0]), rng.choice([0.75, 0.75, 0.75, 0.5, 1.0, 0.6, 2.0]),
        rng.choice([1.0, 2.0]), window, stride, padding, rng.random() < 0.5, groups,
    )  # fmt: skip


def strided(tensor, how):
    """The same values under other strides."""
    if how == 0:
        return tensor.contiguous()
    if how == 1:
        return tensor.contiguous(memory_format=torch.channels_last)
    if how == 2:
        return tensor.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    n, c, h, w = tensor.shape
    room = torch.full((n + 1, c + 3, 2 * h, w + 2), math.nan, dtype=tensor.dtype)
    part = room[1:, 2 : c + 2, ::2, 1 : w + 1]
    part.copy_(tensor)
    return part


@pytest.mark.parametrize("seed", range(30))
def test_drawn_shapes(seed):
    case, dtype = draw(seed), DTYPES[seed % 3]
    x = strided((torch.randn(case.shape) * 2).to(dtype), seed // 3 % 4)
    grad = strided(torch.randn(*case.shape[:2], *out_size(case)).to(dtype), seed // 5 % 4)
    hold(case, x, grad, layout=haloed if seed % 2 else halo.dense)


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("channels", [3, 7, 16])
def test_even_windows_and_windows_wider_than_the_map(size, channels):
    case = Case((1, channels, 5, 4), size, 1.5, window=(2, 2))
    hold(case, torch.randn(case.shape), torch.randn(1, channels, 2, 2))


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 0.75, 1.0, 1.5])
def test_exponents(beta):
    case = Case((1, 16, 5, 5), beta=beta)
    hold(case, torch.randn(case.shape) * 3, torch.randn(1, 16, 2, 2))


@pytest.mark.parametrize("dims", [(0,), (1,), (2, 3), (0, 1, 2, 3)], ids=str)
def test_expanded_inputs_and_gradients(dims):
    case = Case((2, 8, 7, 7))

    def expanded(shape):
        part = torch.randn([1 if i in dims else n for i, n in enumerate(shape)])
        return part.expand(shape)

    hold(case, expanded(case.shape), torch.randn(2, 8, 3, 3))
    hold(case, torch.randn(case.shape), expanded((2, 8, 3, 3)))


def test_stride_larger_than_the_window_leaves_pixels_without_gradient():
    case = Case((1, 8, 9, 9), window=(2, 1), stride=(3, 4))
    _, _, dx = hold(case, torch.randn(case.shape), torch.randn(1, 8, 3, 3), layout=haloed)
    assert dx[:, :, 2::3].abs().max() == 0
    assert dx[:, :, :, 1::4].abs().max() == 0


@pytest.mark.parametrize("layout", [halo.dense, haloed])
def test_empty_batch(layout):
    case = Case((0, 8, 7, 7))
    y, index, dx = run(case, torch.zeros(case.shape), torch.zeros(0, 8, 3, 3), layout=layout)
    assert y.shape == (0, 8, 3, 3)
    assert index.shape == (0, 8)
    assert dx.shape == case.shape


@pytest.mark.parametrize(("window", "stride"), [((4, 5), (1, 2)), ((13, 20), (13, 20))])
def test_index_is_torchs(window, stride):
    case = Case((2, 1, 26, 24), 0, window=window, stride=stride)
    x = torch.randn(case.shape)
    y, found = F.max_pool2d(x, window, stride, return_indices=True)
    ours, index, _ = hold(case, x, torch.randn(y.shape))
    assert torch.equal(ours, y)
    p, q = torch.meshgrid(torch.arange(y.shape[2]), torch.arange(y.shape[3]), indexing="ij")
    position = (found // 24 - p * stride[0]) * window[1] + found % 24 - q * stride[1]
    assert torch.equal(index.long(), position.permute(0, 2, 3, 1).reshape(-1, 1))


def test_index_is_small_where_it_can_be():
    assert norm_pool.index_dtype((16, 16)) == torch.uint8
    assert norm_pool.index_dtype((1, 257)) == torch.int32


def test_index_is_left_out_where_nobody_wants_it():
    case = Case((1, 8, 7, 7))
    x = torch.randn(case.shape)
    assert torch.equal(run(case, x)[0], run(case, x, torch.randn(1, 8, 3, 3))[0])


@pytest.mark.parametrize("config", [NormPoolConfig(256, 4, 3, 1), NormPoolConfig(128, 16, 99, 2)])
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 32, 9, 7), groups=2),
        Case((1, 16, 8, 6), 4, padding=(1, 1), ceil_mode=True),
        Case((1, 16, 9, 5), window=(4, 2), stride=(1, 1)),
        Case((1, 16, 9, 5), 0, window=(2, 2), stride=(3, 2)),
    ],
)
def test_blocks_lanes_and_strips_do_not_change_a_bit(case, config):
    x, grad = torch.randn(case.shape), torch.randn(*case.shape[:2], *out_size(case))
    for a, b in zip(run(case, x, grad, layout=haloed), run(case, x, grad, layout=haloed, config=config), strict=True):
        assert torch.equal(a, b)


def test_strips_find_the_same_nans_ties_and_infinities():
    case = Case((1, 8, 9, 9), 0, window=(3, 3), stride=(1, 1), padding=(1, 1))
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0])[torch.randint(5, case.shape)]
    y, index, _ = run(case, x, torch.ones(case.shape))
    strip, strip_index, _ = run(case, x, torch.ones(case.shape), config=NormPoolConfig(64, 8, 4, 4))
    wanted = F.max_pool2d(x, 3, 1, 1)
    assert same(y, wanted)
    assert same(strip, wanted)
    assert torch.equal(index, strip_index)


def test_offsets_pass_two_to_the_31():
    # Strides that fit 32 bits, times numbers that do.
    case = Case((3, 9, 5, 5), alpha=1.0)
    try:
        room = torch.empty(2**31 + 4096, dtype=torch.float16)  # memory that is not touched is not taken
    except RuntimeError:
        pytest.skip("no 4 GB of addresses")
    x = room.as_strided(case.shape, (2**30, 1, 45, 9)).copy_(torch.randn(case.shape))
    grad = room[2048:].as_strided((3, 9, 2, 2), (4, 2**28, 2, 1)).copy_(torch.randn(3, 9, 2, 2))
    hold(case, x, grad)


# --- values that users stumble over -------------------------------------------------------------------------


def pool_one(x, **options):
    """Over windows of one pixel, so that the answer is the normalised map itself."""
    case = Case(tuple(x.shape), window=(1, 1), stride=(1, 1), **options)
    return run(case, x, torch.ones_like(x))


def test_alpha_is_torchs():
    x = torch.full((1, 5, 1, 1), 100.0)
    y, _, _ = pool_one(x, alpha=1e-4)
    assert y[0, 2].item() == pytest.approx(43.8691, abs=1e-4)
    assert torch.allclose(y, F.local_response_norm(x, 5, 1e-4, 0.75, 2.0), rtol=1e-6)
    y, _, _ = pool_one(x, alpha=5e-4)
    assert y[0, 2].item() == pytest.approx(23.2368, abs=1e-4)


def test_half_precision_is_squared_in_float32():
    y, _, dx = pool_one(torch.full((1, 5, 1, 1), 300.0, dtype=torch.float16), alpha=1e-4)
    assert y[0, 2].item() == pytest.approx(49.668, abs=0.05)
    assert y.isfinite().all()
    assert dx.isfinite().all()


@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0])
def test_overflowing_squares_stay_inside_their_windows(beta):
    x = torch.tensor([-2e38, 1, 1e38, 1, 1, 1, 1, 1, 1, 1]).reshape(1, 10, 1, 1)
    y, _, dx = pool_one(x, alpha=1.0, k=1.0, beta=beta)
    leaf = x.clone().requires_grad_()
    wanted = F.local_response_norm(leaf, 5, 1.0, beta, 1.0)
    assert torch.allclose(y, wanted, equal_nan=True)
    wanted.sum().backward()
    assert torch.allclose(dx, leaf.grad, equal_nan=True)


def test_nan_and_infinity_stay_inside_their_windows_of_channels():
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(1, 24, 1, 1)
        x[0, 11] = bad
        y, _, dx = pool_one(x, groups=2)
        wanted = torch.cat([F.local_response_norm(part, 5, 0.2, 0.75, 2.0) for part in x.chunk(2, 1)], 1)
        assert same(y.round(decimals=4), wanted.round(decimals=4))
        assert dx[0, :7].isfinite().all()
        assert dx[0, 12:].isfinite().all()
        assert dx[0, 11].isnan().all()


def test_a_group_that_ends_divides_by_nothing_where_k_is_zero():
    x = torch.rand(1, 16, 3, 3) + 1
    x[:, 5:8] = 0.5
    case = Case(tuple(x.shape), k=0.0, groups=2)
    hold(case, x, torch.randn(1, 16, 1, 1), layout=haloed)
    x = torch.zeros(1, 16, 1, 1)
    x[:, [6, 9]] = 1
    _, _, dx = pool_one(x, k=0.0, groups=2)
    assert dx[0, 7:9].isfinite().all()


def test_pool_propagates_nan_to_every_window_that_touches_it():
    for column, touched in ((0, [0]), (2, [0, 1]), (6, [2])):
        x = torch.zeros(1, 1, 3, 7)
        x[0, 0, 1, column] = math.nan
        y, index, dx = run(Case((1, 1, 3, 7), 0), x, torch.ones(1, 1, 1, 3))
        assert y.flatten().isnan().nonzero().flatten().tolist() == touched
        assert [index[q].item() for q in touched] == [3 + column - 2 * q for q in touched]
        assert dx[0, 0, 1, column] == len(touched)
    y, _, _ = run(Case((1, 1, 3, 3), 0), torch.full((1, 1, 3, 3), math.nan), torch.ones(1, 1, 1, 1))
    assert y.isnan().all()


def test_nan_after_an_infinity_wins():
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 0, 1], x[0, 0, 1, 1], x[0, 0, 2, 1] = math.inf, math.nan, math.inf
    y, index, _ = run(Case((1, 1, 3, 3), 0), x, torch.ones(1, 1, 1, 1))
    assert y.isnan().all()
    assert index.item() == 4


@pytest.mark.parametrize("padding", [0, 1])
def test_pool_of_minus_infinity_is_minus_infinity_with_its_gradient_in_bounds(padding):
    case = Case((1, 8, 5, 5), 0, padding=(padding, padding))
    x = torch.full(case.shape, -math.inf, requires_grad=True)
    wanted = F.max_pool2d(x, 3, 2, padding)
    wanted.sum().backward()
    y, _, dx = run(case, x.detach(), torch.ones(1).expand(wanted.shape))
    assert (y == -math.inf).all()
    assert torch.equal(dx, x.grad)
    assert dx.sum() == 8 * (4 + 5 * padding)


def test_tied_gradient_goes_to_the_first_maximum():
    _, _, dx = run(Case((1, 1, 5, 5), 0), torch.ones(1, 1, 5, 5), torch.ones(1).expand(1, 1, 2, 2))
    assert dx.nonzero()[:, 2:].tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    assert dx.sum() == 4


def test_padding_never_wins():
    case = Case((1, 8, 4, 4), padding=(1, 1), ceil_mode=True)
    hold(case, -torch.rand(case.shape) - 1, torch.randn(1, 8, *out_size(case)))


def test_the_last_window_of_ceil_mode():
    y, _, _ = run(Case((1, 1, 6, 7), 0, window=(1, 1), ceil_mode=True), torch.ones(1, 1, 6, 7))
    assert y.shape == (1, 1, 3, 4)
    assert y.min() == 1
    y, _, _ = run(Case((1, 1, 54, 54), 0, ceil_mode=True), torch.ones(1, 1, 54, 54))
    assert y.shape == (1, 1, 27, 27)
    assert y.min() == 1


def test_the_winner_is_chosen_before_rounding():
    # In bfloat16 both normalised values are the same; in float32 the later is larger.
    x = torch.zeros(1, 2, 1, 2, dtype=torch.bfloat16)
    x[0, 0, 0] = 1.0
    x[0, 1] = torch.tensor([0.01, 0.0])
    _, index, dx = run(Case((1, 2, 1, 2), 2, 0.1, window=(1, 2)), x, torch.ones(1, 2, 1, 1))
    assert index[0, 0] == 0  # size 2 looks one channel down only
    _, index, dx = run(Case((1, 2, 1, 2), 3, 0.1, window=(1, 2)), x, torch.ones(1, 2, 1, 1))
    assert index[0, 0] == 1
    assert dx[0, 0, 0, 0].abs() < 0.01


@pytest.mark.parametrize("size", [0, 5])
def test_relus_gradient(size):
    case = Case((1, 8, 9, 9), size)
    x, grad = torch.randn(case.shape), torch.randn(1, 8, 4, 4)
    x[x.abs() < 0.3] = 0
    _, _, dx = run(case, x, grad, layout=haloed)
    _, _, masked = run(case, x, grad, layout=haloed, relu=True)
    assert torch.equal(masked, torch.ops.aten.threshold_backward(dx, x, 0))
    assert (dx[x <= 0] != 0).any()


def test_relus_gradient_passes_where_x_is_nan():
    x = torch.tensor([math.nan, -1.0, 0.0, 2.0]).reshape(1, 4, 1, 1)
    _, _, dx = run(Case((1, 4, 1, 1), 0, window=(1, 1)), x, torch.ones(x.shape), relu=True)
    assert dx.flatten().tolist() == torch.ops.aten.threshold_backward(torch.ones(4), x.flatten(), 0).tolist()
