"""What users of training recipes stumble over: masks and draws of several processes, and rates that are too high."""

from __future__ import annotations

import groups
import narrow
import pytest
import torch
from small_run import patterns, training
from torch.utils.data import DataLoader, Dataset

from alexnet_triton.parallel.processes.world import World
from alexnet_triton.parallel.replicas import Replicas
from alexnet_triton.recipe.augment import PCAColor
from alexnet_triton.recipe.optim import KrizhevskySGD
from alexnet_triton.recipe.train import checkpoint
from alexnet_triton.recipe.train.loop import TrainingError

# --- processes that train together ------------------------------------------------------------------------------------


def trained_together(rank, size):
    """What dropout leaves of the same images in each step, and the weights in the end."""
    engine = Replicas(narrow.network("torchvision"), World(torch.device("cpu"), rank, size))
    torch.manual_seed(40 + engine.stream)
    kept = []
    engine.module.classifier[3].register_forward_hook(lambda layer, given, out: kept.append(out != 0))
    rule = KrizhevskySGD(engine.module.parameters(), 0.01)
    engine.train()
    for _ in range(3):
        rule.zero_grad()
        engine.step(*narrow.batch(4), 4 * size)
        rule.step()
    return kept, engine.module.state_dict()


def test_copies_of_one_seed_drop_units_of_their_own_and_stay_one_network():
    """huggingface/transformers#31412: one seed, and the same mask on every device."""
    (masks, weights), (others, same) = groups.run(trained_together, 2)
    assert len(masks) == 3
    assert not any(map(torch.equal, masks, others))
    for name, weight in weights.items():
        assert torch.equal(weight, same[name]), name


# --- processes that read ----------------------------------------------------------------------------------------------


class Grey(Dataset):
    """Images that are all alike, and the transform that is to tell them apart."""

    transform = PCAColor([1.0, 0.5, 0.2], torch.eye(3))

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self.transform(torch.full((3, 1, 1), 0.5)).flatten()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_colours_are_drawn_anew_in_every_worker_of_a_loader_and_in_every_epoch():
    """pytorch#5059, #3880: generators that every worker had a copy of."""

    def two_epochs(seed):
        loader = DataLoader(Grey(), batch_size=2, num_workers=4)
        torch.manual_seed(seed)
        return torch.cat([batch for _ in range(2) for batch in loader])

    first, again, other = two_epochs(1), two_epochs(1), two_epochs(2)
    assert torch.equal(first, again)
    assert len(torch.cat([first, other]).unique(dim=0)) == 4 * 16


# --- rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "said"), [(1e3, "loss is (nan|inf) at step"), (1e20, "the loss is (nan|inf) at step 2")]
)
def test_a_rate_that_is_far_too_high_ends_the_run_by_its_step_and_leaves_a_network_that_is_finite(lr, said, tmp_path):
    """pytorch/examples#152, #459: a loss of NaN after some batches, and hours of training on it."""
    with pytest.raises(TrainingError, match=f"{said}.*: use a learning rate below"):
        training(tmp_path, learn=patterns(22), lr=lr, epochs=20).run()
    for path in tmp_path.glob("*.pt"):
        assert all(value.isfinite().all() for value in checkpoint.read(path)["model"].values()), path
    assert (tmp_path / "last.pt").exists()
