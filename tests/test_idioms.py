"""Idioms of surgery: layers and parameters that people replace, cut out, share, freeze, and call on their own."""

import idioms
import pytest
import torch
from idioms import answer
from torch import nn
from torch.nn.utils import parametrizations, prune


def idiom_new_head(model, x):
    model.classifier[6] = nn.Linear(model.classifier[6].in_features, 3)
    return answer(model, x)


def idiom_new_classifier(model, x):
    model.classifier = nn.Sequential(nn.Linear(model.classifier[1].in_features, 16), nn.ReLU(), nn.Linear(16, 3))
    return answer(model, x)


def idiom_no_head(model, x):
    """The network as an encoder."""
    model.classifier[6] = nn.Identity()
    return answer(model, x)


def idiom_head_deleted_and_layers_appended(model, x):
    del model.classifier[6]
    model.classifier.append(nn.Linear(model.classifier[4].out_features, 5))
    model.classifier.extend([nn.ReLU(), nn.Softmax(1)])
    return len(model.classifier), answer(model, x)


def idiom_grey_images(model, x):
    old = model.features[0]
    model.features[0] = nn.Conv2d(1, old.out_channels, 11, 4, old.padding)
    with torch.no_grad():
        model.features[0].weight.copy_(old.weight.mean(1, keepdim=True))
    return answer(model, x[:, :1])


def idiom_other_activations(model, x):
    for index in (1, 4):
        model.features[index] = nn.LeakyReLU(0.1)
    model.classifier[2] = nn.GELU()
    return answer(model, x)


def idiom_batch_norm(model, x):
    model.features[7] = nn.Sequential(nn.BatchNorm2d(model.features[6].out_channels), nn.ReLU(inplace=True))
    model.features[6].bias = None
    model.features[7].train()
    return answer(model, x), dict(model.named_buffers()), answer(model.eval(), x)


def idiom_new_average_pool(model, x):
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(model.features[10].out_channels, 3)
    return answer(model, x)


def idiom_one_layer_in_two_places(model, x):
    model.features.insert(9, model.features[8])
    return answer(model, x)


def idiom_slice(model, x):
    return answer(model.features[:8], x), model.features[8:][-1] is model.features[12]


def idiom_sequential_of_children(model, x):
    return answer(nn.Sequential(*list(model.features)[:5]), x)


def idiom_children_in_turn(model, x):
    maps = [x]
    for layer in model.features:
        maps.append(layer(maps[-1]))
    return maps


def idiom_lpips_slices(model, x):
    """Five stages whose outputs are all used, with frozen parameters."""

    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            for name, (start, stop) in enumerate(((0, 2), (2, 5), (5, 8), (8, 10), (10, 12))):
                stage = nn.Sequential()
                for index in range(start, stop):
                    stage.add_module(str(index), model.features[index])
                self.add_module(f"slice{name}", stage)

        def forward(self, x):
            outputs = []
            for stage in self.children():
                x = stage(x)
                outputs.append(x.flatten(1))
            return torch.cat(outputs, 1)

    return answer(Stages().requires_grad_(False), x)


def idiom_subclass(model, x):
    class Two(type(model)):
        def forward(self, x):
            maps = self.features(x)
            return torch.cat([self.classifier(self.avgpool(maps).flatten(1)), maps.mean((2, 3))], 1)

    model.__class__ = Two
    return answer(model, x)


def idiom_a_layer_s_forward_replaced(model, x):
    model.features[1].forward = torch.tanh
    return answer(model, x)


def idiom_frozen_features(model, x):
    model.features.requires_grad_(False)
    model(x).sum().backward()
    return idioms.gradients(model)


def idiom_frozen_and_thawed_between_calls(model, x):
    found = []
    for frozen in (True, False):
        model.features[3].requires_grad_(not frozen)
        model.classifier[1].bias.requires_grad_(frozen)
        found.append(answer(model, x))
    return found


def idiom_apply(model, x):
    def initialise(layer):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    model.apply(initialise)
    return model(x)


def idiom_weights_changed_in_place(model, x):
    with torch.no_grad():
        before = model(x)
        model.features[3].weight.mul_(2)
        model.features[6].weight.data = model.features[6].weight.data.flip(2)
        model.classifier[6].bias.zero_()
        return before, model(x)


def idiom_state_dict(model, x):
    state = {name: 2 * value for name, value in model.state_dict().items()}
    result = model.load_state_dict(state)
    return list(state), list(result), model(x)


def idiom_names(model, x):
    walks = (model.named_parameters(), model.named_modules(), model.named_children(), model.features.named_parameters())
    names = [[name for name, _ in walk] for walk in walks]
    return names, model.get_submodule("classifier.4").in_features, model.get_parameter("features.3.bias")


def idiom_pruning(model, x):
    for layer in (model.features[3], model.classifier[4]):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    prune.ln_structured(model.features[6], "weight", amount=0.25, n=2, dim=0)
    pruned = answer(model, x)
    for layer in (model.features[3], model.classifier[4]):
        prune.remove(layer, "weight")
    return pruned, sorted(model.state_dict()), model(x)


def idiom_parametrizations(model, x):
    parametrizations.weight_norm(model.features[3])
    parametrizations.weight_norm(model.classifier[4])
    parametrizations.orthogonal(model.classifier[6])
    return answer(model, x)


@idioms.over(idioms.of(dict(globals())), idioms.ON_EVERY_VARIANT)
def test_surgery_gives_what_it_gives_with_plain_layers(idiom, variant, backend):
    idioms.check(idiom, variant, backend)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_an_idiom_that_differs_is_found(backend):
    """The comparison sees a gradient alone, and a name."""

    def other_gradient(model, x):
        grads = answer(model, x)
        return grads if type(model).__module__.startswith("torchvision") else (grads[0], [1.001 * g for g in grads[1]])

    for idiom in (other_gradient, lambda model, x: type(model).__module__):
        with pytest.raises(AssertionError):
            idioms.check(idiom, "torchvision", backend)
