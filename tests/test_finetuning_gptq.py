"""GPTQ: codes against the formula in float64, and the programs it goes through."""

import dataclasses
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from scipy.linalg import hadamard

import cage_jax as cage
from cage_jax.finetuning.columns import Grids, round_columns

INPUTS, OUTPUTS, ROWS = 32, 8, 96
INT4 = cage.int4(group_size=8)


def some(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(seed, rows=ROWS, inputs=INPUTS):
    """Inputs that depend on each other, so that errors are worth spreading."""
    return some(seed, rows, 6) @ some(9, 6, inputs) + some(seed + 1, rows, inputs) / 3


def multiply(params, x):
    return x @ params["w"]


def run(function, quantizer, params, *batches, pattern=".*", **options):
    rules = cage.Rules([(pattern, quantizer)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fewer rows.*")
        return cage.gptq(function, rules, params, [*batches], **options)


# --- the formula, in float64 ----------------------------------------------------------


def absmax(end, levels=None, rounded=lambda scale: scale):
    """Returns a rule: the scale, the zero point, and codes that are forced."""

    def find(w):
        scale = rounded(np.abs(w).max(0) / end)
        forced = np.full(w.shape, np.nan)
        first = np.abs(w).argmax(0), np.arange(w.shape[1])
        forced[first] = nearest(w[first] / scale, levels)
        return scale, 0, forced

    return find, levels


def minmax(w):
    top, bottom = np.maximum(w.max(0), 0), np.minimum(w.min(0), 0)
    scale = (top - bottom) / 15
    zero = np.clip(np.round(-8 - bottom / scale), -8, 7)
    forced, columns = np.full(w.shape, np.nan), np.arange(w.shape[1])
    for row in (w.argmax(0), w.argmin(0)):
        forced[row, columns] = nearest(w[row, columns] / scale + zero, np.arange(-8, 8))
    return scale, zero, forced


def nearest(position, levels):
    return levels[np.abs(position[..., None] - levels).argmin(-1)]


def by_the_formula(w, x, rule, levels, group, damping=0.01):
    """GPTQ as a loop over inputs; returns code values and positions before rounding."""
    w, x = w.astype(np.float64), x.astype(np.float64)
    h = x.T @ x
    h += damping * np.diag(h).mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes, positions = np.zeros(w.shape), np.zeros(w.shape)
    for i in range(len(w)):
        if i % group == 0:
            scale, zero, forced = rule(w[i : i + group])
        positions[i] = w[i] / scale + zero
        code = nearest(positions[i], levels)
        codes[i] = np.where(np.isnan(forced[i % group]), code, forced[i % group])
        error = (w[i] - (codes[i] - zero) * scale) / upper[i, i]
        w[i:] -= np.outer(upper[i, i:], error)
    return codes, positions


E2M1 = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
W = some(0, INPUTS, OUTPUTS)
W[2, 3] = 4  # sets the divisor of NVFP4 before there are errors
DIVISOR = 448 * 6 / np.abs(W).max()


def e4m3(scale):
    return (scale * DIVISOR).astype(ml_dtypes.float8_e4m3fn).astype(float) / DIVISOR


def e8m0(scale):
    return 2.0 ** (np.floor(np.log2(6 * scale)) - 2)


INT3, NF4 = np.arange(-3, 4), cage.nf4().format.values
FORMULAS = {
    "channel": (cage.int3(), *absmax(3, INT3), INPUTS),
    "group": (cage.int3(group_size=8), *absmax(3, INT3), 8),
    "zero point": (
        cage.int4(group_size=16, symmetric=False),
        minmax,
        np.arange(-8, 8),
        16,
    ),
    "nf4": (cage.nf4(group_size=16), *absmax(1, NF4), 16),
    "mxfp4": (cage.mxfp4(), *absmax(6, E2M1, e8m0), 32),
    "nvfp4": (cage.nvfp4(), *absmax(6, E2M1, e4m3), 16),
    "rotated": (cage.int3(group_size=8, hadamard=8), *absmax(3, INT3), 8),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_codes_are_those_of_the_formula(name):
    quantizer, rule, levels, group = FORMULAS[name]
    x = correlated(1)
    found = run(multiply, quantizer, {"w": W}, (x[:48],), (x[48:],))["w"]
    w = W
    if quantizer.hadamard:
        rotation = np.kron(np.eye(INPUTS // 8), hadamard(8) / np.sqrt(8))
        w, x = rotation @ W, x @ rotation
    expected, positions = by_the_formula(w, x, rule, levels, group)
    codes = np.asarray(quantizer.format.decode(found.codes, jnp.float32), np.float64)
    wrong = ~np.isclose(codes, expected, atol=1e-6)
    # A tie may go the other way in float32, and all after it then differs.
    for column in np.flatnonzero(wrong.any(0)):
        first = wrong[:, column].argmax()
        middles = (levels[1:] + levels[:-1]) / 2
        assert np.abs(middles - positions[first, column]).min() < 1e-3
    assert wrong.any(0).sum() <= 1


QUANTIZERS = {name: formula[0] for name, formula in FORMULAS.items()} | {
    "q4_0": cage.q4_0(axis=-2),
    "q4_1": cage.q4_1(axis=-2),
    "tensor": cage.int4(axis=None),
    "outputs": cage.int4(axis=-1, group_size=4),
    "searched": cage.int4(scale=cage.scales.Searched(count=4), group_size=16),
    "learned": cage.lsq(4),
    "four over six": cage.nvfp4(scale=cage.scales.FourOverSix()),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_training_starts_on_the_grid(name):
    quantizer, x = QUANTIZERS[name], correlated(1)
    assert quantizer.idempotent
    w = W[::-1]  # the largest number is given errors of many inputs
    rules, params = cage.Rules([("w", quantizer)]), {"w": w}
    if name == "learned":
        params = cage.with_grids(params, rules)
    codes = run(multiply, quantizer, params, (x,))
    start = cage.dequantize(codes)
    again = cage.fake_quant(start, rules)
    start, again, plain = (
        np.asarray(tree.get("params", tree)["w"], np.float64)
        for tree in (start, again, cage.fake_quant(params, rules))
    )
    # A rotation sums; without it nothing is left to rounding.
    tolerance = 1e-6 if quantizer.hadamard else 0
    np.testing.assert_allclose(again, start, rtol=0, atol=tolerance)
    errors = [np.linalg.norm(x @ (each - w)) for each in (start, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_grids_that_other_groups_depend_on_are_kept():
    kept, forced = np.zeros((1, 2, OUTPUTS)), np.full((1, *W.shape), np.nan)
    kept[0, 1, 3], forced[0, 20] = 448, -4
    kept, forced = (jnp.asarray(x, jnp.float32) for x in (kept, forced))
    x = correlated(1)
    cell = dataclasses.replace(
        cage.nvfp4(), axis=0, group_size=None, scale_type=cage.scale_types.Float8(False)
    )
    known = Grids(cage.scales.Grid(kept), None, forced)
    values, grid = round_columns(
        W[None] * 400, (x.T @ x)[None], known, 0.01, quantizer=cell, group=16
    )
    assert (values[0, 20, 3], grid.scale[0, 1, 3]) == (-4, 448)
    # The numbers of other groups count for nothing.
    assert (values[0, 20] == -4).sum() < OUTPUTS
    assert (grid.scale != 448).sum() > OUTPUTS


@pytest.mark.parametrize(
    "quantizer", [cage.ternary(), cage.quest(4, hadamard=8)], ids=str
)
def test_scales_that_are_not_found_again_stay(quantizer):
    found = run(multiply, quantizer, {"w": W}, (correlated(1),))["w"]
    plain = cage.quantize(W, quantizer)  # of whole channels, so before any error
    assert not quantizer.idempotent
    np.testing.assert_array_equal(found.scale, plain.scale)


def test_learned_scales_start_from_those_of_codes():
    codes = run(multiply, INT4, {"w": W, "bias": W[0]}, (correlated(1),), pattern="w")
    rules = cage.Rules([("w", cage.lsq(4, axis=-2, group_size=8, narrow=True))])
    variables = cage.with_grids(codes, rules)
    start = cage.dequantize(codes)
    np.testing.assert_array_equal(variables["params"]["w"], start["w"])
    np.testing.assert_array_equal(variables["params"]["bias"], W[0])
    again = cage.fake_quant(variables, rules)["params"]["w"]
    np.testing.assert_array_equal(again, start["w"])
    for wrong in (cage.lsq(3, axis=-2, group_size=8), cage.lsq(4, narrow=True)):
        with pytest.raises(ValueError, match=r"`w`: `(params|grid)` must have"):
            cage.with_grids(codes, cage.Rules([("w", wrong)]))


# --- programs -------------------------------------------------------------------------


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
    module, calls = sys.modules["cage_jax.finetuning.gptq"], []
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
    "nan": (multiply, [(np.full((8, 4), np.nan),)], "`w`: `batches` must give finite"),
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
