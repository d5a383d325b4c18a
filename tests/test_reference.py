import math

import pytest
import torch
import torch.nn.functional as F
from plain import error

from alexnet_triton.reference import local_response_norm


def constant(value, dtype=torch.float32):
    return torch.full((1, 5, 1, 1), value, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "alpha", "k", "expected"),
    [("paper", 5e-4, 2.0, 23.2368), ("torch", 1e-4, 2.0, 43.8691), ("caffe", 1e-4, 1.0, 59.4604)],
)
def test_lrn_of_five_equal_channels_of_100(name, alpha, k, expected):
    middle = local_response_norm(constant(100.0), 5, alpha, 0.75, k)[0, 2, 0, 0].item()
    assert math.isclose(middle, expected, rel_tol=2e-6)


def test_lrn_squares_in_float32_whatever_the_input():
    x = constant(300.0, torch.float16).requires_grad_()
    y = local_response_norm(x, 5, 1e-4, 0.75, 2.0)
    assert y.dtype == torch.float16
    assert abs(y[0, 2, 0, 0].item() - 49.668) < 0.05
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lrn_of_half_precision_is_the_float32_one_rounded(dtype):
    x = torch.randn(1, 8, 4, 4).to(dtype)
    y = local_response_norm(x, 5, 1e-4, 0.75, 1.0)
    assert torch.equal(y, local_response_norm(x.float(), 5, 1e-4, 0.75, 1.0).to(dtype))


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("channels", [1, 2, 3, 7])
def test_lrn_equals_torch_for_odd_and_even_sizes_and_few_channels(size, channels):
    x = torch.randn(2, channels, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, channels, 3, 4, dtype=torch.float64)
    results = []
    for lrn in (local_response_norm, F.local_response_norm):
        y = lrn(x, size, 0.9, 0.75, 1.5)
        (gradient,) = torch.autograd.grad((y * weights).sum(), x)
        results.append((y, gradient))
    assert error(results[0][0], results[1][0]) < 1e-12
    assert error(results[0][1], results[1][1]) < 1e-12


@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 5), (2, 6, 2, 3, 4)])
def test_lrn_takes_any_rank_from_two(shape):
    x = torch.randn(shape)
    expected = local_response_norm(x.reshape(shape[0], 6, -1, 1), 5, 1.0, 0.75, 1.0).reshape(shape)
    assert torch.allclose(local_response_norm(x, 5, 1.0, 0.75, 1.0), expected, rtol=1e-6)


def test_lrn_equals_torch_where_squares_overflow():
    x = torch.tensor([-2e38, 1, 1e38, 1, 1, 1, 1]).reshape(1, 7, 1, 1).requires_grad_()
    outputs, gradients = [], []
    for lrn in (local_response_norm, F.local_response_norm):
        y = lrn(x, 5, 1.0, 1.0, 1.0)
        outputs.append(y.flatten())
        gradients.append(torch.autograd.grad(y.sum(), x)[0].flatten())
    torch.testing.assert_close(outputs[0], outputs[1], equal_nan=True)
    torch.testing.assert_close(gradients[0].isfinite(), gradients[1].isfinite())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_within_its_window_of_channels(bad):
    x = torch.ones(1, 12, 1, 1)
    x[0, 5] = bad
    y = local_response_norm(x, 5, 1e-4, 0.75, 1.0).flatten()
    expected = F.local_response_norm(x, 5, 1e-4, 0.75, 1.0).flatten()
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y[[0, 1, 2, 8, 9, 10, 11]].isfinite().all()


def test_lrn_in_groups_is_lrn_of_each_group():
    x = torch.randn(2, 12, 3, 3)
    halves = [local_response_norm(half, 5, 1.0, 0.75, 1.0) for half in x.chunk(2, 1)]
    assert torch.equal(local_response_norm(x, 5, 1.0, 0.75, 1.0, groups=2), torch.cat(halves, 1))
    assert not torch.allclose(local_response_norm(x, 5, 1.0, 0.75, 1.0), torch.cat(halves, 1))


@pytest.mark.parametrize("groups", [1, 2])
def test_lrn_keeps_channels_last(groups):
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    y = local_response_norm(x, 5, 1.0, 0.75, 1.0, groups)
    assert y.is_contiguous(memory_format=torch.channels_last)
