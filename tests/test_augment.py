"""Augmentation: what is drawn, and what becomes of bytes, on the CPU and by the kernel."""

import math

import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from alexnet_triton import use_backend
from alexnet_triton.bench import augment_checks
from alexnet_triton.bench.checks import TINY
from alexnet_triton.folded import Folded
from alexnet_triton.kernels import augment as kernels_augment
from alexnet_triton.kernels import halo
from alexnet_triton.kernels.augment import augment as by_kernel
from alexnet_triton.kernels.augment import pack_draws
from alexnet_triton.recipe import augment
from alexnet_triton.recipe.augment import Augment, PCAColor
from alexnet_triton.recipe.data.sets import ColourSums, Statistics
from alexnet_triton.variants import VARIANTS


def statistics():
    seeded = torch.Generator().manual_seed(0)
    return ColourSums.of(torch.randint(0, 256, (2, 3, 40, 40), generator=seeded, dtype=torch.uint8)).statistics()


def images(n, size, layout="planes"):
    shape = {"planes": (n, 3, size, size), "packed": (n, size, size, 3)}[layout]
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    return x if layout == "planes" else x.permute(0, 3, 1, 2)


def defined(x, draws, s, crop):
    """The definition, in float64."""
    mean, std, values, vectors = (t.double() for t in s)
    out = []
    for image, top, left, mirror, alpha in zip(x, *draws, strict=True):
        y = image[:, top : top + crop, left : left + crop].double() / 255
        y = y.flip(-1) if mirror else y
        shift = vectors @ (values * alpha.double())
        out.append((y + shift[:, None, None] - mean[:, None, None]) / std[:, None, None])
    return torch.stack(out) if out else torch.empty(0, 3, crop, crop).double()


ROUNDING = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Of the largest difference over the largest number: one rounding, and in float32 a few."""


def error(result, expected):
    return ((result.double() - expected).abs().max() / expected.abs().max()).item()


# --- draws ------------------------------------------------------------------------------------------------------------


def test_crops_are_uniform_over_30_by_30_positions_and_half_are_mirrored():
    count = 90_000
    draws = augment.draw(count, 256, 227, torch.Generator().manual_seed(1))
    cells = torch.bincount(draws.top * 30 + draws.left, minlength=900).double()
    assert cells.shape == (900,)
    chi_square = ((cells - 100) ** 2 / 100).sum().item()
    assert abs(chi_square - 899) < 4 * math.sqrt(2 * 899)
    assert abs(draws.mirror.sum().item() - count / 2) < 4 * math.sqrt(count / 4)
    assert draws.mirror.dtype == torch.bool


def test_colours_have_mean_0_and_the_covariance_of_the_principal_components():
    s = statistics()
    alpha = augment.draw(20_000, 8, 8, torch.Generator().manual_seed(2)).colour
    shifts = (alpha * s.eigenvalues) @ s.eigenvectors.t()
    expected = s.eigenvectors @ torch.diag((0.1 * s.eigenvalues) ** 2) @ s.eigenvectors.t()
    assert (shifts.mean(0).abs() < 4 * (expected.diagonal() / 20_000).sqrt()).all()
    assert (shifts.t().cov() - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_seed_gives_the_same_draws_and_the_same_crops_with_less_asked_for():
    first, again, other, plain = (
        augment.draw(50, 40, 31, torch.Generator().manual_seed(seed), **options)
        for seed, options in ((3, {}), (3, {}), (4, {}), (3, {"mirror": False, "colour": 0.0}))
    )
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert torch.equal(plain.top, first.top)
    assert torch.equal(plain.left, first.left)
    assert not plain.mirror.any()
    assert plain.colour.abs().max() == 0


def test_draws_of_an_epoch_are_taken_by_batch():
    draws = augment.draw(10, 40, 31)
    indices = torch.tensor([7, 0, 7])
    for field, of_batch in zip(draws, draws.at(indices), strict=True):
        assert torch.equal(of_batch, field[indices])


def test_ten_crops_lie_in_corners_and_centre_and_their_mirrors():
    places = [(int(d.top[1]), int(d.left[1]), bool(d.mirror[1])) for d in augment.ten(2, 256, 227)]
    five = [(0, 0), (0, 29), (29, 0), (29, 29), (14, 14)]
    assert places == [(*place, False) for place in five] + [(*place, True) for place in five]
    x = torch.arange(2 * 256 * 256).view(2, 1, 256, 256)  # no two pixels alike
    crops = augment.ten_crop(x, 227)
    assert crops.shape == (2, 10, 1, 227, 227)
    for crop, (top, left, mirror) in zip(crops[1], places, strict=True):
        expected = x[1, :, top : top + 227, left : left + 227]
        assert torch.equal(crop, expected.flip(-1) if mirror else expected)
    assert len({tuple(crop.flatten()[[0, -1]].tolist()) for crop in crops[0]}) == 10


def test_ten_crop_takes_oblong_images():
    crops = augment.ten_crop(torch.arange(6 * 9.0).view(1, 1, 6, 9), 4)
    assert crops[0, :5, 0, 0, 0].tolist() == [0, 5, 18, 23, 11]
    with pytest.raises(ValueError, match=r"takes a batch of images \(N, C, H, W\), got \(3, 6, 9\)"):
        augment.ten_crop(torch.zeros(3, 6, 9), 4)


def test_the_centre_is_torchvisions():
    for size in range(9, 14):
        x = images(1, size)
        d = augment.centre(1, size, 8)
        crop = x[:, :, d.top : d.top + 8, d.left : d.left + 8]
        assert torch.equal(crop, v2.CenterCrop(8)(x))


@pytest.mark.parametrize("make", [augment.draw, augment.centre, augment.ten])
@pytest.mark.parametrize("crop", [9, 0])
def test_a_crop_larger_than_the_image_is_refused(make, crop):
    with pytest.raises(ValueError, match=rf"a crop of {crop} pixels a side cannot be cut from images of 8"):
        make(2, 8, crop)


# --- a batch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("layout", ["planes", "packed"])
@pytest.mark.parametrize(("n", "size", "crop"), [(5, 40, 31), (1, 17, 17), (0, 9, 8)])
def test_a_batch_is_as_defined(n, size, crop, layout, dtype):
    s, x, draws = statistics(), images(n, size, layout), augment.draw(n, size, crop, colour=1.0)
    y = Augment(s, crop, dtype)(x, draws)
    assert y.dtype == dtype
    assert y.shape == (n, 3, crop, crop)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if n:
        assert error(y, defined(x, draws, s, crop)) < ROUNDING[dtype]


def test_autocast_rounds_nothing_before_the_end():
    s, x, draws = statistics(), images(2, 20), augment.draw(2, 20, 17)
    with torch.autocast("cpu", torch.bfloat16):
        y = Augment(s, 17)(x, draws)
    assert torch.equal(y, Augment(s, 17)(x, draws))


def test_a_batch_agrees_with_torchvisions_transforms():
    s, x = statistics(), images(6, 24)
    torch.manual_seed(5)
    expected = torch.stack([augment.evaluation_transform(s, 17)(image) for image in x])
    assert error(Augment(s, 17)(x, augment.centre(6, 24, 17)), expected.double()) < 2e-6


def test_draws_that_torchvisions_transforms_make_give_the_same_image():
    s, x = statistics(), images(1, 24)[0]
    for seed in range(4):
        train, made = augment.training_transform(s, 17), {}
        _, crop, flip, _, shift, *_ = train.transforms
        flip.p = float(seed % 2)
        for transform in (crop, shift):
            make = transform.make_params

            def noted(inputs, make=make, made=made):
                params = make(inputs)
                made.update(params)
                return params

            transform.make_params = noted
        torch.manual_seed(seed)
        result = train(x)
        draws = augment.Draws(
            torch.tensor([made["top"]]), torch.tensor([made["left"]]), torch.tensor([seed % 2 == 1]),
            made["alpha"][None],
        )  # fmt: skip
        assert type(result) is torch.Tensor
        assert error(Augment(s, 17)(x[None], draws)[0], result.double()) < 2e-6


def test_wrong_batches_are_refused_in_words():
    with pytest.raises(ValueError, match=r"gives floating-point images, got torch\.uint8"):
        Augment(statistics(), 8, torch.uint8)
    augment_ = Augment(statistics(), 8)
    draws = augment.centre(2, 9, 8)
    with pytest.raises(ValueError, match=r"takes bytes \(N, 3, H, W\) of dtype uint8, got \(2, 3, 9, 9\) of torch.flo"):
        augment_(torch.zeros(2, 3, 9, 9), draws)
    with pytest.raises(ValueError, match=r"takes bytes .* got \(2, 1, 9, 9\)"):
        augment_(images(2, 9)[:, :1], draws)
    with pytest.raises(ValueError, match="draws for its 3 images, got draws for 2"):
        augment_(images(3, 9), draws)
    with pytest.raises(ValueError, match="a crop of 8 pixels a side cannot be cut from images of 7"):
        augment_(images(2, 7), draws)
    with pytest.raises(ValueError, match="begin at pixels 4 to 4 do not fit images of 9 pixels and crops of 8"):
        augment_(images(2, 9), augment.centre(2, 16, 8))


# --- the kernel -------------------------------------------------------------------------------------------------------


def both(x, draws, crop, dtype=torch.float32, conv=None):
    """What the kernel and plain torch make of a batch."""
    s = statistics()
    with use_backend("triton"):
        found = Augment(s, crop, dtype, conv)(x, draws)
    return found, Augment(s, crop, dtype)(x, draws), defined(x, draws, s, crop)


def first_layer(window=11, stride=4, padding=0, **options):
    return nn.Conv2d(3, 6, window, stride, padding, **options)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("layout", ["planes", "packed"])
@pytest.mark.parametrize(("n", "size", "crop"), [(3, 24, 17), (1, 19, 19), (0, 9, 8)])
def test_kernel_gives_a_channels_last_tensor(n, size, crop, layout, dtype):
    draws = augment.draw(n, size, crop, colour=1.0)
    found, plain, expected = both(images(n, size, layout), draws, crop, dtype)
    assert type(found) is torch.Tensor
    assert found.dtype == dtype
    assert found.stride() == plain.stride()
    if n:
        assert error(found, expected) < ROUNDING[dtype]
        assert error(plain, expected) < ROUNDING[dtype]


LAYERS = {
    "as AlexNet's": ({}, 27),
    "with padding": ({"padding": 2}, 28),
    "past the images' end": ({"padding": 1}, 22),
    "3x3/2, columns that are no channel": ({"window": 3, "stride": 2, "padding": 1}, 15),
    "5x5/3": ({"window": 5, "stride": 3}, 17),
    "each channel alone": ({"window": 3, "stride": 2, "groups": 3}, 15),
    "strides of two lengths": ({"window": (5, 3), "stride": (2, 1), "padding": (1, 2)}, 13),
}


@pytest.mark.parametrize("layout", ["planes", "packed"])
@pytest.mark.parametrize(("options", "crop"), LAYERS.values(), ids=LAYERS)
def test_kernel_writes_what_the_first_layer_reads(options, crop, layout):
    conv, draws = first_layer(**options), augment.draw(2, crop + 5, crop, colour=1.0)
    found, _, expected = both(images(2, crop + 5, layout), draws, crop, conv=conv)
    assert isinstance(found, Folded)
    pixels = found.clone()
    assert error(pixels, expected) < ROUNDING[torch.float32]
    assert torch.equal(found.matrix, halo.enter(pixels, found.matrix_layout, found.fold))  # zeros all around, too


@pytest.mark.parametrize(("crop", "padding"), {(v.image_size, v.padding) for v in VARIANTS.values()})
def test_kernel_at_the_variants_own_sizes(crop, padding):
    draws = augment.draw(1, 256, crop)
    found, _, expected = both(images(1, 256, "packed"), draws, crop, torch.bfloat16, first_layer(padding=padding))
    assert error(found.clone(), expected) < ROUNDING[torch.bfloat16]


def test_kernel_rounds_once_to_the_nearest():
    x, draws = images(2, 20), augment.draw(2, 20, 19)
    for conv in (None, first_layer()):
        full, *_ = both(x, draws, 19, conv=conv)
        for dtype in (torch.float16, torch.bfloat16):
            half, *_ = both(x, draws, 19, dtype, conv)
            assert torch.equal(half.clone(), full.clone().to(dtype))


PLAIN = {
    "dilated": {"window": 3, "dilation": 2},
    "of stride 1": {"window": 3, "stride": 1},
    "that reflects at the border": {"padding": 1, "padding_mode": "reflect"},
    "padded by name": {"padding": "valid"},
    "that passes over pixels": {"window": 3, "stride": 4},
    "that leaves pixels out at the end": {"window": 8},
    "larger than the images": {"window": 29},
}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_other_first_layers_get_an_ordinary_tensor(options):
    found, _, expected = both(images(1, 28), augment.draw(1, 28, 27), 27, conv=first_layer(**options))
    assert type(found) is torch.Tensor
    assert error(found, expected) < ROUNDING[torch.float32]


def test_plain_torch_gives_ordinary_tensors_whatever_the_first_layer():
    s, x, draws = statistics(), images(2, 28), augment.draw(2, 28, 27)
    for dtype in (torch.float32, torch.float64):
        y = Augment(s, 27, dtype, first_layer())(x, draws)
        assert type(y) is torch.Tensor
        assert error(y, defined(x, draws, s, 27)) < ROUNDING[torch.float32]
    module = Augment(s, 27, conv=first_layer())
    assert not list(module.parameters())
    assert not module.state_dict()
    assert torch.equal(module.half()(x, draws), Augment(s, 27)(x, draws))


def test_bytes_past_two_billion_are_found():
    far = 2**30 + 8  # a stride that fits 32 bits, and a place that does not
    store = torch.empty(2 * far + 4096, dtype=torch.uint8)  # pages that nobody touches cost nothing
    near = images(3, 12)
    for strides in ((far, 144, 12, 1), (432, far, 12, 1)):
        x = store.as_strided((3, 3, 12, 12), strides)
        x.copy_(near)
        draws = augment.draw(3, 12, 9)
        found, _, expected = both(x, draws, 9)
        assert error(found, expected) < ROUNDING[torch.float32]


def test_draws_are_packed_in_one_tensor_of_whole_numbers_and_offsets():
    offset = torch.tensor([[0.5, 1.5, -2.5], [1, 2, 3]])
    packed = pack_draws(torch.tensor([4, 5]), torch.tensor([6, 7]), torch.tensor([False, True]), offset, 10)
    assert packed.tolist() == [[4, 6, 1, 0.5, 1.5, -2.5], [5, 16, -1, 1, 2, 3]]
    assert packed.dtype == torch.float32


def test_no_image_leaves_a_layout_of_zeros():
    layout = halo.for_convolution(0, 48, (7, 7), (3, 3), (0, 0), (5, 5))
    fold = halo.Fold(1, 3, (4, 4), (4, 4), (0, 0), 48)
    out = by_kernel(images(0, 28), torch.empty(0, 6), (1.0, 1.0, 1.0), 27, layout, fold, torch.float32)
    assert out.shape == (layout.rows, 48)
    assert not out.any()


# --- torchvision's form -----------------------------------------------------------------------------------------------


def test_pca_colour_of_a_grey_image_has_mean_0_and_the_right_covariance():
    s = statistics()
    shift = PCAColor(s.eigenvalues, s.eigenvectors)(torch.full((2_000, 3, 2, 2), 0.5)) - 0.5
    assert torch.equal(shift[..., :1, :1].expand_as(shift), shift)
    shifts = shift[..., 0, 0]
    assert len(shifts.unique(dim=0)) == 2_000
    expected = s.eigenvectors @ torch.diag((0.1 * s.eigenvalues) ** 2) @ s.eigenvectors.t()
    assert (shifts.mean(0).abs() < 4 * (expected.diagonal() / 2_000).sqrt()).all()
    assert (shifts.t().cov() - expected).abs().max() < 0.15 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_no_deviation_changes_nothing(dtype):
    x = torch.randint(0, 2, (3, 5, 5)).to(dtype)
    assert torch.equal(PCAColor([1, 1, 1], torch.eye(3), std=0)(x), x)


def test_a_seed_gives_the_same_colours():
    shift, x = PCAColor([1, 0.5, 0.2], torch.eye(3)), torch.rand(3, 4, 4)
    torch.manual_seed(1)
    first = shift(x)
    torch.manual_seed(1)
    assert torch.equal(shift(x), first)
    assert not torch.equal(shift(x), first)


def test_bytes_are_rounded_and_do_not_wrap():
    x = torch.tensor([0, 1, 128, 254, 255], dtype=torch.uint8).expand(64, 3, 1, 5)
    shift = PCAColor([1, 1, 1], torch.eye(3), std=0.5)
    torch.manual_seed(0)
    y = shift(x)
    torch.manual_seed(0)
    expected = shift(x.double() / 255) * 255
    assert expected.min() < -1
    assert expected.max() > 256
    assert (y.double() - expected.clamp(0, 255)).abs().max() < 0.5001
    assert y.dtype == torch.uint8


def test_pca_colour_takes_what_torchvisions_transforms_take():
    s, x = statistics(), images(1, 12)[0]
    shift = PCAColor(s.eigenvalues, s.eigenvectors, std=2.0)
    results = []
    mask = tv_tensors.Mask(torch.ones(1, 12, 12, dtype=torch.uint8))
    for given in (x, tv_tensors.Image(x), v2.functional.to_pil_image(x)):
        torch.manual_seed(3)
        y, label = shift(given, 7)
        assert type(y) is type(given) or given.mode == y.mode == "RGB"
        assert label == 7
        results.append(v2.functional.to_image(y).as_subclass(torch.Tensor))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], x)
    _, same = shift(tv_tensors.Image(x), mask)
    assert torch.equal(same, mask)


def test_pca_colour_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"eigenvalues \(3,\) and eigenvectors \(3, 3\) .* got \(2,\) and \(3, 3\)"):
        PCAColor([1, 1], torch.eye(3))
    with pytest.raises(ValueError, match="a standard deviation of at least 0, got -1"):
        PCAColor([1, 1, 1], torch.eye(3), std=-1)
    shift = PCAColor([1, 1, 1], torch.eye(3))
    with pytest.raises(ValueError, match=r"takes RGB images .* got \(1, 4, 4\)"):
        shift(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="got .* of torch.int16"):
        shift(torch.zeros(3, 4, 4, dtype=torch.int16))


def test_statistics_type_is_what_augment_takes():
    s = Statistics(torch.zeros(3), torch.ones(3), torch.ones(3), torch.eye(3))
    y = Augment(s, 2)(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), augment.centre(1, 2, 2))
    assert torch.equal(y, torch.ones(1, 3, 2, 2))


# --- what `make gpu` checks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "dtype"), [("paper", torch.bfloat16), ("torchvision", torch.float32)])
def test_the_checks_for_a_gpu_hold_here(variant, dtype):
    measures = augment_checks.check_augment(variant, dtype, TINY, torch.device("cpu"))
    assert len(measures) == 5
    assert [measure.name for measure in measures if not measure.holds] == []


def test_the_checks_for_a_gpu_notice_a_kernel_that_mirrors_nothing(monkeypatch):
    pack = kernels_augment.pack_draws
    monkeypatch.setattr(
        kernels_augment, "pack_draws", lambda top, left, mirror, *rest: pack(top, left, mirror & False, *rest)
    )
    torch.manual_seed(0)
    measures = augment_checks.check_augment("paper", torch.float32, TINY, torch.device("cpu"))
    assert "pixels" in [measure.name for measure in measures if not measure.holds]
