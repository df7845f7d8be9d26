"""docs/recipes.md runs, and does what it says."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cage_jax as cage

pytest.importorskip("flax")

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "recipes.md"
TITLES = [
    "Recipes",
    "Flax's TrainState",
    "nnx.Optimizer",
    "Calibrated inputs",
    "Keys and values",
    "Clipping",
    "Gradient accumulation",
    "Hyperparameters in the state",
    "Frozen parameters",
    "Averaged weights",
    "LoRA inside the grid",
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
    found = recipe("Gradient accumulation")
    assert not np.any(found["updates"]["kernel"])
    assert int(found["state"].mini_step) == 1
    inner = found["state"].inner_opt_state
    assert int(found["optax"].tree_utils.tree_get(inner, "cage_count")) == 0


def test_hyperparameters(capsys):
    found = recipe("Hyperparameters in the state")
    largest = float(jnp.abs(found["updates"]["kernel"]).max())
    assert largest == pytest.approx(1e-4, rel=0.05)


def test_frozen_parameters():
    found = recipe("Frozen parameters")
    assert np.all(np.asarray(found["updates"]["bias"]) == 0)
    assert np.any(np.asarray(found["updates"]["kernel"]) != 0)


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
