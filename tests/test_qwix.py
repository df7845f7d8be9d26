"""Rules taken from qwix, and what is said of its own."""

import functools
import importlib
import importlib.metadata
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises
from qwix_models import (
    EXACT,
    Own,
    bridge,
    contracted,
    exact_rules,
    implicit_promotion,
    nnx,
    over_7,
    quantized_by_qwix,
    quantizing,
    qwix,
    rules_and_warnings,
    without_values,
)

import cage_jax as cage
from cage_jax.program.model_report import report

linen = pytest.importorskip("flax.linen")

# What qwix itself calls of flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def as_qwix_needs_it():
    """Allows implicit promotion in each test."""
    with implicit_promotion():
        yield


class Dotted(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4, name="upx0")(linen.Dense(4, name="up.0")(x))


def test_a_path_is_no_pattern():
    qwix_rules = [quantizing("int4", module_path=r"up\.0")]
    rules = exact_rules(Dotted(), qwix_rules, np.ones((1, 4), np.float32))
    assert rules.match("up.0/kernel") is not None
    assert rules.match("upx0/kernel") is None


# --- from a factor back to its parameter ----------------------------------------------


def int4_by_hand(x, size=8):
    """In groups of rows of each column, in float64."""
    groups = np.asarray(x, np.float64).reshape(-1, size, *x.shape[1:])
    scale = np.abs(groups).max(1, keepdims=True) / 7
    return (np.clip(np.round(groups / scale), -8, 7) * scale).reshape(x.shape)


def in_a_branch(w, x):
    return jax.lax.cond(x[0, 0] > 0, lambda: contracted(w, x), lambda: x)


def in_a_loop(w, x):
    return jax.lax.fori_loop(0, 2, lambda i, x: contracted(w, x), x)


# A product, the shape of its parameter, and the tile of a contracted axis of 8.
FACTORS = {
    "weight first": (lambda w, x: jnp.einsum("io,bi->bo", w, x), (8, 6), 8),
    "reshape": (lambda w, x: contracted(w.reshape(8, 6), x), (2, 4, 6), 8),
    "tiles of 2": (lambda w, x: contracted(w.reshape(8, 6), x), (2, 4, 6), 2),
    "tiles of 4": (lambda w, x: contracted(w.reshape(8, 6), x), (4, 2, 6), 4),
    "squeeze": (lambda w, x: contracted(w[:, 0], x), (8, 1, 6), 8),
    "heads": (
        lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(8, 2, 3)),
        (8, 6),
        8,
    ),
    "jit": (jax.jit(contracted), (8, 6), 8),
    "tiles": (contracted, (8, 6), 4),
    "cond": (in_a_branch, (8, 8), 8),
    "loop": (in_a_loop, (8, 8), 8),
    "transpose": (lambda w, x: contracted(w.T, x), (6, 8), 8),
    "rows": (lambda w, x: contracted(w[1], contracted(w[0], x)), (2, 8, 8), 8),
}


def test_a_factor_is_followed_back():
    x, quantizers, weights = np.ones((3, 8), np.float32), {}, {}
    for name, (product, shape, tile) in FACTORS.items():
        model = Own(product, shape)
        rule = over_7(tile_size=None if tile == 8 else tile)
        quantizers[name] = exact_rules(model, [rule], x).match("w")
        weights[name] = np.asarray(model.w[...])
    values = jax.jit(
        lambda weights: {
            n: cage.fake_quant(weights[n], q) for n, q in quantizers.items()
        }
    )(weights)
    for name, (_, shape, tile) in FACTORS.items():
        w = weights[name]
        if name == "transpose":
            expected = int4_by_hand(w.T).T
        elif name == "rows":
            expected = np.stack([int4_by_hand(row) for row in w])
        else:
            expected = int4_by_hand(w.reshape(8, -1), tile).reshape(shape)
        np.testing.assert_allclose(values[name], expected, rtol=1e-5, err_msg=name)


# --- what has no equal ----------------------------------------------------------------


def both_ways(w, x):
    return jnp.einsum("bi,oi->bo", contracted(w, x), w)


def carried(w, x):
    """Data by the second repetition."""

    def repeated(carry, _):
        return (carry[0] + x[0], contracted(*carry)), 0

    return jax.lax.scan(repeated, (w, x), length=2)[0][1]


def test_what_is_no_parameter_is_left_alone():
    x, qwix_rules = np.ones((3, 8), np.float32), [quantizing("int4")]
    for product, text in (
        (lambda w, x: x @ w, "in jnp.matmul. .* Use jnp.einsum"),
        (
            lambda w, x: jnp.dot(x, w),
            "in jnp.dot. If jax has cached a trace of jnp.dot",
        ),
        (
            lambda w, x: contracted(w * 2, x),
            "mul computes from it, so CAGE .* Use cage",
        ),
        (lambda w, x: contracted(w[:, :4], x), "an array that slice computes from it"),
        (
            both_ways,
            "in several ways, .* axis 0 and .* axis 1, so CAGE leaves it alone. Let",
        ),
    ):
        rules, texts = rules_and_warnings(Own(product), qwix_rules, x)
        assert rules == cage.Rules([("w", None)]), text
        (problem,) = [each for each in texts if each.startswith("`w`: ")]
        assert re.search(text, problem)
        assert "CAGE leaves it alone" in problem
    with pytest.raises(ValueError, match="must quantize a weight"):
        bridge.rules(Own(carried), qwix_rules, x)


def test_sparse_weights_are_left_alone():
    sparsity = importlib.import_module("qwix._src.core.sparsity").SparsityRule(
        weight_sparsity_n=1, weight_sparsity_m=2
    )
    rule = quantizing("int4", additional_qt_config={"sparsity_rule": sparsity})
    x = np.ones((3, 8), np.float32)
    rules, texts = rules_and_warnings(Own(contracted), [rule], x)
    assert rules.match("w") is None
    assert re.search("`w`: .* computes from it, so CAGE leaves it alone", texts[0])


# --- what is said of qwix -------------------------------------------------------------


def test_warnings_of_qwix_defaults():
    parts = {
        "original": "use_original_residuals': False}",
        "tiles": "as always for tiles and MX types: `w`",
        "idempotent": "not idempotent, so a long pull moves their grids: `w`",
    }
    by = "weight_calibration_method"
    for options, said in (
        ({}, {"original", "idempotent"}),
        ({"additional_qt_config": EXACT}, {"idempotent"}),
        ({"tile_size": 4}, {"tiles", "idempotent"}),
        ({"tile_size": 0.25}, {"tiles", "idempotent"}),
        ({by: "absmax,1.0714286"}, {"original"}),
        ({by: "absmax,1.05"}, {"original", "idempotent"}),
        ({by: "fixed,-1.7,1.7", "additional_qt_config": EXACT}, set()),
        ({"weight_qtype": "mxfp4", "tile_size": 32}, {"tiles"}),
        ({"weight_qtype": "nf4", "additional_qt_config": EXACT}, set()),
        ({"bwd_qtype": "int8"}, {"idempotent"}),
    ):
        rule = qwix.QtRule(**{"weight_qtype": "int4"} | options)
        x = np.ones((3, 32), np.float32)
        _, texts = rules_and_warnings(Own(contracted, (32, 8)), [rule], x)
        found = {name for name, part in parts.items() if any(part in t for t in texts)}
        assert found == said, options
        assert len(texts) == len(said), options


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.stack = nnx.Param(jnp.ones((2, 8)))  # a bias for each layer
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.out = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, tokens):
        x = self.norm(self.embed(tokens)) + self.stack[0]
        x = self.out(self.up(x) + jax.lax.dot(x, self.up.kernel[...]))
        return self.embed.attend(x)


def test_warnings_of_what_qwix_does_not_see():
    options = {"additional_qt_config": EXACT, "module_path": "up|out|embed"}
    qwix_rules = [quantizing("nf4", **options)]
    tokens = np.zeros(3, np.int32)
    rules, texts = rules_and_warnings(without_values(Tied), qwix_rules, tokens)
    assert [rule.pattern for rule in rules] == ["out/kernel", "up/kernel"]
    (unseen,) = texts
    assert "quantizes no product of them: `embed/embedding`. It does not see" in unseen


class Backwards(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.second = nnx.Linear(4, 4, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.first(self.second(x))


def test_a_warning_names_the_parameter_in_whatever_order():
    over_7_5 = quantizing("int4", module_path="second", additional_qt_config=EXACT)
    first = quantizing("nf4", module_path="first", additional_qt_config=EXACT)
    x = np.ones((1, 4), np.float32)
    _, texts = rules_and_warnings(without_values(Backwards), [over_7_5, first], x)
    (text,) = texts
    assert "not idempotent, so a long pull moves their grids: `second/kernel`." in text


def test_many_paths_are_cut_short():
    model = without_values(
        lambda rngs: nnx.Sequential(*[nnx.Linear(4, 4, rngs=rngs) for _ in range(8)])
    )
    x = np.ones((1, 4), np.float32)
    _, texts = rules_and_warnings(model, [quantizing("int4")], x)
    assert all("`layers/5/kernel` and 2 more" in text for text in texts)


# --- training -------------------------------------------------------------------------


def test_cage_pulls_to_the_grid_that_qwix_has(rng):
    model = without_values(lambda rngs: nnx.Linear(32, 8, use_bias=False, rngs=rngs))
    x, y, kernel = (
        jax.device_put(rng.standard_normal(shape).astype(np.float32))
        for shape in ((64, 32), (64, 8), (32, 8))
    )
    nnx.update(model, {"kernel": kernel / np.float32(np.sqrt(32))})
    qwix_rules = [over_7(additional_qt_config=EXACT)]
    rules = bridge.rules(model, qwix_rules, x)

    def distance(strength):
        tx = optax.chain(cage.coupled(rules, strength=strength), optax.sgd(0.05))
        quantized = quantized_by_qwix(model, qwix_rules, x)
        optimizer = nnx.Optimizer(quantized, tx, wrt=nnx.Param)

        @nnx.jit
        def step(quantized, optimizer):
            def loss(model):
                return 0.01 * jnp.mean((model(x) - y) ** 2)

            before = quantized.kernel[...], quantized(jnp.eye(32))
            gradient = nnx.grad(loss)(quantized)
            optimizer.update(quantized, gradient)
            return before

        for _ in range(301):
            kernel, on_grid = map(np.asarray, step(quantized, optimizer))
        return np.linalg.norm(kernel - on_grid) / np.linalg.norm(kernel)

    free, pulled = distance(0.0), distance(1.0)
    assert free > 0.05
    assert pulled < 0.1 * free


# --- nothing is left behind -----------------------------------------------------------


def test_the_trace_is_not_seen_elsewhere(rng):
    # jax keeps the trace of jnp.matmul: with qwix at work, and with our marks.
    model = Own(lambda w, x: x @ w, (11, 13))
    x, qwix_rules = (
        rng.standard_normal((7, 11)).astype(np.float32),
        [quantizing("int4")],
    )
    rules_and_warnings(model, qwix_rules, x)
    expected = np.asarray(x, np.float64) @ np.asarray(model.w[...], np.float64)
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(nnx.jit(model)(x), expected, rtol=1e-4, atol=1e-3)
    quantized = quantized_by_qwix(Own(contracted, (11, 13)), qwix_rules, x)
    assert "qwix_quantized" not in str(jax.make_jaxpr(lambda x: quantized(x))(x))


def test_the_model_stays_as_it_was():
    model = without_values(
        lambda rngs: nnx.Sequential(
            nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        )
    )
    ones = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), nnx.state(model))
    nnx.update(model, ones)
    before = jax.tree.leaves(nnx.state(model))
    x = np.ones((3, 4), np.float32)
    bridge_rules = rules_and_warnings(model, [quantizing("nf4")], x)[0]
    assert bridge_rules.match("layers/0/kernel") is not None
    for one, other in zip(before, jax.tree.leaves(nnx.state(model))):
        assert one is other
    assert not hasattr(model, "qwix_path")


# --- errors ---------------------------------------------------------------------------


def test_bad_arguments():
    model, good = Own(contracted), [quantizing("int4")]
    x, nothing = np.ones((1, 8), np.float32), [quantizing("int4", module_path="layer")]
    wrong = (qwix.QtProvider(good), good[0], ["int4"], None)
    table = [
        (
            lambda: bridge.rules({}, good, x),
            TypeError,
            r"`model` must be an NNX or a Linen .* dict",
        ),
        *(
            (
                functools.partial(bridge.rules, model, each, x),
                TypeError,
                r"`qwix_rules` must be a list .* Use",
            )
            for each in wrong
        ),
        (
            lambda: bridge.rules(model, good),
            ValueError,
            "`inputs` must be those of the model",
        ),
        (
            lambda: bridge.rules(model, nothing, x),
            ValueError,
            r"got module_path=\['layer'\], .*\['w'\]",
        ),
    ]
    assert_raises(table)


def test_another_version_is_refused(monkeypatch):
    for found in ("0.1.9", None):

        def version(name, found=found):
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.delitem(sys.modules, "cage_jax.qwix", raising=False)
        text = f"needs qwix 0.1.8.* got {found or 'none'}"
        with pytest.raises(ImportError, match=text):
            importlib.import_module("cage_jax.qwix")


def test_a_quantizer_is_a_value():
    first, second = (
        exact_rules(Own(contracted), [quantizing("int4")], np.ones((1, 8), np.float32))
        for _ in range(2)
    )
    assert first == second
    assert hash(first) == hash(second)
    assert str(first.match("w")) == (
        "int4 by qwix, absmax, a scale for each index of axis 1"
    )


def test_what_has_no_codes_says_so():
    model = Own(contracted, (64, 24))
    rules = exact_rules(model, [quantizing("int4")], np.ones((1, 64), np.float32))
    params = {"w": model.w[...]}
    for name, function in (
        ("quantize", lambda: cage.quantize(params, rules)),
        (
            "freeze_scale",
            lambda: cage.coupled(rules, strength=1.0, freeze_scale=True).init(params),
        ),
        (
            "statistics",
            lambda: cage.coupled(rules, strength=1.0, statistics=True).init(params),
        ),
    ):
        with pytest.raises(ValueError, match=rf"`w`: `{name}` needs a .* by qwix"):
            function()


def test_its_size_is_that_of_the_codes_and_scales():
    model = Own(contracted, (64, 24))
    tiled = quantizing("int4", tile_size=16)
    rules = exact_rules(model, [tiled], np.ones((1, 64), np.float32))
    row = rules.report({"w": model.w[...]}).rows[0]
    assert row.quantized_bits == 64 * 24 * 4 + 4 * 24 * 32


def test_the_report_of_a_model(rng):
    model = Own(lambda w, x: contracted(w.reshape(64, 24), x), (8, 8, 24))
    params = {"w": rng.standard_normal((8, 8, 24)).astype(np.float32)}
    rules = exact_rules(model, [over_7()], np.ones((1, 64), np.float32))

    def apply(params, x):
        return x @ params["w"].reshape(64, 24)

    (layer,) = report(apply, rules, params, np.ones((2, 64), np.float32)).layers
    weights = np.asarray(params["w"]).reshape(64, 24)
    error = np.linalg.norm(weights - int4_by_hand(weights, 64))
    error /= np.linalg.norm(weights)
    assert layer.measured.error == pytest.approx(error, rel=1e-4)
