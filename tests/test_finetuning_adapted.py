"""Adapters in training: whole programs, devices, files and wrong arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_cases import moved, params_of, rules_of

import cage_jax as cage
from cage_jax import finetuning
from cage_jax.export import trees


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "options",
    [
        {"store": "int8"},
        {"units": "weights", "scale": "grid"},
        {"units": "weights", "store": "float32"},
    ],
    ids=["LR-QAT", "L4Q", "DL-QAT"],
)
def test_training_lowers_the_loss_and_keeps_state_of_adapters_alone(
    rng, tmp_path, options
):
    params, rules = params_of(rng, (32, 8)), rules_of(cage.int4())
    x = jnp.asarray(rng.standard_normal((256, 32)), jnp.float32)
    change = rng.standard_normal((32, 1)) * rng.standard_normal((1, 8))
    target = x @ (params["up"]["kernel"] + jnp.asarray(change, jnp.float32))
    adapters, frozen = finetuning.low_rank(params, rules, **options)
    labels = {"a": "low rank", "b": "low rank", "scale": "scales"}
    tx = optax.partition(
        {"low rank": optax.adam(1e-2), "scales": optax.adam(1e-3)},
        {
            path: {name: labels[name] for name in each}
            for path, each in adapters.items()
        },
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters, state, frozen):
        def loss(adapters):
            kernel = finetuning.weights(adapters, frozen)["up"]["kernel"]
            return jnp.mean((x @ kernel - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state = tx.init(adapters)
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(sizes) == 2 * sum(leaf.size for leaf in jax.tree.leaves(adapters))
    losses = []
    for _ in range(60):
        adapters, state, value = step(adapters, state, frozen)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    pytest.importorskip("safetensors", reason="the file's format")
    codes = finetuning.merge(adapters, frozen)
    trees.save(codes, tmp_path / "codes.safetensors")
    again = trees.load(tmp_path / "codes.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal,
        cage.dequantize(again),
        finetuning.weights(adapters, frozen),
    )


def test_weights_on_eight_devices_are_those_on_one(rng):
    params, rules = params_of(rng), rules_of(cage.int4(group_size=8))
    adapters, frozen = finetuning.low_rank(params, rules, store="int8")
    adapters = moved(adapters, rng)
    expected = finetuning.merge(adapters, frozen)["up"]["kernel"].codes
    mesh = jax.make_mesh((8,), ("x",))
    rows = jax.NamedSharding(mesh, jax.P("x", None))
    whole = jax.NamedSharding(mesh, jax.P())
    adapter = adapters["up/kernel"]
    adapters = {
        "up/kernel": jax.device_put(adapter, {"a": rows, "b": whole, "scale": rows})
    }
    weight = frozen["up"]["kernel"]
    frozen["up"] = {
        "kernel": jax.device_put(weight, jax.tree.map(lambda _: rows, weight)),
        "bias": jax.device_put(frozen["up"]["bias"], whole),
    }
    found = finetuning.merge(adapters, frozen)["up"]["kernel"].codes
    np.testing.assert_array_equal(found, expected)
    assert found.sharding.is_equivalent_to(rows, 2)

    @jax.jit
    def gradient(adapters, frozen):
        def loss(adapters):
            return jnp.sum(finetuning.weights(adapters, frozen)["up"]["kernel"] ** 2)

        return jax.grad(loss)(adapters)["up/kernel"]["a"]

    assert gradient(adapters, frozen).sharding.is_equivalent_to(rows, 2)


def deep(params, tokens):
    """A model with a stack of layers, and weights in all sorts of forms."""
    x = params["embedding"][tokens]  # a look-up, no product

    def layer(x, kernels):
        up, down = kernels
        hidden = jax.checkpoint(lambda x: jnp.tanh(x @ up.astype(jnp.float32)))(x)
        return x + jax.jit(jnp.matmul)(hidden, down.reshape(hidden.shape[-1], -1)), None

    x, _ = jax.lax.scan(layer, x, (params["up"], params["down"]))
    x = x @ jnp.transpose(params["embedding"])  # tied
    return x + jnp.sum(params["norms"] * params["up"][:, 0, 0])


def deep_params(rng):
    shapes = {"embedding": (32, 16), "up": (3, 16, 32), "down": (3, 32, 16)}
    params = {
        name: jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)
        for name, shape in shapes.items()
    }
    return params | {"norms": jnp.ones(3)}


@pytest.mark.parametrize("form", ["tef,efg->teg", "efg,tef->egt", "tef,efg->tg"])
def test_factors_beside_codes_multiply_the_input_along_all_axes(rng, form):
    w, x = rng.standard_normal((3, 8, 4)), rng.standard_normal((5, 3, 8))
    w, x = jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)
    codes = cage.quantize(w, cage.int4(axis=-2))
    first = form.startswith("efg")

    def apply(params, x):
        return jnp.einsum(form, *((params["w"], x) if first else (x, params["w"])))

    rules = cage.Rules([("w", cage.int4(axis=-2))])
    adapters, frozen = finetuning.low_rank({"w": codes}, rules, rank=2, alpha=3.0)
    adapters = moved(adapters, rng)
    found, pull = jax.vjp(
        lambda each: finetuning.adapted(apply)(each, frozen, x), adapters
    )
    a, b = (np.float64(adapters["w"][name]) for name in "ab")
    sum_ = np.float64(cage.dequantize(codes)) + 1.5 * a @ b
    operands = (sum_, np.float64(x)) if first else (np.float64(x), sum_)
    np.testing.assert_allclose(found, np.einsum(form, *operands), atol=1e-5)
    # The gradient of a sum of all outputs.
    reach = np.float64(x).sum(0)[..., None] * np.ones(4)
    gradient = pull(jnp.ones_like(found))[0]["w"]["a"]
    expected = 1.5 * reach @ np.swapaxes(b, -1, -2)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_codes_are_multiplied_as_integers_where_inputs_are_quantized(rng):
    params, tokens = deep_params(rng), jnp.arange(8)
    inputs = cage.int8(axis=-1)
    table = [("norms", None), ("embedding", cage.int4(axis=-1), inputs)]
    rules = cage.Rules([*table, (".*", cage.int4(axis=-2), inputs)])
    adapters, frozen = finetuning.low_rank(cage.quantize(params, rules), rules)
    adapters = moved(adapters, rng)

    def loss(apply):
        return lambda *pair: jnp.sum(apply(*pair, tokens) ** 2)

    in_low_bits = loss(finetuning.adapted(deep, rules))
    of_values = loss(finetuning.adapted(cage.quantize_activations(deep, rules)))
    integers = "preferred_element_type=int32"  # of both products in the scan
    assert str(jax.make_jaxpr(in_low_bits)(adapters, frozen)).count(integers) == 2
    assert integers not in str(jax.make_jaxpr(of_values)(adapters, frozen))
    found, expected = (
        jax.jit(jax.value_and_grad(each))(adapters, frozen)
        for each in (in_low_bits, of_values)
    )
    for one, other in zip(*map(jax.tree.leaves, (found, expected))):
        # A rounded input may be on the other side of a tie behind another sum.
        size = np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=2e-3 * size, rtol=2e-3)


@pytest.mark.parametrize("start", ["weights", "codes"])
def test_weights_are_made_where_they_are_used(rng, start):
    params, tokens = deep_params(rng), jnp.arange(8)
    rules = cage.Rules(
        [
            (r"up", cage.int4(axis=1, group_size=8)),  # an axis from the start
            (r"down", cage.int4(axis=(-2,), group_size=(8,))),
            (r"embedding", cage.int4(axis=-1)),
            (r".*", None),
        ]
    )
    if start == "codes":
        params = cage.quantize(params, rules)
    adapters, frozen = finetuning.low_rank(params, rules, store="int8")
    adapters = moved(adapters, rng)

    def loss(logits):
        return jnp.sum(logits**2)

    def at_once(adapters, frozen):
        return loss(deep(finetuning.weights(adapters, frozen), tokens))

    def where_used(adapters, frozen):
        return loss(finetuning.adapted(deep)(adapters, frozen, tokens))

    expected, found = (
        jax.jit(jax.value_and_grad(each))(adapters, frozen)
        for each in (at_once, where_used)
    )
    # Gradients of a weight that is used twice are summed in another order.
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(
            one, other, rtol=1e-4, atol=1e-5 * float(jnp.abs(other).max())
        ),
        found,
        expected,
    )


def test_no_weight_is_kept_for_the_backward_pass(rng):
    params, tokens = deep_params(rng), jnp.arange(8)
    rules = cage.Rules([(r"up|down", cage.int4(axis=-2)), (r".*", None)])
    adapters, frozen = finetuning.low_rank(params, rules, store="int8", rank=2)

    def kept(function):
        _, backward = jax.vjp(lambda adapters: function(adapters, frozen), adapters)
        floats = [x for x in jax.tree.leaves(backward) if x.dtype == jnp.float32]
        return {x.shape for x in floats} & {(3, 16, 32), (3, 32, 16), (32, 16)}

    assert kept(lambda *pair: deep(finetuning.weights(*pair), tokens).sum())
    # Only what is not adapted is there in float32.
    found = kept(lambda *pair: finetuning.adapted(deep)(*pair, tokens).sum())
    assert found <= {(32, 16)}


def test_a_module_is_no_function(rng):
    nn = pytest.importorskip("flax.linen", reason="the module")
    with pytest.raises(TypeError, match="`function` must be a function"):
        finetuning.adapted(nn.Dense(4))


def test_bfloat16_parameters_keep_their_dtype(rng):
    params, rules = params_of(rng, dtype=jnp.bfloat16), rules_of(cage.int4())
    adapters, frozen = finetuning.low_rank(params, rules)
    assert {each.dtype for each in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    found = finetuning.weights(adapters, frozen)
    expected = cage.fake_quant(params, rules)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found["up"]["kernel"].dtype == jnp.bfloat16


def test_the_same_key_gives_the_same_adapters(rng):
    params, rules = params_of(rng), rules_of(cage.int4())
    start = functools.partial(finetuning.low_rank, params, rules)
    first, second = (start(key=jax.random.key(1))[0]["up/kernel"]["a"] for _ in "ab")
    np.testing.assert_array_equal(first, second)
    assert (start()[0]["up/kernel"]["a"] != first).any()
    # Of 512 normal numbers of variance 1/4.
    assert 0.45 < float(jnp.std(first)) < 0.55


def test_a_scale_of_the_other_sign_becomes_nan(rng):
    params, rules = params_of(rng), rules_of(cage.int4())
    adapters, frozen = finetuning.low_rank(params, rules)
    scale = adapters["up/kernel"]["scale"]
    adapters["up/kernel"]["scale"] = scale.at[0, 0].multiply(-1)
    kernel = finetuning.weights(adapters, frozen)["up"]["kernel"]
    assert jnp.isnan(kernel[:, 0]).all()
    assert not jnp.isnan(kernel[:, 1:]).any()


def test_bad_arguments(rng):
    params, rules = params_of(rng), rules_of(cage.int4())
    broken = {"kernel": params["up"]["kernel"].at[0, 0].set(jnp.nan)}
    codeless = Codeless()
    for arguments, options, text in (
        ((params, [("kernel", "int4")]), {}, "`rules` must be Rules"),
        ((params, rules), {"rank": 0}, "`rank` must be at least 1; got 0"),
        ((params, rules), {"rank": 9}, "`up/kernel`: `rank` must be at most the shor"),
        ((params, rules), {"alpha": 0}, "`alpha` must be"),
        ((params, rules), {"store": "int4"}, "`store` must be one of"),
        ((params, rules), {"units": "w"}, "`units` must be one of"),
        ((params, rules), {"scale": "s"}, "`scale` must be one of"),
        (
            (params, rules_of(cage.int8())),
            {"store": "int8"},
            "`up/kernel`: `store` 'int8' must divide",
        ),
        ((broken, rules), {}, "`kernel`: `params` must have finite values"),
        ((params, rules_of(codeless)), {}, "`up/kernel`: `low_rank` needs a quantizer"),
        (
            (params, cage.Rules([("kernel", "int4")])),
            {},
            "no parameter is quantized by .* such as 'up/kernel'",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            finetuning.low_rank(*arguments, **options)
    adapters, frozen = finetuning.low_rank(params, rules)
    with pytest.raises(ValueError, match="`adapters` must have an entry for each"):
        finetuning.weights({"kernel": adapters["up/kernel"]}, frozen)
    other = adapters["up/kernel"] | {"b": jnp.zeros((4, 1))}  # which would broadcast
    with pytest.raises(ValueError, match=r"`up/kernel`: `adapters` must be those of"):
        finetuning.weights({"up/kernel": other}, frozen)
    moved = adapters["up/kernel"] | {
        "b": adapters["up/kernel"]["b"].at[0, 0].set(jnp.nan)
    }
    with pytest.raises(ValueError, match=r"`up/kernel/b`: `adapters` must have finite"):
        finetuning.merge({"up/kernel": moved}, frozen)


class Codeless(cage.quantizers.codeless.CodelessQuantizer):
    """Values without codes."""

    bits, idempotent = 4, True

    def fake_quant(self, x):
        return x

    def storage_bits(self, shape, scale_dtype=None):
        return 4

    def __str__(self):
        return "codeless"
