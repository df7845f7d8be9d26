import dataclasses

import jax.numpy as jnp
import numpy as np

import cage_jax as cage


def test_each_parameter_gets_the_smaller_error(rng):
    grid = rng.integers(-7, 8, (64, 8)).astype(np.float32)
    grid[0] = 7  # exactly on the grid, unless it is rotated
    outlier = rng.standard_normal((64, 8)).astype(np.float32)
    outlier[3] = 30
    params = {
        "grid": {"kernel": jnp.asarray(grid)},
        "outlier": {"kernel": jnp.asarray(outlier)},
        "embedding": jnp.asarray(np.ones((8, 8), np.float32)),
    }
    rotated = dataclasses.replace(cage.int4(hadamard=64), hadamard_seed=1)
    rules = cage.Rules([(r".*kernel", rotated), (r"embedding", cage.int8())])
    chosen = cage.choose_rotation(params, rules)
    assert chosen.match("grid/kernel") == cage.int4(axis=-2)
    assert chosen.match("outlier/kernel") == rotated
    assert chosen.match("embedding") == cage.int8()
    for path in ("grid", "outlier"):
        x = params[path]["kernel"]
        sizes = [
            float(np.linalg.norm(cage.quantization_error(x, quantizer)))
            for quantizer in (chosen.match(f"{path}/kernel"), cage.int4(), rotated)
        ]
        assert sizes[0] == min(sizes)
    assert cage.choose_rotation(params, chosen) == chosen
