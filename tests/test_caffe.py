"""Caffe's files. The tests write them themselves; their writer is held to what Google's protobuf wrote."""

import random
import shutil
import tracemalloc

import numpy as np
import plain
import pytest
import torch

from alexnet_triton import AlexNet, alexnet, caffe, read_state_dict
from alexnet_triton.caffe import read_caffemodel, read_mean

KEYS = {
    "conv1": "features.0", "conv2": "features.3", "conv3": "features.6", "conv4": "features.8",
    "conv5": "features.10", "fc6": "classifier.1", "fc7": "classifier.4", "fc8": "classifier.6",
}  # fmt: skip
ORDER = [
    "data", "conv1", "relu1", "norm1", "pool1", "conv2", "relu2", "norm2", "pool2", "conv3", "conv4", "conv5",
    "pool5", "fc6", "drop6", "fc7", "drop7", "fc8", "loss",
]  # fmt: skip
MEAN = (122.67891434, 116.66876762, 104.00698793)  # R, G, B


# --- a writer of protobuf ---------------------------------------------------------------------------------------------


def varint(value):
    head = b""
    while value > 127:
        head, value = head + bytes([value & 127 | 128]), value >> 7
    return head + bytes([value])


def message(*fields):
    """Of (number, value): integers; texts, bytes and arrays by their length; floats alone in 32 bits."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts += [varint(number << 3), varint(value)]
        elif isinstance(value, np.float32):
            parts += [varint(number << 3 | 5), value.tobytes()]
        else:
            value = value.encode() if isinstance(value, str) else value
            size = value.nbytes if isinstance(value, np.ndarray) else len(value)
            parts += [varint(number << 3 | 2), varint(size), value]
    return b"".join(parts)


def legacy_blob(values):
    """As bvlc_alexnet.caffemodel has it: four dimensions, filled up with ones."""
    shape = (1,) * (4 - values.ndim) + values.shape
    return message(*enumerate(shape, 1), (5, np.ascontiguousarray(values)))


def blob(values):
    number = {"float32": 5, "float64": 8}[values.dtype.name]
    shape = message((1, b"".join(varint(size) for size in values.shape)))
    return message(*sorted([(number, np.ascontiguousarray(values)), (7, shape)], key=lambda field: field[0]))


def v1_layer(name, blobs):
    return message((2, "data"), (3, name), (4, name), (5, 4), *((6, each) for each in blobs), (7, np.float32(1)))


def layer(name, blobs):
    return message((1, name), (2, "Convolution"), (3, "data"), (4, name), *((7, each) for each in blobs))


def network(parameters, write=legacy_blob, order=ORDER, write_layer=v1_layer):
    """A NetParameter of layers with (weight, bias) in Caffe's order of channels."""
    number = 2 if write_layer is v1_layer else 100
    layers = [write_layer(name, [write(values) for values in parameters.get(name, ())]) for name in order]
    return message((1, "AlexNet"), *((number, each) for each in layers))


def test_the_tests_write_what_protobuf_writes():
    filters, bias = np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1), np.array([0.5, -300], np.float32)
    v1 = message(
        (2, "data"), (3, "conv1"), (4, "conv1"), (5, 4), (6, legacy_blob(filters)), (6, legacy_blob(bias)),
        (7, np.float32(1)), (7, np.float32(2)),
    )  # fmt: skip
    assert message((1, "AlexNet"), (2, v1)).hex() == (
        "0a07416c65784e657412581204646174611a05636f6e76312205636f6e76312804322208021003180120012a18000000000000803f"
        "0000004000004040000080400000a040321208011001180120022a080000003f000096c33d0000803f3d00000040"
    )
    unfit = message((5, np.array([1, 2], np.float32)), (7, message((1, b"\x02\x03\x01\xac\x02"))))
    v2 = message((1, "AlexNet"), (100, layer("conv1", [unfit, blob(bias.astype(np.float64))])))
    assert v2.hex() == (
        "0a07416c65784e6574a2064f0a05636f6e7631120b436f6e766f6c7574696f6e1a04646174612205636f6e76313a132a080000803f"
        "000000403a070a05020301ac023a173a030a01024210000000000000e03f0000000000c072c0"
    )


# --- the whole network ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A network of torch's own layers that takes B, G, R, and its parameters by Caffe's names."""
    torch.manual_seed(1)
    net = plain.alexnet("caffe", 10).eval()
    state = {key: value.numpy() for key, value in net.state_dict().items()}
    return net, {name: (state[f"{key}.weight"], state[f"{key}.bias"]) for name, key in KEYS.items()}


@pytest.fixture(scope="module")
def path(trained, tmp_path_factory):
    """It as Caffe wrote bvlc_alexnet.caffemodel."""
    file = tmp_path_factory.mktemp("caffe") / "bvlc_alexnet.caffemodel"
    file.write_bytes(network(trained[1]))
    return file


@pytest.fixture(scope="module")
def model(path):
    return alexnet(weights=str(path), init="torchvision").eval()


def expected(parameters):
    tensors = {}
    for name, (weight, bias) in parameters.items():
        tensors[f"{KEYS[name]}.weight"] = torch.from_numpy(weight).flip(1) if name == "conv1" else weight
        tensors[f"{KEYS[name]}.bias"] = bias
    return {key: torch.as_tensor(value) for key, value in tensors.items()}


def same(state_dict, tensors):
    assert list(state_dict) == list(tensors)
    return all(
        torch.equal(value, tensors[key]) and value.dtype == torch.float32 and value.is_contiguous()
        for key, value in state_dict.items()
    )


def test_bvlc_alexnets_file_becomes_the_state_dict(trained, path):
    assert same(read_caffemodel(path), expected(trained[1]))
    assert same(read_state_dict(str(path)), expected(trained[1]))


def test_the_network_answers_rgb_images_as_caffe_answers_bgr(trained, model):
    images = torch.randint(256, (1, 3, 227, 227)).float()
    mean = torch.tensor(MEAN).view(3, 1, 1)
    with torch.no_grad():
        caffes = trained[0].double()(images.flip(1).double() - mean.flip(0))  # B, G, R
        assert plain.error(model(images - mean), caffes) < 1e-5
        assert plain.error(model((images - mean).flip(1)), caffes) > 1e-2


def test_a_caffemodel_makes_variant_caffe_and_fits_no_other(path, model):
    assert (model.variant, model.classifier[6].out_features) == ("caffe", 10)
    for variant in ("paper", "torchvision"):
        with pytest.raises(RuntimeError, match=f"is of variant 'caffe' and this model of variant '{variant}'"):
            alexnet(weights=path, variant=variant, device="meta")
    with pytest.raises(RuntimeError, match="is of 10 classes and this model's of 5"):
        alexnet(weights=path, num_classes=5, device="meta")


def test_reading_allocates_the_parameters_alone(path):
    tracemalloc.start()
    try:
        state_dict = read_caffemodel(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1 <= peak / sum(value.nbytes for value in state_dict.values()) < 1.05


def test_what_was_read_outlives_the_file(trained, path, tmp_path):
    shutil.copyfile(path, tmp_path / "copy.caffemodel")
    state_dict = read_caffemodel(tmp_path / "copy.caffemodel")
    with open(tmp_path / "copy.caffemodel", "r+b") as written_over:
        written_over.write(bytes(2**20))
    assert same(state_dict, expected(trained[1]))


# --- formats, and files of something else, in small -------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Parameters of a network of the same layers, and the reader told of their shapes."""
    shapes = {name: (4, 2, 3, 3) for name in KEYS if name.startswith("conv")} | {"conv1": (4, 3, 5, 5)}
    shapes |= {"fc6": (5, 8), "fc7": (5, 5), "fc8": (7, 5)}
    monkeypatch.setattr(caffe, "_LAYERS", {name: (KEYS[name], shape) for name, shape in shapes.items()})
    draw = np.random.default_rng(0)
    return {
        name: tuple(draw.standard_normal(size, dtype=np.float32) for size in (shape, shape[:1]))
        for name, shape in shapes.items()
    }


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file, and gives its path."""

    def write(content, name="net.caffemodel"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def pieces(values):
    """A blob whose numbers come in two pieces, the second one by one, and its sizes one by one."""
    flat = values.reshape(-1)
    one_by_one = [(5, value) for value in flat[2:]]
    return message((5, flat[:2]), *one_by_one, (7, message(*((1, size) for size in values.shape))))


def with_gradients(values):
    return blob(values) + message((6, values), (9, values.astype(np.float64)))


FORMATS = {
    "layers": (legacy_blob, v1_layer),
    "layer": (blob, layer),
    "layer, upgraded": (legacy_blob, layer),
    "double": (lambda values: blob(values.astype(np.float64)), layer),
    "in pieces": (pieces, layer),
    "with gradients": (with_gradients, layer),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_that_caffe_has_written_is_read(form, small, file):
    write, write_layer = FORMATS[form]
    assert same(read_caffemodel(file(network(small, write, write_layer=write_layer))), expected(small))


@pytest.mark.parametrize("classes", [1, 3])
def test_the_last_layer_may_have_any_number_of_classes(classes, small, file):
    small["fc8"] = (small["fc8"][0][:classes], small["fc8"][1][:classes])
    state_dict = read_caffemodel(file(network(small)))
    assert state_dict["classifier.6.weight"].shape == (classes, 5)
    assert same(state_dict, expected(small))


def test_layers_and_fields_that_are_not_bvlc_alexnets_are_passed_over(small, file):
    small["extra"] = (np.ones(3, np.float32),)
    unknown = varint(77 << 3 | 1) + b"8 bytes." + message((78, "text"), (79, 2**63), (80, np.float32(1)))
    content = network(small, order=["extra", *ORDER]) + unknown
    del small["extra"]
    assert same(read_caffemodel(file(content)), expected(small))


def test_missing_layers_are_named_with_those_that_are_there(small, file):
    for name in ("conv3", "fc8"):
        small[f"{name}_new"] = small.pop(name)
    path = file(network(small, order=[*small]))
    with pytest.raises(RuntimeError, match=r"lacks parameters of 'conv3', 'fc8', .*'fc7', 'conv3_new', 'fc8_new'$"):
        read_caffemodel(path)
    with pytest.raises(RuntimeError, match="net.caffemodel' lacks parameters of 'conv1'.* are none$"):
        read_caffemodel(file(network({})))
    names = [f"inception_{number}" for number in range(57)]
    path = file(network({name: (np.ones(1, np.float32),) for name in names}, order=names))
    with pytest.raises(RuntimeError, match="'inception_9' and 47 more$"):
        read_caffemodel(path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("conv2", lambda weight, bias: (weight[:, :1], bias)),
        ("conv2", lambda weight, bias: (weight[..., :1], bias)),
        ("fc6", lambda weight, bias: (weight.T, bias)),
        ("fc8", lambda weight, bias: (weight[:, :-1], bias)),
        ("fc8", lambda weight, bias: (weight, bias[:-1])),
        ("fc8", lambda weight, bias: (weight[0, 0], bias)),
        ("conv1", lambda weight, bias: (weight,)),
        ("conv1", lambda weight, bias: (weight, bias, bias)),
        ("conv1", lambda weight, bias: (weight, np.stack([bias, bias]))),
    ],
)
def test_other_shapes_are_named_beside_those_expected(name, change, small, file):
    shape = small[name][0].shape
    small[name] = change(*(np.array(values) for values in small[name]))
    path = file(network(small, blob, write_layer=layer))
    with pytest.raises(RuntimeError, match="is of another network$") as caught:
        read_caffemodel(path)
    for part in (str(path), repr(name), *(str(values.shape) for values in small[name]), str(shape)):
        assert part in str(caught.value)


def test_caffenet_which_has_the_same_shapes_is_refused(small, file):
    swapped = [{"norm1": "pool1", "pool1": "norm1"}.get(name, name) for name in ORDER]
    with pytest.raises(RuntimeError, match="pools before it normalises, as CaffeNet does"):
        read_caffemodel(file(network(small, order=swapped)))


def one_sentence(error):
    return "\n" not in str(error) and len(str(error)) < 600 and "net.caffemodel" in str(error)


@pytest.mark.parametrize("form", ["layers", "layer"])
def test_a_file_cut_at_any_byte_is_refused_in_one_sentence(form, small, file):
    write, write_layer = FORMATS[form]
    content = network(small, write, write_layer=write_layer)
    ends = {len(network(small, write, ORDER[:count], write_layer)) for count in range(len(ORDER))}
    for length in {*range(120), *range(120, len(content), 37), *range(len(content) - 60, len(content))} - ends:
        with pytest.raises(ValueError, match="is not a caffemodel or is damaged: .*; download it again$") as caught:
            read_caffemodel(file(content[:length]))
        assert one_sentence(caught.value)
    for length in sorted(ends)[1:-1]:  # a whole file of fewer layers; "loss", the last, is not missed
        with pytest.raises(RuntimeError, match="lacks parameters of") as caught:
            read_caffemodel(file(content[:length]))
        assert one_sentence(caught.value)


def complaint(path):
    try:
        read_caffemodel(path)
    except (ValueError, RuntimeError) as error:
        return error
    return None


def test_whatever_the_bytes_the_answer_is_a_network_or_one_sentence(small, file):
    draw = random.Random(0)
    content = network(small)
    refused = 0
    for _ in range(150):
        assert one_sentence(complaint(file(draw.randbytes(draw.randrange(1, 400)))))
        damaged = bytearray(content)
        for _ in range(draw.randrange(1, 6)):
            damaged[draw.randrange(200)] = draw.randrange(256)
        error = complaint(file(bytes(damaged)))
        assert error is None or one_sentence(error)
        refused += error is not None
    assert refused > 40  # in the others a number or a name that is not looked at has changed


def conv1_of(blob):
    return message((2, v1_layer("conv1", [blob, blob])))


OTHERS = {
    "nothing": (b"", "empty"),
    "a page": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "field 7 has wire type 4"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 243862414\n", "wire type 6"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "it holds no layers"),
    "zeros": (bytes(64), "it holds no layers"),
    "a mean": (legacy_blob(np.ones((3, 4, 4), np.float32)), "field 2 holds an integer where a message is expected"),
    "a solver's state": (message((1, 360_000), (2, "net.caffemodel")), "wire type 6"),
    "a name alone": (message((1, "AlexNet")), "it holds no layers"),
    "a layer that is a number": (message((1, "AlexNet"), (2, 7)), "field 2 holds an integer"),
    "an endless number": (b"\x10" + b"\xff" * 20, "a number is longer than protobuf's 64 bits"),
    "half a float": (conv1_of(message((1, 1), (5, b"abc"))), "multiple of element size"),
    "too few numbers": (conv1_of(message((1, 4), (5, bytes(16)))), r"4 numbers .* shape \(4, 0, 0, 0\) says 0"),
    "a negative size": (conv1_of(message((1, 2**64 - 4), (5, bytes(16)))), "4 numbers stand where shape"),
    "no numbers": (conv1_of(message((6, bytes(16)))), r"0 numbers stand where shape \(\) says 1"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_file_is_no_caffemodel(kind, file, monkeypatch):
    monkeypatch.setattr(caffe, "_LAYERS", {"conv1": ("features.0", (4, 3, 5, 5))})
    content, reason = OTHERS[kind]
    for read in (read_caffemodel, read_state_dict, lambda path: alexnet(weights=path)):
        with pytest.raises(ValueError, match=f"' is not a caffemodel or is damaged: .*{reason}") as caught:
            read(file(content))
        assert one_sentence(caught.value)


def test_what_torch_saved_under_caffes_ending_is_no_caffemodel(tmp_path):
    torch.save({"features.0.weight": torch.ones(3)}, tmp_path / "net.caffemodel")
    with pytest.raises(ValueError, match="is not a caffemodel or is damaged"):
        read_state_dict(tmp_path / "net.caffemodel")


def test_files_that_are_not_there_are_named(tmp_path):
    for read in (read_caffemodel, read_mean, read_state_dict):
        for path in (tmp_path / "none.caffemodel", tmp_path):
            with pytest.raises(ValueError, match=f"there is no (file.* at|'config.json' in) '{path}'"):
                read(path)


# --- the mean ---------------------------------------------------------------------------------------------------------


def test_a_mean_file_of_protobufs_own_is_read(file):
    content = bytes.fromhex(
        "08011003180220022a300000803f000000400000404000008040000020410000a0410000f041000020420000c842000048430000494300"
        "004a43"
    )
    mean = read_mean(file(content, "mean.binaryproto"))
    assert mean.dtype == torch.float32
    assert mean.tolist() == [175.75, 25.0, 2.5]  # R, G, B of B, G, R


@pytest.mark.parametrize("write", [legacy_blob, blob, lambda values: blob(values.astype(np.float64)), pieces])
def test_the_mean_is_averaged_over_the_image_and_turned_to_rgb(write, file):
    image = np.random.default_rng(0).uniform(0, 255, (3, 256, 256 if write is not pieces else 3)).astype(np.float32)
    mean = read_mean(str(file(write(image), "mean.binaryproto")))
    exact = image.astype(np.float64).mean((1, 2))[::-1]
    assert np.abs(mean.double().numpy() / exact - 1).max() < 1e-7


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (legacy_blob(np.ones((4, 2, 2), np.float32)), r"it has shape \(4, 2, 2\), expected \(3, height, width\)"),
        (legacy_blob(np.ones((2, 3, 2, 2), np.float32)), r"it has shape \(2, 3, 2, 2\)"),
        (blob(np.ones(3, np.float32)), r"it has shape \(3,\)"),
        (blob(np.ones((3, 0, 2), np.float32)), r"it has shape \(3, 0, 2\)"),
        (legacy_blob(np.ones((3, 2, 2), np.float32))[:-1], "it is cut short by 1 bytes"),
        (network({}), r"it has shape \(116, 8064, 0, 0\)"),
        (b"", "empty"),
    ],
)
def test_another_file_is_no_mean(content, reason, file):
    with pytest.raises(ValueError, match=f"mean.binaryproto' is not a mean image or is damaged: .*{reason}"):
        read_mean(file(content, "mean.binaryproto"))


def test_the_table_of_layers_is_variant_caffes():
    own = AlexNet(device="meta", variant="caffe").state_dict()
    assert {f"{key}.weight": shape for key, shape in caffe._LAYERS.values()} == {
        key: tuple(value.shape) for key, value in own.items() if key.endswith("weight")
    }
