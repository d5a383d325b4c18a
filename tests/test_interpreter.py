"""Triton's interpreter as it is mended: on any release of it, the mends for the others among them."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as tritons

from alexnet_triton.kernels import interpreter, launch


@triton.jit
def count_kernel(counts, bound, SIZE: tl.constexpr):
    column = tl.arange(0, SIZE)
    for row in range(bound):
        for more in tl.static_range(2):
            mask = (column < SIZE - 1) & (row + more < bound)
            tl.store(counts + column, tl.load(counts + column, mask=mask) + 1, mask=mask)


def counted():
    """Five rows, and the one after each that is still within them, in three columns of four."""
    counts = torch.zeros(4, dtype=torch.int32)
    launch.launch(count_kernel, 1, counts=counts, bound=5, SIZE=4)
    return counts.tolist()


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setattr(tritons, "_patch_lang_tensor", tritons._patch_lang_tensor)
    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(tritons.InterpreterBuilder, name, getattr(tritons.InterpreterBuilder, name))


def test_loops_and_masks_of_numbers_run_as_they_compile():
    assert counted() == [9, 9, 9, 0]


def test_loop_ends_at_a_tensor_where_arrays_are_no_numbers(monkeypatch):
    patch = tritons._patch_lang_tensor

    def as_in_3_6(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: pytest.fail("only 0-dimensional arrays can be converted"))

    monkeypatch.setattr(tritons, "_patch_lang_tensor", as_in_3_6)
    interpreter.bound_loops_by_items()
    assert counted() == [9, 9, 9, 0]


def test_masks_are_bits_where_comparisons_are_integers(monkeypatch):
    builder, found = tritons.InterpreterBuilder, []

    def noted(which):
        real = getattr(builder, which)

        def note(self, at, *rest):
            mask = rest[0 if which == "create_masked_load" else 1]
            found.append((which, mask.data.dtype.name))
            return real(self, at, *rest)

        return note

    for which in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(builder, which, noted(which))
    interpreter.mask_by_bits()
    assert counted() == [9, 9, 9, 0]
    assert set(found) == {("create_masked_load", "bool"), ("create_masked_store", "bool")}


@pytest.mark.parametrize(("release", "expected"), [((3, 6), "loops"), ((3, 8), ""), ((3, 9), "masks")])
def test_each_release_gets_the_mends_that_it_needs(monkeypatch, release, expected):
    made = []
    monkeypatch.setattr(interpreter, "RELEASE", release)
    monkeypatch.setattr(interpreter, "bound_loops_by_items", lambda: made.append("loops"))
    monkeypatch.setattr(interpreter, "mask_by_bits", lambda: made.append("masks"))
    interpreter.mend()
    assert "".join(made) == expected
