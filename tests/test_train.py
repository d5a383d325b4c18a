import os
import signal

import pytest
import torch
from torch import nn

from alexnet_triton import AlexNet, alexnet, read_state_dict
from alexnet_triton.recipe.data import LabelledImages
from alexnet_triton.recipe.evaluate import Normalise
from alexnet_triton.recipe.train import Interrupted, Settings, TrainingError, train


def patterns(count=48, classes=4, size=16):
    """Images whose class is the quarter that is bright."""
    labels = torch.arange(count) % classes
    images = torch.randint(0, 60, (count, 3, size, size), generator=torch.Generator().manual_seed(0))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 150
    return LabelledImages("patterns", images.to(torch.uint8), labels, tuple("abcd"[:classes]))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))


def fit(model, path, data=None, augment=None, **settings):
    data = data or patterns()
    options = {"epochs": 3, "batch_size": 16, "lr": 0.01, **settings}
    normalise = Normalise(*data.statistics()[:2])
    return train(model, data, data, normalise, Settings(**options), path, augment, progress=False)


def test_training_learns_and_reports_every_step_and_epoch(tmp_path):
    history = fit(small(), tmp_path / "c.pt")
    assert len(history.step_loss) == 9
    assert len(history.epoch_loss) == len(history.held_out_loss) == len(history.held_out_accuracy) == 3
    assert history.epoch_loss[-1] < history.epoch_loss[0]
    assert history.held_out_accuracy[-1] == 1.0
    assert history.seconds > 0


def test_a_seed_gives_the_same_weights(tmp_path):
    results = []
    for seed in (0, 0, 1):
        model = small()
        fit(model, tmp_path / "c.pt", seed=seed)
        results.append(model[1].weight.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_checkpoints_hold_tensors_and_plain_types_and_load_as_a_network(tmp_path):
    data = patterns()
    data = LabelledImages("big", data.images.repeat(1, 1, 5, 5)[:4], data.labels[:4], data.classes)
    model = AlexNet(4, variant="torchvision")
    fit(model, tmp_path / "c.pt", data, epochs=1)
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    assert content["classes"] == list("abcd")
    assert content["variant"] == "torchvision"
    assert content["image_size"] == 80
    assert len(content["history"]["epoch_loss"]) == 1
    assert torch.equal(read_state_dict(tmp_path / "c.pt")["features.0.weight"], model.features[0].weight)
    again = alexnet(weights=tmp_path / "c.pt")
    x = torch.rand(1, 3, 80, 80)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert os.listdir(tmp_path) == ["c.pt"]


def test_ctrl_c_leaves_a_usable_checkpoint_and_says_where(tmp_path):
    seen = []

    def interrupt(image):
        seen.append(1)
        if len(seen) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return image

    model, before = small(), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"c\.pt"):
        fit(model, tmp_path / "c.pt", augment=interrupt)
    assert len(seen) == 32  # the step at hand was finished
    assert torch.equal(read_state_dict(tmp_path / "c.pt")["1.weight"], model[1].weight)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def interrupt(image):
        os.kill(os.getpid(), signal.SIGINT)
        return image

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(small(), tmp_path / "c.pt", augment=interrupt)
    assert not isinstance(caught.value, Interrupted)
    read_state_dict(tmp_path / "c.pt")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_network(tmp_path):
    with pytest.raises(TrainingError, match=r"at step \d+: use a learning rate below .*c\.pt"):
        fit(small(), tmp_path / "c.pt", lr=1e38)
    assert all(value.isfinite().all() for value in read_state_dict(tmp_path / "c.pt").values())


def test_a_loss_that_stays_that_of_guessing_is_warned_about(tmp_path):
    model = small()
    nn.init.zeros_(model[1].weight)
    with pytest.warns(UserWarning, match=r"ln\(4\) = 1.386 for 3 epochs.*--init kaiming"):
        fit(model, tmp_path / "c.pt", lr=1e-9)
