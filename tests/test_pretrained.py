"""Networks in folders: what is written, what comes back, and what is said of folders and layers that do not fit."""

import os

import pytest
import safetensors.torch
import torch
from kept import UNITS, change, config_in, equal, images
from torch import nn

from alexnet_triton import VARIANTS, AlexNet, alexnet, read_state_dict, unfuse
from alexnet_triton.weights import strip_prefixes


@pytest.fixture(autouse=True)
def _narrow(request, monkeypatch):
    if "pair" not in request.fixturenames:
        monkeypatch.setattr("alexnet_triton.model.FEATURES", UNITS)


@pytest.fixture
def folder(tmp_path):
    """Where a network of 4 classes is kept."""
    AlexNet(4, init="kaiming").save_pretrained(tmp_path / "kept")
    return tmp_path / "kept"


# --- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lrn", [None, True, False])
def test_a_network_comes_back_as_it_was(variant, lrn, tmp_path):
    model = AlexNet(7, 0.3, variant=variant, lrn=lrn, init="kaiming")
    assert model.save_pretrained(tmp_path) is None
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    back = AlexNet.from_pretrained(tmp_path)
    assert equal(back, model)
    assert repr(back) == repr(model)
    assert (back.variant, back.init) == (variant, "kaiming")
    assert not any(module.training for module in back.modules())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in back.parameters())
    assert torch.equal(back(images()), model.eval()(images()))


def test_the_config_is_the_constructors_arguments(tmp_path):
    AlexNet(7, 0.3, variant="paper").save_pretrained(tmp_path)
    config = {"num_classes": 7, "dropout": 0.3, "variant": "paper", "lrn": True, "init": "paper"}
    assert config_in(tmp_path) == config


def new_head(model):
    model.classifier[6] = nn.Linear(UNITS, 3)


def other_dropout(model):
    model.classifier[0].p = model.classifier[3].p = 0


def unfused(model):
    unfuse(model)


def layers_of_the_users_own(model):
    model.features = nn.Sequential(*model.features)


def relus_not_in_place(model):
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False


def one_relu_for_all(model):
    model.features[7] = model.features[9] = model.features[11]


def data_parallel_features(model):
    model.features = nn.DataParallel(model.features)


def compiled_features(model):
    model.features = torch.compile(model.features)


CHANGES = {
    new_head: {"num_classes": 3},
    other_dropout: {"dropout": 0},
    unfused: {},
    layers_of_the_users_own: {},
    relus_not_in_place: {},
    one_relu_for_all: {},
    data_parallel_features: {},
    compiled_features: {},
}


@pytest.mark.parametrize("changed", CHANGES, ids=lambda changed: changed.__name__)
def test_arguments_are_those_of_the_layers_as_they_are(changed, tmp_path):
    model = AlexNet(4, init="kaiming")
    changed(model)
    model.save_pretrained(tmp_path)
    written = {"num_classes": 4, "dropout": 0.5, "variant": "merged", "lrn": False, "init": "kaiming"}
    assert config_in(tmp_path) == {**written, **CHANGES[changed]}
    back = AlexNet.from_pretrained(tmp_path).state_dict()
    expected = strip_prefixes(model.state_dict())
    assert list(back) == list(expected)
    assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_numbers_of_numpy_are_numbers(tmp_path):
    import numpy as np

    model = AlexNet(4)
    model.classifier[6] = nn.Linear(UNITS, np.int64(3))
    model.classifier[0].p = model.classifier[3].p = np.float32(0.25)
    model.save_pretrained(tmp_path)
    assert (config_in(tmp_path)["num_classes"], config_in(tmp_path)["dropout"]) == (3, 0.25)


def test_a_compiled_network_is_kept_as_what_it_compiles(tmp_path):
    model = AlexNet(4)
    torch.compile(model).save_pretrained(tmp_path)
    assert equal(AlexNet.from_pretrained(tmp_path), model)


def norm_of_features(model):
    model.features[1] = nn.BatchNorm2d(96)


def another_stride(model):
    model.features[0].stride = (2, 2)


def one_dropout(model):
    model.classifier[3].p = 0.2


def dropout_elsewhere(model):
    model.classifier[0] = nn.Identity()


def longer(model):
    model.classifier.append(nn.Softmax(1))


def shorter(model):
    del model.classifier[6]


def another_head(model):
    model.classifier[6] = nn.Sequential(nn.Linear(UNITS, 4), nn.ReLU())


def without_bias(model):
    model.classifier[6] = nn.Linear(UNITS, 4, bias=False)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.classifier[4])


def pruned(model):
    from torch.nn.utils import prune

    prune.l1_unstructured(model.classifier[4], "weight", 0.5)


def scaled(model):
    model.scale = nn.Parameter(torch.ones(()))


OTHERS = {
    norm_of_features: r"'features.1' is BatchNorm2d\(96, .*\), not ReLU\(\)",
    another_stride: r"'features.0' is Conv2d\(3, 96, kernel_size=\(11, 11\), stride=\(2, 2\)\), not Conv2d\(.*4\)\)",
    one_dropout: r"'classifier.3' is Dropout\(p=0.2\), not Dropout\(p=0.5\)",
    dropout_elsewhere: r"'classifier.0' is Identity\(\), not Dropout\(p=0.5\)",
    longer: "there is a 'classifier.7' too",
    shorter: "there is no 'classifier.6'",
    another_head: r"'classifier.6' is Sequential\(\), not Linear\(.*out_features=1000",
    without_bias: r"'classifier.6' is Linear\(.*bias=False\), not Linear\(.*bias=True\)",
    parametrized: r"'classifier.4' is ParametrizedLinear",
    pruned: "there is no parameter 'classifier.4.weight'",
    scaled: "there is a parameter 'scale'",
}


@pytest.mark.parametrize("changed", OTHERS, ids=lambda changed: changed.__name__)
def test_layers_that_no_arguments_give_are_named_and_nothing_is_written(changed, tmp_path):
    model = AlexNet(4)
    changed(model)
    with pytest.raises(ValueError, match=rf"{OTHERS[changed]}.*save model.state_dict\(\) instead") as caught:
        model.save_pretrained(tmp_path / "kept")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "kept").exists()


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept_unless_another_is_asked_for(dtype, tmp_path):
    model = AlexNet(4, dtype=dtype)
    model.classifier[6].float()
    model.save_pretrained(tmp_path)
    assert equal(AlexNet.from_pretrained(tmp_path), model)
    other = AlexNet.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    assert equal(other, model.float())


@pytest.mark.parametrize("name", ["device", "map_location"])
def test_a_network_comes_back_where_it_is_asked_for(name, folder):
    for device in (torch.device("meta"), torch.device("cpu")):
        model = AlexNet.from_pretrained(folder, **{name: device})
        assert {parameter.device for parameter in model.parameters()} == {device}


def channels_last(model):
    model.to(memory_format=torch.channels_last)


def shared_with_processes(model):
    model.share_memory()


def with_tied_biases(model):
    model.features[8].bias = model.features[6].bias


def in_one_buffer(model):
    """As optimizers and communication that work on all parameters at once lay them."""
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1


@pytest.mark.parametrize("laid", [channels_last, shared_with_processes, with_tied_biases, in_one_buffer])
def test_values_are_written_however_they_lie(laid, tmp_path):
    model = AlexNet(4, init="kaiming")
    laid(model)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    back = AlexNet.from_pretrained(tmp_path).state_dict()
    assert list(back) == list(expected)
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    numbers = sum(value.numel() for value in expected.values())
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * numbers + 10_000


def test_a_network_that_was_read_does_not_hang_on_its_file(folder):
    model, loose = AlexNet.from_pretrained(folder), read_state_dict(folder)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * size)  # in place, as others write
    for values in (model.state_dict(), loose):
        assert all(torch.equal(values[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nn.Parameter(torch.empty(4, UNITS, device="meta")), "'classifier.6.weight' is on the meta device"),
        (
            nn.Parameter(torch.ones(4, UNITS).to_sparse()),
            "'classifier.6.weight' is no plain tensor but Tensor, torch.sp",
        ),
        (
            nn.Parameter(torch.ones(4, UNITS).as_subclass(type("Shard", (torch.Tensor,), {}))),
            "'classifier.6.weight' is no plain tensor but Shard",
        ),
    ],
    ids=["meta", "sparse", "subclass"],
)
def test_values_that_cannot_be_written_are_named(value, message, tmp_path):
    model = AlexNet(4)
    model.classifier[6].weight = value
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


# --- files --------------------------------------------------------------------------------------------------


def test_folders_are_made_and_other_files_in_them_left(tmp_path):
    folder = tmp_path / "a" / "b"
    AlexNet(4).save_pretrained(str(folder))
    (folder / "README.md").write_text("mine")
    again = AlexNet(5, variant="caffe")
    again.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert equal(AlexNet.from_pretrained(str(folder)), again)
    (folder / "file").touch()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def fails_at_once(*_, **__):
    raise OSError(28, "No space left on device")


def fails_in_the_middle(tensors, filename, **_):
    filename.write_bytes(b"half")
    raise safetensors.SafetensorError("I/O error: No space left on device")


@pytest.mark.parametrize("failing", [fails_at_once, fails_in_the_middle])
def test_a_write_that_fails_leaves_what_was_there(failing, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(safetensors.torch, "save_file", failing)
    with pytest.raises(OSError, match=r"could not be written into '.*kept' \(.*No space left.*make room"):
        AlexNet(5).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_neither_file_takes_its_place_before_both_are_whole(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("pathlib.Path.write_text", fails_at_once)
    with pytest.raises(OSError, match="No space left"):
        AlexNet(5).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_in_the_place_of_the_folder_is_left(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(NotADirectoryError, match="kept' is a file.*name another"):
        AlexNet(4).save_pretrained(tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "mine"


def rewritten(folder, edit):
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in safetensors.torch.load_file(path).items()}
    edit(tensors)
    safetensors.torch.save_file(tensors, path)


def config_of(text):
    return lambda folder: (folder / "config.json").write_text(text)


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), r"no 'config.json' in .*alexnet\(weights=...\)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no 'model.safetensors' in '.*kept', the file"),
    "no JSON": (config_of("{"), "config.json' cannot be read as a network's arguments: it is no JSON"),
    "no text": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json' cannot be read.*it is no JSON",
    ),
    "nested": (config_of("[" * 100_000), "config.json' cannot be read.*it is no JSON"),
    "a list": (config_of("[]"), "config.json' holds a list, and an object"),
    "unknown": (lambda f: change(f, model_type="resnet"), r"'model_type', which AlexNet\(...\) does not take: read it"),
    "no variant": (lambda f: change(f, variant="vgg"), "unknown variant 'vgg': choose one of"),
    "classes": (lambda f: change(f, num_classes="4"), "config.json' has num_classes '4', and int is needed"),
    "a truth": (lambda f: change(f, num_classes=True), "config.json' has num_classes True, and int is needed"),
    "dropout": (lambda f: change(f, dropout=None), "config.json' has dropout None, and int or float is needed"),
    "lrn": (lambda f: change(f, lrn="no"), "config.json' has lrn 'no', and bool or null is needed"),
    "large dropout": (lambda f: change(f, dropout=2), r"in \[0, 1\], got 2"),
    "broken": (
        lambda f: (f / "model.safetensors").write_bytes(b"no weights"),
        "model.safetensors' cannot be read as tensors",
    ),
    "integers": (
        lambda f: rewritten(f, lambda t: t.update({"features.0.bias": torch.ones(96, dtype=torch.int8)})),
        "'features.0.bias' in '.*kept' is of torch.int8, and weights are floating-point",
    ),
    "missing": (lambda f: rewritten(f, lambda t: t.pop("features.3.bias")), "lacks 'features.3.bias'"),
    "more": (lambda f: rewritten(f, lambda t: t.update(more=torch.ones(1))), "has the unknown 'more'"),
    "of other classes": (lambda f: change(f, num_classes=5), "is of 4 classes and this model's of 5"),
    "of another variant": (
        lambda f: change(f, variant="caffe"),
        "is of variant 'merged' and this model of variant 'caffe'",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_cannot_be_used_is_told_in_one_sentence(name, folder):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        AlexNet.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user/alexnet", r"no folder 'user/alexnet', and nothing is downloaded.*snapshot_download\('user/alexnet'\)"),
        ("nowhere", "no folder 'nowhere': give one that save_pretrained has written"),
        (__file__, r"test_pretrained.py' is a file, and a folder is needed: alexnet\(weights=...\)"),
    ],
)
def test_what_is_no_folder_is_told_apart(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        AlexNet.from_pretrained(name)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_no_pickle_is_read(folder, capsys):
    (folder / "model.safetensors").unlink()
    torch.save(Evil(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no 'model.safetensors'.*alexnet\(weights='.*pytorch_model.bin'\)"):
        AlexNet.from_pretrained(folder)
    with pytest.raises(ValueError, match="holds something else"):
        alexnet(weights=folder / "pytorch_model.bin")
    assert "must not run" not in capsys.readouterr().out


# --- arguments of the caller's ------------------------------------------------------------------------------


def test_arguments_take_the_place_of_the_folders(folder):
    model = AlexNet.from_pretrained(folder, dropout=0.1, lrn=True)
    assert (model.classifier[0].p, model.classifier[3].p) == (0.1, 0.1)
    assert isinstance(model.features[1], nn.Sequential)


def test_arguments_that_the_weights_do_not_fit_are_refused(folder):
    with pytest.raises(ValueError, match=r"have 4 classes, got num_classes=9: .*replace model.classifier\[6\]"):
        AlexNet.from_pretrained(folder, num_classes=9)
    assert AlexNet.from_pretrained(folder, num_classes=4).classifier[6].out_features == 4
    AlexNet(4, variant="paper").save_pretrained(folder)
    with pytest.raises(RuntimeError, match="is of variant 'paper' and this model of variant 'caffe'"):
        AlexNet.from_pretrained(folder, variant="caffe")
    for name in ("force_download", "revision"):
        with pytest.raises(TypeError, match=name):
            AlexNet.from_pretrained(folder, **{name: True})
        with pytest.raises(TypeError, match=name):
            AlexNet(4).save_pretrained(folder, **{name: True})


def test_what_is_missing_is_as_the_constructor_makes_it_where_that_is_allowed(folder):
    expected = AlexNet.from_pretrained(folder)
    rewritten(folder, lambda tensors: (tensors.pop("classifier.6.weight"), tensors.update(more=torch.ones(1))))
    torch.manual_seed(5)
    model = AlexNet.from_pretrained(folder, strict=False)
    torch.manual_seed(5)
    assert torch.equal(model.classifier[6].weight, AlexNet(4, init="kaiming").classifier[6].weight)
    assert torch.equal(model.features[0].weight, expected.features[0].weight)
    assert torch.equal(model.classifier[6].bias, expected.classifier[6].bias)


def test_nothing_is_drawn(folder):
    before = torch.get_rng_state()
    AlexNet.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)
