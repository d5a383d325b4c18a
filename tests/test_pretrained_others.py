"""Networks in folders and everybody else: `alexnet`, the commands, Hugging Face's mixin, classes of the user's own."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin
from kept import UNITS, change, config_in, equal, images
from torch import nn

from alexnet_triton import AlexNet, alexnet, read_state_dict
from alexnet_triton.recipe.trained import load_trained


@pytest.fixture(autouse=True)
def _narrow(request, monkeypatch):
    if "pair" not in request.fixturenames:
        monkeypatch.setattr("alexnet_triton.model.FEATURES", UNITS)


# --- other ways in ------------------------------------------------------------------------------------------


def test_alexnet_reads_such_folders(tmp_path):
    model = AlexNet(4, 0.2, variant="caffe")
    model.save_pretrained(tmp_path)
    for name in (tmp_path, str(tmp_path)):
        back = alexnet(weights=name)
        assert equal(back, model)
        assert (repr(back), back.training) == (repr(model), True)
    assert alexnet(weights=tmp_path, dropout=0.1).classifier[3].p == 0.1
    with pytest.raises(ValueError, match="have 4 classes, got num_classes=5"):
        alexnet(weights=tmp_path, num_classes=5)


def test_a_folders_state_dict_keeps_its_variant(tmp_path):
    model = AlexNet(4, variant="caffe")
    model.save_pretrained(tmp_path)
    AlexNet(4, variant="caffe").load_state_dict(read_state_dict(tmp_path))
    with pytest.raises(RuntimeError, match="is of variant 'caffe' and this model of variant 'paper'"):
        AlexNet(4, variant="paper").load_state_dict(read_state_dict(tmp_path))


@pytest.mark.parametrize(("variant", "lrn"), [("merged", True), ("caffe", True), ("paper", False)])
def test_the_commands_read_such_folders_with_their_norms(variant, lrn, tmp_path):
    model = AlexNet(4, variant=variant, lrn=lrn)
    model.save_pretrained(tmp_path)
    trained = load_trained(tmp_path)
    assert equal(trained.model, model)
    assert repr(trained.model.features) == repr(model.features)


def test_huggingface_hub_is_not_needed(tmp_path):
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import alexnet_triton\n"
        "assert 'safetensors' not in sys.modules\n"
        "import alexnet_triton.model; alexnet_triton.model.FEATURES = 16\n"
        f"alexnet_triton.AlexNet(3).save_pretrained({str(tmp_path)!r})\n"
        f"print(alexnet_triton.AlexNet.from_pretrained({str(tmp_path)!r}).classifier[6].out_features)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.stdout.strip(), result.stderr) == ("3", "")


def test_torchvisions_network_takes_the_weights_and_gives_them(tmp_path, pair):
    ours, theirs = pair("torchvision")
    ours.save_pretrained(tmp_path)
    for parameter in theirs.parameters():
        parameter.data.zero_()
    missing, unexpected = safetensors.torch.load_model(theirs, tmp_path / "model.safetensors")
    assert (missing, unexpected) == (set(), [])
    assert equal(theirs, ours)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(2)
    safetensors.torch.save_model(theirs, tmp_path / "model.safetensors")
    assert equal(AlexNet.from_pretrained(tmp_path), theirs)


# --- classes of others --------------------------------------------------------------------------------------


class MixinFirst(PyTorchModelHubMixin, AlexNet):
    pass


class MixinLast(AlexNet, PyTorchModelHubMixin):
    pass


mixed = pytest.mark.parametrize("Net", [MixinFirst, MixinLast])


@mixed
def test_what_the_mixin_writes_is_read_without_it(Net, tmp_path):
    model = Net(5, variant="paper", init="kaiming", device="cpu")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").is_file()  # the mixin's own
    assert config_in(tmp_path)["device"] == "cpu"
    back = AlexNet.from_pretrained(tmp_path)
    assert equal(back, model)
    assert type(back) is AlexNet
    assert (back.variant, back.init) == ("paper", "kaiming")
    assert torch.equal(back(images()), model.eval()(images()))


@mixed
def test_what_is_written_without_the_mixin_is_read_by_it(Net, tmp_path, capsys):
    model = AlexNet(5, 0.1, variant="caffe", init="kaiming")
    model.save_pretrained(tmp_path)
    back = Net.from_pretrained(tmp_path, map_location="cpu", strict=True, local_files_only=True)
    assert "local directory" in capsys.readouterr().out  # the mixin's words
    assert type(back) is Net
    assert equal(back, model)
    assert (back.variant, back.classifier[3].p, back.training) == ("caffe", 0.1, False)


def test_what_the_mixin_writes_of_a_wrapped_network_is_read(tmp_path):
    model = MixinFirst(5)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    model.features = nn.DataParallel(model.features)
    model.save_pretrained(tmp_path)
    assert "features.module.0.weight" in safetensors.torch.load_file(tmp_path / "model.safetensors")
    back = AlexNet.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(back[name], plain[name]) for name in plain)


class Flowers(PyTorchModelHubMixin, AlexNet):
    def __init__(self, petals=3):
        super().__init__(2 * petals, variant="torchvision")


def test_a_class_with_arguments_of_its_own_is_read_by_that_class_alone(tmp_path):
    Flowers(petals=2).save_pretrained(tmp_path)
    assert Flowers.from_pretrained(tmp_path).classifier[6].out_features == 4
    with pytest.raises(
        ValueError, match=r"'petals', which AlexNet\(...\) does not take: read it with from_pretrained of"
    ):
        AlexNet.from_pretrained(tmp_path)
    assert alexnet(weights=tmp_path / "model.safetensors").classifier[6].out_features == 4


class Own(AlexNet):
    pass


class Normalising(AlexNet):
    """With a buffer that is not in the state dict."""

    def __init__(self, *args, mean=0.5, **options):
        super().__init__(*args, **options)
        self.register_buffer("mean", torch.full((1, 3, 1, 1), mean), persistent=False)

    def forward(self, x):
        return super().forward(x - self.mean)


class Fixed(AlexNet):
    def __init__(self):
        super().__init__(4)


def test_classes_of_the_users_own_come_back(tmp_path):
    for cls in (Own, Normalising):
        model = cls(4, init="kaiming")
        model.save_pretrained(tmp_path)
        back = cls.from_pretrained(tmp_path)
        assert type(back) is cls
        assert torch.equal(back(images()), model.eval()(images()))
    assert Normalising.from_pretrained(tmp_path, mean=0.25).mean.unique().tolist() == [0.25]
    change(tmp_path, mean=0.75)
    assert Normalising.from_pretrained(tmp_path).mean.unique().tolist() == [0.75]
    with pytest.raises(ValueError, match=r"which Fixed\(...\) does not take"):
        Fixed.from_pretrained(tmp_path)
