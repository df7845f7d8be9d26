"""GPTQ: the programs it goes through."""

import dataclasses
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_oracle import (
    INPUTS,
    INT3,
    INT4,
    OUTPUTS,
    ROWS,
    W,
    absmax,
    by_the_formula,
    correlated,
    multiply,
    run,
    some,
)
from jax import lax

import cage_jax as cage


def codes_of(w, x, quantizer=INT4):
    return np.asarray(run(multiply, quantizer, {"w": w}, (x,))["w"].codes, int)


def assert_codes(found, expected):
    np.testing.assert_array_equal(np.asarray(found, int), expected)


def test_layers_see_inputs_from_the_layers_before():
    x, stack = correlated(1), some(2, 3, INPUTS, INPUTS)

    def layer(x, w):
        return jnp.tanh(x @ w / 8)

    expected = []
    for w in stack:
        found = run(multiply, INT4, {"w": w}, (x,))["w"]
        expected.append(np.asarray(found.codes, int))
        x = layer(x, cage.dequantize(found))

    def unrolled(params, x):
        for w in params.values():
            x = jax.checkpoint(jax.jit(layer))(x, w)
        return x

    def scanned(params, x):
        return lax.scan(lambda x, w: (layer(x, w), None), x, params["w"])[0]

    def backward(params, x):
        def step(x, w):
            return layer(x, w.T), x.sum()

        return lax.scan(step, x, params["w"], reverse=True)

    x = correlated(1)
    flat = run(unrolled, INT4, dict(enumerate(stack)), (x[:48],), (x[48:],))
    assert_codes([flat[n].codes for n in range(3)], expected)
    stacked = cage.int4(axis=-2, group_size=8)
    found = run(scanned, stacked, {"w": stack}, (x[:48],), (x[48:],))["w"]
    assert_codes(found.codes, expected)
    turned = {"w": stack[::-1].transpose(0, 2, 1)}
    found = run(backward, cage.int4(axis=-1, group_size=8), turned, (x,))["w"]
    assert_codes(found.codes.transpose(0, 2, 1)[::-1], expected)


def agree(found, expected):
    """Whether codes are those of the formula, but for a column after a tie."""
    codes = np.asarray(found.codes, np.int32)
    return (codes != expected).any(0).sum() <= 1


def test_a_recurrent_weight_is_rounded_for_all_its_inputs():
    square, steps = some(3, INPUTS, INPUTS) / 8, 4
    x = some(4, steps, ROWS, INPUTS)

    def recurrent(params, x):
        def step(h, row):
            h = jnp.tanh(row + h @ params["w"])
            return h, None

        return lax.scan(step, jnp.zeros_like(x[0]), x)[0]

    def twice(params, x):
        return jnp.tanh(x[0] @ params["w"]) @ params["w"]

    states = [np.zeros((ROWS, INPUTS))]
    for row in x[:-1]:
        states.append(np.tanh(row + states[-1] @ square.astype(np.float64)))
    both = [x[0], np.tanh(x[0] @ square)]
    for function, inputs in ((recurrent, states), (twice, both)):
        found = run(function, cage.int3(), {"w": square}, (x,))["w"]
        inputs = np.concatenate(inputs)
        expected, _ = by_the_formula(square, inputs, *absmax(3, INT3), INPUTS)
        assert agree(found, expected)


def test_weights_in_other_layouts():
    x, w = correlated(1), some(2, INPUTS, OUTPUTS)
    expected = codes_of(w, x)

    def heads(params, x):
        return jnp.einsum("td,hkd->thk", x, params["w"].astype(jnp.float32))

    def split(params, x):
        left, right = jnp.split(params["w"].T, [3], axis=1)
        return x @ left, x @ right

    def merged(params, x):
        return jnp.einsum("tab,abo->to", x.reshape(-1, 4, 8), params["w"])

    found = run(
        heads, cage.int4(axis=-1, group_size=8), {"w": w.T.reshape(2, 4, -1)}, (x,)
    )
    assert_codes(found["w"].codes.reshape(OUTPUTS, INPUTS).T, expected)
    found = run(split, cage.int4(axis=-1, group_size=8), {"w": w.T}, (x,))
    assert_codes(found["w"].codes.T, expected)
    quantizer = cage.int4(axis=(0, 1), group_size=(1, 8))
    found = run(merged, quantizer, {"w": w.reshape(4, 8, -1)}, (x,))
    assert_codes(found["w"].codes.reshape(w.shape), expected)


def test_outputs_in_two_products_are_rounded_once():
    x, w = correlated(1), some(2, INPUTS, OUTPUTS)

    def overlapping(params, x):
        return x @ params["w"][:, :5], jnp.tanh(x) @ params["w"][:, 3:]

    found = run(overlapping, INT4, {"w": w}, (x,))["w"]
    assert_codes(found.codes[:, :5], codes_of(w, x)[:, :5])
    assert_codes(found.codes[:, 5:], codes_of(w, np.tanh(x))[:, 5:])


def test_experts_have_sums_of_their_own():
    x, stack = correlated(1), some(2, 3, INPUTS, OUTPUTS)
    owner = np.sort(np.random.default_rng(3).integers(0, 3, ROWS))
    expected = [codes_of(w, x[owner == n]) for n, w in enumerate(stack)]
    quantizer = cage.int4(axis=-2, group_size=8)

    def gathered(params, x, owner):
        return jnp.einsum("td,tdo->to", x, params["w"][owner])

    def ragged(params, x, sizes):
        return lax.ragged_dot(x, params["w"], sizes)

    def batched(params, x):
        return jnp.einsum("etd,edo->eto", x, params["w"])

    found = run(gathered, quantizer, {"w": stack}, (x, owner))
    assert_codes(found["w"].codes, expected)
    found = run(ragged, quantizer, {"w": stack}, (x, np.bincount(owner)))
    assert_codes(found["w"].codes, expected)
    masked = np.where((owner == np.arange(3)[:, None])[..., None], x, 0)
    found = run(batched, quantizer, {"w": stack}, (masked,))
    assert_codes(found["w"].codes, expected)


def test_a_convolution_is_a_product_of_its_windows():
    x, kernel = some(1, 2, 10, 4), some(2, 3, 4, OUTPUTS)

    def convolve(params, x):
        numbers = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            x, params["w"], (2,), [(1, 0)], dimension_numbers=numbers
        )

    padded = np.pad(x, [(0, 0), (1, 0), (0, 0)])
    windows = np.stack([padded[:, n : n + 3] for n in range(0, 9, 2)], 1)
    expected = codes_of(kernel.reshape(12, -1), windows.reshape(-1, 12), cage.int4())
    found = run(convolve, cage.int4(axis=(0, 1)), {"w": kernel}, (x,))["w"]
    assert_codes(found.codes.reshape(12, -1), expected)


def test_a_tied_embedding_is_rounded_for_its_product():
    table, tokens = some(1, 12, INPUTS), np.arange(96).reshape(8, 12) % 12
    quantizer = cage.int4(axis=-1, group_size=8)
    rules = cage.Rules([("table", quantizer)])

    def tied(params, tokens):
        x = jnp.tanh(params["table"][tokens])
        return x @ params["table"].T

    rounded = np.asarray(cage.fake_quant(table, quantizer))
    expected = codes_of(table.T, np.tanh(rounded[tokens]).reshape(-1, INPUTS))
    found = run(tied, quantizer, {"table": table}, (tokens,))["table"]
    assert_codes(found.codes.T, expected)
    looked_up = cage.gptq(
        lambda params, tokens: params["table"][tokens],
        rules,
        {"table": table},
        [(tokens,)],
    )
    plain = cage.quantize({"table": table}, rules)
    assert_codes(looked_up["table"].codes, np.asarray(plain["table"].codes, int))


def test_inputs_are_quantized_as_in_the_model():
    x, w = correlated(1), some(2, INPUTS, OUTPUTS)
    inputs = cage.int3(axis=-1)
    expected = codes_of(w, np.asarray(cage.fake_quant(x, inputs)))
    rules = cage.Rules([("w", INT4, inputs)])
    found = cage.gptq(multiply, rules, {"w": w}, [(x,)])["w"]
    assert_codes(found.codes, expected)
    found = cage.gptq(multiply, rules, {"w": w}, [(x,)], inputs=False)["w"]
    assert_codes(found.codes, codes_of(w, x))


@pytest.mark.parametrize("inputs", [None, cage.int3(axis=-1)])
def test_matrices_of_one_input_share_its_products(inputs, monkeypatch):
    module, calls = sys.modules["cage_jax.finetuning.gptq.gptq"], []
    products_of = module.products_of
    monkeypatch.setattr(
        module, "products_of", lambda x: calls.append(x.shape) or products_of(x)
    )
    rules = cage.Rules([("[qk]", INT4, inputs)])
    params = {"q": some(2, INPUTS, OUTPUTS), "k": some(3, INPUTS, OUTPUTS)}

    def both(params, x):
        return x @ params["q"], x @ params["k"]

    cage.gptq(both, rules, params, [(correlated(1),)])
    assert calls == [(1, ROWS, INPUTS)]


def test_an_input_that_is_always_zero_keeps_its_weights():
    x, w = correlated(1), some(2, INPUTS, OUTPUTS)
    x[:, 3] = 0
    found = run(multiply, cage.int8(), {"w": w}, (x,))
    np.testing.assert_allclose(cage.dequantize(found)["w"][3], w[3], atol=0.02)


def test_progress_is_told_for_each_matrix():
    told = []
    x, ws = correlated(1), {"a": some(2, INPUTS, 4), "b": some(3, INPUTS, 4)}

    def sum_of_both(params, x):
        return x @ params["a"] + x @ params["b"]

    run(sum_of_both, INT4, ws, (x,), progress=lambda *each: told.append(each))
    half = INPUTS * 4
    assert told == [("a", half, 2 * half), ("b", 2 * half, 2 * half)]


# --- errors ---------------------------------------------------------------------------


def looped(params, x):
    return lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ params["w"], x)


def masked(params, x):
    return x @ jnp.maximum(params["w"], 0)


ERRORS = {
    "none": (multiply, (), "`batches` must have a batch"),
    "array": (multiply, [some(1, 4, 4)], "tuples of arguments; got one of ndarray"),
    "shapes": (
        multiply,
        [(some(1, 8, 4),), (some(1, 7, 4),)],
        "same shapes.*in batch 1.*Cut them",
    ),
    "nan": (multiply, [(np.full((8, 4), np.nan),)], "`w`: `batches` must give inputs"),
    "unused": (lambda params, x: x, [(some(1, 8, 4),)], "`w`: `function` must use"),
    "while": (looped, [(some(1, 8, 4),)], "`w`: its products .* behind `while`"),
    "mask": (masked, [(some(1, 8, 4),)], "`w`: its products .* behind `max`"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_parameter_and_the_operation(name):
    function, batches, text = ERRORS[name]
    rules, params = cage.Rules([("w", "int4")]), {"w": some(0, 4, 4)}
    with pytest.raises((ValueError, TypeError), match=text):
        cage.gptq(function, rules, params, batches)


def test_a_stack_of_which_one_layer_is_used():
    x, stack = correlated(1), some(2, 3, INPUTS, OUTPUTS)
    rules = cage.Rules([("w", cage.int4(axis=-2, group_size=8))])

    def second(params, x):
        return x @ params["w"][1]

    with pytest.raises(ValueError, match="`w`: a part of it is in no product"):
        cage.gptq(second, rules, {"w": stack}, [(x,)])
    with pytest.warns(UserWarning, match="rounded to the nearest"):
        found = cage.gptq(second, rules, {"w": stack}, [(x,)], strict=False)
    expected = np.asarray(cage.quantize({"w": stack}, rules)["w"].codes, int)
    expected[1] = codes_of(stack[1], x)
    assert_codes(found["w"].codes, expected)


def test_stochastic_rounding_is_refused():
    quantizer = dataclasses.replace(INT4, rounding="stochastic")
    with pytest.raises(ValueError, match="`w`: `rules` must round to the nearest"):
        run(multiply, quantizer, {"w": W}, (correlated(1),))


def test_what_is_out_of_reach_may_be_rounded():
    rules, params = cage.Rules([("w", "int4")]), {"w": some(0, 4, 4)}
    with pytest.warns(UserWarning, match="behind `while`.*rounded to the nearest"):
        found = cage.gptq(looped, rules, params, [(some(1, 8, 4),)], strict=False)
    plain = cage.quantize(params, rules)
    assert_codes(found["w"].codes, np.asarray(plain["w"].codes, int))


def test_too_few_rows_are_told_with_numbers():
    rules, params = cage.Rules([("w", "int4")]), {"w": some(0, 8, 4)}
    with pytest.warns(UserWarning, match="such as 6 rows for the 8 inputs of `w`"):
        cage.gptq(multiply, rules, params, [(some(1, 3, 8),)] * 2)


def test_scales_along_outputs_by_default_are_told():
    x, rules = correlated(1), cage.Rules([("w", cage.int3())])
    params = {"w": some(2, OUTPUTS, INPUTS)}

    def transposed(params, x):
        return x @ params["w"].T

    with pytest.warns(UserWarning, match="`w`: .* sums over axis -1. Use rules = cage"):
        cage.gptq(transposed, rules, params, [(x,)])
    resolved = cage.resolve(rules, transposed, params, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cage.gptq(transposed, resolved, params, [(x,)])
        cage.gptq(multiply, rules, {"w": params["w"].T}, [(x,)])


@pytest.mark.parametrize("rounded", [True, False])
def test_a_stack_takes_the_memory_of_its_codes_and_of_one_layer(rounded):
    layers, width = 16, 64
    params = {"w": jnp.asarray(some(2, layers, width, width))}
    rules = cage.Rules([("w", cage.int3(axis=-2, group_size=16))])
    live, x = [], jnp.asarray(some(1, 2 * width, width))

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    def note(*_):
        live.append(sum(x.nbytes for x in jax.live_arrays()))

    note()
    found = cage.gptq(apply, rules, params, [(x,)], rounded=rounded, progress=note)
    note()
    assert len(live) == layers + 2
    # A quarter of the stack are its codes, and some layers of 1/16 are at work.
    result = 0 if rounded else found["w"].nbytes
    assert max(live) - live[0] < result + params["w"].nbytes
