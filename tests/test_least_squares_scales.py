"""Scale rules that choose by the squared error, against NumPy and `ml_dtypes`."""

import jax
import ml_dtypes
import numpy as np

import cage_jax as cage
from cage_jax import nvfp4
from cage_jax.quantizers.scales import FourOverSix, Searched

E4M3 = ml_dtypes.float8_e4m3fn


def weights(rng):
    """Normal numbers, of another size in each column."""
    return np.float32(rng.standard_normal((64, 48)) * 2.0 ** rng.uniform(-4, 4, 48))


def e2m1(x):
    return np.float32(x).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)


def four_over_six_oracle(x):
    """Values and stored scales of groups of 16 in axis 0, in float32."""
    groups = x.reshape(x.shape[0] // 16, 16, -1)
    largest = np.abs(groups).max(1)
    divisor = np.float32(448 * 6 / 16) * (
        np.float32(1) / (np.float32(1.75) * largest.max() / np.float32(16))
    )
    found = []
    for bound in (largest, np.float32(1.5) * largest):
        scale = np.maximum(
            (divisor * (bound / np.float32(6))).astype(E4M3).astype(np.float32), 2**-9
        )
        scale = np.where(bound == 0, np.float32(0.125), scale)
        step = (scale / divisor)[:, None]
        values = e2m1(groups / step) * step
        found.append((np.square(np.float64(groups - values)).sum(1), scale, values))
    (at_six, scale, six), (at_four, other, four) = found
    use_four = at_four < at_six
    values = np.where(use_four[:, None], four, six)
    return values.reshape(x.shape), np.where(use_four, other, scale), use_four, divisor


def test_four_over_six_is_that_of_the_paper(rng):
    quantizer = nvfp4(axis=0, scale=FourOverSix())
    assert quantizer.idempotent and quantizer.gradient == "identity"
    x = weights(rng)
    x[16:32, 3] = 0
    both = jax.jit(
        lambda x: (cage.fake_quant(x, quantizer), cage.quantize(x, quantizer))
    )
    value, codes = both(x)
    expected, scale, use_four, divisor = four_over_six_oracle(x)
    assert 0.2 < use_four.mean() < 0.8
    np.testing.assert_array_equal(codes.tensor_divisor, [[divisor]])
    np.testing.assert_array_equal(np.float32(codes.scale), scale)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(value, cage.dequantize(codes))
    # The tensor's scale is 256 for the largest magnitude.
    np.testing.assert_allclose(divisor * np.abs(x).max() / 6, 256, rtol=1e-6)
    assert scale.ravel()[np.abs(x).reshape(4, 16, -1).max(1).argmax()] in (256, 384)
    error = {
        each: np.square(np.asarray(cage.quantization_error(x, each))).sum()
        for each in (quantizer, nvfp4(axis=0))
    }
    assert error[quantizer] < error[nvfp4(axis=0)]
    # A second time nothing changes, up to the rounding of the tensor's scale.
    again, _ = both(np.asarray(value))
    np.testing.assert_allclose(again, value, rtol=1e-6)


def test_a_search_tries_the_scales_that_are_stored(rng):
    quantizer = nvfp4(axis=0, scale=Searched(100, 0.3, 2))
    assert not quantizer.idempotent  # clipping the largest value moves all scales
    assert nvfp4(tensor_divisor=False, scale=Searched()).idempotent
    x = weights(rng)
    codes = cage.quantize(x, quantizer)
    groups = np.float64(x.reshape(4, 16, -1))
    step = np.arange(1, 127, dtype=np.uint8).view(E4M3).astype(np.float64)
    step = step / np.float64(codes.tensor_divisor.item())
    # The squared error of each group with each positive E4M3 scale.
    errors = np.stack(
        [np.square(groups - e2m1(groups / s) * np.float32(s)).sum(1) for s in step]
    )
    largest = np.abs(groups).max(1) / 6
    far = (step[:, None, None] < 0.32 * largest) | (step[:, None, None] > 2 * largest)
    best = np.where(far, np.inf, errors).min(0)
    found = np.square(groups - np.asarray(cage.dequantize(codes)).reshape(groups.shape))
    room = 1e-4 * best  # values are rounded to float32
    assert (found.sum(1) <= best + room).all()
    assert (found.sum(1) >= errors.min(0) - room).all()
    # No other scale of E4M3 is better but for few groups.
    assert (errors.min(0) < 0.999 * best).mean() < 0.02
