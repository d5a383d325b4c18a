"""Inference as a CUDA graph: all of a network's launches in one, for fixed shapes and fixed addresses.

A graph is captured once, by running the network on a tensor that stays where it is, and replayed ever after. A replay
runs no Python: it does once more what the capture did, with the same memory. So images are copied into that tensor, and
the answer is copied out. Parameters are read where they lie: values that change there are seen (filters are packed
within the graph), and a layer or a parameter that is another one is not, which each call looks for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

Result = TypeVar("Result")

GPU = "cuda"
"""Type of the devices that have graphs, AMD's among them."""

WARM_UPS = 3
"""Runs before a capture: the first compiles kernels and loads them, which nothing may do while one is under way."""


def capture(
    function: Callable[[], Result], device: torch.device, stream: Any = None, pool: Any = None
) -> tuple[Any, Result]:
    """Run `function` a few times, and then into a CUDA graph.

    Other threads may go on using the GPU meanwhile (a data loader's, which pins memory).

    Args:
        function: launches the same work at the same addresses at every call, and reads nothing back. Its first runs
            count: a training step trains.
        device: the GPU that it runs on.
        stream: of `torch.cuda.Stream`, other than the default one, to run and to capture on; None makes one.
        pool: the graph's memory, of `torch.cuda.graph_pool_handle`, where it may lie together with that of other graphs
            captured on the same stream, of which one at a time is replayed; None for its own.

    Returns:
        The graph, and the tensors that `function` gave in it, which every replay fills anew.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device) if stream is None else stream
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        current.wait_stream(stream)
        # Casts that autocast keeps would be left out of the graph, or be taken out of its memory.
        torch.clear_autocast_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = function()
        finally:
            torch.clear_autocast_cache()
    return graph, result


class _Captured(NamedTuple):
    graph: Any
    images: Tensor
    logits: Tensor


class Graphed:
    """A network's inference, captured for the shape and dtype of each example; called like the network.

    Backend, autocast and torch's switches (TF32, cuDNN's) are those of the capture, whatever holds at a call.
    Calls from several threads or streams take turns. The network is kept alive, and so is the memory of the parameters
    that it had.

    Args:
        model: a network in evaluation, on one GPU, without hooks, that makes one tensor of one.
        *examples: images, whose values do not matter. Each shape and dtype gets a graph; all share their memory.

    Raises:
        RuntimeError: the model is in training or has hooks, or a capture is under way.
        ValueError: the model or an example is not on one and the same GPU, an example is empty or wants gradients, or
            the model refuses it.
        TypeError: an example is no tensor, or the model's answer is none.
    """

    def __init__(self, model: nn.Module, *examples: Tensor) -> None:
        self._device = _checked(model, examples)
        self._name = type(model).__name__
        self._makeup = _Makeup(model)
        self._makeup.check()
        self._lock = threading.Lock()
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._stream = torch.cuda.current_stream(self._device)
        side, pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
        # The largest first: the others find room in what it has left.
        for example in sorted(examples, key=Tensor.numel, reverse=True):
            if _kind(example) not in self._captured:
                self._captured[_kind(example)] = _captured(model, example, side, pool)

    def __call__(self, images: Tensor) -> Tensor:
        """The network's answer, a tensor that no later call touches; without gradients.

        Args:
            images: of an example's shape, dtype and device; of any strides.

        Raises:
            ValueError: images of another shape, dtype or device, or that want gradients.
            RuntimeError: the network is not in the mode of the capture; a hook has been added; a layer, a parameter or
                a buffer has been replaced or moved; or another capture is under way.
            TypeError: no tensor.
        """
        with self._lock:
            found = self._captured.get(_kind(images))
            if found is None:
                self._refuse(images)
            _check_grad(images)
            self._makeup.check()
            _check_not_capturing()
            stream = torch.cuda.current_stream(self._device)
            if stream != self._stream:
                self._move_to(stream)
            found.images.copy_(images)
            found.graph.replay()
            return found.logits.clone()

    def _move_to(self, stream: Any) -> None:
        """Let what `stream` does follow what was done before, and outlive this object."""
        stream.wait_stream(self._stream)
        for captured in self._captured.values():
            captured.images.record_stream(stream)
        self._stream = stream

    def __repr__(self) -> str:
        return f"Graphed({self._name}: {self._kinds()})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a captured graph cannot be copied or pickled: copy the model, and capture the copy")

    def _kinds(self) -> str:
        return " or ".join(map(_words, self._captured))

    def _refuse(self, images: Tensor) -> NoReturn:
        raise ValueError(
            f"the graph was captured for images of {self._kinds()}, got {_words(_kind(images))}: give graphed() an "
            "example of these too, or call the model itself"
        )


def _kind(images: Tensor) -> tuple[Any, ...]:
    """What a graph is captured for."""
    if not isinstance(images, Tensor):
        raise TypeError(f"a captured graph takes a tensor of images, got {type(images).__name__}")
    return images.shape, images.dtype, images.device


def _words(kind: tuple[Any, ...]) -> str:
    shape, dtype, device = kind
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')} on {device}"


def _captured(model: nn.Module, example: Tensor, stream: Any, pool: Any) -> _Captured:
    # A tensor made in inference mode could not be written to outside of it.
    with torch.inference_mode(False), torch.no_grad():
        images = torch.empty_like(example).copy_(example)
        graph, logits = capture(lambda: model(images), example.device, stream, pool)
    if not isinstance(logits, Tensor):
        raise TypeError(f"graphed needs a model that gives one tensor, got {type(logits).__name__}")
    return _Captured(graph, images, logits)


# --- what is refused ------------------------------------------------------------------------------------------


def _checked(model: nn.Module, examples: tuple[Tensor, ...]) -> torch.device:
    """The one device of model and examples, once all that a capture needs holds."""
    for example in examples:
        _kind(example)
        _check_grad(example)
        if not example.numel():
            raise ValueError(f"graphed needs an example with images in it, got {_words(_kind(example))}")
    if model.training:
        raise RuntimeError("graphed captures inference, and the model is in training: call model.eval() first")
    of_model = {t.device for t in (*model.parameters(), *model.buffers())}
    devices = of_model | {example.device for example in examples}
    if len(devices) != 1 or next(iter(devices)).type != GPU:
        model_on, examples_on = (
            " and ".join(sorted(map(str, found))) or "no device"
            for found in (of_model, {example.device for example in examples})
        )
        raise ValueError(
            f"graphed needs the model and its examples on one GPU, got a model on {model_on} and examples on "
            f"{examples_on}: move them with .to('cuda'); elsewhere there are no CUDA graphs, and model(images) does it"
        )
    _check_not_capturing()
    return next(iter(devices))


def _check_grad(images: Tensor) -> None:
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError("a captured graph gives no gradients, and these images want one: pass images.detach()")


def _check_not_capturing() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured on this stream, and cannot hold a captured graph: call the model itself"
        )


# --- what a model is made of ----------------------------------------------------------------------------------


class _Makeup:
    """What a captured model is made of, to tell within a few microseconds whether that is still so.

    The tensors are held: while they are, nothing else can come to lie at their addresses.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names, modules = zip(*model.named_modules(), strict=True)
        self._own = [vars(module) for module in modules]
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        self._hooks = [own[name] for own in self._own for name in hooks]
        self._hooks += [module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks]
        self._children = [own["_modules"] for own in self._own if own["_modules"]]
        self._tensors = [own[name] for own in self._own for name in ("_parameters", "_buffers") if own[name]]
        self._held = [t.detach() for tensors in self._tensors for t in tensors.values() if t is not None]
        self._seen = self._look()

    def _look(self) -> tuple[Any, ...]:
        return (
            any(self._hooks),
            [own["training"] for own in self._own],
            ["forward" in own for own in self._own],
            [list(children.values()) for children in self._children],
            [None if t is None else t.data_ptr() for tensors in self._tensors for t in tensors.values()],
        )

    def check(self) -> None:
        """Refuse hooks, which a replay would not call, and a model that has changed."""
        found = self._look()
        if found != self._seen or found[0]:
            raise RuntimeError(self._why(found))

    def _why(self, found: tuple[Any, ...]) -> str:
        if found[0]:
            return (
                f"{self._hooked()} has a hook, which a CUDA graph would not call: remove it, or call the model itself"
            )
        training, forward, children, addresses = (
            next((i for i, (now, then) in enumerate(zip_longest(a, b)) if now != then), None)
            for a, b in zip(found[1:], self._seen[1:], strict=True)
        )
        if training is not None:
            now = "in training" if found[1][training] else "in evaluation"
            return (
                f"{self._names[training] or 'the model'} is {now}, and was not when the graph was captured: set its "
                "mode back, as model.eval() does, or call the model itself"
            )
        if forward is not None:
            what = f"{self._names[forward] or 'the model'} has got another forward"
        elif children is not None:
            what = self._layer(children, found[3][children], self._seen[3][children])
        else:
            assert addresses is not None
            what = f"{self._tensor(addresses)} has been replaced or moved"
        return f"{what} since the graph was captured: capture again with model.graphed(example)"

    def _hooked(self) -> str:
        """The first module with a hook."""
        for number, name in enumerate(self._names):
            if self._hooks[2 * number] or self._hooks[2 * number + 1]:
                return name or "the model"
        return "every module"

    def _layer(self, number: int, now: list[nn.Module], then: list[nn.Module]) -> str:
        """What became of the first child that differs, of the module that holds an entry of `_children`."""
        of = self._children[number]
        parent = next(name for name, own in zip(self._names, self._own, strict=True) if own["_modules"] is of)
        if len(now) != len(then):
            return f"{parent or 'the model'} has got {len(now)} layers instead of {len(then)}"
        slot = next(i for i, (a, b) in enumerate(zip(now, then, strict=True)) if a is not b)
        return f"{parent}.{list(of)[slot]}".lstrip(".") + " has been replaced"

    def _tensor(self, number: int) -> str:
        """Name of the parameter or buffer with this number; one that has come or gone shifts the others."""
        names = [
            f"{name}.{key}".lstrip(".")
            for name, own in zip(self._names, self._own, strict=True)
            for where in ("_parameters", "_buffers")
            for key in own[where]
        ]
        return names[min(number, len(names) - 1)]
