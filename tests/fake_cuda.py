"""A stand-in for torch's streams and CUDA graphs, on CPU tensors, that keeps to what a real graph keeps to.

A capture records torch's operators with the very tensors that they were given, and a replay does them again, into the
very tensors that they gave: values that changed in place are seen, tensors and layers that were replaced are not, no
Python of the captured function runs, and a value that is read back ends a capture. Streams write down who waits for
whom. What stands in for the GPU is the CPU.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Tape(TorchDispatchMode):
    """The operators of a capture, which leaves no trace but their outputs, and in those nothing yet."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.written = []
        self.generator = torch.get_rng_state()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            self.written += [(t.detach(), t.detach().clone()) for t in tensors_in((args, kwargs))]
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def end(self):
        for tensor, before in reversed(self.written):
            tensor.copy_(before)
        for tensor in (t for func, _, _, out in self.calls if is_fresh(func) for t in tensors_in(out)):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        torch.set_rng_state(self.generator)


def is_fresh(func):
    """Whether its outputs are memory of their own, not views or what was written in place."""
    return not any(given.alias_info for given in func._schema.returns)


def tensors_in(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Graph:
    """Of `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.tape = None

    @torch.no_grad()
    def replay(self):
        if self.tape is None:
            raise RuntimeError("replay before a capture has ended")
        for func, args, kwargs, out in self.tape.calls:
            again = func(*args, **kwargs)
            if is_fresh(func):
                for old, new in zip(tensors_in(out), tensors_in(again), strict=True):
                    old.copy_(new)


class FakeCuda:
    """Put into `torch.cuda` by `install`; `log` holds what streams did, `memory` the pools of the captures."""

    def __init__(self):
        self.log, self.memory, self.recorded = [], [], []
        self.default = self.now = Stream(self.log, "default")
        self.capturing = False
        self.made = 0

    def stream(self, device=None):
        self.made += 1
        return Stream(self.log, f"side {self.made}")

    @contextmanager
    def on(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert stream is not self.default
        assert not self.capturing
        self.log.append(f"{stream.name} captures, {capture_error_mode}")
        self.memory.append(pool)
        tape = Tape()
        self.capturing = True
        try:
            with self.on(stream), tape:
                yield
        finally:
            self.capturing = False
        tape.end()
        graph.tape = tape

    def install(self, monkeypatch):
        stands_in = {
            "Stream": self.stream,
            "stream": self.on,
            "current_stream": lambda device=None: self.now,
            "CUDAGraph": Graph,
            "graph": self.graph,
            "graph_pool_handle": lambda: f"pool {len(self.memory)}",
            "is_current_stream_capturing": lambda: self.capturing,
            "device": lambda device: nullcontext(),
        }
        for name, what in stands_in.items():
            monkeypatch.setattr(torch.cuda, name, what)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.recorded.append(stream))
        monkeypatch.setattr("alexnet_triton.graphs.GPU", "cpu")
        return self
