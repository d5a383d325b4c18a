from collections import OrderedDict

import pytest
import torch
from torch import nn

from alexnet_triton import AlexNet
from alexnet_triton.recipe.augment import ten_crop
from alexnet_triton.recipe.data.loader import Loader
from alexnet_triton.recipe.data.sets import DataError, LabelledImages, Statistics
from alexnet_triton.recipe.evaluate.evaluation import (
    Score,
    autocast_dtype,
    average,
    confusion_matrix,
    evaluate,
    log_probabilities,
)
from alexnet_triton.recipe.trained import Trained

CPU = torch.device("cpu")
STATISTICS = Statistics(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25]), torch.ones(3), torch.eye(3))


class Counted(LabelledImages):
    """Images in memory that note which of them were read."""

    def read(self, indices):
        self.seen = [*getattr(self, "seen", []), *indices.tolist()]
        return super().read(indices)


def noise(count=11, size=9, classes=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator).to(torch.uint8)
    labels = torch.randint(classes, (count,), generator=generator)
    return Counted("noise", images, labels, tuple("abcdefghij"[:classes]))


def small(seed, crop=7, classes=4, scale=3.0):
    """A network of one layer, of certain and differing opinions."""
    torch.manual_seed(seed)
    features, head = nn.Sequential(nn.Dropout(0.5), nn.Flatten()), nn.Linear(3 * crop * crop, classes)
    head.weight.data.mul_(scale)
    model = nn.Sequential(OrderedDict(features=features, head=head))
    return Trained(model, tuple("abcdefghij"[:classes]), STATISTICS, 9, crop)


def reference(network, images, ten):
    """Probabilities (N, classes) in float64: one crop of one image at a time."""
    middle = round((images.shape[-1] - network.crop) / 2)
    centre = slice(middle, middle + network.crop)
    model = network.model.double().eval()
    rows = []
    for image in images:
        crops = ten_crop(image[None], network.crop)[0] if ten else image[None, :, centre, centre]
        x = (crops.double() / 255 - STATISTICS.mean.double().view(3, 1, 1)) / STATISTICS.std.double().view(3, 1, 1)
        rows.append(torch.stack([model(crop[None])[0].softmax(0) for crop in x]).mean(0))
    model.float()
    return torch.stack(rows).detach()


def among_best(probabilities, labels, k):
    """Share of images whose class is among the k most probable."""
    ranks = (probabilities > probabilities[torch.arange(len(labels)), labels][:, None]).sum(1)
    return (ranks < k).double().mean().item()


@pytest.mark.parametrize("ten", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_networks_of_different_crops_are_judged_as_one_by_one_in_float64(ten, batch):
    data, networks = noise(), [small(0), small(1, crop=5), small(2)]
    each = torch.stack([reference(network, data.images, ten) for network in networks])
    together = each.mean(0)
    found = evaluate(networks, Loader(data, 0, CPU), batch_size=batch, ten_crop=ten)
    assert torch.equal(found.guesses, together.argmax(1))
    of_true = together[torch.arange(len(data)), data.labels]
    assert torch.allclose(found.probabilities.double(), torch.stack([together.amax(1), of_true], 1), rtol=1e-5)
    for score, probabilities in zip([found.score, *found.members], [together, *each], strict=True):
        loss = -probabilities[torch.arange(len(data)), data.labels].log().mean().item()
        assert score.cross_entropy == pytest.approx(loss, rel=1e-5)
        assert score.top1 == among_best(probabilities, data.labels, 1)
        assert score.images == len(data)
        assert torch.equal(score.confusion, confusion_matrix(probabilities, data.labels))
    assert len({score.cross_entropy for score in found.members}) == 3
    assert data.seen == list(range(len(data)))


def test_top5_counts_the_five_best_and_of_fewer_classes_all():
    data = noise(40, classes=10)
    found = evaluate([small(0, classes=10)], Loader(data, 0, CPU))
    probabilities = reference(small(0, classes=10), data.images, False)
    assert found.score.top5 == among_best(probabilities, data.labels, 5)
    assert found.score.top1 < found.score.top5 < 1
    for label in range(10):
        of_class = data.labels == label
        hits = round(among_best(probabilities[of_class], data.labels[of_class], 5) * int(of_class.sum()))
        assert found.score.best[label] == hits
    pair = evaluate([small(0, classes=2)], Loader(noise(classes=2), 0, CPU))
    assert pair.score.top1 < pair.score.top5 == 1


def test_the_parts_of_several_processes_add_up_and_no_image_counts_twice():
    data, networks = noise(), [small(0), small(1)]
    whole = evaluate(networks, Loader(data, 0, CPU))
    parts = [evaluate(networks, Loader(data, 0, CPU), part) for part in torch.tensor_split(torch.arange(11), 3)]
    total = Score.none(4)
    for part in parts:
        total += part.score
    assert torch.equal(total.confusion, whole.score.confusion)
    assert torch.equal(total.best, whole.score.best)
    assert total.loss.item() == pytest.approx(whole.score.loss.item(), rel=1e-6)
    assert torch.equal(torch.cat([part.guesses for part in parts]), whole.guesses)
    nothing = evaluate(networks, Loader(data, 0, CPU), torch.arange(0))
    assert (nothing.score.images, nothing.score.top1, nothing.score.cross_entropy) == (0, 0, 0)
    assert nothing.guesses.shape == (0,)
    assert nothing.probabilities.shape == (0, 2)


def test_alexnet_with_ten_crops_is_ten_forward_passes(monkeypatch):
    monkeypatch.setattr("alexnet_triton.model.FEATURES", 64)  # fully connected layers that take no time
    model = AlexNet(3, variant="torchvision", init="kaiming")
    data = noise(2, size=70, classes=3)
    network = Trained(model, data.classes, STATISTICS, 70, 63)
    (found,) = log_probabilities([network], Loader(data, 0, CPU), [torch.arange(2)], ten_crop=True)
    assert model.training
    assert network.model.classifier[0].training
    model.eval()
    with torch.no_grad():
        crops = ten_crop(data.images, 63).float() / 255
        x = (crops - STATISTICS.mean.view(3, 1, 1)) / STATISTICS.std.view(3, 1, 1)
        expected = torch.stack([model(x[:, place]).softmax(1) for place in range(10)]).mean(0)
    assert torch.allclose(found[0].exp(), expected, rtol=1e-4, atol=1e-6)
    assert (expected.amax(1) - expected.amin(1)).min() > 0.01
    assert found.shape == (1, 2, 3)


def test_a_class_that_a_network_rules_out_has_a_finite_loss():
    certain = small(0, scale=3000.0)
    found = evaluate([certain], Loader(noise(), 0, CPU))
    assert found.probabilities[:, 1].min() == 0
    assert 100 < found.score.cross_entropy < float("inf")


def test_average_is_of_probabilities():
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    assert torch.allclose(average(probabilities.log()[:, None]).exp(), torch.tensor([[0.55, 0.45]]))
    assert torch.equal(average(probabilities[None]), probabilities)


def test_modes_come_back_also_when_an_image_cannot_be_read():
    class Broken(LabelledImages):
        def read(self, indices):
            raise DataError("'x.jpg' is no image")

    network = small(0)
    network.model.features.eval()
    data = Broken("noise", torch.zeros(3, 3, 9, 9).byte(), torch.zeros(3).long(), ("a", "b", "c", "d"))
    with pytest.raises(DataError, match="x.jpg"):
        evaluate([network], Loader(data, 2, CPU))
    assert network.model.training
    assert not network.model.features.training


def test_mixed_precision_differs_by_its_rounding():
    data, networks = noise(), [small(0, scale=1.0)]
    full = evaluate(networks, Loader(data, 0, CPU)).probabilities
    half = evaluate(networks, Loader(data, 0, CPU), amp=True).probabilities
    assert 0 < (half - full).abs().max() < 0.02
    assert autocast_dtype(CPU) == torch.bfloat16


def test_gradients_are_not_kept():
    (found,) = log_probabilities([small(0)], Loader(noise(), 0, CPU), [torch.arange(11)])
    assert not found.requires_grad
    assert torch.is_grad_enabled()


def test_what_cannot_be_judged_is_said():
    loader = Loader(noise(), 0, CPU)
    with pytest.raises(ValueError, match="at least one network"):
        evaluate([], loader)
    with pytest.raises(ValueError, match="one has 4 from 'a' to 'd', another 3 from 'a' to 'c'"):
        evaluate([small(0), small(0, classes=3)], loader)
    with pytest.raises(ValueError, match="a crop of 10 pixels a side cannot be cut from images of 9"):
        evaluate([small(0), small(1, crop=10)], loader)
    assert not hasattr(loader.data, "seen")


# --- figures ---------------------------------------------------------------------------------------------------------


def test_a_score_takes_guesses_of_any_strides():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    labels = torch.tensor([0, 1, 2])
    for strided in (logits, logits.t().contiguous().t()):
        score = Score.of(strided.log_softmax(1), labels)
        assert (score.top1, score.top5, score.images) == (1 / 3, 1, 3)
        assert score.best.tolist() == [1, 1, 1]


def test_confusion_matrix_has_truth_in_rows():
    logits = torch.eye(3)[torch.tensor([0, 1, 1, 1])]
    matrix = confusion_matrix(logits, torch.tensor([0, 1, 2, 1]))
    assert matrix.tolist() == [[1, 0, 0], [0, 2, 0], [0, 1, 0]]
