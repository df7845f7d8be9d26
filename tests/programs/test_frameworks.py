"""One model as a plain dict, in Flax Linen and in Flax NNX: the same training."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from optax.tree_utils import tree_get

import cage_jax as cage

pytestmark = pytest.mark.usefixtures("standard_promotion")

WIDTH, HIDDEN, OUT = 8, 16, 4
STEPS = 5
RULES = cage.Rules(
    [(r"up/kernel", cage.int4(group_size=4)), (r".*kernel", cage.int8())]
)
STRENGTH = cage.silence_then_constant(10, 5.0, silence=0.1)
# The same float32 computation in another order, such as that of a matrix product.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-6}


class Linen(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        if self.boxed:
            init = nn.with_partitioning(init, (None, "model"))
        x = nn.tanh(nn.Dense(HIDDEN, kernel_init=init, name="up")(x))
        return nn.Dense(OUT, kernel_init=init, name="down")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, OUT, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


def plain(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"][None]


def mean_square(prediction, y):
    return jnp.mean((prediction - y) ** 2)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.device_put(
        {
            name: {
                "kernel": np.float32(rng.normal(size=shape) / 3),
                "bias": np.float32(rng.normal(size=shape[1])),
            }
            for name, shape in {"up": (WIDTH, HIDDEN), "down": (HIDDEN, OUT)}.items()
        }
    )


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    return tuple(np.float32(rng.normal(size=(32, width))) for width in (WIDTH, OUT))


def optimizer():
    return cage.cage_adamw(
        1e-2, RULES, strength=STRENGTH, freeze_scale=True, statistics=True
    )


def trained(tx, params, batch):
    """Losses, the first gradient, the last parameters and state of the plain model."""
    x, y = batch
    state, losses, first = tx.init(params), [], None

    def loss(params):
        return mean_square(plain(cage.fake_quant(params, RULES), x), y)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return value, gradient, optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        value, gradient, params, state = step(params, state)
        first = gradient if first is None else first
        losses.append(value)
    return np.array(losses), first, params, state


@pytest.fixture(scope="module")
def expected(params, batch):
    with jax.numpy_dtype_promotion("standard"):
        return trained(optimizer(), params, batch)


def train_step_of(loss):
    """The loss, the gradient and the next of a `TrainState`."""

    @jax.jit
    def step(state):
        value, gradient = jax.value_and_grad(loss)(state.params)
        return value, gradient, state.apply_gradients(grads=gradient)

    return step


@pytest.mark.parametrize("collection", [False, True])
def test_linen_train_state(collection, params, batch, expected):
    x, y = batch
    losses, first, trained, last = expected
    # With and without the name of the collection the paths are the same.
    variables = {"params": params} if collection else params
    state = TrainState.create(apply_fn=Linen().apply, params=variables, tx=optimizer())

    def loss(variables):
        quantized = cage.fake_quant(variables, RULES)
        quantized = quantized if collection else {"params": quantized}
        return mean_square(Linen().apply(quantized, x), y)

    step = train_step_of(loss)
    for count in range(STEPS):
        value, gradient, state = step(state)
        if count == 0:
            found = gradient["params"] if collection else gradient
            chex.assert_trees_all_close(found, first, **FLOAT32)
        np.testing.assert_allclose(value, losses[count], **FLOAT32)
    found = state.params["params"] if collection else state.params
    chex.assert_trees_all_close(found, trained, **FLOAT32)
    chex.assert_trees_all_close(
        tree_get(state.opt_state, "grids"), tree_get(last, "grids"), **FLOAT32
    )
    assert losses[-1] < losses[0]


def test_linen_with_partitioning(params, batch, expected):
    x, y = batch
    losses, _, trained, last = expected
    model = Linen(boxed=True)
    boxed = jax.eval_shape(model.init, jax.random.key(0), x)
    kernel = boxed["params"]["up"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    variables = jax.tree.map(
        lambda box, value: (
            box.replace_boxed(value) if isinstance(box, nn.Partitioned) else value
        ),
        boxed,
        {"params": params},
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optimizer())

    def loss(variables):
        return mean_square(model.apply(cage.fake_quant(variables, RULES), x), y)

    step = train_step_of(loss)
    for count in range(STEPS):
        value, _, state = step(state)
        np.testing.assert_allclose(value, losses[count], **FLOAT32)
    assert isinstance(state.params["params"]["up"]["kernel"], nn.Partitioned)
    unboxed = nn.meta.unbox(state.params)["params"]
    chex.assert_trees_all_close(unboxed, trained, **FLOAT32)
    chex.assert_trees_all_close(
        tree_get(state.opt_state, "grids"), tree_get(last, "grids"), **FLOAT32
    )


@pytest.mark.parametrize("jit", [False, True])
def test_nnx_optimizer(jit, params, batch, expected):
    x, y = batch
    losses, first, trained, last = expected
    model = nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))
    nnx.update(model, params)
    tx = optimizer()
    if not jit:  # What Optax does is compiled, what NNX does is not.
        tx = optax.GradientTransformation(tx.init, jax.jit(tx.update))
    tx = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(model):
        graph, state = nnx.split(model)
        model = nnx.merge(graph, cage.fake_quant(state, RULES))
        return mean_square(model(x), y)

    value_and_gradient = nnx.value_and_grad(loss)
    if not jit:
        value_and_gradient = nnx.jit(value_and_gradient)

    def step(model, tx):
        value, gradient = value_and_gradient(model)
        tx.update(model, gradient)
        return value, gradient

    step = nnx.jit(step) if jit else step
    for count in range(STEPS):
        value, gradient = step(model, tx)
        if count == 0:
            found = nnx.to_pure_dict(nnx.state(gradient))
            chex.assert_trees_all_close(found, first, **FLOAT32)
        np.testing.assert_allclose(value, losses[count], **FLOAT32)
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(found, trained, **FLOAT32)
    # At `init` the paths end in `.value`, at `update` they do not.
    statistics = nnx.as_pure(tx.opt_state)[1]
    assert set(statistics.grids) == {"up/kernel", "down/kernel"}
    chex.assert_trees_all_close(statistics.grids, tree_get(last, "grids"), **FLOAT32)
    assert statistics.cage_count == STEPS


def test_the_pull_differs_from_plain_training(params, batch, expected):
    # Else the agreement above would say nothing of the correction.
    without = trained(optax.adamw(1e-2), params, batch)[2]
    kernels = (np.asarray(each["up"]["kernel"]) for each in (without, expected[2]))
    assert np.abs(np.subtract(*kernels)).max() > 1e-3
