import threading

import pytest
import torch
import torch.nn.functional as F
from plain import error
from torch.autograd import forward_ad

from alexnet_triton import backend, library, ops, use_backend

X = torch.ones(1, 1, 2, 2)


@pytest.fixture
def chains(monkeypatch):
    """The chains that reach the Triton implementation, where a pretended one stands."""
    seen = []

    def pretend(x, parameters, stages, channels_last):
        seen.append(stages)
        return x.new_full((), -7.0)

    monkeypatch.setattr(library, "map_chain", pretend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("ALEXNET_TRITON_BACKEND", raising=False)
    return seen


@pytest.fixture(autouse=True)
def _defaults(monkeypatch):
    monkeypatch.delenv("ALEXNET_TRITON_BACKEND", raising=False)


def pool(x=X):
    return ops.lrn_max_pool(x, size=0, kernel_size=2).item()


def test_unknown_name_is_refused_and_changes_nothing():
    before = backend.current_backend()
    with pytest.raises(ValueError, match=r"'cuda'.*'auto', 'triton', 'reference'"):
        use_backend("cuda")
    assert backend.current_backend() == before


def test_works_as_a_function_and_as_a_context_manager():
    with use_backend("reference"):
        assert backend.current_backend() == "reference"
        use_backend("triton")
        assert backend.current_backend() == "triton"
        with use_backend("auto"):
            assert backend.current_backend() == "auto"
        assert backend.current_backend() == "triton"
    assert backend.current_backend() == "auto"


def test_context_restores_after_an_exception():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend.current_backend() == "auto"


def test_a_context_can_be_entered_again():
    context = use_backend("reference")
    for _ in range(2):
        with context:
            assert backend.current_backend() == "reference"
        assert backend.current_backend() == "auto"


def test_threads_choose_for_themselves():
    seen, inside, leave = {}, threading.Event(), threading.Event()

    def other():
        with use_backend("reference"):
            inside.set()
            leave.wait(10)
            seen["other"] = backend.current_backend()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with use_backend("triton"):
        seen["main"] = backend.current_backend()
        leave.set()
        thread.join(10)
        seen["main later"] = backend.current_backend()
    assert seen == {"other": "reference", "main": "triton", "main later": "triton"}


def test_environment_sets_the_default(monkeypatch):
    monkeypatch.setenv("ALEXNET_TRITON_BACKEND", "reference")
    assert backend.current_backend() == "reference"
    with use_backend("triton"):
        assert backend.current_backend() == "triton"
    monkeypatch.setenv("ALEXNET_TRITON_BACKEND", "gpu")
    with pytest.raises(ValueError, match="ALEXNET_TRITON_BACKEND is 'gpu'"):
        backend.current_backend()


def test_auto_on_a_cpu_takes_triton_only_under_the_interpreter(chains, monkeypatch):
    assert pool() == 1
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert pool() == -7
    with use_backend("reference"):
        assert pool() == 1


def test_auto_leaves_to_the_reference_what_no_kernel_can_run(chains, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert pool(X.double()) == 1
    assert torch.func.vmap(lambda x: ops.lrn_max_pool(x, 0, kernel_size=2))(X[None]).item() == 1
    monkeypatch.setattr(backend, "TRITON_INSTALLED", False)
    assert pool() == 1
    assert chains == []


@pytest.mark.parametrize(
    ("x", "interpret", "reason"),
    [
        (X, "", r"GPU tensor, or TRITON_INTERPRET=1.*use_backend\('auto'\)"),
        (X.double(), "1", "float16, bfloat16 and float32, not float64"),
        (X.to(torch.float8_e5m2), "1", "float16, bfloat16 and float32, not float8_e5m2"),
        (torch.ones(1, 1, 2, 2, device="meta"), "1", "device 'meta'"),
    ],
)
def test_triton_says_why_it_cannot_run(x, interpret, reason, chains, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match=f"lrn_max_pool cannot run.*{reason}"):
            ops.lrn_max_pool(x, size=0, kernel_size=2)
        with pytest.raises(RuntimeError, match=f"conv2d_relu cannot run.*{reason}"):
            ops.conv2d_relu(x, x)
        with pytest.raises(RuntimeError, match=f"dropout_linear cannot run.*{reason}"):
            ops.dropout_linear(x[0, 0], x[0, 0])


def test_triton_says_why_it_cannot_run_under_torch_func(chains, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"), pytest.raises(RuntimeError, match="torch.func transforms"):
        torch.func.vmap(lambda x: ops.lrn_max_pool(x, 0, kernel_size=2))(X[None])


class OnGpu:
    """Stands for a GPU tensor where there is none: the rule reads a device and a dtype, nothing else."""

    device = torch.device("cuda", 0)
    dtype = torch.float16


def test_auto_takes_triton_for_gpu_tensors(monkeypatch):
    assert backend.takes_triton("conv2d_relu", OnGpu())
    with use_backend("reference"):
        assert not backend.takes_triton("conv2d_relu", OnGpu())
    monkeypatch.setattr(backend, "TRITON_INSTALLED", False)
    assert not backend.takes_triton("conv2d_relu", OnGpu())


def test_a_compiled_function_follows_the_backend(monkeypatch):
    monkeypatch.setattr(library, "map_chain", lambda x, *rest: x * 0 - 7)
    compiled = torch.compile(lambda x: ops.lrn_max_pool(x, size=0, kernel_size=2), backend="eager", fullgraph=True)
    assert compiled(X).min() == -7
    with use_backend("reference"):
        assert compiled(X).min() == 1


def test_forward_mode_and_traces_take_the_plain_ops_or_are_told_why_not():
    x, weight = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3)

    def forward_mode():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(ops.conv2d_relu(forward_ad.make_dual(x, x), weight)).tangent

    def trace():
        return torch.jit.trace(ops.conv2d_relu, (x, weight))(2 * x, weight)

    expected = torch.where(F.conv2d(x, weight) > 0, F.conv2d(x, weight), 0)
    for call, scale, sees in ((forward_mode, 1, "forward-mode"), (trace, 2, "torch.jit.trace")):
        with use_backend("auto"):
            assert error(call(), scale * expected) < 1e-6
        with use_backend("triton"), pytest.raises(RuntimeError, match=rf"{sees}.* sees through plain.*'auto'"):
            call()
