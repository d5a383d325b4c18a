"""Idioms of training and of differentiation: optimizers, transforms of functions, recomputation."""

import copy

import idioms
import pytest
import torch
from idioms import answer, gradients, loss_of, without_dropout
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


def steps(model, x, optimizer, count=2):
    """The weights after steps of training."""
    without_dropout(model)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    return dict(model.named_parameters())


def idiom_groups_of_parameters_with_rates_of_their_own(model, x):
    groups = [
        {"params": model.features.parameters(), "lr": 1e-3},
        {"params": [p for n, p in model.classifier.named_parameters() if n.endswith("weight")], "weight_decay": 0.1},
        {"params": [p for n, p in model.classifier.named_parameters() if n.endswith("bias")]},
    ]
    return steps(model, x, torch.optim.SGD(groups, lr=1e-2, momentum=0.9))


def idiom_frozen_features_and_an_optimizer_of_the_rest(model, x):
    model.features.requires_grad_(False)
    return steps(model, x, torch.optim.SGD(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-2))


def idiom_clipping(model, x):
    loss_of(model(x)).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    clipped = {name: grad.clone() for name, grad in gradients(model).items()}
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    return norm, clipped, gradients(model)


def idiom_a_graph_that_is_walked_twice(model, x):
    loss = loss_of(model(x))
    loss.backward(retain_graph=True)
    loss.backward()
    try:
        loss.backward()
    except RuntimeError as error:
        return gradients(model), str(error)


def idiom_features_without_gradients(model, x):
    with torch.no_grad():
        maps = model.features(x)
    loss_of(model.classifier(model.avgpool(maps).flatten(1))).backward()
    return gradients(model)


def idiom_logits_changed_in_place(model, x):
    logits = model(x)
    logits /= 2.0
    logits -= logits.detach().max()
    loss_of(logits).backward()
    return logits, gradients(model)


def idiom_maps_changed_in_place(model, x):
    maps = model.features(x)
    maps += 1
    loss_of(maps).backward()
    return gradients(model.features)


def idiom_a_weight_changed_before_backward(model, x):
    """Torch's refusal."""
    maps = model.features(x)
    with torch.no_grad():
        model.features[3].weight.mul_(2)
    try:
        maps.sum().backward()
    except RuntimeError as error:
        return str(error).split(" is at version")[0]


def idiom_anomaly_detection(model, x):
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        found = answer(model, x)
    return found


def idiom_inference_then_training(model, x):
    with torch.inference_mode():
        logits = model(x)
        weights_kept = [p.is_inference() for p in model.parameters()]
    loss_of(model(x)).backward()
    return logits.is_inference(), logits.clone(), weights_kept, gradients(model)


def idiom_images_of_inference(model, x):
    """Tensors of inference mode serve where nothing is differentiated, and are refused where something is."""
    with torch.inference_mode():
        x = x * 1
    with torch.no_grad():
        logits = model(x)
    try:
        model(x)
    except RuntimeError as error:
        return logits, str(error)


def idiom_deterministic_mode(model, x):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = answer(model, x), answer(model, x)
    finally:
        torch.use_deterministic_algorithms(False)
    return first, [torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True)]


def idiom_functional_call(model, x):
    parameters = {name: 1.5 * value for name, value in model.named_parameters()}
    return answer(lambda x: torch.func.functional_call(model, parameters, (x,)), x, model.parameters())


def idiom_checkpoint_sequential(model, x):
    def run(x):
        maps = checkpoint_sequential(model.features, 2, x, use_reentrant=False)
        return checkpoint(model.classifier, model.avgpool(maps).flatten(1), use_reentrant=False)

    return answer(run, x, model.parameters())


def idiom_reentrant_checkpoint(model, x):
    def run(x):
        return model.classifier(model.avgpool(checkpoint(model.features, x, use_reentrant=True)).flatten(1))

    x.requires_grad_()
    loss_of(run(x)).backward()
    return x.grad, gradients(model)


def idiom_saved_tensors_elsewhere(model, x):
    with torch.autograd.graph.save_on_cpu():
        logits = model(x)
    loss_of(logits).backward()
    return gradients(model)


def idiom_gradient_penalty(model, x):
    x.requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    (grad.flatten(1).norm(dim=1) - 1).square().sum().backward()
    return grad.detach(), gradients(model)


def idiom_jacobian_of_a_batch_of_gradients(model, x):
    return torch.autograd.functional.jacobian(model, x[:1], vectorize=True)


@idioms.over(idioms.of(dict(globals())), idioms.ON_BOTH_BACKENDS)
def test_training_gives_what_it_gives_with_plain_layers(idiom, variant, backend):
    idioms.check(idiom, variant, backend)


# --- transforms, which see through plain PyTorch alone: the automatic choice of a backend gives them that -------------


def idiom_vmap_over_images(model, x):
    return torch.func.vmap(model)(x[:, None])[:, 0]


def idiom_jacrev(model, x):
    return torch.func.jacrev(model)(x[:1])


def idiom_jvp(model, x):
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))


def idiom_dual_numbers(model, x):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))))


def idiom_hessian(model, x):
    return torch.func.hessian(lambda scale: loss_of(model(scale * x).square()))(torch.tensor(1.0))


def idiom_gradients_by_image(model, x):
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, image):
        return loss_of(torch.func.functional_call(model, parameters, (image[None],)))

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)


def idiom_ensemble(model, x):
    models = [model, copy.deepcopy(model)]
    with torch.no_grad():
        models[1].features[0].weight.mul_(0.5)
    parameters, buffers = torch.func.stack_module_state(models)

    def call(parameters, buffers):
        return torch.func.functional_call(model, (parameters, buffers), (x,))

    return torch.func.vmap(call)(parameters, buffers)


TRANSFORMS = [
    idiom_vmap_over_images,
    idiom_jacrev,
    idiom_jvp,
    idiom_dual_numbers,
    idiom_hessian,
    idiom_gradients_by_image,
    idiom_ensemble,
]


@idioms.over(TRANSFORMS, [("torchvision", "auto"), ("paper", "reference"), ("caffe", "reference")])
def test_transforms_give_what_they_give_with_plain_layers(idiom, variant, backend):
    idioms.check(idiom, variant, backend)


@idioms.over(TRANSFORMS, [("torchvision", "triton")])
def test_transforms_on_kernels_alone_are_refused_in_words(idiom, variant, backend):
    with pytest.raises(RuntimeError, match=r"cannot run on the Triton backend: .* plain PyTorch only; .*'auto'"):
        idioms.check(idiom, variant, backend)
