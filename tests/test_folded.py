"""Images that lie as the first convolution reads them: the network's numbers are the same, and so is all else."""

import copy
import io
import pickle
from contextlib import contextmanager

import pytest

pytest.importorskip("triton")
import torch
from plain import error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_triton import AlexNet, use_backend
from alexnet_triton.folded import Folded
from alexnet_triton.fusion import FusedSequential
from alexnet_triton.kernels import halo, launch
from alexnet_triton.kernels.conv_shape import convolution
from alexnet_triton.variants import VARIANTS


def lies(x, conv):
    """Images as `conv` reads them."""
    shape = convolution(tuple(x.shape), tuple(conv.weight.shape), conv.stride, conv.padding, conv.groups)
    return Folded(halo.enter(x, shape.x_layout, shape.fold), shape.x_layout, shape.fold, tuple(x.shape))


def images(n=2, size=27, dtype=torch.float32):
    return torch.randn(n, 3, size, size).to(dtype).contiguous(memory_format=torch.channels_last)


@contextmanager
def launches(monkeypatch):
    """Names of the kernels that are launched within the block."""
    made, real = [], launch.launch

    def noted(kernel, programs, **arguments):
        made.append(kernel.__name__)
        real(kernel, programs, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "launch", noted)
        yield made


def answers(layers, x, **autocast):
    for parameter in layers.parameters():
        parameter.grad = None
    with use_backend("triton"), torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        y = layers(x)
        (y * y).sum().backward()
    return [y.detach(), *(parameter.grad for parameter in layers.parameters())]


def first_layer(**options):
    return FusedSequential(nn.Conv2d(3, 16, 7, 4, **options), nn.ReLU())


CASES = [*((variant, torch.float32) for variant in VARIANTS), ("paper", torch.bfloat16)]


@pytest.mark.parametrize(("variant", "dtype"), CASES, ids=str)
def test_answer_and_gradients_are_the_same_to_the_bit_and_nothing_is_copied(variant, dtype, monkeypatch):
    layers = AlexNet(10, variant=variant, init="kaiming").features[:3].to(dtype)  # to pool1; then all is as ever
    x = images(dtype=dtype)
    with launches(monkeypatch) as plain:
        expected = answers(layers, x)
    folded = lies(x, layers[0])
    with launches(monkeypatch) as made:
        found = answers(layers, folded)
    assert all(map(torch.equal, found, expected))
    assert [y.stride() for y in found] == [y.stride() for y in expected]
    assert plain.index("enter_kernel") == 0
    assert made[0] == "pack_kernel"
    assert made.count("enter_kernel") == plain.count("enter_kernel") - 1


def test_under_autocast_too(monkeypatch):
    layers, x = first_layer(), images(dtype=torch.bfloat16)
    expected, folded = answers(layers, x, on=True), lies(x, layers[0])
    with launches(monkeypatch) as made:
        found = answers(layers, folded, on=True)
    assert all(map(torch.equal, found, expected))
    assert made[0] == "pack_kernel"
    wider = lies(x.float(), layers[0])  # whose dtype autocast changes
    assert all(map(torch.equal, answers(layers, wider, on=True), expected))


def test_eager_calls_pass_the_dispatcher_by_and_dispatch_modes_see_them(monkeypatch):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names, layers, x = [], first_layer(), images()
    expected, folded, own = answers(layers, x), lies(x, layers[0]), []
    dispatch = Folded.__torch_dispatch__

    def noting(cls, func, *rest):
        own.append(func.name())
        return dispatch(func, *rest)

    monkeypatch.setattr(Folded, "__torch_dispatch__", classmethod(noting))
    assert all(map(torch.equal, answers(layers, folded), expected))
    assert own == []
    with launches(monkeypatch) as made, Seen():
        assert all(map(torch.equal, answers(layers, folded), expected))
    assert "alexnet_triton::map_chain" in names
    assert "alexnet_triton::map_chain_backward" in names
    assert made[0] == "pack_kernel"


def test_another_first_layer_gets_the_pixels():
    x = images()
    folded = lies(x, first_layer()[0])
    for layers in (first_layer(padding=2), first_layer()[1:], FusedSequential(nn.MaxPool2d(3, 2), nn.Conv2d(3, 8, 3))):
        if list(layers.parameters()):
            assert all(map(torch.equal, answers(layers, folded), answers(layers, x)))
        else:
            with use_backend("triton"):
                assert torch.equal(layers(folded), layers(x))


def test_hooks_and_the_reference_see_pixels():
    x, layers, seen = images(), first_layer(), []
    folded = lies(x, layers[0])
    with use_backend("reference"):
        assert torch.equal(layers(folded), layers(x))
    layers[0].register_forward_pre_hook(lambda layer, given: seen.append(given[0] + 0))
    with use_backend("triton"):
        assert torch.equal(layers(folded), layers(x))
    assert torch.equal(seen[0], x)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_gradient_of_the_images_is_right(backend):
    x, layers = images(), first_layer()
    folded = lies(x, layers[0]).requires_grad_()
    x.requires_grad_()
    with use_backend(backend):
        layers(x).sum().backward()
        layers(folded).sum().backward()
    assert error(folded.grad, x.grad) < 1e-6  # on a CPU plain images' gradient is computed in another way
    assert folded.grad.abs().max() > 0


def through_pickle(x):
    return pickle.loads(pickle.dumps(x))


def through_a_file(x):
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["x"]


DONE = {
    "half": lambda x: x.half(),
    "slice": lambda x: x[1:, :, 3:9, ::2],
    "sum": lambda x: x.sum(),
    "stack": lambda x: torch.stack([x, x]),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "to its own device": lambda x: x.to("cpu", torch.float32),
    "detach": lambda x: x.detach(),
    "flip": lambda x: x.flip(3),
    "unfold": lambda x: x.unfold(2, 3, 3),
    "convolution": lambda x: nn.functional.conv2d(x, torch.ones(4, 3, 3, 3)),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "first image": lambda x: next(iter(x)),
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "a file": through_a_file,
    "vmap": torch.vmap(lambda image: image * 2),
}


@pytest.mark.parametrize("do", DONE.values(), ids=DONE)
def test_whatever_is_done_to_it_is_done_to_the_pixels(do):
    x = images()
    folded = lies(x, first_layer(padding=2)[0])
    y = do(folded)
    assert torch.equal(y, do(x))
    assert y.stride() == do(x).stride()
    assert "Folded(tensor(" in repr(folded)


@pytest.mark.parametrize("do", [copy.deepcopy, through_pickle, through_a_file, torch.clone], ids=lambda do: do.__name__)
def test_its_copies_are_ordinary_tensors(do):
    assert type(do(lies(images(), first_layer()[0]))) is torch.Tensor


REFUSED = {
    "add_": lambda x: x.add_(1),
    "assignment": lambda x: x.__setitem__(0, 1),
    "out": lambda x: torch.add(torch.ones(2, 3, 27, 27), 1, out=x),
    "data_ptr": lambda x: x.data_ptr(),
    "share_memory_": lambda x: x.share_memory_(),
}


@pytest.mark.parametrize("do", REFUSED.values(), ids=REFUSED)
def test_writing_into_it_is_refused(do):
    with pytest.raises(RuntimeError, match=r"needs the memory of images .*: take a copy, x\.clone\(\)"):
        do(lies(images(), first_layer()[0]))


def test_it_knows_what_it_is():
    x, folded = images(dtype=torch.float16), lies(images(dtype=torch.float16), first_layer()[0])
    assert isinstance(folded, torch.Tensor)
    for name in ("shape", "dtype", "device", "layout", "requires_grad"):
        assert getattr(folded, name) == getattr(x, name)
    assert folded.stride() == x.stride()
    assert folded.is_contiguous(memory_format=torch.channels_last)
    assert folded.detach().matrix is folded.matrix
    with pytest.raises(NotImplementedError, match="record_stream.*CPU"):  # as the matrix's own memory says
        folded.record_stream(torch.Stream("cpu"))


def test_it_stays_what_it_is_under_checkpoint_and_data_parallel(monkeypatch, tmp_path):
    x, layers = images(), first_layer()
    folded, expected = lies(x, layers[0]), answers(layers, x)
    recomputed = FusedSequential(*layers)
    recomputed.forward = lambda x: torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=False)
    with launches(monkeypatch) as made:
        assert all(map(torch.equal, answers(recomputed, folded), expected))
    assert made[0] == "pack_kernel"
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(layers)
        with launches(monkeypatch) as made:
            assert all(map(torch.equal, answers(parallel, folded), expected))
        assert made[0] == "pack_kernel"
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_compiled_network_takes_it(backend):
    x, layers = images(), first_layer()
    folded = lies(x, layers[0])
    with use_backend(backend):
        compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
        y = compiled(folded)
        assert torch.equal(y, layers(x))
        y.sum().backward()
    assert layers[0].weight.grad.abs().max() > 0
