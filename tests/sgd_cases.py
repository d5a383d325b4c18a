"""What the tests of the update rule and of its kernel share."""

import torch
from torch import nn

from alexnet_triton.bench.checks import Scale
from alexnet_triton.kernels import sgd
from alexnet_triton.kernels.target import INTERPRETER

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")
SMALL = Scale((2,), 64, 17, 1000, 1)
SIZES = ((1,), (3,), (16,), (10, 100), (4097,), (16, 8, 8, 8))
BLOCK = sgd._block(INTERPRETER)
"""Elements of a program here, 4,096: tensors of less than one, of one and an element, of two programs."""


def parameters(sizes=SIZES, dtype=torch.float32):
    return [nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]


def give_gradients(parameters):
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)


class InFloat64:
    """The rule as it is written, in float64."""

    def __init__(self, parameters):
        self.w = [parameter.detach().double().clone() for parameter in parameters]
        self.v = [torch.zeros_like(w) for w in self.w]

    def step(self, gradients, lr, momentum, decay):
        """Each by tensor; a tensor without a gradient stays."""
        for i, (g, rate, m, d) in enumerate(zip(gradients, lr, momentum, decay, strict=True)):
            if g is not None:
                self.v[i] = m * self.v[i] - d * rate * self.w[i] - rate * g.double()
                self.w[i] = self.w[i] + self.v[i]


def trained(optimizer, parameters, rates, seed=0):
    """Take a step with drawn gradients at each of the rates."""
    torch.manual_seed(seed)
    for lr in rates:
        for group in optimizer.param_groups:
            group["lr"] = lr
        give_gradients(parameters)
        optimizer.step()
