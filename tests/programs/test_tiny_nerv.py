"""A tiny network that is a video: its program, its loss, its rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_nerv

import cage_jax as cage

pytestmark = pytest.mark.usefixtures("as_users_have_it")


def test_the_program_runs():
    found = tiny_nerv.run(tiny_nerv.Settings(tiny=True))
    arms = [f"4 bits, {name}" for name in ("rounded", "QAT", "distilled")]
    assert list(found) == ["teacher", "full precision", *arms]
    assert all(5 < value < 40 for value in found.values())
    assert len(set(found.values())) == len(found)


def blurred(x):
    line = np.exp(-(np.arange(-2, 3) ** 2) / 2)
    kernel = np.outer(line, line) / line.sum() ** 2
    height, width = x.shape[:2]
    padded = np.pad(x, ((2, 2), (2, 2), (0, 0)))
    return sum(
        kernel[i, j] * padded[i : i + height, j : j + width]
        for i in range(5)
        for j in range(5)
    )


def test_the_distance_is_that_of_tinynerv(rng):
    frames = rng.uniform(size=(2, 2, 16, 8, 3))
    total = 0
    for own, given in zip(*frames):
        for scale in (1, 2, 4):
            parts = (16 // scale, scale, 8 // scale, scale, 3)
            s, t = (x.reshape(parts).mean((1, 3)) for x in (own, given))
            gap = np.abs(t - s).mean(-1, keepdims=True)
            weights = (gap - gap.min()) / (gap.max() - gap.min())
            low, low_given = blurred(s), blurred(t)
            high = np.abs((s - low) - (t - low_given))
            total += np.abs(low - low_given).mean() + 3 * (weights * high).mean()
    found = tiny_nerv.distance(*map(jnp.float32, frames))
    # Sums in float32, and 1e-6 beside the range of the gap.
    np.testing.assert_allclose(found, total / 3 / 2, rtol=1e-5)


def test_each_output_of_each_kernel_has_a_scale():
    params = jax.eval_shape(lambda: tiny_nerv.initial(jax.random.key(0), 4))
    rules = tiny_nerv.rules_of(4)
    for path, (quantizer, x) in rules.quantized(params).items():
        assert (
            quantizer.blocks(x.shape).scale_shape == (1,) * (x.ndim - 1) + x.shape[-1:]
        )
        assert path.endswith("kernel")
    assert len(rules.quantized(params)) == 6
    resolved = cage.resolve(
        cage.Rules([(r".*kernel", cage.int4())]),
        tiny_nerv.frames_of,
        params,
        jax.ShapeDtypeStruct((2,), np.float32),
    )
    for path, (quantizer, x) in rules.quantized(params).items():
        shape = resolved.match(path).blocks(x.shape).scale_shape
        assert shape == quantizer.blocks(x.shape).scale_shape
