"""The axes of weights, found in programs; which ones are right is told by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracles import absmax_round, rotate

import cage_jax as cage

INT4 = cage.Rules([(".*", "int4")])
IDS = jax.ShapeDtypeStruct((6,), jnp.int32)
MASK = jax.ShapeDtypeStruct((32, 32), jnp.float32)


def shape(*lengths):
    return jax.ShapeDtypeStruct(lengths, jnp.float32)


X = shape(6, 32)


def resolved(rules, function, params, *args):
    """The axes by path, from 0, that `resolve` finds."""
    rules = cage.resolve(rules, function, params, *args)
    axes = {path: rules.match(path).axis for path in params}
    tuples = {
        path: axis if isinstance(axis, tuple) else (axis,)
        for path, axis in axes.items()
    }
    assert all(axis < 0 for axes in tuples.values() for axis in axes)
    return {
        path: tuple(axis + len(params[path].shape) for axis in axes)
        for path, axes in tuples.items()
    }


def convolved(numbers, **settings):
    def convolve(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, **settings
        )

    return convolve


def transposed_kernel(p, x):
    return lax.conv_transpose(x, p["w"], (2, 2), "SAME", transpose_kernel=True)


def scanned(of):
    return lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, of(p["w"]))[0]


def indexed(p, x):
    def step(i, h):
        return h @ lax.dynamic_index_in_dim(p["w"], i, keepdims=False)

    return lax.fori_loop(0, 3, step, x)


def by_expert(p, x):
    return lax.ragged_dot(x, p["w"], jnp.array([2, 0, 3, 1], jnp.int32))


def einsum(text, of=lambda w: w):
    return lambda p, x, *_: jnp.einsum(text, x, of(p["w"]))


NHWC = ("NHWC", "HWIO", "NHWC")
# By name: a function, the weight's shape, other arguments, and the axes that its
# product sums over.
ONE_WEIGHT = {
    "a matrix": (lambda p, x: x @ p["w"], (32, 32), [X], (0,)),
    "transposed": (lambda p, x: x @ p["w"].T, (32, 32), [X], (1,)),
    "the first factor": (lambda p, x: p["w"] @ x.T, (32, 32), [X], (1,)),
    "heads": (einsum("td,dhk->thk"), (32, 4, 8), [X], (0,)),
    "from heads": (einsum("thk,hkd->td"), (4, 8, 32), [shape(6, 4, 8)], (0, 1)),
    "heads, outputs first": (einsum("td,hkd->thk"), (4, 8, 32), [X], (2,)),
    "outputs split": (
        einsum("td,dhk->thk", lambda w: w.reshape(32, 4, 8)),
        *((32, 32), [X], (0,)),
    ),
    "inputs split": (
        einsum("thk,hkd->td", lambda w: w.reshape(4, 8, 32)),
        *((32, 32), [shape(6, 4, 8)], (0,)),
    ),
    "outputs merged": (einsum("td,df->tf", lambda w: w.reshape(32, -1)), (32, 4, 8))
    + ([X], (0,)),
    "inputs merged": (einsum("td,df->tf", lambda w: w.reshape(-1, 32)), (4, 8, 32))
    + ([X], (0, 1)),
    "moved and merged": (
        einsum("td,df->tf", lambda w: jnp.moveaxis(w, 1, 0).reshape(-1, 32)),
        *((8, 4, 32), [X], (0, 1)),
    ),
    "a part of the columns": (lambda p, x: x @ p["w"][:, 8:24], (32, 48), [X], (0,)),
    "a part of the rows": (lambda p, x: x @ p["w"].T[8:40, ::2], (32, 48), [X], (1,)),
    "reversed": (lambda p, x: x @ p["w"][::-1], (32, 32), [X], (0,)),
    "layers": (scanned(lambda w: w), (3, 32, 32), [X], (1,)),
    "layers in the middle": (
        scanned(lambda w: jnp.moveaxis(w, 1, 0)),
        *((32, 3, 32), [X], (0,)),
    ),
    "layers, outputs first": (
        scanned(lambda w: jnp.swapaxes(w, 1, 2)),
        *((3, 32, 32), [X], (2,)),
    ),
    "a layer by a constant": (lambda p, x: x @ p["w"][1], (3, 32, 32), [X], (1,)),
    "a layer by a counter": (indexed, (3, 32, 32), [X], (1,)),
    "members": (
        lambda p, x: jax.vmap(jnp.matmul, in_axes=(0, 1))(x, p["w"]),
        *((32, 3, 32), [shape(3, 6, 32)], (0,)),
    ),
    "members of one input": (
        lambda p, x: jax.vmap(lambda w: x @ w.T, in_axes=1)(p["w"]),
        *((32, 3, 32), [X], (2,)),
    ),
    "unstacked": (
        lambda p, x: [x @ w for w in jnp.unstack(p["w"], axis=1)],
        *((32, 3, 32), [X], (0,)),
    ),
    "ragged experts": (by_expert, (4, 32, 32), [X], (1,)),
    "gathered experts": (
        lambda p, x, ids: jnp.einsum("td,tdf->tf", x, p["w"][ids]),
        *((4, 32, 32), [X, IDS], (1,)),
    ),
    "gathered experts, outputs first": (
        lambda p, x, ids: jnp.einsum("td,tfd->tf", x, jnp.take(p["w"], ids, axis=0)),
        *((4, 32, 32), [X, IDS], (2,)),
    ),
    "a convolution": (convolved(NHWC), (3, 3, 16, 32), [shape(2, 5, 5, 16)], (0, 1, 2)),
    "channels first": (
        convolved(("NCHW", "OIHW", "NCHW")),
        *((32, 16, 3, 3), [shape(2, 16, 5, 5)], (1, 2, 3)),
    ),
    "depthwise": (
        convolved(NHWC, feature_group_count=16),
        *((3, 3, 1, 16), [shape(2, 5, 5, 16)], (0, 1, 2)),
    ),
    "a kernel of the forward pass": (
        transposed_kernel,
        *((3, 3, 16, 32), [shape(2, 5, 5, 32)], (0, 1, 3)),
    ),
    "gathered experts of each token": (
        lambda p, x, ids: jax.vmap(lambda x, i: x @ p["w"][i].T)(x, ids),
        *((4, 32, 32), [X, IDS], (2,)),
    ),
    "multiplied with a constant": (
        lambda p, x: x @ jnp.einsum("oi,oj->ij", p["w"], jnp.eye(32) * 2),
        *((32, 32), [X], (1,)),
    ),
    "masked": (lambda p, x, m: x @ (p["w"] * m).T, (32, 32), [X, MASK], (1,)),
    "with a change that is given": (
        lambda p, x, m: x @ (p["w"] + m).T,
        *((32, 32), [X, MASK], (1,)),
    ),
    "chosen": (
        lambda p, x, m: x @ jnp.where(m > 0, p["w"], 0.0).T,
        *((32, 32), [X, MASK], (1,)),
    ),
    "scaled by itself": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)[None]).T,
        *((32, 32), [X], (1,)),
    ),
    "looked up": (lambda p, ids: p["w"][ids], (32, 32), [IDS], (1,)),
    "looked up among columns": (lambda p, ids: p["w"][:, ids], (32, 32), [IDS], (0,)),
    "looked up and tied": (
        lambda p, ids: p["w"][ids] @ p["w"].T,
        *((32, 32), [IDS], (1,)),
    ),
    "called": (
        jax.jit(lambda p, x: jax.checkpoint(jnp.matmul)(x, p["w"].T)),
        *((32, 32), [X], (1,)),
    ),
    "taken by a branch": (
        lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p["w"].T, lambda: x),
        *((32, 32), [X], (1,)),
    ),
    "chosen by a branch": (
        lambda p, x: x @ lax.cond(x.sum() > 0, lambda w: w, lambda w: -w, p["w"]).T,
        *((32, 32), [X], (1,)),
    ),
    "behind a barrier": (
        lambda p, x: x @ lax.optimization_barrier(p["w"]).T,
        *((32, 32), [X], (1,)),
    ),
    "quantized there": (
        lambda p, x: x @ cage.fake_quant(p["w"], cage.int4(axis=-1)).T,
        *((32, 32), [X], (1,)),
    ),
}


@pytest.mark.parametrize("name", ONE_WEIGHT)
def test_what_a_product_sums_over(name):
    function, of_weight, args, axes = ONE_WEIGHT[name]
    params = {"w": shape(*of_weight)}
    assert resolved(INT4, function, params, *args) == {"w": axes}


def test_several_parameters_in_one_product():
    params = {"w": shape(32, 48), "a": shape(32, 4), "b": shape(4, 48)}

    def merged(p, x):
        return x @ (p["w"] + p["a"] @ p["b"])

    def beside(p, x):
        return x @ p["w"] + x @ p["a"] @ p["b"]

    def transposed(p, x):
        return x @ (p["w"].T + p["b"].T @ p["a"].T).T

    expected = {"w": (0,), "a": (0,), "b": (0,)}
    for function in (merged, beside, transposed):
        assert resolved(INT4, function, params, X) == expected, function

    parts = {"a": shape(32, 8), "b": shape(24, 32)}

    def joined(p, x):
        return x @ jnp.concatenate([p["a"], p["b"].T], axis=1)

    assert resolved(INT4, joined, parts, X) == {"a": (0,), "b": (1,)}

    def stacked(p, x):
        return scanned(lambda w: w)({"w": jnp.stack([p["a"], p["b"].T])}, x)

    def low_rank(p, x):
        pairs = jnp.stack([p["a"].T, 2 * p["a"].T])
        return jnp.einsum("td,ldf->tlf", x, pairs @ p["b"])

    parts = {"a": shape(4, 32), "b": shape(4, 9)}
    assert resolved(INT4, low_rank, parts, X) == {"a": (1,), "b": (0,)}

    square = {"a": shape(32, 32), "b": shape(32, 32)}
    assert resolved(INT4, stacked, square, X) == {"a": (0,), "b": (1,)}


def test_learned_latents_that_are_repeated_for_each_example_are_data():
    params = {"latents": shape(6, 32), "w": shape(32, 48)}

    def queries(p, x):
        latents = jnp.broadcast_to(p["latents"], (4, 6, 32))
        return (latents @ p["w"]) @ x.T

    rules = cage.Rules([("w", "int4", "int8"), (".*", None)])
    found = cage.resolve(rules, queries, params, shape(6, 48))
    assert found.match("w").axis == -2
    (product,) = cage.report(queries, found, params, shape(6, 48)).layers[1].inputs
    assert product.product.shape == (4, 6, 32)


def test_one_scale_for_each_matrix():
    rules = cage.Rules([(".*", cage.int8(axis=None))])
    for name, axes in (
        ("heads", (0, 1, 2)),
        ("from heads", (0, 1, 2)),
        ("layers", (1, 2)),
        ("layers in the middle", (0, 2)),
        ("members", (0, 2)),
        ("ragged experts", (1, 2)),
        ("gathered experts", (1, 2)),
        ("a convolution", (0, 1, 2, 3)),
    ):
        function, of_weight, args, _ = ONE_WEIGHT[name]
        found = resolved(rules, function, {"w": shape(*of_weight)}, *args)
        assert found == {"w": axes}, name


def test_the_first_product_decides_and_the_report_tells():
    params = {"w": shape(32, 32)}

    def tied(p, x):
        return (x @ p["w"].T) @ p["w"]

    assert resolved(INT4, tied, params, X) == {"w": (1,)}
    rules = cage.resolve(INT4, tied, params, X)
    (found,) = cage.report(tied, rules, params, X).findings
    assert found.startswith("w, weight: its products sum over different axes")
    assert found.endswith("If that product matters more, use axis=0.")
    other = cage.report(tied, cage.Rules([(".*", cage.int4(axis=0))]), params, X)
    assert other.findings[0].endswith("use axis=1.")


def test_what_is_resolved_stays():
    heads = {"w": shape(32, 4, 8)}
    once = cage.resolve(INT4, einsum("td,dhk->thk"), heads, X)
    other = cage.resolve(once, einsum("thk,dhk->td"), heads, shape(6, 4, 8))
    assert other == once and other.match("w").axis == -3
    assert once != INT4 and len({once, other, INT4}) == 2
    assert [*once] == [*INT4]

    named = cage.Rules([(".*", cage.int4(axis=-1))])
    assert resolved(named, ONE_WEIGHT["a matrix"][0], {"w": shape(32, 32)}, X) == {
        "w": (1,)
    }


def test_a_resolved_table_is_used_everywhere(rng):
    w = rng.standard_normal((32, 4, 8)).astype(np.float32)
    x = rng.standard_normal((6, 32)).astype(np.float32)
    function = einsum("td,dhk->thk")
    rules = cage.resolve(INT4, function, {"w": w}, x)
    expected = absmax_round(w, axis=0)
    np.testing.assert_allclose(
        cage.fake_quant({"w": w}, rules)["w"], expected, rtol=1e-6
    )
    codes = cage.quantize({"w": w}, rules)
    np.testing.assert_allclose(cage.dequantize(codes)["w"], expected, rtol=1e-6)
    found = cage.quantization_error({"w": w}, rules)["w"]
    np.testing.assert_allclose(found, w - expected, atol=1e-6)
    found = cage.low_bit(function)(codes, x)
    np.testing.assert_allclose(found, np.einsum("td,dhk->thk", x, expected), atol=1e-4)


def test_arguments_are_those_of_the_function():
    """Any number of them, by position or name, and some that are no arrays."""

    def apply(p, a, b, c, *, transposed, scale):
        x = (a + b + c) * scale
        return x @ (p["w"].T if transposed else p["w"])

    for transposed, axis in ((True, -1), (False, -2)):
        rules = cage.resolve(
            INT4, apply, {"w": shape(32, 32)}, X, X, X, transposed=transposed, scale=2.0
        )
        assert rules.match("w").axis == axis


def test_what_is_in_no_product():
    params = {"a": shape(2, 3, 4), "b": shape(2, 3, 4), "c": shape(32, 32)}

    def apply(p, x):
        return x @ p["c"] * p["a"].sum()

    with pytest.raises(ValueError, match="contracted") as raised:
        cage.resolve(INT4, apply, params, X)
    first, others = str(raised.value).splitlines()
    assert first.startswith("`a`: `axis` must be given, since it is in no product")
    assert others == "Nor are the axes of `b` known."


# --- groups and scales ----------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("block", [None, 32])
def test_a_group_over_several_axes(size, block, rng):
    w = rng.standard_normal((4, 64, 6)).astype(np.float32)
    quantizer = cage.int4(group_size=size, hadamard=block)
    rules = cage.Rules([("w", quantizer)])
    rules = cage.resolve(rules, einsum("thk,hkd->td"), {"w": w}, shape(2, 4, 64))
    turned = rotate(w.reshape(256, 6), block)
    expected = rotate(absmax_round(turned, group=size), block).reshape(w.shape)
    found = cage.fake_quant({"w": w}, rules)["w"]
    # A rotation in float32 is off by a few of its roundings.
    np.testing.assert_allclose(found, expected, atol=1e-6 if block is None else 3e-6)
    codes = cage.quantize({"w": w}, rules)
    np.testing.assert_allclose(cage.dequantize(codes)["w"], expected, atol=3e-6)


def test_experts_that_a_product_adds_up_share_scales_unless_an_axis_is_named():
    params = {"down": shape(4, 32, 16)}
    args = shape(6, 4), shape(6, 4, 32)
    named = cage.Rules([(".*", cage.int4(axis=1))])

    def added(p, gates, hidden):
        return jnp.einsum("te,tef,efd->td", gates, hidden, p["down"])

    def added_afterwards(p, gates, hidden):
        out = jnp.einsum("tef,efd->ted", hidden, p["down"])
        return jnp.einsum("te,ted->td", gates, out)

    assert resolved(INT4, added, params, *args) == {"down": (0, 1)}
    assert cage.resolve(named, added, params, *args).match("down").axis == 1
    assert resolved(INT4, added_afterwards, params, *args) == {"down": (1,)}


def test_one_scale_for_each_expert(rng):
    sizes = np.float32([1, 10, 100, 1e-3])[:, None, None]
    experts = sizes * rng.standard_normal((4, 32, 16)).astype(np.float32)

    def ternary(w):
        scale = np.abs(w).mean()
        return np.clip(np.round(w / scale), -1, 1) * scale

    expected = np.stack([ternary(np.float64(w)) for w in experts])
    found = cage.fake_quant(experts, cage.ternary())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert cage.quantize(experts, cage.int8(axis=None)).scale.shape == (4, 1, 1)
    for_all = cage.int8(axis=(0, 1, 2))
    assert cage.quantize(experts, for_all).scale.shape == (1, 1, 1)


def test_all_groups_that_do_not_divide_are_told():
    rules = cage.Rules([(".*", cage.int4(group_size=24))])
    params = {"a": shape(32, 8), "b": shape(48, 8), "c": shape(40, 8)}
    with pytest.raises(ValueError, match="group_size") as raised:
        rules.report(params)
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["`a`", "`c`"]
    assert "Use 16, or None" in lines[0]
    assert "Use 20, or None" in lines[1]


def test_contracted_axes_need_a_program():
    quantizer = cage.int4()
    assert str(quantizer) == "int4 absmax, identity"
    assert quantizer.at((32, 8)).axis == -2
    with pytest.raises(
        ValueError, match=r"rules = cage\.resolve\(rules, function, par"
    ):
        cage.fake_quant(np.ones((2, 32, 8), np.float32), quantizer)
    with pytest.raises(ValueError, match=r"\(r'\.\*bias', None\)"):
        cage.fake_quant(np.ones(8, np.float32), quantizer)


def test_factors_of_a_weight_are_left_alone_in_suggestions():
    shapes = {"a": (32, 64), "b": (64, 32), "in": (32, 32), "out": (32, 32)}
    params = {name: shape(*lengths) for name, lengths in shapes.items()}

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["in"]) @ (p["a"] @ p["b"])) @ p["out"]

    rules = cage.suggest(apply, params, X, show=False)
    assert [*rules.resolved] == ["a"]


@pytest.mark.parametrize("sizes", [(32, 64), (32, 64, 32), (32, 64, 32, 64)])
def test_the_ends_of_a_model_without_a_middle_are_suggested(sizes, capsys):
    params = [shape(*pair) for pair in itertools.pairwise(sizes)]

    def apply(p, x):
        for kernel in p:
            x = jnp.tanh(x @ kernel)
        return x

    rules = cage.suggest(apply, params, X)
    found, all_of = [*rules.resolved], [str(i) for i in range(len(params))]
    assert found == (["1"] if len(params) == 3 else all_of)
    printed = capsys.readouterr().out
    assert ("No layer is left alone for being" in printed) == (len(params) < 3)
