"""The paper's quantizer against its formula in PyTorch, which takes long to import."""

import jax
import numpy as np
import pytest

from cage_jax import fake_quant, quest

torch = pytest.importorskip("torch", reason="the paper's own code is PyTorch")

CLIP = {2: 1.4935346200, 3: 2.0510683541, 4: 2.5139305786}
EPS = float(np.finfo(np.float32).eps)


def test_quest_is_the_formula_in_pytorch(rng):
    x = rng.standard_normal((64, 32)).astype(np.float32)
    found = jax.jit(
        lambda x: {bits: fake_quant(x, quest(bits, hadamard=None)) for bits in CLIP}
    )(x)
    for bits, clip in CLIP.items():
        w = torch.from_numpy(x)
        bound = clip * torch.sqrt(torch.mean(w**2, dim=0, keepdim=True))
        step = 2 * bound / (2**bits - 1)
        clipped = torch.clamp(w, -bound, bound)
        expected = torch.round(clipped / step + 0.5) * step - step / 2
        # That formula lets the very end round up to a level the grid does not have.
        expected = torch.clamp(expected, -bound, bound)
        np.testing.assert_allclose(
            found[bits],
            expected.numpy(),
            rtol=1e-6,
            atol=8 * EPS * float(bound.max()),  # two orders of float32 operations
        )
