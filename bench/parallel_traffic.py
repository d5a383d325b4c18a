"""Bytes that a process sends to others, from the shapes of what it hands to torch's collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
"""The namespaces of torch's operators that talk."""

RECEIVING = ("recv_", "wait_tensor", "_wrap_tensor_autograd")
"""Those of them that send nothing."""


class Traffic:
    """What a process has sent."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._unknown = False

    @property
    def bytes(self) -> int | None:
        """How much; None where an operator was met that is not known here."""
        return None if self._unknown else round(self._bytes)

    def add(self, name: str, args: tuple[Any, ...], group: int) -> None:
        """Count a call of an operator.

        Of a collective it counts what each process sends in a ring (Thakur et al. 2005, "Optimization of Collective
        Communication Operations in MPICH", section 4): in a group of n, n - 1 times its part where parts are gathered,
        (n - 1) / n of the whole where a sum is scattered, and both where a sum is given to all.

        Args:
            name: the operator's.
            args: what it was given.
            group: processes of a group of which the operator does not say how many it has.
        """
        if name == "send":
            self._bytes += _size(args[0])
        elif name == "all_gather_into_tensor":
            self._bytes += (args[1] - 1) * _size(args[0])
        elif name in ("allgather_", "_allgather_base_"):
            self._bytes += (group - 1) * _size(args[1])
        elif name == "reduce_scatter_tensor":
            self._bytes += (args[2] - 1) / args[2] * _size(args[0])
        elif name in ("allreduce_", "allreduce_coalesced_"):
            self._bytes += 2 * (group - 1) / group * _size(args[0])
        elif name not in RECEIVING:
            self._unknown = True


def _size(tensors: Any) -> int:
    """Bytes of a tensor, or of several."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(tensor.nbytes for tensor in tensors)


@contextmanager
def counted(group: int) -> Iterator[Traffic]:
    """Count what this process sends in the block.

    Args:
        group: processes of a group that sums in place, as copies of a network sum their gradients.
    """
    traffic = Traffic()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in COLLECTIVES:
                traffic.add(func.__name__.split(".")[0], args, group)
            return func(*args, **(kwargs or {}))

    with Counting():  # type: ignore[no-untyped-call]  # of torch's
        yield traffic
