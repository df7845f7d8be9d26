"""docs/recipes.md runs, and does what it says."""

import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import absmax_round

import cage_jax as cage

pytest.importorskip("flax")

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "recipes.md"
TITLES = [
    "Recipes",
    "Flax's TrainState",
    "Save and resume",
    "nnx.Optimizer",
    "Calibrated inputs",
    "Keys and values",
    "Clipping",
    "Gradient accumulation",
    "Hyperparameters in the state",
    "Frozen parameters",
    "Muon for matrices, Adam for the rest",
    "Compute in bfloat16",
    "Many devices",
    "Averaged weights",
    "LoRA inside the grid",
    "Models of other libraries",
    "A derivative inside the loss",
    "A model trained through qwix",
]


def recipe(title):
    """What a recipe and the first block define."""
    parts = re.split(r"^#+ (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2]))
    assert list(texts) == TITLES
    names = {}
    for each in dict.fromkeys([TITLES[0], title]):
        for block in re.findall(r"```python\n(.*?)```", texts[each], re.DOTALL):
            exec(compile(block, each, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def as_users_have_it(standard_promotion):
    """Flax promotes dtypes and ranks by itself."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_train_state():
    found = recipe("Flax's TrainState")
    moved = found["state"].params["kernel"] - found["params"]["kernel"]
    assert float(jnp.abs(moved).max()) == pytest.approx(1e-3, rel=1e-2)


def test_resumed_in_the_middle_of_the_ramp():
    found = recipe("Save and resume")
    schedule = cage.recommended(1e-3, 1000)["strength"]
    assert 0 < schedule(800) < schedule(900)
    step, states = found["step"], [found["state"], found["resumed"]]
    for _ in range(50):
        states = [step(state) for state in states]
    assert states[0].step == 850
    chex.assert_trees_all_equal(*states)
    moved = states[0].params["kernel"] - found["state"].params["kernel"]
    assert np.any(np.asarray(moved) != 0)


def test_nnx_optimizer():
    found = recipe("nnx.Optimizer")
    shipped = found["shipped"].kernel[...]
    expected = cage.fake_quant(found["linear"].kernel[...], cage.int4(group_size=16))
    np.testing.assert_array_equal(shipped, expected)
    assert found["train_step"](found["linear"], found["optimizer"]) < found["value"]


def test_calibrated_inputs(capsys):
    found = recipe("Calibrated inputs")
    x = np.float64(found["x"])
    scale = np.abs(x).max() / 127
    rounded = cage.fake_quant(found["params"]["kernel"], cage.int4(group_size=16))
    # The bias is 0 at the start.
    expected = np.round(x / scale) * scale @ np.float64(rounded)
    np.testing.assert_allclose(found["outputs"], expected, rtol=1e-4, atol=1e-4)
    (grid,) = found["module"].input_grids.values()
    assert float(grid.scale[...]) == pytest.approx(scale, rel=1e-5)
    assert "int8 calibrated" in capsys.readouterr().out


def test_keys_and_values():
    found = recipe("Keys and values")
    np.testing.assert_allclose(
        found["last"][:, 0], found["mixed"][:, -1], rtol=1e-4, atol=1e-5
    )


def test_clipping_leaves_the_correction_alone():
    found = recipe("Clipping")
    params = found["params"]
    huge = jax.tree.map(lambda p: 1e6 * jnp.ones_like(p), params)
    rules = found["rules"]
    tx = cage.cage_adamw(1e-3, rules, strength=5.0)
    clipped = jax.tree.map(lambda g: g / np.sqrt(16 * 8 + 8) / 1e6, huge)
    expected, _ = tx.update(clipped, tx.init(params), params)
    chained = found["optax"].chain(found["optax"].clip_by_global_norm(1.0), tx)
    updates, _ = chained.update(huge, chained.init(params), params)
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-5)


def test_gradient_accumulation():
    """Four batches make the step of their mean gradient, and count as one."""
    found = recipe("Gradient accumulation")
    tx, params = found["tx"], found["params"]
    inner = found["cage"].cage_adamw(1e-3, found["rules"], strength=found["strength"])
    inner = inner.init(params), inner.update

    def after(count):
        """The state as if so many steps had been taken."""
        return optax.tree_utils.tree_set(inner[0], count=count, cage_count=count)

    ramp = jnp.int32(950)
    state = tx.init(params)._replace(inner_opt_state=after(ramp))
    rng = np.random.default_rng(0)
    draws = [
        jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        for _ in range(4)
    ]
    for gradient in draws:
        updates, state = tx.update(gradient, state, params)
        assert np.any(updates["kernel"]) == (state.gradient_step == 1)
    mean = jax.tree.map(lambda *each: np.mean(each, 0), *draws)
    expected, last = inner[1](mean, after(ramp), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-9)
    count = optax.tree_utils.tree_get(state.inner_opt_state, "cage_count")
    assert count == optax.tree_utils.tree_get(last, "cage_count") == 951


def test_hyperparameters(capsys):
    found = recipe("Hyperparameters in the state")
    largest = float(jnp.abs(found["updates"]["kernel"]).max())
    assert largest == pytest.approx(1e-4, rel=0.05)


def test_frozen_parameters():
    found = recipe("Frozen parameters")
    assert np.all(np.asarray(found["updates"]["bias"]) == 0)
    assert np.any(np.asarray(found["updates"]["kernel"]) != 0)


def test_muon_pulls_with_its_own_rate():
    found = recipe("Muon for matrices, Adam for the rest")
    params, rules = found["params"], found["rules"]
    gradient = jax.grad(found["loss"])(params)

    def updates_of(strength):
        muon = cage.decoupled(
            optax.contrib.muon(0.02), rules, learning_rate=0.02, strength=strength
        )
        labels = {"kernel": "matrices", "bias": "others"}
        parts = {"matrices": muon, "others": optax.adamw(1e-3)}
        tx = optax.partition(parts, labels)
        return tx.update(gradient, tx.init(params), params)[0]

    without, pulled = updates_of(0.0), updates_of(5.0)
    # The page's strength is 0 at the first step.
    chex.assert_trees_all_equal(found["updates"], without)
    alone = optax.contrib.muon(0.02)
    kernel = {"kernel": params["kernel"]}
    expected, _ = alone.update(
        {"kernel": gradient["kernel"]}, alone.init(kernel), kernel
    )
    np.testing.assert_array_equal(without["kernel"], expected["kernel"])
    weights = np.float64(params["kernel"])
    pull = -0.02 * 5 * (weights - absmax_round(weights, top=7, group=16))
    np.testing.assert_allclose(
        pulled["kernel"] - without["kernel"], pull, rtol=1e-3, atol=1e-7
    )


def test_a_cast_after_rounding_keeps_the_codes():
    found = recipe("Compute in bfloat16")
    assert 1 / 300 < found["flipped"] < 1 / 100
    params = found["params"]
    value, gradient = jax.value_and_grad(found["low_loss"])(params)
    assert gradient["kernel"].dtype == params["kernel"].dtype == np.float32
    # The products are those of the shipped codes, cast; float32 sums of bfloat16.
    codes = cage.quantize(params, found["rules"])["kernel"]
    low = [np.asarray(a, jnp.bfloat16) for a in (found["x"], cage.dequantize(codes))]
    outputs = np.float64(low[0]) @ np.float64(low[1])
    expected = np.mean((outputs - np.float64(found["y"])) ** 2)
    assert float(value) == pytest.approx(expected, rel=2**-8)


def test_many_devices_take_the_step_of_one():
    assert jax.device_count() == 8
    found = recipe("Many devices")
    params, tx = found["params"], found["tx"]
    step = jax.jit(found["train_step"])
    alone, _, value = step(params, tx.init(params), found["x"], found["y"])
    for name, other in (("placed", "value"), ("same", "same_value")):
        # Sums over devices are rounded in another order.
        assert float(found[other]) == pytest.approx(float(value), rel=1e-6)
        chex.assert_trees_all_close(found[name], alone, rtol=1e-5, atol=1e-6)
    shards = found["placed"]["kernel"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(16, 1)}
    # Inputs are rounded in float32: one is within its precision of a tie.
    x = np.asarray(found["x"])
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    x = np.float64(np.round(x / scale)) * scale
    outputs = x @ absmax_round(params["kernel"], top=7, group=16)
    expected = np.mean((outputs - np.float64(found["y"])) ** 2)
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_averaged_weights():
    found = recipe("Averaged weights")
    # The first average, unbiased, is what the step comes to.
    stepped = optax.apply_updates(found["params"], found["updates"])
    averaged = found["contrib"].averaged(found["state"])
    np.testing.assert_allclose(averaged["kernel"], stepped["kernel"], rtol=1e-6)
    assert isinstance(found["codes"]["kernel"], cage.QuantizedArray)


def test_lora_is_trained_through_the_rounding_of_the_sum():
    found = recipe("LoRA inside the grid")
    adapters = found["adapters"]
    assert np.any(np.asarray(adapters["b"]) != 0)
    weight = found["merged"](adapters)["kernel"]
    rounded = cage.fake_quant(weight, cage.int4(group_size=16))
    np.testing.assert_array_equal(cage.dequantize(found["codes"]["kernel"]), rounded)
    # The gradient is that at the rounded sum, in float64.
    x, y = (np.float64(found[name]) for name in "xy")
    bias = np.float64(found["params"]["bias"])
    residual = x @ np.float64(rounded) + bias - y
    at_the_sum = 2 / residual.size * x.T @ residual
    gradient = jax.grad(found["adapter_loss"])(adapters)
    a, b = np.float64(adapters["a"]), np.float64(adapters["b"])
    np.testing.assert_allclose(gradient["b"], at_the_sum @ a.T, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradient["a"], b.T @ at_the_sum, rtol=1e-4, atol=1e-7)


def test_equinox():
    pytest.importorskip("equinox")
    found = recipe("Models of other libraries")
    rules, arrays = found["mlp_rules"], found["arrays"]
    assert {q.axis for q in rules.resolved.values()} == {-1}  # (out, in)
    hidden = np.float64(found["x"])
    for layer in arrays.layers:
        weight = absmax_round(layer.weight, top=7, axis=1)
        hidden = absmax_round(hidden, top=127, axis=1) @ weight.T
        hidden += np.float64(layer.bias)
        if layer is arrays.layers[0]:
            hidden = np.maximum(hidden, 0)
    expected = np.mean((hidden - np.float64(found["y"])) ** 2)
    assert float(found["mlp_loss"](arrays)) == pytest.approx(expected, rel=1e-5)


def test_a_derivative_is_that_at_the_rounded_inputs():
    found = recipe("A derivative inside the loss")
    first, last = (np.float64(found["layers"][name]) for name in ("first", "last"))
    first = absmax_round(first, top=7)
    points = absmax_round(found["points"], top=127, axis=1)
    slopes = 3 * np.cos(3 * points @ first) * last @ first.T
    expected = np.mean((np.linalg.norm(slopes, axis=1) - 1) ** 2)
    assert float(found["eikonal"]) == pytest.approx(expected, rel=1e-4)
    assert np.all(np.isfinite(found["gradient"]["first"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix's own
def test_qwix():
    pytest.importorskip("cage_jax.qwix", exc_type=ImportError)
    found = recipe("A model trained through qwix")
    # qwix's loss is that of the values which CAGE pulls to.
    rounded = cage.fake_quant(found["params"], found["rules"])
    outputs = found["model"].apply({"params": rounded}, found["x"])
    expected = np.mean(np.square(np.float64(outputs) - np.float64(found["y"])))
    assert float(found["value"]) == pytest.approx(expected, rel=1e-5)
    assert found["qwix_step"](found["state"])[1] < found["value"]
