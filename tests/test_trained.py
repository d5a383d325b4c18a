import copy
from types import SimpleNamespace

import pytest
import torch

from alexnet_triton import VARIANTS, AlexNet
from alexnet_triton.recipe import trained as room
from alexnet_triton.recipe.augment import centre
from alexnet_triton.recipe.data.sets import DataError, LabelledImages, Statistics
from alexnet_triton.recipe.trained import Trained, load_trained, read_names

STATISTICS = Statistics(
    torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6]), torch.tensor([3.0, 2.0, 1.0]), torch.eye(3).flip(0)
)


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Fully connected layers of 64 instead of 4,096, which take no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet_triton.model.FEATURES", 64)
        yield


def network(variant="torchvision", classes=3, **options):
    """A network whose parameters are told apart by their values."""
    model = AlexNet(classes, variant=variant, device="meta", **options).to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), 1):
            parameter.fill_(number / 64)
    return model


def trained(variant="torchvision", **options):
    return Trained(network(variant, **options), ("a", "b", "c"), STATISTICS, 96, 80)


@pytest.fixture(scope="module")
def content(narrow):
    return trained().content()


def is_plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(part) for key, part in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return isinstance(value, str | int | bool | torch.Tensor)


@pytest.mark.parametrize("options", [{"variant": name} for name in VARIANTS] + [{"variant": "merged", "lrn": True}])
def test_content_gives_the_same_network_back(options):
    before = trained(**options)
    content = before.content()
    assert is_plain(content)
    after = Trained.from_content({**content, "step": 7, "velocity": [torch.zeros(2)]})
    assert str(after.model) == str(before.model.eval())
    assert after.model.variant == options["variant"]
    for name, value in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], value), name
    assert (after.classes, after.size, after.crop, after.named) == (("a", "b", "c"), 96, 80, True)
    assert all(map(torch.equal, after.statistics, STATISTICS))
    assert not any(module.training for module in after.model.modules())
    assert all(parameter.requires_grad for parameter in after.model.parameters())


def test_content_is_in_float32_and_without_wrappers_prefixes(content):
    wrapped = {f"module.{name}": value.bfloat16() for name, value in content["model"].items()}
    written = trained().content(wrapped)["model"]
    assert list(written) == list(content["model"])
    assert all(value.dtype == torch.float32 for value in written.values())
    assert torch.equal(written["features.3.bias"], content["model"]["features.3.bias"])


def test_a_checkpoint_on_disk_is_loaded_without_running_its_code(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    after = load_trained(tmp_path / "a.pt", variant="torchvision", classes=["x", "y", "z"])
    assert after.classes == ("x", "y", "z")
    assert torch.equal(after.model.classifier[6].weight, content["model"]["classifier.6.weight"])
    assert type(after.augment()(torch.zeros(1, 3, 96, 96, dtype=torch.uint8), centre(1, 96, 80))) is torch.Tensor


def test_checkpoints_of_one_size_and_without_principal_components_are_taken(content):
    kept = ("model", "variant", "classes", "mean", "std")
    old = {name: content[name] for name in kept} | {"image_size": 67, "settings": {}, "history": {}}
    after = Trained.from_content(old)
    assert (after.size, after.crop, after.classes) == (67, 67, ("a", "b", "c"))
    assert torch.equal(after.statistics.mean, STATISTICS.mean)
    assert not after.statistics.eigenvalues.any()


@pytest.mark.parametrize(("variant", "crop"), [("torchvision", 224), ("merged", 227), ("caffe", 227), ("paper", 227)])
def test_parameters_alone_take_the_input_of_the_published_weights(variant, crop):
    after = Trained.from_content(network(variant).state_dict())
    assert (after.model.variant, after.size, after.crop) == (variant, 256, crop)
    assert (after.classes, after.named) == (("0", "1", "2"), False)
    image = torch.tensor([255.0, 128.0, 0.0]).byte().view(1, 3, 1, 1).expand(1, 3, 256, 256)
    pixel = after.augment()(image, centre(1, 256, crop))[0, :, 5, 9]
    if variant == "caffe":
        expected = torch.tensor([255 - 122.67891434, 128 - 116.66876762, -104.00698793])
    else:
        expected = (torch.tensor([1.0, 128 / 255, 0.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
            [0.229, 0.224, 0.225]
        )
    assert torch.allclose(pixel, expected, rtol=1e-5)


def test_what_paper_and_caffe_share_must_be_told_apart():
    plain = dict(network("caffe").state_dict())
    with pytest.raises(ValueError, match="does not say whether it is of variant 'paper' or 'caffe'.*--variant"):
        Trained.from_content(plain)
    assert Trained.from_content(plain, variant="caffe").model.variant == "caffe"
    assert Trained.from_content(plain, variant="paper").model.variant == "paper"


@pytest.mark.parametrize(("saved", "asked"), [("torchvision", "merged"), ("caffe", "paper"), ("paper", "caffe")])
def test_another_variant_than_asked_for_is_refused(saved, asked):
    message = f"'f.pt' is of variant '{saved}', and '{asked}' was asked for"
    with pytest.raises(ValueError, match=message):
        Trained.from_content(network(saved).state_dict(), "'f.pt'", asked)


def test_a_mean_file_of_caffe_is_taken_from_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "read_mean", lambda path: torch.tensor([51.0, 102.0, 153.0]))
    monkeypatch.setattr(room, "read_file", lambda path: network(path).state_dict())
    after = load_trained("caffe", mean="m.binaryproto")
    assert torch.allclose(after.statistics.mean, torch.tensor([0.2, 0.4, 0.6]))
    assert torch.allclose(after.statistics.std, torch.full((3,), 1 / 255))
    with pytest.raises(ValueError, match="a mean file belongs to variant 'caffe', and the network is 'merged'"):
        load_trained("merged", mean="m.binaryproto")


def test_published_weights_bring_their_categories_which_are_no_folders_names(monkeypatch):
    categories = {"categories": ["crane", "maillot", "crane"]}
    member = SimpleNamespace(meta=categories, get_state_dict=lambda **options: network().state_dict())
    monkeypatch.setattr(room, "published", lambda name: member)
    after = load_trained("IMAGENET1K_V1")
    assert (after.classes, after.named, after.crop) == (("crane", "maillot", "crane"), False, 224)
    data = LabelledImages("val", torch.zeros(3, 3, 4, 4).byte(), torch.tensor([0, 1, 2]), ("n3", "n1", "n2"))
    assert after.labels(data).labels.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="'IMAGENET1K_V1' is of variant 'torchvision', and 'paper' was asked for"):
        load_trained("IMAGENET1K_V1", variant="paper")


# --- classes ----------------------------------------------------------------------------------------------------------


def test_labels_are_the_networks_whatever_the_order_of_the_datas():
    images = torch.zeros(4, 3, 4, 4).byte()
    data = LabelledImages("val", images, torch.tensor([0, 1, 1, 2]), ("c", "a", "b"))
    after = trained().labels(data)
    assert after.classes == ("a", "b", "c")
    assert after.labels.tolist() == [2, 0, 0, 1]
    with pytest.raises(DataError, match="class 'd' of 'val' is none of the 3 classes"):
        trained().labels(LabelledImages("val", images, torch.tensor([0, 0, 0, 0]), ("d",)))


def test_a_network_that_names_no_classes_needs_as_many_folders():
    unnamed = Trained.from_content(network().state_dict())
    data = LabelledImages("val", torch.zeros(2, 3, 4, 4).byte(), torch.tensor([0, 1]), ("a", "b"))
    with pytest.raises(DataError, match="'val' has 2 classes and the network 3.*sorted WordNet ids.*--classes"):
        unnamed.labels(data)


def test_names_of_classes_can_be_given(content, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "read_file", lambda path: content)
    (tmp_path / "names").write_text("x\n\n y \nz")
    assert read_names(tmp_path / "names") == ["x", "y", "z"]
    assert load_trained("f", classes=["x", "y", "z"]).classes == ("x", "y", "z")
    for names in (["x", "y"], ["x", "x", "y"]):
        with pytest.raises(ValueError, match=f"has 3 classes, and {len(names)} names were given, 2 of them different"):
            load_trained("f", classes=names)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name in ("nowhere", "bytes"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read as names of classes"):
            read_names(tmp_path / name)


# --- what cannot be used ----------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('the code of a checkpoint was run')",)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    torch.save({"model": {"w": torch.arange(1000.0)}}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"model": {}, "classes": Evil()}, tmp_path / "evil.pt")
    for name in ("cut.pt", "text.pt", "evil.pt"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read as tensors and plain types"):
            load_trained(tmp_path / name)
    with pytest.raises(ValueError, match="there is no file of weights at '.*nowhere.pt'"):
        load_trained(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [1, 2], "holds no network"),
        (lambda c: c | {"model": 3}, "holds no network"),
        (lambda c: c["model"].pop("classifier.6.weight"), "no last layer 'classifier.6'"),
        (lambda c: c["model"].pop("classifier.4.bias"), "lacks 'classifier.4.bias'"),
        (lambda c: c["model"].update(more=torch.zeros(1)), "the unknown 'more'"),
        (lambda c: c["model"].update({"features.0.weight": torch.zeros(8, 3, 11, 11)}), "those of no variant"),
        (lambda c: c["model"].update({"classifier.1.bias": torch.zeros(5)}), "no AlexNet of variant 'torchvision'"),
        (
            lambda c: c["model"].update({"features.3.bias": torch.full((192,), float("nan"))}),
            "'features.3.bias' has val",
        ),
        (lambda c: c.update(variant="merged"), "those of no variant"),
        (lambda c: c.update(classes=["a", "b"]), "does not name the 3 classes"),
        (lambda c: c.update(classes=["a", "b", 3]), "does not name the 3 classes"),
        (lambda c: c.update(mean=torch.zeros(4)), "'mean' is not 3 finite numbers"),
        (lambda c: c.update(std=torch.tensor([1, float("nan"), 1])), "'std' is not 3 finite numbers"),
        (lambda c: c.update(eigenvectors=[1, 2, 3]), "'eigenvectors' is not 3 x 3 finite numbers"),
        (lambda c: c.pop("mean"), "'mean' is not 3 finite numbers"),
        (lambda c: c.update(crop="large"), "'crop' is 'large'"),
        (lambda c: c.update(size=0), "'size' is 0"),
        (lambda c: c.update(size=79), "its crop of 80 pixels is larger than its images of 79"),
    ],
)
def test_a_checkpoint_that_is_damaged_is_refused_in_one_sentence(change, message, content):
    damaged = copy.copy(content)
    damaged["model"] = copy.copy(content["model"])
    changed = change(damaged)
    with pytest.raises(ValueError, match=message) as caught:
        Trained.from_content(changed if isinstance(changed, list | dict) else damaged, "'f.pt'")
    assert str(caught.value).startswith("'f.pt' ")
    assert "\n" not in str(caught.value)
