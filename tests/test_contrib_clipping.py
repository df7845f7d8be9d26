"""Learned clips of frozen weights, trained without a backward pass, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import assert_raises

import cage_jax as cage
from cage_jax import contrib

GROUP = 4
RULES = cage.Rules([(r".*kernel", cage.int4(group_size=GROUP))])


def clipped_by_numpy(x, clips, low=-7, high=7):
    """OmniQuant's formula for a symmetric grid; the clips are (groups, columns)."""
    groups = np.float64(x).reshape(-1, GROUP, x.shape[1])
    share = 1 / (1 + np.exp(-np.float64(clips)))
    scale = share[:, None] * np.abs(groups).max(1, keepdims=True) / 7
    codes = np.clip(np.round(groups / scale), low, high)
    return codes.reshape(x.shape), (codes * scale).reshape(x.shape)


def test_clips_scale_the_grid(x64, rng):
    x, clips = rng.normal(size=(12, 5)), rng.normal(size=(3, 5))
    params = {"kernel": jnp.asarray(x), "bias": jnp.ones(5)}

    @jax.jit
    def found(params, clips):
        grids = contrib.clipped_grids(params, RULES, clips)
        values = cage.fake_quant(params, RULES, grid=grids)
        return values["kernel"], cage.quantize(params, RULES, grid=grids)["kernel"]

    values, kept = found(params, {"kernel": jnp.asarray(clips)})
    codes, want = clipped_by_numpy(x, clips)
    np.testing.assert_allclose(values, want, rtol=1e-13)
    np.testing.assert_array_equal(kept.codes, codes)
    assert (np.abs(codes) == 7).mean() > 0.3  # most groups are cut

    first = contrib.first_clips(params, RULES)
    assert jax.tree.map(jnp.shape, first) == {"kernel": (3, 5)}
    values, _ = found(params, first)
    np.testing.assert_allclose(
        values, clipped_by_numpy(x, first["kernel"])[1], rtol=1e-6
    )


def test_clipped_scales_can_be_stored(rng):
    x = {"kernel": jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)}
    rules = cage.Rules([("kernel", cage.mxfp4())])
    clips = {"kernel": jnp.asarray(rng.normal(size=(1, 4)), jnp.float32)}
    grids = contrib.clipped_grids(x, rules, clips)
    scale = np.asarray(grids["kernel"].scale)
    np.testing.assert_array_equal(scale, 2.0 ** np.round(np.log2(scale)))


def outliers(rng):
    """Weights of which a few are large, so that cutting them is right."""
    x = rng.normal(size=(32, 4))
    x[rng.integers(32, size=4), np.arange(4)] *= 4
    return x.astype(np.float32)


def test_clips_fall_on_a_quadratic(rng, standard_promotion):
    """`sum h (Q(w) + b - w) ** 2` over clips and a bias, the weights frozen."""
    frozen = {"kernel": jnp.asarray(outliers(rng))}
    rules = cage.Rules([("kernel", cage.int3())])
    curvature = jnp.asarray(np.exp(rng.normal(size=(32, 4))), jnp.float32)
    tx = optax.adam(0.03)

    def loss(trained):
        grids = contrib.clipped_grids(frozen, rules, trained["clips"])
        values = cage.fake_quant(frozen, rules, grid=grids)["kernel"]
        return jnp.mean(curvature * (values + trained["bias"] - frozen["kernel"]) ** 2)

    start = {"clips": contrib.first_clips(frozen, rules), "bias": jnp.zeros((1, 4))}

    @jax.jit
    def train(key):
        def step(carry, key):
            trained, state = carry
            _, g = contrib.two_point_gradient(loss, trained, key, radius=0.1)
            updates, state = tx.update(g, state)
            trained = optax.apply_updates(trained, updates)
            return (trained, state), loss(trained)

        keys = jax.random.split(key, 600)
        return jax.lax.scan(step, (start, tx.init(start)), keys)[1]

    for seed in range(3):
        losses = np.asarray(train(jax.random.key(seed)))
        assert losses[-100:].mean() < 0.9 * float(loss(start))


def test_two_points_take_less_memory_than_the_backward_pass():
    """Counted by the compiler: no layer keeps its values for a backward pass."""
    width, layers, tokens = 64, 8, 512
    rules = cage.Rules([("kernel", cage.int4(axis=-2))])
    frozen = {"kernel": jnp.zeros((layers, width, width))}
    clips = contrib.first_clips(frozen, rules)
    x = jnp.zeros((tokens, width))

    def loss(weights, x):
        return jnp.mean(
            jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]
        )

    def without(clips, frozen, x, key):
        def at(clips):
            grids = contrib.clipped_grids(frozen, rules, clips)
            return loss(cage.fake_quant(frozen, rules, grid=grids)["kernel"], x)

        return contrib.two_point_gradient(at, clips, key)

    def backward(frozen, x):
        def at(params):
            return loss(cage.fake_quant(params, rules)["kernel"], x)

        return jax.value_and_grad(at)(frozen)

    def temporary(function, *args):
        compiled = jax.jit(function).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    fewer = temporary(without, clips, frozen, x, jax.random.key(0))
    more = temporary(backward, frozen, x)
    kept = 4 * layers * tokens * width  # inputs of the layers
    assert more > kept > fewer


def test_bad_clips():
    params = {"kernel": jnp.ones((8, 4))}
    learned = cage.Rules([("kernel", cage.lsq(4))])
    text = "^`kernel`: `clips` must have an entry for each quantized parameter"
    call = contrib.clipped_grids
    assert_raises(
        [
            (functools.partial(call, params, RULES, {}), ValueError, text),
            (
                functools.partial(call, params, learned, {"kernel": jnp.ones((1, 4))}),
                ValueError,
                text,
            ),
            (
                functools.partial(contrib.first_clips, {"other": jnp.ones(3)}, RULES),
                ValueError,
                "no parameter is quantized",
            ),
        ]
    )
