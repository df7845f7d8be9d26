"""Parameters and adapters for the tests of low-rank adapters."""

import jax
import jax.numpy as jnp
import numpy as np

import cage_jax as cage


def rules_of(quantizer):
    return cage.Rules([(r".*kernel", quantizer), (r".*", None)])


def params_of(rng, shape=(128, 8), dtype=np.float32):
    kernel = jnp.asarray(rng.standard_normal(shape), dtype)
    return {"up": {"kernel": kernel, "bias": jnp.ones(shape[-1], dtype)}}


def moved(adapters, rng, size=0.5):
    """Adapters as some training leaves them."""

    def move(path, x):
        noise = size * rng.standard_normal(x.shape)
        if path[-1].key in ("scale", "offset"):
            return jnp.asarray(np.asarray(x) * (1 + 0.05 * noise), x.dtype)
        return jnp.asarray(noise, x.dtype)

    return jax.tree_util.tree_map_with_path(move, adapters)
