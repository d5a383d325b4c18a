import re
import shlex
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from alexnet_triton import VARIANTS, AlexNet, alexnet, read_state_dict
from alexnet_triton.cli import _parser
from alexnet_triton.weights import strip_prefixes

ALL = list(VARIANTS)
PAGE = Path(__file__).parents[1] / "docs" / "weights.md"


def same_parameters(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("ours", ALL)
@pytest.mark.parametrize("theirs", ALL)
@pytest.mark.parametrize("metadata", [True, False])
def test_a_state_dict_of_another_variant_is_named(ours, theirs, metadata, pair):
    state_dict = pair(theirs)[0].state_dict()
    model, _ = pair(ours)
    with torch.no_grad():
        model.classifier[6].bias.zero_()
    before = snapshot(model)
    if ours == theirs or (not metadata and {ours, theirs} == {"paper", "caffe"}):
        model.load_state_dict(state_dict if metadata else dict(state_dict))
        assert unchanged(model, state_dict)
        return
    named = theirs if metadata or theirs != "caffe" else "paper"
    with pytest.raises(RuntimeError, match=f"is of variant '{named}' and this model of variant '{ours}'"):
        model.load_state_dict(state_dict if metadata else dict(state_dict))
    assert unchanged(model, before)


def test_another_number_of_classes_names_the_key_and_the_way_out(pair):
    model = AlexNet(7)
    before, state_dict = snapshot(model), pair("merged")[0].state_dict()
    with pytest.raises(
        RuntimeError, match=r"'classifier.6.weight' is of 10 classes and this model's of 7.*num_classes=10"
    ):
        model.load_state_dict(state_dict)
    assert unchanged(model, before)
    del state_dict["classifier.6.weight"], state_dict["classifier.6.bias"]
    result = model.load_state_dict(state_dict, strict=False)
    assert result.missing_keys == ["classifier.6.weight", "classifier.6.bias"]
    assert torch.equal(model.features[0].weight, state_dict["features.0.weight"])


def test_missing_and_unknown_keys_are_listed_and_nothing_is_loaded(pair):
    model = AlexNet(10)
    before, state_dict = snapshot(model), dict(pair("merged")[0].state_dict())
    del state_dict["features.3.bias"]
    state_dict["features.4.gamma"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"lacks 'features.3.bias' and has the unknown 'features.4.gamma'"):
        model.load_state_dict(state_dict)
    assert unchanged(model, before)
    with pytest.raises(RuntimeError, match=r"of no variant"):
        model.load_state_dict({**before, "features.3.weight": torch.ones(1, 2)})
    assert unchanged(model, before)


def test_inside_another_module_errors_come_before_any_change(pair):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = AlexNet(10)

    wrapper = Wrapper()
    before = snapshot(wrapper)
    state_dict = {f"net.{key}": value for key, value in pair("torchvision")[0].state_dict().items()}
    with pytest.raises(RuntimeError, match="is of variant 'torchvision'"):
        wrapper.load_state_dict(state_dict)
    assert unchanged(wrapper, before)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"module.{key}",
        lambda key: key.replace("features.", "features.module."),
        lambda key: f"_orig_mod.module.{key}",
    ],
)
def test_prefixes_of_wrappers_are_told_and_stripped(rename, pair):
    source, _ = pair("torchvision")
    wrapped = {rename(key): value for key, value in source.state_dict().items()}
    model = alexnet(num_classes=10)
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        model.load_state_dict(wrapped)
    assert unchanged(model, before)
    model.load_state_dict(strip_prefixes(wrapped))
    assert same_parameters(model, source)
    with pytest.raises(ValueError, match="become 'a'"):
        strip_prefixes({"module.a": 1, "a": 2})


def test_data_parallel_state_dicts_load_with_their_variant(pair):
    source, _ = pair("caffe")
    state_dict = strip_prefixes(nn.DataParallel(source).state_dict())
    with pytest.raises(RuntimeError, match="is of variant 'caffe'"):
        AlexNet(10, variant="paper").load_state_dict(state_dict)
    model = AlexNet(10, variant="caffe")
    model.load_state_dict(state_dict)
    assert same_parameters(model, source)


def test_assigning_loads_into_a_meta_model(pair):
    source, _ = pair("merged")
    model = AlexNet(10, device="meta")
    model.load_state_dict(source.state_dict(), assign=True)
    assert same_parameters(model, source)


# --- files and published weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["state dict", "model", "state_dict", "data parallel", "safetensors", "torchvision"])
def test_alexnet_reads_weights_from_files(form, tmp_path, pair):
    source, theirs = pair("torchvision")
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    state_dict = source.state_dict()
    if form == "safetensors":
        safetensors.torch.save_file(state_dict, path)
    elif form in ("model", "state_dict"):
        torch.save({form: state_dict, "epoch": 3}, path)
    elif form == "data parallel":
        torch.save({"state_dict": nn.DataParallel(source).state_dict()}, path)
    else:
        torch.save(theirs.state_dict() if form == "torchvision" else state_dict, path)
    for name in (path, str(path)):
        model = alexnet(weights=name)
        assert same_parameters(model, source)
        assert model.classifier[6].out_features == 10


def test_torchvisions_file_of_before_2020_is_read(tmp_path, pair):
    """alexnet-owt-4df8aa71.pth: no zip file, and of parameters. (7be5be79 is as `torch.save` writes them today.)"""
    _, theirs = pair("torchvision")
    path = tmp_path / "alexnet-owt-4df8aa71.pth"
    torch.save(OrderedDict(theirs.named_parameters()), path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    state_dict = read_state_dict(path)
    assert list(state_dict) == list(theirs.state_dict())
    model = alexnet(weights=path)
    assert same_parameters(model, theirs)
    assert model.variant == "torchvision"


def test_files_keep_their_variant(tmp_path, pair):
    torch.save(pair("caffe")[0].state_dict(), tmp_path / "caffe.pth")
    with pytest.raises(RuntimeError, match="is of variant 'caffe'"):
        alexnet(weights=tmp_path / "caffe.pth", variant="paper")
    with pytest.raises(RuntimeError, match="is of variant 'caffe' and this model of variant 'torchvision'"):
        alexnet(weights=tmp_path / "caffe.pth")
    with pytest.raises(RuntimeError, match=r"'classifier.6.weight' is of 10 classes and this model's of 5"):
        alexnet(weights=tmp_path / "caffe.pth", variant="caffe", num_classes=5)
    assert alexnet(weights=tmp_path / "caffe.pth", variant="caffe").variant == "caffe"


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_files_that_hold_code_or_nothing_are_refused(tmp_path, capsys):
    cases = {"evil.pth": Evil(), "number.pth": 3, "list.pth": [torch.ones(1)], "names.pth": {"a": "b"}}
    for name, content in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=name) as caught:
            read_state_dict(tmp_path / name)
        assert "\n" not in str(caught.value)
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(ValueError, match=f"{name}.*cannot be read"):
            read_state_dict(tmp_path / name)
    assert "must not run" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="no file of weights at 'IMAGENET'"):
        alexnet(weights="IMAGENET")


@pytest.mark.parametrize(
    "weights",
    [
        torchvision.models.AlexNet_Weights.IMAGENET1K_V1,
        "DEFAULT",
        "IMAGENET1K_V1",
        "AlexNet_Weights.IMAGENET1K_V1",
        "AlexNet_Weights.DEFAULT",
    ],
)
def test_published_weights_by_enum_and_name(weights, monkeypatch):
    published = torchvision.models.alexnet()
    asked = []

    def download(self, *args, **options):
        asked.append((self.name, options))
        return published.state_dict()

    monkeypatch.setattr(torchvision.models.AlexNet_Weights, "get_state_dict", download)
    assert same_parameters(alexnet(weights=weights, progress=False), published)
    assert asked == [("IMAGENET1K_V1", {"progress": False, "check_hash": True})]
    with pytest.raises(ValueError, match="have 1000 classes, got num_classes=10"):
        alexnet(weights=weights, num_classes=10)
    with pytest.raises(RuntimeError, match="is of variant 'torchvision'"):
        alexnet(weights=weights, variant="paper")
    if weights == "DEFAULT":
        with pytest.warns(UserWarning, match="pretrained"):
            assert same_parameters(alexnet(pretrained=True), published)


def test_the_page_of_weights_has_torchvisions_own_figures():
    page = PAGE.read_text()
    weights = torchvision.models.AlexNet_Weights.IMAGENET1K_V1
    scores = weights.meta["_metrics"]["ImageNet-1K"]
    assert f"{scores['acc@1']} / {scores['acc@5']}" in page
    assert weights.url.rsplit("/", 1)[1] in page


def test_the_commands_of_the_page_of_weights_are_commands():
    commands = re.findall(r"^alexnet-triton (.+)$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        _parser().parse_args(shlex.split(command))  # exits where it is none


def test_weights_of_another_model_are_refused():
    with pytest.raises(TypeError, match="AlexNet_Weights"):
        alexnet(weights=torchvision.models.VGG11_Weights.DEFAULT)
