import math

import pytest
import torch
from kernel_cases import limit, rms_error
from test_random import mask

from alexnet_triton.kernels import launch, linear, random
from alexnet_triton.kernels.config import LinearConfig, StripConfig

FC6, FC7, FC8 = (4096, 9216), (4096, 4096), (1000, 4096)
SMALL = LinearConfig(16, 32, 16, 1, 4, 1)
SPLIT = LinearConfig(32, 16, 32, 3, 4, 1)


def expected_results(grad, x, weight, bias, y, kept, p):
    """Output and gradients in float64; the ReLU's gradient is that of the output `y`, so that both agree at 0."""
    grad, x, weight = grad.double(), x.double(), weight.double()
    factor = kept.double() * random.scale(p) if p else torch.ones_like(x)
    dropped = x * factor
    output = dropped @ weight.t()
    if bias is not None:
        output = output + bias.double()
    if y is not None:
        output = output.relu()
        grad = grad * (y > 0)
    return output, grad @ weight * factor, grad.t() @ dropped, grad.sum(0)


def hold(x, weight, bias, grad, p=0.0, relu=False, config=None, x_config=None, weight_config=None):
    """The kernels are the formula: output, and the gradients of input, weight and bias."""
    seed = random.seed(x.device) if p else None
    y = linear.dropout_linear(x, weight, bias, seed, p, relu, config)
    saved = y if relu else None
    needs = (True, True, bias is not None)
    results = linear.dropout_linear_backward(grad, x, weight, saved, seed, p, needs, x_config, weight_config)
    kept = mask(seed.item(), *x.shape, p) if p else None
    expected = expected_results(grad, x, weight, bias, saved, kept, p)
    assert y.is_contiguous()
    assert y.dtype == x.dtype
    for result, reference in zip((y, *results), expected, strict=True):
        if result is not None:
            assert rms_error(result, reference) < limit(x.dtype, reference)
            assert result.dtype == x.dtype
    assert (results[2] is None) == (bias is None)
    assert results[1].stride() == torch.empty_like(weight).stride()
    return y, *results


def tensors(batch, outputs, features, dtype=torch.float32):
    """x, weight, bias, gradient."""
    sizes = [(batch, features), (outputs, features), (outputs,), (batch, outputs)]
    x, weight, bias, grad = (torch.randn(size, dtype=dtype) for size in sizes)
    return x, weight / max(1, features) ** 0.5, bias, grad


FULL = [
    # (size, dtype, batches)
    *((size, torch.float32, (1, 3)) for size in (FC6, FC7, FC8)),
    (FC6, torch.float16, (1,)),
    (FC7, torch.bfloat16, (1,)),
    (FC8, torch.bfloat16, (3,)),
]


@pytest.mark.parametrize(("size", "dtype", "batches"), FULL, ids=str)
def test_alexnets_layers_at_full_size(size, dtype, batches):
    for batch in batches:
        hold(*tensors(batch, *size, dtype), 0.5 if batch > 1 else 0.0, relu=size != FC8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 37])
def test_half_precision_is_summed_in_float32(batch, dtype):
    hold(*tensors(batch, 129, 2500, dtype), 0.5, relu=True)


SIZES = [
    # (N, O, I)
    (1, 1, 1),
    (1, 10, 4096),
    (2, 1, 7),
    (5, 3, 1),
    (16, 16, 16),
    (17, 31, 13),
    (64, 10, 100),
    (127, 1000, 61),
    (130, 48, 259),
    (2, 4097, 33),
    (3, 29, 4097),
    (1030, 20, 36),
]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size(size, dropout):
    hold(*tensors(*size), dropout, relu=True)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
def test_every_combination_of_what_is_fused(p, biased, relu):
    x, weight, bias, grad = tensors(6, 40, 50)
    hold(x, weight, bias if biased else None, grad, p, relu)


@pytest.mark.parametrize("config", [SMALL, SPLIT, LinearConfig(16, 16, 16, 7, 4, 2)], ids=str)
@pytest.mark.parametrize("size", [(35, 24, 68), (18, 33, 37), (3, 20, 1)], ids=str)
def test_blocks_and_splits_do_not_change_the_numbers(size, config, monkeypatch):
    sample = tensors(*size)
    torch.manual_seed(1)
    one = hold(*sample, 0.5, relu=True)
    torch.manual_seed(1)
    monkeypatch.setattr(linear, "strip_config", lambda *_, **__: StripConfig(16, 64, 4))
    other = hold(*sample, 0.5, relu=True, config=config, x_config=config, weight_config=config)
    for a, b in zip(one, other, strict=True):
        assert rms_error(a, b) < 1e-6


@pytest.mark.parametrize("config", [None, SPLIT], ids=str)
@pytest.mark.parametrize("size", [(5, 7, 11), (20, 35, 160)], ids=str)
def test_what_lies_beside_a_matrix_stays_out(size, config):
    x, weight, bias, grad = tensors(*size)
    beside = [torch.full((m + 9, n + 9), math.nan)[:m, :n].copy_(t) for t in (x, weight, grad) for m, n in [t.shape]]
    for p in (0.0, 0.5):
        hold(beside[0], beside[1], bias, beside[2], p, False, config, config, config)


def test_two_runs_agree_bit_for_bit():
    sample = tensors(40, 30, 40)
    runs = []
    for _ in range(2):
        torch.manual_seed(2)
        runs.append(hold(*sample, 0.5, relu=True, config=SPLIT, x_config=SPLIT, weight_config=SPLIT))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def layouts(rows, columns):
    """Matrices of one shape in layouts that differ."""
    wide = torch.randn(2 * rows + 3, 2 * columns + 3)
    yield "contiguous", torch.randn(rows, columns)
    yield "transposed", torch.randn(columns, rows).t()
    yield "stepped", wide[::2, ::2][:rows, :columns]
    yield "offset", wide[1 : rows + 1, 1 : columns + 1]
    yield "one row", torch.randn(1, columns).expand(rows, columns)
    yield "one column", torch.randn(rows, 1).expand(rows, columns)
    yield "one number", torch.randn(1, 1).expand(rows, columns)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("which", range(7))
def test_strides_do_not_change_the_numbers(which, p):
    batch, outputs, features = 18, 48, 64
    (_, x), (_, weight), (_, grad) = (list(layouts(*s))[which] for s in [(18, 64), (48, 64), (18, 48)])
    plain = tensors(batch, outputs, features)
    hold(x, plain[1], plain[2], plain[3], p)
    hold(plain[0], weight, plain[2][:1].expand(outputs) if which > 3 else plain[2], plain[3], p)
    hold(plain[0], plain[1], torch.randn(2 * outputs)[::2], grad, p)


def test_the_weight_gradient_lies_as_the_weight_does():
    x, weight, bias, grad = tensors(4, 12, 20)
    column_major = weight.t().contiguous().t()
    assert hold(x, column_major, bias, grad)[2].stride() == (1, 12)
    assert hold(x, weight, bias, grad)[2].stride() == (20, 1)


def test_only_what_is_needed_is_computed():
    x, weight, bias, grad = tensors(4, 12, 20)
    y = linear.dropout_linear(x, weight, bias, None, 0.0, True)
    full = linear.dropout_linear_backward(grad, x, weight, y, None, 0.0, (True, True, True))
    for needs in [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]:
        some = linear.dropout_linear_backward(grad, x, weight, y, None, 0.0, needs)
        for needed, gradient, expected in zip(needs, some, full, strict=True):
            assert torch.equal(gradient, expected) if needed else gradient is None


@pytest.mark.parametrize("config", [None, SPLIT], ids=str)
def test_nan_passes_the_relu_both_ways(config):
    x, weight, bias, grad = tensors(3, 4, 40)
    x[1] = math.nan
    y = linear.dropout_linear(x, weight, bias, None, 0.0, True, config)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()
    _, _, db = linear.dropout_linear_backward(grad, x, weight, y, None, 0.0, (False, False, True))
    expected = torch.ops.aten.threshold_backward(grad, y, 0).sum(0)
    assert torch.allclose(db, expected)


def test_relu_has_no_slope_at_zero():
    x, weight = torch.zeros(2, 3), torch.ones(4, 3)
    y = linear.dropout_linear(x, weight, None, None, 0.0, True)
    dx, dw, db = linear.dropout_linear_backward(torch.ones(2, 4), x, weight, y, None, 0.0, (True, True, True))
    assert all((gradient == 0).all() for gradient in (dx, dw, db))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_dropped_is_multiplied_by_zero():
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]]).repeat(1, 16)
    seed = torch.tensor([4])
    eye = torch.eye(64)
    kept = mask(4, 1, 64, 0.5)[0]
    dropped = linear.drop(x, seed, 0.5, 16)
    expected = (x * (kept * 2.0))[0]
    assert torch.equal(dropped[0].nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))
    dx, *_ = linear.dropout_linear_backward(x, torch.ones(1, 64), eye, None, seed, 0.5, (True, False, False))
    assert dx.isnan().all()  # each sum meets an infinity times 0


@pytest.mark.parametrize("config", [None, SPLIT], ids=str)
def test_p_of_one_gives_zeros(config):
    x, weight, bias, grad = tensors(3, 5, 70)
    seed = random.seed(x.device)
    assert torch.equal(linear.dropout_linear(x, weight, bias, seed, 1.0, False, config), bias.expand(3, 5))
    dx, dw, db = linear.dropout_linear_backward(grad, x, weight, None, seed, 1.0, (True, True, True), config)
    assert (dx == 0).all()
    assert (dw == 0).all()
    assert torch.allclose(db, grad.sum(0))


@pytest.mark.parametrize("config", [None, SMALL, SPLIT], ids=str)
def test_the_gradients_use_the_mask_of_the_forward_pass(config):
    x = torch.ones(40, 64)
    seed = random.seed(x.device)
    y = linear.dropout_linear(x, torch.eye(64), None, seed, 0.5, False, config)
    needs = (True, True, False)
    dx, dw, _ = linear.dropout_linear_backward(x, x, torch.eye(64), None, seed, 0.5, needs, config, config)
    assert torch.equal(y, mask(seed.item(), 40, 64, 0.5) * 2.0)
    assert torch.equal(dx, y)
    assert torch.equal(dw, y.sum(0).expand(64, 64))


@pytest.mark.parametrize("size", [(0, 5, 7), (4, 0, 7), (4, 5, 0), (0, 0, 0)], ids=str)
def test_empty_matrices_give_empty_or_zero_answers(size, monkeypatch):
    x, weight, bias, grad = tensors(*size)
    seed = random.seed(x.device)
    if not size[0]:
        monkeypatch.setattr(launch, "launch", None)  # an empty batch launches nothing
    y = linear.dropout_linear(x, weight, bias, seed, 0.5, True)
    expected = torch.nn.functional.linear(x, weight, bias).relu()
    assert torch.equal(y, expected)
    dx, dw, db = linear.dropout_linear_backward(grad, x, weight, y, seed, 0.5, (True, True, True))
    assert torch.equal(dx, torch.zeros_like(x))
    assert torch.equal(dw, torch.zeros_like(weight))
    assert torch.allclose(db, (grad * (y > 0)).sum(0))


def test_the_gradient_of_the_bias_sums_in_float32():
    grad = torch.ones(3000, 3, dtype=torch.float16)  # past 2048 a float16 does not count on
    x, weight = torch.zeros(3000, 2, dtype=torch.float16), torch.zeros(3, 2, dtype=torch.float16)
    *_, db = linear.dropout_linear_backward(grad, x, weight, None, None, 0.0, (False, False, True))
    assert db.tolist() == [3000] * 3


def test_rows_may_lie_more_than_2_to_the_31_elements_apart():
    rows, columns, apart = 3, 40, 2**30 + 64  # a stride that fits 32 bits, and places that do not
    storage = torch.empty((rows - 1) * apart + columns, dtype=torch.float16)  # memory comes with the first touch
    far = storage.as_strided((rows, columns), (apart, 1))
    near = torch.randn(rows, columns, dtype=torch.float16)
    far.copy_(near)
    turned = storage.as_strided((columns, rows), (1, apart))
    x, weight, bias, grad = tensors(5, rows, columns, torch.float16)
    hold(far, torch.randn(6, columns).half() / 6, None, torch.randn(rows, 6).half(), 0.5, relu=True)
    y = linear.dropout_linear(x, far, bias, None, 0.0, False)
    assert torch.equal(y, linear.dropout_linear(x, near, bias, None, 0.0, False))
    dx = linear.dropout_linear_backward(grad, x, far, None, None, 0.0, (True, False, False))[0]
    assert torch.equal(dx, linear.dropout_linear_backward(grad, x, near, None, None, 0.0, (True, False, False))[0])
    x, weight, bias, grad = tensors(rows, columns, 7, torch.float16)
    hold(x, weight, bias, far)
    x, weight, bias, grad = tensors(columns, rows, 7, torch.float16)
    hold(x, weight, bias, turned)
