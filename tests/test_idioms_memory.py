"""Idioms of dtypes, layouts and devices."""

import idioms
import narrow
import pytest
import torch
from idioms import answer, gradients, loss_of, without_dropout
from plain import error
from torch import nn

from alexnet_triton import AlexNet, alexnet, use_backend


def idiom_half(model, x):
    return answer(model.half(), x.half())


def idiom_bfloat16(model, x):
    return answer(model.bfloat16(), x.bfloat16())


def idiom_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    loss_of(logits.float()).backward()
    return logits, {name: grad.dtype for name, grad in gradients(model).items()}


def idiom_scaled_loss(model, x):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(without_dropout(model).parameters(), lr=1e-3)
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(model(x).float())
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), dict(model.named_parameters())


LIMITS = {idiom_half: 5e-3, idiom_bfloat16: 0.05, idiom_autocast: 0.05, idiom_scaled_loss: 5e-3}


@idioms.over(LIMITS, idioms.ON_BOTH_BACKENDS)
def test_lower_precision_gives_what_it_gives_with_plain_layers(idiom, variant, backend):
    idioms.check(idiom, variant, backend, LIMITS[idiom])


def layouts(model, x):
    """Values and strides of maps, and of the gradients that stay in the leaves."""
    x.requires_grad_()
    maps = model.features(x)
    maps.sum().backward()
    leaves = {"images": x.grad, **gradients(model.features)}
    return maps.stride(), maps, {name: (grad, grad.stride()) for name, grad in leaves.items()}


def idiom_channels_last_images(model, x):
    return layouts(model, x.contiguous(memory_format=torch.channels_last))


def idiom_channels_last_model(model, x):
    return layouts(model.to(memory_format=torch.channels_last), x)


def idiom_channels_last_model_and_images(model, x):
    return layouts(model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))


def idiom_images_of_any_strides(model, x):
    wide = torch.cat([x, x], 3)
    views = (wide[..., ::2], x.transpose(2, 3), x[:, :1].expand(-1, 3, -1, -1), x.flip(1), wide[..., 5:72])
    with torch.no_grad():
        return [model.features[:3](view) for view in views], model.features[:3](x[:, :, :63].transpose(2, 3)).stride()


def idiom_no_images(model, x):
    logits = model(x[:0])
    logits.sum().backward()
    return logits, gradients(model)


def idiom_to_meta(model, x):
    return model.to("meta")(x.to("meta"))


def idiom_to_empty_and_back(model, x):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    return model(x)


def idiom_meta_and_assigned(model, x):
    state = model.state_dict()
    model.to("meta").load_state_dict(state, assign=True)
    return answer(model, x)


@idioms.over(
    [
        idiom_channels_last_images,
        idiom_channels_last_model,
        idiom_channels_last_model_and_images,
        idiom_images_of_any_strides,
        idiom_no_images,
        idiom_to_meta,
        idiom_to_empty_and_back,
        idiom_meta_and_assigned,
    ],
    idioms.ON_BOTH_BACKENDS,
)
def test_layouts_and_devices_give_what_they_give_with_plain_layers(idiom, variant, backend):
    idioms.check(idiom, variant, "auto" if (idiom, backend) == (idiom_to_meta, "triton") else backend)


def idiom_double(model, x):
    return answer(model.double(), x.double())


def idiom_default_dtype(model, x):
    """Layers that are made under another default, and images."""
    torch.set_default_dtype(torch.float64)
    try:
        model.double().classifier[6] = nn.Linear(18, 2)
        return answer(model, x + torch.zeros(1))
    finally:
        torch.set_default_dtype(torch.float32)


@idioms.over([idiom_double, idiom_default_dtype], [("torchvision", "auto"), ("paper", "reference")])
def test_float64_runs_where_kernels_do_not(idiom, variant, backend):
    if backend == "auto":
        with use_backend("triton"), pytest.raises(RuntimeError, match="float32, not float64.*'auto'"):
            narrow.network().double()(torch.zeros(1, 3, 67, 67, dtype=torch.float64))
    idioms.check(idiom, variant, backend)


# --- making networks ------------------------------------------------------------------------------------------------


def test_a_network_is_made_without_initialisation_or_memory():
    keys = alexnet(num_classes=2, device="meta").state_dict().keys()
    for variant in ("torchvision", "paper"):
        skipped = nn.utils.skip_init(AlexNet, 2, variant=variant, device="cpu")
        with torch.device("meta"):
            shadow = AlexNet(2, variant=variant)
        assert {p.device.type for p in skipped.parameters()} == {"cpu"}
        assert {p.device.type for p in shadow.parameters()} == {"meta"}
        assert skipped.state_dict().keys() == shadow.state_dict().keys() == keys
        assert skipped.variant == shadow.variant == variant


def test_a_network_is_made_in_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        model = AlexNet(2)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert model.eval()(torch.randn(1, 3, 67, 67)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_narrow_network_is_torchvisions():
    """What the idioms are compared with has torchvision's class and other random weights than a second one."""
    ours, theirs = narrow.twins()
    assert type(theirs).__module__ == "torchvision.models.alexnet"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        theirs.features[0].weight.mul_(1.01)
        x = torch.randn(1, 3, 67, 67)
        assert error(ours.eval()(x), theirs.eval()(x)) > 1e-4
