"""docs/pods.md runs on eight devices, and does what it says."""

import pathlib
import re

import hlo
import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import cage_jax as cage

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "pods.md"


@pytest.fixture(scope="module")
def found():
    """What the page's programs define."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, "pods.md", "exec"), names)
    return names


def test_everything_lies_where_it_should(found, capsys):
    assert jax.device_count() == 8
    params, state = found["params"], found["state"]
    adam = next(
        s for s in jax.tree.leaves(state, is_leaf=has_moments) if has_moments(s)
    )
    for tree in (params, adam.mu, adam.nu):
        assert tree["layers"]["up"].sharding == found["columns"]
        assert tree["layers"]["down"].sharding == found["rows"]
        shapes = {shard.data.shape for shard in tree["layers"]["up"].addressable_shards}
        assert shapes == {(3, 128, 64)}
    codes = found["codes"]["layers"]["up"]
    assert codes.codes.sharding.spec == P(None, None, ("data", "model"))
    assert int(optax.tree_utils.tree_get(state, "total_notfinite")) == 0


def has_moments(node):
    return isinstance(node, optax.ScaleByAdamState)


def test_it_trains_as_one_device(found, standard_promotion):
    first = found["first_params"]
    with jax.numpy_rank_promotion("allow"):
        params, tx, values = first(), found["tx"], []
        state = tx.init(params)
        for number in range(3):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(number), 0), 2)
            shapes = (64, 128), (64, 8)
            batch = tuple(map(jax.random.normal, keys, shapes))
            if number == 0:
                on_mesh = jax.jit(first, out_shardings=found["places"])()
                begun = jax.jit(tx.init)(on_mesh)
                placed = jax.device_put(batch, found["batch"])
                *_, first_value = found["step"](on_mesh, begun, *placed)
            params, state, value = jax.jit(found["train_step"])(params, state, *batch)
            values.append(value)
    # Sums over devices are rounded in another order, and after a step a code may flip.
    np.testing.assert_allclose(first_value, values[0], rtol=1e-5)
    np.testing.assert_allclose(found["value"], values[-1], rtol=2e-3)


def test_cage_adds_only_the_scales_of_split_rows(found, standard_promotion):
    counts = []
    with jax.numpy_rank_promotion("allow"):
        for adamw in (
            lambda: optax.adamw(1e-3),
            lambda: cage.cage_adamw(1e-3, found["rules"], strength=1.0),
        ):
            found["tx"] = optax.apply_if_finite(adamw(), 10)
            state = jax.jit(found["tx"].init)(found["params"])
            # Of its own each time: what is jitted is kept by the function.
            step = jax.jit(lambda *arguments: found["train_step"](*arguments))
            program = step.lower(found["params"], state, found["x"], found["y"])
            counts.append(hlo.moved(program.compile().as_text()))
    assert counts[0].counts
    # The scales of `down`, whose rows are split over "model": a number a column.
    added = counts[1].collectives - counts[0].collectives
    assert set(added) <= {"all-reduce"}
    assert sum(added.values()) <= 2 * 3 * 128 * 4


def test_the_report_has_nothing_to_say(found, recwarn):
    assert found["rules"].report(found["params"]).splits == ()
    assert not recwarn.list
