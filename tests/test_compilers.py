"""What records a network, compiles it or takes it elsewhere: torch.compile, torch.export, ONNX, torch.fx, torch.jit."""

import copy
import subprocess
import sys

import idioms
import narrow
import onnxruntime
import pytest
import torch
import torchvision
from idioms import answer
from plain import error
from torch.fx.experimental.proxy_tensor import make_fx

from alexnet_triton import FusedSequential, alexnet, fuse, ops, unfuse, use_backend

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated", "ignore:.*TracerWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(model, backend="aot_eager", **options):
    return torch.compile(model, backend=backend, fullgraph=True, **options)


# --- torch.compile, in one graph -------------------------------------------------------------------------------------


def idiom_compile(model, x):
    return answer(compiled(model), x, model.parameters())


def idiom_compile_in_place(model, x):
    model.compile(backend="aot_eager", fullgraph=True)
    return answer(model, x)


def idiom_compile_one_layer(model, x):
    model.features[3].compile(backend="aot_eager", fullgraph=True)
    model.classifier[4] = compiled(model.classifier[4])
    return answer(model, x)


def idiom_compile_with_a_hook(model, x):
    model.features[4].register_forward_hook(lambda module, args, out: 2 * out)
    return compiled(model)(x)


@idioms.over(idioms.of(dict(globals())), idioms.ON_BOTH_BACKENDS)
def test_compiled_layers_give_what_plain_ones_give(idiom, variant, backend):
    idioms.check(idiom, variant, backend)


def test_inductor_gives_the_numbers_of_plain_layers():
    """Of the first layers, forward and every gradient: each kernel is a C++ program that takes its time."""
    ours, theirs = (model.features[:3] for model in narrow.twins())
    x = torch.randn(2, 3, 67, 67)
    found, expected = answer(compiled(ours, "inductor"), x, ours.parameters()), answer(theirs, x)
    for value, wanted in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert error(value, wanted) < 1e-5


def test_inductor_calls_the_kernels_operators(launches):
    ours, theirs = (model.eval() for model in narrow.twins())
    x = torch.randn(1, 3, 67, 67)
    with use_backend("triton"), torch.no_grad():
        assert error(compiled(ours, "inductor")(x), theirs(x)) < 1e-5
    assert "conv_kernel" in {name for name, _, _ in launches}


def test_a_second_batch_size_costs_one_compilation_and_a_third_none():
    model = narrow.network("torchvision").eval()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    run = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 2, 3, 4, 7):
            assert error(run(torch.randn(batch, 3, 67, 67)[:0]), torch.zeros(0, 4)) == 0
            run(torch.randn(batch, 3, 67, 67))
    assert len(made) <= 3  # no images, two, and any number


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_fusing_and_unfusing_reach_what_was_compiled_before(backend):
    model = narrow.twins()[1].eval()
    x = torch.randn(1, 3, 67, 67)
    graphs = []

    def noted(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    run = torch.compile(model, backend=noted, fullgraph=True)
    with use_backend(backend), torch.no_grad():
        expected = run(x)
        assert error(fuse(run)(x), expected) < 1e-5
        assert type(model.features) is FusedSequential
        assert error(unfuse(model)(x), expected) < 1e-5
        assert torch.equal(run(x), expected)
    assert type(model.features) is torch.nn.Sequential
    assert any("map_chain" in name for name in set().union(*graphs)) == (backend == "triton")


def test_a_compiled_network_follows_the_backend():
    ours, theirs = (model.eval() for model in narrow.twins())
    x, names = torch.randn(1, 3, 67, 67), []

    def noted(graph, inputs):
        names.append("map_chain" in str(graph.graph))
        return graph

    run = torch.compile(ours, backend=noted, fullgraph=True)
    with torch.no_grad():
        for backend in ("reference", "triton"):
            with use_backend(backend):
                assert error(run(x), theirs(x)) < 1e-5
    assert names == [False, True]


# --- torch.export ----------------------------------------------------------------------------------------------------


def idiom_export(model, x):
    """Recorded for batches of any size, and run on another."""
    x = x.expand(2, -1, -1, -1)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    return program.module()(torch.cat([x, -x[:1]])), program.run_decompositions().module()(x)


def idiom_strict_export(model, x):
    return torch.export.export(model, (x,), strict=True).module()(2 * x)


def idiom_make_fx(model, x):
    """Recorded by what runs, and differentiated after."""
    return answer(make_fx(model)(x), x)


@idioms.over([idiom_export, idiom_strict_export, idiom_make_fx], idioms.ON_BOTH_BACKENDS)
def test_exported_programs_give_what_plain_layers_give(idiom, variant, backend):
    idioms.check(idiom, variant, backend)


RELOAD = """
import sys, torch
if sys.argv[4] == "triton":
    import alexnet_triton
x = torch.load(sys.argv[2])
torch.save(torch.export.load(sys.argv[1]).module()(x), sys.argv[3])
assert ("alexnet_triton" in sys.modules) == (sys.argv[4] == "triton")
"""


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_an_exported_program_is_loaded_elsewhere_and_needs_the_package_for_kernels_alone(backend, tmp_path):
    ours, theirs = (model.eval() for model in narrow.twins())
    x = torch.randn(1, 3, 67, 67)
    program, images, logits = (str(tmp_path / name) for name in ("net.pt2", "x.pt", "y.pt"))
    with use_backend(backend):
        torch.export.save(torch.export.export(ours, (x,)), program)
    torch.save(x, images)
    made = subprocess.run(
        [sys.executable, "-c", RELOAD, program, images, logits, backend], capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stderr
    assert error(torch.load(logits), theirs(x)) < 1e-5


# --- ONNX: programs of plain layers, whatever the backend ------------------------------------------------------------


def ran_by_onnxruntime(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize(("backend", "variant", "size"), [
    ("triton", "torchvision", 224),
    ("reference", "paper", 67),
    ("auto", "torchvision", 256),  # whose maps of 7x7 are averaged to 6x6
])  # fmt: skip
def test_onnx_holds_plain_layers_for_images_of_every_size_and_batches_of_any(backend, variant, size, tmp_path):
    ours, theirs = (model.eval() for model in narrow.twins(variant))
    x = torch.randn(2, 3, size, size)
    path = tmp_path / "net.onnx"
    with use_backend(backend):
        torch.onnx.export(
            ours, (x,), path, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    assert error(ran_by_onnxruntime(path, x[:1]), theirs(x[:1]).detach()) < 1e-5


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_onnx_by_the_exporter_of_old_averages_maps_of_6x6_and_refuses_7x7_in_words(backend, tmp_path):
    """224 and 227 pixels give 6x6; what torch says of others is pytorch#42653."""
    ours, theirs = (model.eval() for model in narrow.twins())
    path = tmp_path / "net.onnx"
    with use_backend(backend):
        x = torch.randn(1, 3, 224, 224)
        torch.onnx.export(ours, (x,), path, dynamo=False)
        assert error(ran_by_onnxruntime(path, x), theirs(x).detach()) < 1e-5
        with pytest.raises(torch.onnx.errors.SymbolicValueError, match="output size that are not factor of input size"):
            torch.onnx.export(ours, (torch.randn(1, 3, 256, 256),), path, dynamo=False)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_onnx_takes_the_ops_themselves(backend):
    class Layer(torch.nn.Module):
        def forward(self, x, weight):
            return ops.conv2d_relu(x, weight)

    with use_backend(backend):
        arguments = (torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3))
        program = torch.onnx.export(Layer().eval(), arguments, dynamo=True, verbose=False)
    assert {node.op_type for node in program.model.graph} == {"Conv", "Relu"}


# --- torch.fx and torch.jit, which see layers ------------------------------------------------------------------------


def idiom_symbolic_trace(model, x):
    return answer(torch.fx.symbolic_trace(model), x)


def idiom_jit_trace(model, x):
    trace = torch.jit.trace(model, x)
    return trace(torch.cat([x, -x])), torch.jit.freeze(trace)(x)


def idiom_jit_script(model, x):
    return answer(torch.jit.script(model), x)


RECORDED = [idiom_symbolic_trace, idiom_jit_trace, idiom_jit_script]


@idioms.over(RECORDED, [*idioms.ON_BOTH_BACKENDS, ("paper", "reference"), ("caffe", "reference")])
def test_traces_give_what_plain_layers_give(idiom, variant, backend):
    idioms.check(idiom, variant, backend)


def test_a_script_is_saved_and_loaded(tmp_path):
    ours, theirs = (model.eval() for model in narrow.twins())
    x = torch.randn(2, 3, 67, 67)
    torch.jit.script(ours).save(str(tmp_path / "net.pt"))
    assert error(torch.jit.load(str(tmp_path / "net.pt"))(x), theirs(x)) < 1e-5


def test_torchvisions_network_is_compiled_exported_and_traced_when_fused():
    theirs = narrow.twins()[1].eval()
    ours = fuse(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 67, 67)
    for run in (compiled(ours), torch.export.export(ours, (x,)).module(), torch.jit.trace(ours, x)):
        assert error(run(x), theirs(x)) < 1e-5
    assert type(ours) is torchvision.models.AlexNet
    assert type(alexnet(device="meta").features) is type(ours.features)
