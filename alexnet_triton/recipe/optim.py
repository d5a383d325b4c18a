"""The update rule of 2012: momentum with the learning rate inside the velocity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alexnet_triton.backend import takes_triton

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
CHUNK = 1 << 18
"""Elements of a half-precision gradient that are converted at a time: a megabyte, which a core's cache holds."""


class KrizhevskySGD(torch.optim.Optimizer):
    """Stochastic gradient descent as Krizhevsky et al. (2012, section 5) write it.

        v <- m v - lambda epsilon w - epsilon g
        w <- w + v

    with momentum m, weight decay lambda, learning rate epsilon and the gradient g of the batch's mean loss. The rate is
    inside the velocity, so that a drop of the rate is felt by what is added from then on, and what the velocity
    holds runs out at the old rate. `torch.optim.SGD` multiplies the whole velocity by the rate of the moment (the note
    at the end of its documentation says so): the two agree while the rate is constant, and part when it drops. With
    w = 0, g = 1, m = 0.9, no decay and rates of 0.01, 0.01, 0.001, w becomes -0.01, -0.029, -0.0471 here, and
    -0.03171 in the end there.

    Parameters of half precision have a float32 *master*, which is what the rule updates; the parameter is the
    master rounded to nearest. State of a parameter: `velocity`, and `master` where there is one.

    Args:
        params: parameters, or dicts of parameter groups, of float16, bfloat16, float32 or float64.
        lr: learning rate, at least 0; a tensor of one element where a CUDA graph that holds `step` should see it
            change.
        momentum: in [0, 1).
        weight_decay: at least 0.

    A group may set `lr_mult`, by which its `lr` is multiplied in `step` alone (see `biases_apart`).

    Raises:
        ValueError: a number outside these bounds, or a parameter of another dtype.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "lr_mult": 1.0}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as `torch.optim.Optimizer` does.

        Raises:
            ValueError: as the class.
        """
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; nothing is read back from a GPU.

        Args:
            closure: evaluates the model again, and gives the loss, which is handed on.

        Raises:
            RuntimeError: a gradient is sparse or complex, or a parameter is no longer what its state was made for;
                then no parameter has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = self._updates()
        kinds = _kinds(updates)
        by_kernel = [_have_kernel(kind) for kind in kinds]  # a refusal comes before the first change
        for kind, kernel in zip(kinds, by_kernel, strict=True):
            _update_all(kind, kernel)
        # Neither a kernel nor torch's fused step tells autograd that a parameter has changed.
        torch.autograd.graph.increment_version([update.parameter for update in updates])
        return loss

    def master_of(self, parameter: Tensor) -> Tensor:
        """The values that the rule updates: a parameter's float32 master, or itself where it is not of half precision.

        Checkpoints hold these. What is given is the state itself, not a copy.

        Raises:
            ValueError: the parameter is not this optimizer's.
        """
        self._own(parameter)
        return self._state_of(parameter)["master"] if parameter.dtype in HALF else parameter.detach()

    @torch.no_grad()
    def set_master(self, parameter: Tensor, values: Tensor) -> None:
        """Set the values that the rule updates, and the parameter to them, rounded where it is of half precision.

        A parameter of half precision that is written to in another way has its old values back after the next step.

        Args:
            parameter: one of this optimizer's.
            values: of the same shape, any dtype and device.

        Raises:
            ValueError: the parameter is not this optimizer's, or the shapes differ.
        """
        self._own(parameter)
        _check_shape(parameter, values)
        if parameter.dtype in HALF:
            self._state_of(parameter)["master"].copy_(values)
        parameter.copy_(values)

    @torch.no_grad()
    def set_velocity(self, parameter: Tensor, values: Tensor) -> None:
        """Set a parameter's velocity, as of a run that goes on.

        Args:
            parameter: one of this optimizer's.
            values: of the same shape, any dtype and device.

        Raises:
            ValueError: the parameter is not this optimizer's, or the shapes differ.
        """
        self._own(parameter)
        _check_shape(parameter, values)
        self._state_of(parameter)["velocity"].copy_(values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, on any device; the state is copied, and keeps its float32.

        Masters are left out where the parameter is float32 by now, and begin as the parameter where they are missing.

        Raises:
            ValueError: the groups or the shapes are not this optimizer's.
        """
        final: dict[str, Any] = {}  # as the user's own hooks leave it, which run before this one
        handle = self.register_load_state_dict_pre_hook(lambda _, state: final.update(state))
        before = self.state, self.param_groups
        try:
            super().load_state_dict(state_dict)
            # torch has cast the state to the parameters' dtypes, and shares what it has not cast.
            numbers = [number for group in final["param_groups"] for number in group["params"]]
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            for number, parameter in zip(numbers, parameters, strict=True):
                if number in final["state"]:
                    self.state[parameter] = _copied(final["state"][number], parameter)
        except ValueError:
            self.state, self.param_groups = before
            raise
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("lr_mult", 1.0)

    def _own(self, parameter: Tensor) -> None:
        if not any(parameter is own for group in self.param_groups for own in group["params"]):
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not among this optimizer's")

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's state, which is made where it is missing."""
        state: dict[str, Tensor] = self.state[parameter]
        half = parameter.dtype in HALF
        if not half:
            state.pop("master", None)  # of a time when it was
        if "velocity" in state and ("master" in state or not half):
            return state
        if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph that holds a parameter's first step would make its state anew whenever it is replayed: "
                "take one step before the capture"
            )
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter, dtype=_state_dtype(parameter), requires_grad=False)
        if half and "master" not in state:
            state["master"] = parameter.detach().to(torch.float32)
        return state

    def _updates(self) -> list[Update]:
        found = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _check_gradient(parameter.grad)
                    found.append((parameter, group))
        updates = []
        for parameter, group in found:
            state = self._state_of(parameter)
            weight = state["master"] if parameter.dtype in HALF else parameter
            _check_velocity(state["velocity"], weight)
            updates.append(Update(parameter, parameter.grad, weight, state["velocity"], group))
        return updates


def biases_apart(
    model: nn.Module, lr: float | Tensor, weight_decay: float, bias_lr: float = 2.0, bias_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups with another rate and decay for biases: by default those of 2012, twice the rate and no decay.

    The multiples are those of Caffe's bvlc_alexnet (`lr_mult: 2`, `decay_mult: 0`). Schedulers change the groups' `lr`,
    which stays the same for both; the rate's multiple is beside it, in `lr_mult`, so that a scheduler's lower
    bound does not change it.

    Args:
        model: its parameters whose names end in `bias` are the biases.
        lr: learning rate of the weights; each group has a tensor of its own where it is one.
        weight_decay: of the weights.
        bias_lr: multiple of the rate.
        bias_decay: multiple of the decay.

    Returns:
        Groups for `KrizhevskySGD`, weights first; a group that would be empty is left out.
    """
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (biases if name.endswith("bias") else weights).append(parameter)
    groups = [
        {"params": weights, "lr": lr, "weight_decay": weight_decay, "lr_mult": 1.0},
        {"params": biases, "lr": lr, "weight_decay": weight_decay * bias_decay, "lr_mult": bias_lr},
    ]
    if isinstance(lr, Tensor):  # one for each, which a scheduler changes one by one
        groups[1]["lr"] = lr.clone()
    return [group for group in groups if group["params"]]


# --- checks and state ---------------------------------------------------------------------------------------


def _check_shape(parameter: Tensor, values: Tensor) -> None:
    if values.shape != parameter.shape:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} cannot take values of shape {tuple(values.shape)}"
        )


def _check(group: Mapping[str, Any]) -> None:
    lr, momentum, decay, multiple = (group[name] for name in ("lr", "momentum", "weight_decay", "lr_mult"))
    if isinstance(lr, Tensor) and (lr.numel() != 1 or not lr.is_floating_point()):
        raise ValueError(f"lr must be one real number, got a tensor {tuple(lr.shape)} of {lr.dtype}")
    on_gpu = isinstance(lr, Tensor) and lr.device.type != "cpu"  # reading it would wait for the GPU
    if not on_gpu and not 0 <= lr < math.inf:
        raise ValueError(f"lr must be at least 0 and finite, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
    for name, value in (("weight_decay", decay), ("lr_mult", multiple)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    for parameter in group["params"]:
        if parameter.dtype not in DTYPES:
            raise ValueError(f"parameters must be float16, bfloat16, float32 or float64, got {parameter.dtype}")


def _check_gradient(gradient: Tensor) -> None:
    if gradient.layout != torch.strided:
        raise RuntimeError(f"gradients must be dense, got {gradient.layout}: use nn.Embedding with sparse=False")
    if gradient.is_complex():
        raise RuntimeError(f"gradients must be real, got {gradient.dtype}")


def _check_velocity(velocity: Tensor, weight: Tensor) -> None:
    is_of = (velocity.shape, velocity.dtype, velocity.device)
    if is_of != (weight.shape, weight.dtype, weight.device):
        told, found = (f"{tuple(x.shape)} of {x.dtype} on {x.device}" for x in (velocity, weight))
        raise RuntimeError(
            f"a velocity is {told}, and its parameter's values are {found}: make the optimizer anew after a model's "
            "shapes, dtype or device have changed"
        )


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float32 if parameter.dtype in HALF else parameter.dtype


def _copied(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """A parameter's saved state on its device, in its layout, in the state's dtype."""
    copied: dict[str, Any] = {}
    for name, value in state.items():
        if name not in ("velocity", "master"):
            copied[name] = value
            continue
        if name == "master" and parameter.dtype not in HALF:
            continue
        if value.shape != parameter.shape:
            raise ValueError(
                f"the saved {name} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}: the state "
                "is another network's"
            )
        copied[name] = torch.empty_like(parameter, dtype=_state_dtype(parameter), requires_grad=False).copy_(value)
    return copied


# --- the step -----------------------------------------------------------------------------------------------


class Update(NamedTuple):
    """What one parameter's step reads and writes."""

    parameter: Tensor
    gradient: Tensor
    weight: Tensor
    """The master, or the parameter itself."""
    velocity: Tensor
    group: dict[str, Any]


def _kinds(updates: Iterable[Update]) -> list[list[Update]]:
    """The updates by device and dtypes."""
    kinds: dict[tuple[Any, ...], list[Update]] = {}
    for update in updates:
        parameter, gradient, weight, _, _ = update
        kinds.setdefault((weight.device, parameter.dtype, gradient.dtype), []).append(update)
    return list(kinds.values())


def _have_kernel(updates: list[Update]) -> bool:
    """Whether a kernel can do updates of one kind; raises as `takes_triton`."""
    one = updates[0]
    return all(takes_triton("KrizhevskySGD.step", tensor) for tensor in (one.weight, one.gradient))


def _update_all(updates: list[Update], by_kernel: bool) -> None:
    """Do updates of one kind."""
    alike: list[Update] = []
    others: list[Update] = []
    for update in updates:
        (alike if _lie_alike(update) else others).append(update)
    if alike and by_kernel:
        _launch(alike)
    else:
        for update in alike:
            # Without momentum torch's fused step has no velocity.
            fused = update.weight.device.type == "cpu" and update.group["momentum"]
            (_update_fused if fused else _update)(update)
    for update in others:
        _update(update)


def _launch(updates: list[Update]) -> None:
    """Updates of one kind, whose tensors lie alike, by the kernel."""
    from alexnet_triton.kernels import sgd
    from alexnet_triton.library import on_device

    groups = list({id(update.group): update.group for update in updates}.values())
    rows = {id(group): row for row, group in enumerate(groups)}
    steps = []
    for parameter, gradient, weight, velocity, group in updates:
        copy = None if weight is parameter else parameter
        steps.append(sgd.Step(gradient, weight, velocity, copy, rows[id(group)]))
    device = updates[0].weight.device
    with on_device(updates[0].weight):
        sgd.sgd(steps, _rates(groups, device))


def _rates(groups: list[dict[str, Any]], device: torch.device) -> Tensor:
    """Rate, momentum and decay of each group, (groups, 3); a rate that is a tensor of a GPU is not read back."""
    from alexnet_triton.kernels import sgd

    numbers: list[float] = []
    tensors: list[tuple[int, Tensor]] = []
    for row, group in enumerate(groups):
        rate = _rate(group, device)
        if isinstance(rate, Tensor):
            tensors.append((row, rate))
            rate = 0.0
        numbers += [rate, float(group["momentum"]), float(group["weight_decay"])]
    rates = sgd.by_value(tuple(numbers), torch.float32, device).view(-1, 3)
    if tensors:
        rates = rates.clone()
        for row, rate in tensors:
            rates[row, 0].copy_(rate)
    return rates


def _rate(group: Mapping[str, Any], device: torch.device) -> float | Tensor:
    """A group's rate on `device`: a number, or a tensor that is not read."""
    lr: float | Tensor = group["lr"]
    multiple: float = group["lr_mult"]
    if not isinstance(lr, Tensor) or (lr.device.type == "cpu" and device.type != "cpu"):
        return float(lr) * multiple
    return lr.to(device).reshape(()) * multiple


def _update(update: Update) -> None:
    """The rule in plain PyTorch, whatever the tensors."""
    parameter, gradient, weight, velocity, group = update
    rate, decay = _rate(group, weight.device), group["weight_decay"]
    if torch.compiler.is_compiling():  # which would multiply in the gradient's precision
        gradient = gradient.to(weight.dtype)
    velocity.mul_(group["momentum"])
    if isinstance(rate, Tensor):
        velocity.addcmul_(weight, rate, value=-decay).addcmul_(gradient, rate, value=-1)
    else:
        velocity.add_(weight, alpha=-decay * rate).add_(gradient, alpha=-rate)
    weight.add_(velocity)
    if weight is not parameter:
        parameter.copy_(weight)


def _update_fused(update: Update) -> None:
    """As `_update`, on a CPU, each number read and written once.

    torch's fused step is b = m b + (1 - dampening) (decay w - g) and w = w - lr b where it maximises. With a rate of
    -1, a decay of -lambda and a dampening of 1 - epsilon that is this rule, and b the velocity.
    """
    momentum, decay = update.group["momentum"], update.group["weight_decay"]
    rate = float(_rate(update.group, update.weight.device))
    parameter, gradient, weight, velocity = (_memory(tensor) for tensor in update[:4])
    size = CHUNK if gradient.dtype != weight.dtype else max(1, weight.numel())
    chunks = zip(*(tensor.split(size) for tensor in (parameter, gradient, weight, velocity)), strict=True)
    for low, slope, high, speed in chunks:
        torch._fused_sgd_(
            [high], [slope.to(high.dtype)], [speed], weight_decay=-decay, momentum=momentum, lr=-1.0,
            dampening=1 - rate, nesterov=False, maximize=True, is_first_step=False,
        )  # fmt: skip
        if update.weight is not update.parameter:
            low.copy_(high)


def _lie_alike(update: Update) -> bool:
    """Whether the update's tensors hold their elements in the same order, and densely, as a velocity always does."""
    parameter, gradient, weight, velocity, _ = update
    if torch.compiler.is_compiling():
        return False  # for a compiler that sees through plain PyTorch only
    if type(parameter) not in (Tensor, nn.Parameter) or type(gradient) is not Tensor:
        return False  # whose memory may hold something else than its elements
    if parameter.is_neg() or gradient.is_neg() or gradient._is_zerotensor():
        return False  # which torch negates lazily, or whose zeros take up no memory
    if parameter.is_contiguous() and gradient.is_contiguous():
        return weight.is_contiguous() and velocity.is_contiguous()
    strides = _strides(velocity)
    return all(_strides(tensor) == strides for tensor in (parameter, gradient, weight))


def _strides(tensor: Tensor) -> list[int]:
    """Of the dimensions that have more than one element."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _memory(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order in which they lie."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
