import torch
from torch import nn

from alexnet_triton.recipe.data import LabelledImages
from alexnet_triton.recipe.evaluate import Normalise, accuracy, confusion_matrix, predict


def test_accuracy_counts_the_k_best_and_takes_k_beyond_the_classes():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    labels = torch.tensor([0, 1, 2])
    assert accuracy(logits, labels) == 1 / 3
    assert accuracy(logits, labels, 2) == 2 / 3
    assert accuracy(logits, labels, 5) == 1
    assert accuracy(logits.t().contiguous().t(), labels) == 1 / 3


def test_confusion_matrix_has_truth_in_rows():
    logits = torch.eye(3)[torch.tensor([0, 1, 1, 1])]
    matrix = confusion_matrix(logits, torch.tensor([0, 1, 2, 1]))
    assert matrix.tolist() == [[1, 0, 0], [0, 2, 0], [0, 1, 0]]


def test_normalise_gives_mean_zero_and_deviation_one():
    images = torch.randint(0, 256, (8, 3, 5, 5)).to(torch.uint8)
    data = LabelledImages("noise", images, torch.zeros(8).long(), ("a", "b"))
    x = Normalise(*data.statistics()[:2])(images)
    assert x.dtype == torch.float32
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert (x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_predict_runs_in_evaluation_mode_and_puts_the_mode_back():
    data = LabelledImages("noise", torch.ones(5, 3, 4, 4).to(torch.uint8), torch.zeros(5).long(), ("a",))
    model = nn.Sequential(nn.Flatten(), nn.Dropout(1.0), nn.Linear(48, 2))
    logits = predict(model, data, Normalise(torch.zeros(3), torch.ones(3)), batch_size=2)
    assert logits.shape == (5, 2)
    assert not torch.equal(logits[0], model[2].bias)
    assert model.training
