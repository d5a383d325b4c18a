"""Idioms of watching: hooks that look and hooks that change, activations, attributions."""

import idioms
import pytest
import torch
from idioms import answer, loss_of
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names


def watch(model, register):
    """Register a hook on every module of `model` that notes what it sees."""
    seen = []
    for name, module in model.named_modules():
        getattr(module, register)(lambda module, *values, name=name: seen.append((name, *values[-1:])))
    return seen


def out_of_place(model):
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return model


def idiom_forward_hooks_on_every_module(model, x):
    """Each fires once; what a convolution gave is changed by the in-place ReLU behind it."""
    seen = watch(model, "register_forward_hook")
    model(x)
    return seen


def idiom_forward_hooks_on_every_module_copy_at_once(model, x):
    seen = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, out.clone())))
    model(x)
    return seen


def idiom_pre_hooks_on_every_module(model, x):
    seen = watch(model, "register_forward_pre_hook")
    model(x)
    return seen


def idiom_a_hook_on_one_layer_at_a_time(model, x):
    """The stored tensor of features.0 is that which its in-place ReLU changes later."""
    with torch.no_grad():
        seen = []
        for index in (0, 1, 12):
            handle = model.features[index].register_forward_hook(lambda m, args, out: seen.append((out.clone(), out)))
            model(x)
            handle.remove()
        return seen, model(x)


def idiom_backward_hooks_on_every_module(model, x):
    seen = []
    for name, module in out_of_place(model).named_modules():
        module.register_full_backward_hook(lambda m, into, out, name=name: seen.append((name, into, out)))
    loss_of(model(x.requires_grad_())).backward()
    return seen


def idiom_backward_hooks_beside_in_place_relus(model, x):
    """Torch's refusal, word for word; and a hook where it has none."""
    seen, refusals = [], []
    for index in (0, 1, 2):
        handle = model.features[index].register_full_backward_hook(lambda m, into, out: seen.append((into, out)))
        try:
            loss_of(model(x.requires_grad_())).backward()
        except RuntimeError as error:
            refusals.append((index, str(error)))
        handle.remove()
    return seen, refusals


def idiom_backward_hooks_of_old(model, x):
    seen = []
    for index in (1, 7, 11):
        model.features[index].register_backward_hook(lambda m, into, out: seen.append((into, out)))
    loss_of(model(x)).backward()
    return seen


def idiom_hooks_that_change_inputs(model, x):
    model.features.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    model.features[3].register_forward_pre_hook(lambda m, args: (args[0] - 0.1,))
    model.classifier[4].register_forward_pre_hook(lambda m, args, options: ((args[0] + 1,), options), with_kwargs=True)
    return answer(model, x)


def idiom_hooks_that_change_outputs(model, x):
    model.features[4].register_forward_hook(lambda m, args, out: 2 * out)
    model.features[12].register_forward_hook(lambda m, args, out: out.add_(1))
    model.classifier[1].register_forward_hook(lambda m, args, out: out - 1)
    return answer(model, x)


def idiom_hooks_that_change_gradients(model, x):
    model.features[12].register_full_backward_pre_hook(lambda m, grads: (2 * grads[0],))
    model.avgpool.register_full_backward_hook(lambda m, into, out: (into[0].clamp(min=0),))
    model.features[3].weight.register_hook(lambda grad: grad.sign())
    return answer(model, x)


def idiom_a_hook_that_raises(model, x):
    def refuse(module, args):
        raise KeyError("enough")

    seen = []
    handle = model.features[7].register_forward_pre_hook(refuse)
    model.features[6].register_forward_hook(lambda m, args, out: seen.append(out.shape), always_call=True)
    try:
        model(x)
    except KeyError as error:
        seen.append(str(error))
    handle.remove()
    return seen, model(x)


def idiom_global_hooks(model, x):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(out.clone()))
    try:
        model(x)
    finally:
        handle.remove()
    return seen


def idiom_post_accumulate_hooks(model, x):
    seen = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad.clone())))
    loss_of(model(x)).backward()
    return sorted(seen, key=lambda each: each[0])


def idiom_thingsvision(model, x):
    """A name is found among `named_modules`, hooked, and its flattened activations kept, without gradients."""
    activations = {}
    for name in ("features.9", "features.12", "classifier.1", "classifier.4"):
        module = dict(model.named_modules())[name]
        module.register_forward_hook(lambda m, args, out, name=name: activations.update({name: out.clone().detach()}))
    with torch.no_grad():
        model(x)
    return {name: activation.flatten(1) for name, activation in activations.items()}


def idiom_feature_extractor(model, x):
    names = get_graph_node_names(model)
    return names, create_feature_extractor(model, ["features.5", "features.12", "classifier.4"])(x)


def idiom_maps_of_the_last_convolution_retain_their_gradient(model, x):
    kept = []
    model.features[11].register_forward_hook(lambda m, args, out: (out.retain_grad(), kept.append(out))[1])
    loss_of(model(x)).backward()
    return kept[0], kept[0].grad


def cam(activations, gradients):
    weights = gradients.mean((2, 3), keepdim=True)
    return (weights * activations).sum(1).relu()


def idiom_grad_cam(model, x):
    """As pytorch-grad-cam: a forward hook keeps the map and hooks the tensor for its gradient."""
    activations, gradients = [], []
    layer = model.features[10]
    layer.register_forward_hook(lambda m, args, out: activations.append(out.cpu().detach()))

    def save_gradient(module, args, out):
        out.register_hook(lambda grad: gradients.append(grad.cpu().detach()))

    layer.register_forward_hook(save_gradient)
    model(x)[:, 1].sum().backward()
    return activations, gradients, cam(activations[0], gradients[0])


def idiom_grad_cam_by_a_backward_hook(model, x):
    activations, gradients = [], []
    layer = model.features[12]
    layer.register_forward_hook(lambda m, args, out: activations.append(out.detach()))
    layer.register_full_backward_hook(lambda m, into, out: gradients.append(out[0].detach()))
    logits = model(x)
    logits.backward(nn.functional.one_hot(logits.argmax(1), 4).to(logits))
    return cam(activations[0], gradients[0])


def idiom_saliency(model, x):
    model.requires_grad_(False)
    x.requires_grad_()
    model(x).max(1).values.sum().backward()
    return x.grad.abs().amax(1)


def idiom_guided_backpropagation(model, x):
    for layer in out_of_place(model).modules():
        if isinstance(layer, nn.ReLU):
            layer.register_full_backward_hook(lambda m, into, out: (into[0].clamp(min=0),))
    x.requires_grad_()
    return torch.autograd.grad(model(x)[:, 2].sum(), x)


class Listening(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def idiom_function_mode(model, x):
    with Listening():
        return answer(model, x)


def idiom_dispatch_mode(model, x):
    with Dispatching():
        return answer(model, x)


def idiom_tensor_subclass(model, x):
    class Batch(torch.Tensor):
        pass

    logits, grads = answer(model, x.as_subclass(Batch))
    return type(logits).__name__, logits.as_subclass(torch.Tensor), [grad.as_subclass(torch.Tensor) for grad in grads]


def idiom_count_of_layers_by_hooks(model, x):
    """As summaries and counters of operations do."""
    rows = []
    for name, layer in model.named_modules():
        if not layer._modules:
            layer.register_forward_hook(
                lambda m, args, out, name=name: rows.append((name, type(m).__name__, tuple(out.shape)))
            )
    with torch.no_grad():
        model(x)
    return rows, sum(p.numel() for p in model.parameters())


@idioms.over(idioms.of(dict(globals())), idioms.ON_BOTH_BACKENDS)
@pytest.mark.filterwarnings("ignore:.*non-full backward hook.*")
def test_watching_sees_what_it_sees_with_plain_layers(idiom, variant, backend):
    idioms.check(idiom, variant, backend)


def idiom_flops(model, x):
    with FlopCounterMode(display=False) as counter:
        loss_of(model(x)).backward()
    return counter.get_total_flops()


@idioms.over([idiom_flops], [("torchvision", "reference")])
def test_operations_are_counted_as_those_of_plain_layers(idiom, variant, backend):
    idioms.check(idiom, variant, backend)
