"""A network cut into stages: modules that hold its own layers and, called in turn, are the network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_triton.fusion import FusedSequential, fits, leaves
from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.pipeline.costs import auto_cut
from alexnet_triton.parallel.pipeline.masks import Dropped, Masks
from alexnet_triton.parallel.pipeline.names import PARTS, layer_names, place
from alexnet_triton.variants import VARIANTS
from alexnet_triton.weights import check_keys, check_values


class Stage(nn.Module):
    """Consecutive layers of an `AlexNet`, under the names that they have in it.

    The layers are the model's own, not copies. Runs of them execute as fused ops, as in the model.

    Args:
        model: the network.
        names: of the layers that this stage holds, of `layer_names`, consecutive.

    Attributes:
        names: those names.
        masks: what drops units, where it is the masks of a batch of which the stage sees some rows at a time; None,
            as at first, where each call is a batch of its own.
        first_row: the place in that batch of the next call's first image.
    """

    def __init__(self, model: AlexNet, names: Sequence[str]) -> None:
        super().__init__()
        self.names, self.model_names = tuple(names), layer_names(model)
        self.variant = model.variant
        self.masks: Masks | None = None
        self.first_row = 0
        self._segments: dict[str, tuple[tuple[nn.Module, ...], list[nn.Module]]] = {}
        for part in PARTS:
            own = [name for name in names if name.split(".")[0] == part]
            whole = getattr(model, part)
            if own and own != [part]:
                children = OrderedDict((name.split(".")[1], model.get_submodule(name)) for name in own)
                self.add_module(part, type(whole)(children))
            elif own:
                self.add_module(part, whole)
        self._flattens = next(name for name in self.model_names if name.split(".")[0] == "classifier") in names
        for module in (self, *self.children()):
            module.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Apply the stage's layers.

        Args:
            x: images (N, 3, H, W) for the first stage, what the stage before gave for the others.
        """
        if x.requires_grad and _works_in_place(self.get_submodule(self.names[0])):
            x = (
                x.clone()
            )  # what comes from elsewhere is a leaf of autograd or a view, which nothing may change in place
        for part, module in self.named_children():
            if part == "classifier" and self._flattens:
                x = torch.flatten(x, 1)
            x = module(x) if self.masks is None else self._drop_by_masks(part, module, x, self.masks)
        return x

    def _drop_by_masks(self, part: str, module: nn.Module, x: Tensor, masks: Masks) -> Tensor:
        for segment in self._segments_of(part, module, masks):
            x = masks.apply(segment, x, self.first_row) if masks.covers(segment) else segment(x)
        return x

    def _segments_of(self, part: str, module: nn.Module, masks: Masks) -> list[nn.Module]:
        """The part's layers of dropout, and what lies between them, as it would be executed."""
        if type(module) not in (nn.Sequential, FusedSequential):
            return [module]
        found = tuple(leaves(module))
        kept = self._segments.get(part)
        if kept is None or kept[0] != found:
            kept = self._segments[part] = (found, _segments(found, masks, type(module)))
        return kept[1]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load this stage's parameters, from its own state dict or from one of the whole model.

        Raises:
            RuntimeError: keys are missing or of no layer of the model, or values are of another variant or shape;
                nothing has been changed then.
        """
        others = tuple(f"{name}." for name in self.model_names if name not in self.names)
        own = {key: value for key, value in state_dict.items() if not key.startswith(others)}
        if strict:
            check_keys(own, self.state_dict())
        metadata = getattr(state_dict, "_metadata", {}).get("", {})
        check_values(self, self.variant, own, metadata.get("variant"))
        return super().load_state_dict(own, strict, assign)

    def extra_repr(self) -> str:
        """Show what the stage holds."""
        return f"{self.names[0]} to {self.names[-1]}"


def split(
    model: AlexNet,
    stages: int | None = None,
    at: str | Sequence[str] = "auto",
    batch: int = 128,
    image_size: int | None = None,
    **choice: Any,
) -> list[Stage]:
    """Cut a network into stages, which share its layers.

    Called in turn, `for stage in split(model): x = stage(x)`, they are the model. A stage's state dict has the model's
    keys; what is loaded into the model is loaded into its stages, and the other way round.

    Args:
        model: any variant, with whatever layers a user has put in.
        stages: their number; None is 2, or what `at` makes.
        at: the names of the layers that begin a stage, but for the first: of `layer_names(model)`, as `"features.6"`,
            or the paper's, as `"conv3"`. `"auto"` chooses them (`auto_cut`).
        batch: images of a step, for that choice.
        image_size: their side, in pixels, likewise; None is the variant's own.
        **choice: what else `auto_cut` takes: `microbatches`, `schedule`, `link`, `memory_limit`, and `times`, by which
            it goes by measured times, as in `times=Table(measure(model, images), NEUTRAL)`.

    Returns:
        The stages, first to last.

    Raises:
        ValueError: the model is no `AlexNet`, there is no such layer to cut at, the names are not in the order of the
            layers, or they do not make so many stages.
    """
    names = layer_names(model)
    if stages is not None and not 1 <= stages <= len(names):
        raise ValueError(f"the network can be cut into 1 to {len(names)} stages, one a layer, got stages={stages}")
    if at == "auto":
        side = image_size or VARIANTS[model.variant].image_size
        at = auto_cut(model, stages or 2, (batch, 3, side, side), **choice) if stages != 1 else ()
    begins = [0, *(place(name, names) for name in ([at] if isinstance(at, str) else at)), len(names)]
    if stages is not None and len(begins) - 1 != stages:
        raise ValueError(f"{len(begins) - 2} cuts make {len(begins) - 1} stages, got stages={stages}")
    if sorted(set(begins)) != begins:
        raise ValueError(f"the cuts must be different and in the order of the layers, got {', '.join(at)}")
    return [Stage(model, names[a:b]) for a, b in pairwise(begins)]


def whole_state_dict(stages: Iterable[Stage]) -> dict[str, Any]:
    """The state dict of the model that these are the stages of, as the model itself would give it.

    Args:
        stages: all of them, in order.
    """
    whole: dict[str, Any] = OrderedDict()
    variant = None
    for stage in stages:
        whole.update(stage.state_dict())
        variant = stage.variant
    whole._metadata = {"": {"version": 1, "variant": variant}}  # type: ignore[attr-defined]
    return whole


def load_whole_state_dict(stages: Sequence[Stage], state_dict: Mapping[str, Any]) -> None:
    """Load a state dict of the whole model into its stages, those that are here.

    Args:
        stages: of one model; some of them, where others are other processes'.
        state_dict: of the whole model, under its names.

    Raises:
        RuntimeError: as `Stage.load_state_dict`.
    """
    for stage in stages:
        stage.load_state_dict(state_dict)


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropouts(network: AlexNet | Sequence[Stage], image_size: int | None = None) -> list[Dropped]:
    """The layers of dropout that a batch in parts drops by whole masks, in order of execution.

    Those are plain `nn.Dropout`s in the network's sequences. One with hooks, or of another type, is called as it is,
    and draws for the part of the batch that it sees.

    Args:
        network: the network, or all its stages in order.
        image_size: side of the images, in pixels; None is the variant's own. Nothing is computed: shapes alone travel.
    """
    modules = [network] if isinstance(network, AlexNet) else list(network)
    found: list[nn.Module] = []
    for part in (getattr(module, name) for module in modules for name in PARTS if hasattr(module, name)):
        found += leaves(part) if type(part) in (nn.Sequential, FusedSequential) else [part]
    before_linear = {
        id(layer): type(following) is nn.Linear and fits(following)
        for layer, following in zip(found, [*found[1:], None], strict=True)
        if type(layer) is nn.Dropout and fits(layer)
    }
    side = image_size or VARIANTS[modules[0].variant].image_size
    shapes = _input_shapes(modules, [layer for layer in found if id(layer) in before_linear], side)
    return [
        Dropped(layer, shapes[id(layer)], before_linear[id(layer)])
        for layer in found
        if isinstance(layer, nn.Dropout) and id(layer) in shapes
    ]


def _input_shapes(modules: Sequence[nn.Module], layers: Sequence[nn.Module], side: int) -> dict[int, tuple[int, ...]]:
    """The shapes of what layers are given, for one image, where modules are called in turn."""
    shapes: dict[int, tuple[int, ...]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: shapes.update({id(layer): tuple(inputs[0].shape[1:])}))
        for layer in layers
    ]
    dtype = next((parameter.dtype for module in modules for parameter in module.parameters()), torch.float32)
    x = torch.empty(1, 3, side, side, device="meta", dtype=dtype)
    try:
        with torch.no_grad():
            for module in modules:
                tensors = (*module.named_parameters(), *module.named_buffers())
                absent = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
                x = torch.func.functional_call(module, absent, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _segments(layers: Sequence[nn.Module], masks: Masks, sequence: type[nn.Module]) -> list[nn.Module]:
    segments: list[nn.Module] = []
    run: list[nn.Module] = []
    for layer in layers:
        if masks.covers(layer):
            segments += [sequence(*run), layer] if run else [layer]
            run = []
        else:
            run.append(layer)
    return [*segments, sequence(*run)] if run else segments


def _works_in_place(layer: nn.Module) -> bool:
    """Whether the layer, or the first of those in it, changes its input."""
    while type(layer) in (nn.Sequential, FusedSequential) and layer._modules:
        layer = next(leaves(layer))
    return bool(getattr(layer, "inplace", False))
