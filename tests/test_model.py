import plain
import pytest
import torch
import torchvision
from plain import error
from torch import nn
from torch.utils.checkpoint import checkpoint

from alexnet_triton import VARIANTS, AlexNet, FusedSequential, alexnet

ALL = list(VARIANTS)
PARAMETERS = {"merged": 62_378_344, "paper": 60_965_224, "torchvision": 61_100_840, "caffe": 60_965_224}
KEYS = [
    f"{name}.{kind}"
    for name in (*(f"features.{i}" for i in (0, 3, 6, 8, 10)), *(f"classifier.{i}" for i in (1, 4, 6)))
    for kind in ("weight", "bias")
]

every_variant = pytest.mark.parametrize("variant", ALL)


def images(batch=2, height=67, width=67, **options):
    return torch.randn(batch, 3, height, width, **options)


# --- the networks -------------------------------------------------------------------------------------------


@every_variant
def test_parameter_counts_to_the_unit(variant):
    model = AlexNet(variant=variant, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[variant]


@every_variant
def test_every_key(variant):
    assert list(AlexNet(variant=variant, device="meta").state_dict()) == KEYS
    assert list(AlexNet(variant=variant, device="meta", lrn=True).state_dict()) == KEYS
    assert list(AlexNet(variant=variant, device="meta", lrn=False).state_dict()) == KEYS


def test_default_is_the_listing_and_alexnet_is_torchvisions():
    assert AlexNet(device="meta").variant == "merged"
    assert alexnet(device="meta").variant == "torchvision"


@pytest.mark.parametrize("variant", ["paper", "caffe"])
def test_grouped_filters_see_half_of_the_channels(variant):
    features = AlexNet(variant=variant, device="meta").features
    shapes = {index: tuple(features[index].weight.shape) for index in (3, 6, 8, 10)}
    assert shapes == {3: (256, 48, 5, 5), 6: (384, 256, 3, 3), 8: (384, 192, 3, 3), 10: (256, 192, 3, 3)}


def test_layers_have_torchvisions_types_under_torchvisions_indices():
    theirs = torchvision.models.alexnet(num_classes=1)
    for variant in ("merged", "torchvision"):
        ours = AlexNet(1, variant=variant, device="meta")
        for part in ("features", "classifier"):
            types = [[type(layer) for layer in getattr(model, part)] for model in (ours, theirs)]
            assert types[0] == types[1]


def names(sequential):
    return [type(leaf).__name__ for leaf in sequential.modules() if not leaf._modules]


def test_where_the_listing_has_norms_too_they_stand_behind_the_relus_and_before_the_pools():
    assert names(AlexNet(device="meta", lrn=True).features)[:8] == [
        "Conv2d", "ReLU", "LocalResponseNorm", "MaxPool2d"
    ] * 2  # fmt: skip


@pytest.mark.parametrize(("variant", "norm"), [("paper", "GroupedLocalResponseNorm"), ("caffe", "LocalResponseNorm")])
def test_order_is_conv_relu_norm_pool_and_dropout_follows_the_relus_of_fc6_and_fc7(variant, norm):
    model = AlexNet(variant=variant, device="meta")
    assert names(model.features)[:8] == ["Conv2d", "ReLU", norm, "MaxPool2d"] * 2
    assert names(model.classifier) == [
        "Identity", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"
    ]  # fmt: skip


def norms(model):
    return [
        (m.size, m.alpha, m.beta, m.k, getattr(m, "groups", 1))
        for m in model.modules()
        if isinstance(m, nn.LocalResponseNorm)
    ]


def test_norms_of_the_variants():
    def of(variant, **options):
        return norms(AlexNet(variant=variant, device="meta", **options))

    paper = (5, 5e-4, 0.75, 2.0)
    assert of("paper") == [(*paper, 2)] * 2
    assert of("caffe") == [(5, 1e-4, 0.75, 1.0, 1)] * 2
    assert of("merged") == of("torchvision") == []
    assert of("merged", lrn=True) == of("torchvision", lrn=True) == [(*paper, 1)] * 2
    assert of("paper", lrn=False) == of("caffe", lrn=False) == []


def test_pools_of_caffe_round_up():
    rounding = {
        v: {m.ceil_mode for m in AlexNet(variant=v, device="meta").features if type(m) is nn.MaxPool2d} for v in ALL
    }
    assert rounding == {"merged": {False}, "paper": {False}, "torchvision": {False}, "caffe": {True}}


@pytest.mark.parametrize(
    ("variant", "size", "first_map"),
    [
        ("torchvision", 224, 55),
        ("torchvision", 227, 56),
        ("torchvision", 256, 63),
        ("paper", 227, 55),
        ("merged", 227, 55),
    ],
)
def test_first_maps(variant, size, first_map):
    model = AlexNet(variant=variant, device="meta")
    assert model.features[0](images(1, size, size, device="meta")).shape[2:] == (first_map, first_map)
    assert model(images(1, size, size, device="meta")).shape == (1, 1000)


# --- initialisation -----------------------------------------------------------------------------------------


def same_parameters(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def seeded(build, *args, **options):
    torch.manual_seed(7)
    return build(*args, **options)


def test_a_seed_gives_torchvisions_weights():
    assert same_parameters(seeded(alexnet, num_classes=3), seeded(torchvision.models.alexnet, num_classes=3))


def test_a_seed_gives_the_listings_weights():
    def listing():
        model = plain.alexnet("merged", 3)
        plain.listing_initialisation(model)
        return model

    assert same_parameters(seeded(AlexNet, 3), seeded(listing))


@pytest.mark.parametrize(
    ("variant", "biases"),
    [
        ("merged", [0, 0, 0, 0, 0, 1, 1, 1]),
        ("paper", [0, 1, 0, 1, 1, 1, 1, 0]),
        ("caffe", [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0]),
    ],
)
def test_initialisation_of_2012(variant, biases):
    layers = [m for m in AlexNet(20, variant=variant).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for index, (layer, bias) in enumerate(zip(layers, biases, strict=True)):
        assert torch.equal(layer.bias, torch.full_like(layer.bias, bias))
        std = 0.005 if variant == "caffe" and index in (5, 6) else 0.01
        assert abs(layer.weight.std().item() / std - 1) < 0.02
        assert abs(layer.weight.mean().item()) < 0.02 * std


def test_kaiming_keeps_the_scale_of_activations():
    model = AlexNet(50, init="kaiming").eval()
    with torch.no_grad():
        deviation = model.features[0](images(4, 99, 99)).std().item()
        logits = model(images(4, 227, 227))
    assert 1 < deviation < 2
    assert 0.1 < logits.std().item() < 10


def test_parameters_are_made_where_and_as_asked():
    model = AlexNet(3, dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}


# --- numbers ------------------------------------------------------------------------------------------------


def everything(model, x, seed=3):
    """Logits, and the gradients of a fixed weighted sum of them for the images and each parameter."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    grads = torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])
    return {"logits": y.detach(), **dict(zip(["images", *KEYS], grads, strict=True))}


@every_variant
@pytest.mark.parametrize("mode", ["eval", "train", "channels last"])
def test_numbers_are_those_of_plain_layers_forward_and_every_gradient(variant, mode, pair, monkeypatch):
    if mode == "channels last":
        monkeypatch.setattr("alexnet_triton.fusion.cpu.CHANNELS_LAST_PIXELS", 0)
    ours, theirs = pair(variant)
    ours.train(mode != "eval")
    theirs.train(mode != "eval")
    x = images(2, 99, 83)
    expected = everything(theirs, x)
    for name, value in everything(ours, x).items():
        assert error(value, expected[name]) < 1e-5, name


@every_variant
def test_numbers_at_full_size(variant, pair):
    ours, theirs = pair(variant)
    x = images(2, VARIANTS[variant].image_size, VARIANTS[variant].image_size)
    with torch.no_grad():
        assert error(ours.eval()(x), theirs.eval()(x)) < 1e-5


@every_variant
def test_a_nan_in_a_filter_reaches_the_logits(variant, pair):
    ours, _ = pair(variant)
    with torch.no_grad():
        ours.features[3].weight[0, 0, 0, 0] = float("nan")
        assert ours.eval()(images(1)).isnan().all()


@every_variant
def test_empty_batch_gives_an_empty_answer_and_zero_gradients(variant, pair):
    ours, _ = pair(variant)
    for model in (ours.train(), ours.eval()):
        model.zero_grad()
        y = model(images(0))
        assert y.shape == (0, 10)
        y.sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("shape", [(63, 63), (63, 200), (200, 63)])
def test_torchvisions_variant_takes_images_from_63_pixels(shape, pair):
    ours, theirs = pair("torchvision")
    x = images(1, *shape)
    assert error(ours.eval()(x), theirs.eval()(x)) < 1e-5


@every_variant
def test_autocast_gives_bfloat16_like_plain_layers(variant, pair):
    ours, theirs = (model.eval() for model in pair(variant))
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x), theirs(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert error(y, expected) < 0.03
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(variant, dtype, pair):
    ours, theirs = (model.eval() for model in pair(variant))
    x = images()
    expected = theirs(x)
    y = ours.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert error(y, expected) < (1e-5 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("where", ["images", "model", "both"])
def test_channels_last_gives_the_same_numbers_and_gradients(where, pair):
    ours, theirs = pair("torchvision")
    x = images(2, 99, 83)
    expected = everything(theirs.eval(), x)
    if where != "images":
        ours = ours.to(memory_format=torch.channels_last)
    if where != "model":
        x = x.contiguous(memory_format=torch.channels_last)
    for name, value in everything(ours.eval(), x).items():
        assert error(value, expected[name]) < 1e-5, name


# --- parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@every_variant
def test_recomputed_dropout_is_the_dropout_of_the_first_pass(variant, reentrant, pair):
    model, _ = pair(variant)
    gradients = []
    for run in (model.classifier, lambda x: checkpoint(model.classifier, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        x = torch.randn(2, 9216).requires_grad_()
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("size", [31, 30])
def test_trunk_of_lpips_takes_patches_from_31_pixels(size):
    trunk = alexnet(num_classes=2).features[:12]
    if size == 31:
        assert trunk(images(1, 31, 31)).shape == (1, 256, 1, 1)
    else:
        with pytest.raises(ValueError, match="at least 3x3.*got 2x2"):
            trunk(images(1, 30, 30))


# --- feature vectors ----------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("training", [False, True])
def test_feature_vectors_are_the_activations_after_relu_without_dropout(variant, training, pair):
    ours, theirs = pair(variant)
    seen = {}
    theirs.eval()
    theirs.classifier[4].register_forward_pre_hook(lambda m, args: seen.__setitem__("fc6", args[0].clone()))
    theirs.classifier[6].register_forward_pre_hook(lambda m, args: seen.__setitem__("fc7", args[0].clone()))
    x = images()
    theirs(x)
    ours.train(training)
    ours.classifier[3].train(not training)  # a mode of its own
    modes = [module.training for module in ours.modules()]
    assert torch.equal(ours.get_feature_vector(x), ours.get_feature_vector(x, "fc7"))
    for layer in ("fc6", "fc7"):
        vector = ours.get_feature_vector(x, layer=layer)
        assert vector.shape == (2, 4096)
        assert vector.min() == 0
        assert error(vector, seen[layer]) < 1e-5
    assert [module.training for module in ours.modules()] == modes


def test_feature_vectors_leave_the_mode_after_an_exception(pair):
    model, _ = pair("paper")
    model.train()
    model.features[6].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.get_feature_vector(images())
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="'fc6' or 'fc7', got 'fc8'"):
        model.get_feature_vector(images(), layer="fc8")
    model.classifier = nn.Linear(9216, 2)
    with pytest.raises(ValueError, match="replaced"):
        model.get_feature_vector(images())


# --- bad input ----------------------------------------------------------------------------------------------

BAD_IMAGES = [
    ((3, 227, 227), ValueError, r"4-D batch.*got 3-D \(3, 227, 227\).*unsqueeze\(0\)"),
    ((1, 1, 3, 227, 227), ValueError, "4-D batch.*got 5-D"),
    ((1, 4, 227, 227), ValueError, "3 channels, got 4"),
    ((1, 1, 227, 227), ValueError, r"3 channels, got 1.*expand"),
    ((1, 0, 227, 227), ValueError, "3 channels, got 0"),
    ((1, 3, 0, 227), ValueError, "at least"),
]


@every_variant
@pytest.mark.parametrize(("shape", "kind", "message"), BAD_IMAGES, ids=[str(case[0]) for case in BAD_IMAGES])
def test_images_of_another_shape_are_refused(variant, shape, kind, message):
    model = AlexNet(variant=variant, device="meta")
    for call in (model, model.get_feature_vector):
        with pytest.raises(kind, match=message) as caught:
            call(torch.zeros(shape, device="meta"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("variant", "least"), [("merged", 67), ("paper", 67), ("torchvision", 63), ("caffe", 39)])
def test_images_below_the_least_size_are_refused_and_the_least_is_taken(variant, least):
    model = AlexNet(variant=variant, device="meta")
    assert model(torch.zeros(1, 3, least, least, device="meta")).shape == (1, 1000)
    for height, width in ((least - 1, 227), (227, least - 1), (32, 32)):
        with pytest.raises(
            ValueError,
            match=rf"variant='{variant}'\) needs images of at least {least}x{least} pixels, got {height}x{width}",
        ):
            model(torch.zeros(1, 3, height, width, device="meta"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_images_are_refused(dtype):
    with pytest.raises(TypeError, match=rf"floating-point images, got {dtype}.*float\(\) / 255"):
        AlexNet(device="meta")(torch.zeros(1, 3, 227, 227, dtype=dtype, device="meta"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"variant": "alexnet"},
            "unknown variant 'alexnet': choose one of 'merged', 'paper', 'torchvision', 'caffe'",
        ),
        ({"variant": None}, "unknown variant None"),
        ({"dropout": -0.1}, r"\[0, 1\], got -0.1"),
        ({"dropout": 1.5}, r"\[0, 1\], got 1.5"),
        ({"dropout": float("nan")}, "got nan"),
        ({"num_classes": 0}, "at least 1, got 0"),
        ({"init": "xavier"}, "unknown init 'xavier'.*'kaiming'"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AlexNet(device="meta", **options)


def test_layers_of_the_users_own_end_the_check_of_sizes(pair):
    model, _ = pair("torchvision")
    model.features = FusedSequential(nn.Upsample(scale_factor=4), *model.features)
    assert model.eval()(images(1, 32, 32)).shape == (1, 10)
    model.features[1] = nn.Conv2d(1, 64, 11, 4, 2)
    model.features = model.features[1:]
    assert model.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 10)
