"""barelm/elementwise.py against model.py's formulas, and its gradients against finite differences.
Whole networks are compared in tests/test_fast.py."""

import pytest
import torch
from torch.autograd import gradcheck

from barelm import operations
from barelm.elementwise import FusedRMSNorm, FusedRotation, FusedSwiGLU, can_fuse

PLAIN = operations.Operations(fast=False)


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def angles():
    """(cos, sin) of some turns, each (1, 3, 1, 8), as model.rope_angles has them."""
    turns = torch.randn(1, 3, 1, 4, dtype=torch.float64)
    cos = turns.cos()
    sin = turns.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


@pytest.mark.parametrize("shape", [(8,), (5, 8)])
def test_rms_norm(shape):
    torch.manual_seed(0)
    x, weight = numbers(2, 3, 5, 8), numbers(*shape)
    fused = FusedRMSNorm.apply(x, weight, 1e-3)
    torch.testing.assert_close(fused, operations.rms_norm(x, weight, 1e-3))
    assert gradcheck(lambda x, w: FusedRMSNorm.apply(x, w, 1e-3), (x, weight))


def test_rotation():
    torch.manual_seed(0)
    x, rope = numbers(2, 3, 5, 8), angles()
    torch.testing.assert_close(FusedRotation.apply(x, *rope), operations.rotate(x, rope))
    assert gradcheck(lambda x: FusedRotation.apply(x, *rope), (x,))


def test_swiglu():
    torch.manual_seed(0)
    x = numbers(2, 3, 10)
    torch.testing.assert_close(FusedSwiGLU.apply(x), PLAIN.swiglu(x))
    assert gradcheck(FusedSwiGLU.apply, (x,))


def test_forward_passes_are_the_formulas_bit_for_bit():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 8), torch.rand(5, 8)
    rope = [t.float() for t in angles()]
    assert torch.equal(FusedRMSNorm.apply(x, weight, 1e-6), operations.rms_norm(x, weight, 1e-6))
    assert torch.equal(FusedRotation.apply(x, *rope), operations.rotate(x, rope))
    assert torch.equal(FusedSwiGLU.apply(x), PLAIN.swiglu(x))


def test_only_float32_that_is_learned_from_is_fused():
    x = torch.zeros(2, requires_grad=True)
    assert can_fuse(x) and not can_fuse(x.detach()) and not can_fuse(x.bfloat16())
    with torch.no_grad():
        assert not can_fuse(x)
