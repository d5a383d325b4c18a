"""Layers that are split over processes by their outputs, and what goes between the processes.

A linear layer's rows, or a convolution's filters, are split as `torch.chunk` splits a dimension, and its bias with
them; a process may have none. Each process computes its part of the outputs from all inputs. So the inputs are gathered
before the layer; backward, each process has a summand of their gradient, and gets its own part of the sum. These are
all-gathers and reduce-scatters of `torch.distributed.tensor`.

Dropout drops of the gathered inputs. Each process draws the mask of all of them, as one alone would; so the masks are
the same, and those of one process, where the generators of all have the same state.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from alexnet_triton.fusion import FusedSequential, leaves
from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.gradients import sum_gradients

Processes = DeviceMesh | dist.ProcessGroup | None
"""Those that share a network: a mesh of one dimension, a group, or None, which is all."""


class Peers:
    """The processes that share a network.

    Args:
        processes: which.
        model: the network.

    Raises:
        RuntimeError: this process has joined no others.
        ValueError: a mesh of several dimensions, or of other devices than the network's.
    """

    def __init__(self, processes: Processes, model: nn.Module) -> None:
        device = next(model.parameters()).device
        if not dist.is_initialized():
            raise RuntimeError(
                "a network is shared by processes that have joined one another: start them with torchrun, and call "
                "torch.distributed.init_process_group"
            )
        if not isinstance(processes, DeviceMesh):
            group: Any = processes or dist.group.WORLD
            processes = DeviceMesh.from_group(group, device.type)
        if processes.ndim != 1:
            raise ValueError(
                f"a network is shared along one dimension of a mesh, got {processes.ndim}: name one, as mesh['place']"
            )
        if processes.device_type != device.type:
            raise ValueError(
                f"the network is on {device.type!r} and shared by processes on {processes.device_type!r}: move it with "
                f".to({processes.device_type!r}) before"
            )
        self.mesh = processes

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes' group."""
        return self.mesh.get_group()

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return self.mesh.get_local_rank()

    @property
    def size(self) -> int:
        """How many they are."""
        return self.mesh.size()

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor that is split along dim 0, a view."""
        parts = whole.chunk(self.size)
        return parts[self.rank] if self.rank < len(parts) else whole[:0]

    def whole(self, part: Tensor, total: int) -> Tensor:
        """The tensor that is split along dim 0, of `total` rows."""
        return self._split(part, 0, total).full_tensor()

    def gather(self, part: Tensor, dim: int, total: int, summed: bool = True) -> Tensor:
        """The tensor that is split along `dim`, in every process.

        Args:
            part: this process's.
            dim: that is split.
            total: its size in all.
            summed: backward, the processes' gradients are summands. Otherwise all have the same gradient, as where all
                compute the same from what is gathered, and nothing is sent.
        """
        placement: Placement = Partial() if summed else Replicate()
        split = self._split(part, dim, total).redistribute(placements=[Replicate()])
        return split.to_local(grad_placements=[placement])

    def share(self, x: Tensor) -> Tensor:
        """What is the same in all processes, of whose gradient each will have a summand."""
        copies = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return copies.to_local(grad_placements=[Partial()])

    def copy_of_first(self, x: Tensor) -> Tensor:
        """A copy of what the first process has, laid out as `x`."""
        values = x.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(values, group=self.group, group_src=0)
        return torch.empty_like(x.detach()).copy_(values)

    def _split(self, part: Tensor, dim: int, total: int) -> DTensor:
        shape = torch.Size([*part.shape[:dim], total, *part.shape[dim + 1 :]])
        stride = torch.empty(shape, device="meta").stride()
        placements = [Shard(dim)]
        return DTensor.from_local(part.contiguous(), self.mesh, placements, run_check=False, shape=shape, stride=stride)


class ShardedSequential(nn.Sequential):
    """Layers of a network, under their names, of which each process computes its part of the output features.

    Args:
        layers: them, and those that have no parameters; runs execute as fused ops.
        segments: the same layers in order of execution; with those of a segment, the size in all of its input's dim 1
            where that is gathered before, and None where each process goes on with its part.
        peers: the processes.
        outputs: the size in all of the last outputs' dim 1 where they are gathered, for all processes to compute the
            same from them; None where each has its part.
    """

    def __init__(
        self,
        layers: nn.Sequential,
        segments: Iterable[tuple[Sequence[nn.Module], int | None]],
        peers: Peers,
        outputs: int | None = None,
    ) -> None:
        super().__init__(OrderedDict(layers._modules))
        self.training = layers.training
        # In a tuple they are no children: the layers have one name each.
        self._segments = tuple((FusedSequential(*segment), total) for segment, total in segments)
        self._peers, self._outputs = peers, outputs

    def forward(self, input: Tensor) -> Tensor:
        """Outputs of the inputs, each in parts or whole as `segments` and `outputs` say."""
        for segment, total in self._segments:
            if total is not None:
                input = self._peers.gather(input, 1, total)
                if getattr(segment[0], "inplace", False):
                    input = input.clone()  # what DTensor gives cannot be changed in place
            input = segment(input)
        if self._outputs is None:
            return input
        return self._peers.gather(input, 1, self._outputs, summed=False).clone()  # and a user may want to


class ShardedNetwork(nn.Module):
    """An `AlexNet` of which this process has some layers whole, and of others a part of the outputs.

    Called with images it gives logits, the same in every process, from which every process is to compute the same
    loss. Then `backward`, and `reduce_gradients`; after that a parameter's gradient is the model's, or this process's
    part of it.

    Args:
        model: the network; this one begins with copies of what it is in the first process, and leaves it as it is.
        peers: the processes.
        split: whether the parameter of a name is split.

    Attributes:
        features: the convolutional layers, under the model's names.
        avgpool: likewise.
        classifier: the linear layers, likewise; parameters are parts of the model's, along dim 0.
    """

    features: nn.Sequential
    avgpool: nn.Module
    classifier: nn.Sequential

    def __init__(self, model: AlexNet, peers: Peers, split: Callable[[str], bool]) -> None:
        super().__init__()
        self.peers = peers

        def own(name: str, value: Tensor) -> Tensor:
            value = peers.copy_of_first(value)
            return peers.part(value).clone() if split(name) else value

        # In a tuple it is no child: the whole model's layers and shapes, without values.
        self._model = (_copied(model, lambda _, value: value.detach().to("meta")),)
        self._is_split = split
        network = _copied(model, own)
        self.features, self.avgpool, self.classifier = network.features, network.avgpool, network.classifier
        self.training = model.training

    @property
    def model(self) -> AlexNet:
        """The whole network, its parameters on `"meta"`."""
        return self._model[0]

    # --- gradients ----------------------------------------------------------------------------------------------------

    def reduce_gradients(self) -> None:
        """Sum over the processes the gradients of the layers of which each has a copy, after the last `backward`."""
        copies = [parameter for name, parameter in self.named_parameters() if not self._is_split(name)]
        sum_gradients(copies, self.peers.group)

    def grad_norm(self) -> Tensor:
        """The norm of the whole model's gradients, once they are reduced: a number, the same in every process."""
        parts: list[Tensor] = []
        copies: list[Tensor] = []
        for name, parameter in self.named_parameters():
            if parameter.grad is not None:
                (parts if self._is_split(name) else copies).append(parameter.grad)
        device = next(self.parameters()).device
        own, shared = (nn.utils.get_total_norm(gradients).float().to(device) for gradients in (parts, copies))
        norms = own.new_empty(self.peers.size)
        dist.all_gather(list(norms.split(1)), own.reshape(1), group=self.peers.group)
        norm: Tensor = torch.linalg.vector_norm(torch.cat([norms, shared.reshape(1)]))
        return norm

    # --- whole tensors and their parts --------------------------------------------------------------------------------

    def part(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of tensors like the whole model's parameters, by name; views where they can be."""
        return {name: self.peers.part(value) if self._is_split(name) else value for name, value in whole.items()}

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put together what each process has a part of; all must call it together.

        Args:
            parts: this process's, by parameter name, and like its parameters: velocities, as an example.

        Returns:
            The whole tensors in the model's order, in the first process, of their own memory; nothing in others.

        Raises:
            ValueError: a name is none of the model's.
        """
        found, shapes = {}, self.model.state_dict()
        if unknown := [name for name in parts if name not in shapes]:
            raise ValueError(f"the network has no parameter {unknown[0]!r}: it has {', '.join(shapes)}")
        for name, value in shapes.items():
            if name in parts:
                part = parts[name].detach()
                whole = self.peers.whole(part, len(value)) if self._is_split(name) else part.clone()
                if self.peers.rank == 0:
                    found[name] = whole
        return found

    def whole_state_dict(self) -> dict[str, Any]:
        """The whole model's state dict in the first process, nothing in others; all must call it together."""
        state_dict = self.model.state_dict()  # has the variant beside the values
        found = self.whole(self.state_dict())
        state_dict.update(found)
        return state_dict if found else {}

    @torch.no_grad()
    def load_whole_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load this process's part of a state dict of the whole model.

        Raises:
            RuntimeError: as `AlexNet.load_state_dict`; nothing has been changed then.
        """
        whole = copy.deepcopy(self.model)
        whole.load_state_dict(state_dict, assign=True)
        parts = self.part(whole.state_dict())
        for name, value in self.state_dict().items():
            value.copy_(parts[name])


def _copied(model: AlexNet, value_of: Callable[[str, Tensor], Tensor]) -> AlexNet:
    """A copy of a model with other values of its parameters and buffers."""
    copies: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        copies[id(parameter)] = nn.Parameter(value_of(name, parameter), parameter.requires_grad)
    for name, buffer in model.named_buffers():
        copies[id(buffer)] = value_of(name, buffer)
    return copy.deepcopy(model, copies)


# --- what can be split ------------------------------------------------------------------------------------------------


def check_model(who: str, model: nn.Module) -> None:
    """Refuse, in the name of `who`, what is no `AlexNet` or has a classifier that cannot be split by outputs.

    Raises:
        ValueError: the model is of another class; the classifier is no `nn.Sequential` of `nn.Dropout`, `nn.Linear`,
            `nn.ReLU` and `nn.Identity` alone, has no linear layer, or has dropout after the last.
    """
    if not isinstance(model, AlexNet) or type(model).forward is not AlexNet.forward:
        raise ValueError(f"{who} takes an AlexNet, got {type(model).__name__}: give the network itself, unwrapped")
    classifier = model.classifier
    if type(classifier) not in (nn.Sequential, FusedSequential):
        raise ValueError(f"{who} splits a classifier that is an nn.Sequential, got {type(classifier).__name__}")
    for layer in leaves(classifier):
        if type(layer) not in (nn.Dropout, nn.Linear, nn.ReLU, nn.Identity) or not is_plain(layer):
            raise ValueError(
                f"{who} splits a classifier of plain Dropout, Linear, ReLU and Identity, and {name_of(layer, model)} "
                f"is {described(layer)}: train the network in whole copies"
            )
    kinds = [type(layer) for layer in leaves(classifier) if type(layer) in (nn.Linear, nn.Dropout)]
    if nn.Linear not in kinds or kinds[-1] is nn.Dropout:
        found = "has dropout after it" if nn.Linear in kinds else "has none"
        raise ValueError(f"{who} splits a classifier that ends with a Linear, and this one {found}")


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer has no other parameters than a weight and a bias, and no buffers."""
    return set(layer._parameters) <= {"weight", "bias"} and not layer._buffers


def name_of(layer: nn.Module, model: nn.Module) -> str:
    """A layer's name in the model."""
    return str(next(name for name, module in model.named_modules() if module is layer))


def described(layer: nn.Module) -> str:
    """A layer's type, in words."""
    return f"a {type(layer).__name__}{'' if is_plain(layer) else ' with parameters or buffers of its own'}"


# --- classifiers ------------------------------------------------------------------------------------------------------


def shard_classifier(network: ShardedNetwork, gathered: bool) -> ShardedSequential:
    """A network's classifier, whose parameters are parts already, in segments that begin with a gathered input.

    Args:
        network: with a classifier that `check_model` lets pass.
        gathered: whether the classifier's own input is gathered before.
    """
    segments: list[tuple[list[nn.Module], int | None]] = []
    for number, (layers, linear) in enumerate(_segments(network.classifier)):
        segments.append((layers, linear.in_features if number or gathered else None))
        outputs = linear.out_features
        linear.out_features = len(linear.weight)
    return ShardedSequential(network.classifier, segments, network.peers, outputs)


def _segments(classifier: nn.Sequential) -> list[tuple[list[nn.Module], nn.Linear]]:
    """A classifier's layers, one `nn.Linear` a segment; the dropout before it belongs to its segment."""
    segments: list[tuple[list[nn.Module], nn.Linear]] = []
    before: list[nn.Module] = []
    for layer in leaves(classifier):
        if isinstance(layer, nn.Linear):
            segments.append(([*before, layer], layer))
            before = []
        elif segments and not before and not isinstance(layer, nn.Dropout):
            segments[-1][0].append(layer)
        else:
            before.append(layer)
    return segments
