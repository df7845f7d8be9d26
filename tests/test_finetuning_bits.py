"""Bits under a budget, against brute force and float64 NumPy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cage_jax as cage
from cage_jax.finetuning import fisher
from cage_jax.finetuning.bits import knapsack

GROUP = 8
WIDTHS = (2, 3, 4, 8)


@pytest.fixture
def params(rng):
    """Four matrices of three shapes, of very different curvature, and a norm."""
    shapes = {"q": (16, 16), "k": (16, 8), "v": (16, 8), "o": (32, 8)}
    found = {
        name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for name, shape in shapes.items()
    }
    return found | {"norm": jnp.ones(16)}


@pytest.fixture
def curvature(params, rng):
    steep = {"q": 3.0, "k": 0.1, "v": 30.0, "o": 0.01, "norm": 1.0}
    return {
        name: jax.tree.map(
            lambda x, name=name: jnp.asarray(
                steep[name] * rng.uniform(0.5, 1.5, x.shape), jnp.float32
            ),
            each,
        )
        for name, each in params.items()
    }


RULES = cage.Rules([(r".*kernel", cage.int4(group_size=GROUP), "int8"), (r".*", None)])


def rounded(x, bits):
    """Integers by absmax of groups along the first axis, in float64."""
    x = np.asarray(x, np.float64)
    groups = x.reshape(-1, GROUP, x.shape[1])
    top = 2 ** (bits - 1) - 1
    scale = np.abs(groups).max(axis=1, keepdims=True) / top
    return (np.round(groups / scale) * scale).reshape(x.shape)


def cost(x, bits):
    """Bytes of codes and of float32 scales."""
    return math.ceil((bits * x.size + 32 * x.size // GROUP) / 8)


def brute_force(names, params, increases, budget_bits, ties=()):
    """The least sum of increases within the budget, of all combinations."""
    total = sum(params[name]["kernel"].size for name in names)
    found = []
    for widths in itertools.product(WIDTHS, repeat=len(names)):
        of = dict(zip(names, widths))
        if any(len({of[name] for name in tie}) > 1 for tie in ties):
            continue
        size = sum(cost(params[name]["kernel"], of[name]) for name in names)
        if 8 * size <= budget_bits * total:
            loss = sum(increases[name][of[name]] for name in names)
            found.append((loss, widths))
    return min(found)


def by_curvature(params, curvature, names):
    return {
        name: {
            bits: float(
                np.sum(
                    np.asarray(curvature[name]["kernel"], np.float64)
                    * (np.asarray(x := params[name]["kernel"]) - rounded(x, bits)) ** 2
                )
                / 2
            )
            for bits in WIDTHS
        }
        for name in names
    }


def widths_of(rules, names):
    return tuple(rules.match(f"{name}/kernel").bits for name in names)


# --- the knapsack ---------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 96])
def test_the_knapsack_is_that_of_brute_force(rng, unit):
    for _ in range(40):
        items, options = rng.integers(1, 6), rng.integers(1, 5)
        sizes = unit * rng.integers(1, 50, (items, options))
        losses = rng.normal(size=(items, options))
        least, most = sizes.min(axis=1).sum(), sizes.max(axis=1).sum()
        budget = int(rng.integers(least, most + 2))
        picks = knapsack.least_loss(sizes, losses, budget)
        every = itertools.product(range(options), repeat=items)
        best = min(
            (losses[range(items), each].sum(), sizes[range(items), each].sum())
            for each in map(list, every)
            if sizes[range(items), each].sum() <= budget
        )
        assert sizes[range(items), picks].sum() <= budget
        np.testing.assert_allclose(losses[range(items), picks].sum(), best[0])


def test_sizes_without_a_divisor_are_rounded_up_to_units(rng, monkeypatch):
    monkeypatch.setattr(knapsack, "_MOST_UNITS", 16)
    for _ in range(300):
        sizes = rng.integers(1, 10_000, (4, 3))
        losses = rng.normal(size=(4, 3))
        smallest = sizes.min(axis=1)
        budget = int(rng.integers(smallest.sum(), sizes.max(axis=1).sum()))
        picks = knapsack.least_loss(sizes, losses, budget)
        assert sizes[range(4), picks].sum() <= budget
        room = budget - smallest.sum()
        # Each of four sizes is rounded up by less than a unit.
        smaller = room - 4 * math.ceil(room / 16)
        for each in map(list, itertools.product(range(3), repeat=4)):
            if (sizes[range(4), each] - smallest).sum() <= smaller:
                assert losses[range(4), picks].sum() <= losses[range(4), each].sum()


def test_nothing_is_spent_for_no_gain():
    sizes, losses = np.array([[1, 2], [1, 2]]), np.zeros((2, 2))
    assert knapsack.least_loss(sizes, losses, 4) == [0, 0]
    assert knapsack.least_loss(sizes[:, ::-1], losses, 4) == [1, 1]


# --- choices --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [6.0, 6.7, 7.5, 9.1, 12.0])
def test_bits_are_those_of_brute_force(params, curvature, bits, capsys):
    names = ["q", "k", "v", "o"]
    increases = by_curvature(params, curvature, names)
    loss, widths = brute_force(names, params, increases, bits)
    rules = cage.choose_bits(RULES, params, bits=bits, curvature=curvature)
    assert widths_of(rules, names) == widths
    quantized = [row for row in rules.report(params).rows if row.quantizer]
    size = sum(row.size for row in quantized)
    spent = 8 * sum(row.bytes_after for row in quantized) / size
    assert spent <= bits
    assert len(quantized) == 4
    told = capsys.readouterr().out
    total = f"at most {bits:g}: {spent:.2f} bits a weight, increase {loss:.3g}\n"
    assert total in told


def test_tied_parameters_get_the_same_bits(params, curvature):
    names = ["q", "k", "v", "o"]
    increases = by_curvature(params, curvature, names)
    tie = ("q", "k", "v")
    loose = cage.choose_bits(RULES, params, bits=7, curvature=curvature, show=False)
    assert len({*widths_of(loose, tie)}) > 1
    _, widths = brute_force(names, params, increases, 7, [tie])
    options = {"bits": 7, "curvature": curvature, "show": False}
    # Patterns that share a parameter tie all of theirs.
    for together in ([r"[qkv]/kernel"], [r"(?:q|v)/(.*)", r"(?:k|q)/(.*)"]):
        rules = cage.choose_bits(RULES, params, together=together, **options)
        assert widths_of(rules, names) == widths


def test_groups_of_a_pattern_tell_sets_apart(rng):
    shapes = {"query": (8, 8), "key": (8, 8)}
    layers = [
        {k: jnp.asarray(rng.normal(size=v), jnp.float32) for k, v in shapes.items()}
        for _ in range(4)
    ]
    steep = [
        {"query": jnp.full((8, 8), 10.0**i), "key": jnp.full((8, 8), 0.1**i)}
        for i in range(4)
    ]
    rules = cage.choose_bits(
        cage.Rules([(".*", cage.int4())]),
        layers,
        bits=7.5,
        curvature=steep,
        together=[r"(\d+)/(?:query|key)"],
        show=False,
    )
    found = [
        tuple(rules.match(f"{i}/{name}").bits for name in shapes) for i in range(4)
    ]
    assert all(len({*each}) == 1 for each in found)
    assert len({*found}) > 1


def test_everything_but_the_width_stays(params, curvature):
    quantizer = cage.int4(
        axis=0, group_size=GROUP, hadamard=4, symmetric=False, gradient="clip"
    )
    rules = cage.Rules(
        [("[qk]/kernel", quantizer, cage.int8(axis=-1)), ("v/kernel", "int4")]
    )
    new = cage.choose_bits(rules, params, bits=11, curvature=curvature, show=False)
    for path in ("q/kernel", "k/kernel"):
        found = new.match(path)
        assert (
            cage.int4(
                **{
                    "axis": found.axis,
                    "group_size": found.group_size,
                    "hadamard": found.hadamard,
                    "symmetric": False,
                    "gradient": found.gradient,
                }
            )
            == quantizer
        )
        assert new.match_inputs(path) == cage.int8(axis=-1)
    assert new.match("v/kernel").group_size is None
    assert new.match("o/kernel") is None
    assert new.match("norm") is None
    # A matrix whose axes were not resolved may still be.
    assert new.match("v/kernel").axis == "contracted"


def test_a_stack_of_layers_is_one_parameter_and_keeps_its_axes(rng):
    params = {
        "up": jnp.asarray(rng.normal(size=(3, 4, 16, 8)), jnp.float32),
        "down": jnp.asarray(rng.normal(size=(3, 4, 8, 16)), jnp.float32),
    }

    def apply(params, x):
        def layer(x, of):
            hidden = jnp.einsum("hio,bhi->bho", of["up"], x)
            return jnp.einsum("hio,bhi->bho", of["down"], jnp.tanh(hidden)), None

        return jax.lax.scan(layer, x, params)[0]

    x = jnp.ones((2, 4, 16))
    rules = cage.resolve(cage.Rules([(".*", cage.int4())]), apply, params, x)
    steep = {"up": jnp.full((3, 4, 16, 8), 100.0), "down": jnp.ones((3, 4, 8, 16))}
    new = cage.choose_bits(rules, params, bits=6.5, curvature=steep, show=False)
    assert new.match("up").bits > new.match("down").bits
    for path in params:
        assert new.match(path).axis == rules.match(path).axis
        assert not new.resolved
    cage.fake_quant(params, new)


def test_patterns_name_what_is_alike_and_nothing_else(rng, capsys):
    params = [
        {"up": {"kernel": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)}}
        for _ in range(12)
    ]
    steep = [
        {"up": {"kernel": jnp.full((8, 8), 100.0 if i in (1, 11) else 1.0)}}
        for i in range(12)
    ]
    rules = cage.Rules([("1?0/.*", None), (".*kernel", cage.int4())])
    new = cage.choose_bits(rules, params, bits=7.2, curvature=steep)
    assert [rule.pattern for rule in new] == [
        "(1|11)/up/kernel",
        "(2|3|4|5|6|7|8|9)/up/kernel",
        "1?0/.*",
    ]
    assert new.match("0/up/kernel") is None
    assert new.match("10/up/kernel") is None
    told = capsys.readouterr().out
    assert "(1|11)/up/kernel             2       (8, 8)  int4" in told
    assert "not quantized: 0/up/kernel and 1 more: left alone by rule 3" in told
    assert "all with 2 bits: 6.00 bits a weight, increase " in told
    assert "chosen, at most 7.2: 7.20 bits" in told
    even = cage.choose_bits(rules, params, bits=6, curvature=steep, show=False)
    assert [rule.pattern for rule in even][:1] == ["(1|2|3|4|5|6|7|8|9|11)/up/kernel"]


def test_without_curvature_errors_are_relative(params):
    scaled = params | {"q": {"kernel": 64 * params["q"]["kernel"]}}
    rules, same = (
        cage.choose_bits(RULES, each, bits=7, show=False) for each in (params, scaled)
    )
    assert rules == same
    zeros = params | {"q": {"kernel": jnp.zeros((16, 16))}}
    rules = cage.choose_bits(RULES, zeros, bits=7, show=False)
    assert rules.match("q/kernel").bits == 2


def test_quantizers_may_be_the_choices(params, curvature):
    choices = (cage.mxfp4(), cage.nf4(group_size=16), cage.int8(group_size=16))
    rules = cage.Rules([(".*kernel", cage.nf4(group_size=16, axis=0))])
    params = params | {"o": {"kernel": jnp.tile(params["o"]["kernel"], (2, 1))}}
    params = {"o": params["o"], "p": params["o"]}
    steep = {"o": {"kernel": jnp.ones((64, 8))}, "p": {"kernel": jnp.ones((64, 8)) * 9}}
    new = cage.choose_bits(
        rules, params, bits=8.2, choices=choices, curvature=steep, show=False
    )
    formats = {str(new.match(f"{name}/kernel").format) for name in "op"}
    assert len(formats) == 2
    assert {new.match(f"{name}/kernel").axis for name in "op"} == {0}
    with pytest.raises(ValueError, match="o/kernel`: `choices` must be quantizers"):
        cage.choose_bits(rules, params, show=False)


def test_learned_scales_are_fitted(params, curvature):
    rules = cage.Rules([(".*kernel", cage.lsq(4, axis=0)), (".*", None)])
    variables = cage.with_grids(params, rules)
    new = cage.choose_bits(rules, variables, bits=6, curvature=curvature, show=False)
    assert new.match("v/kernel").bits > new.match("o/kernel").bits
    beside = {"params": curvature, "grids": variables["grids"]}
    assert new == cage.choose_bits(
        rules, variables, bits=6, curvature=beside, show=False
    )


# --- the measured change of the loss --------------------------------------------------


def test_the_change_of_the_loss_is_measured_parameter_by_parameter(params, rng, capsys):
    names = ["q", "k", "v", "o"]
    targets = {
        name: jnp.asarray(rng.normal(size=params[name]["kernel"].shape), jnp.float32)
        for name in names
    }
    traces, seen = [], []

    def loss(params, factor):
        traces.append(1)
        squares = [
            (i + 1) * jnp.sum((params[name]["kernel"] - targets[name]) ** 2)
            for i, name in enumerate(names)
        ]
        return factor * sum(squares)

    def change(i, name, bits):
        target = np.asarray(targets[name], np.float64)
        x = np.asarray(params[name]["kernel"], np.float64)
        each = [np.sum((y - target) ** 2) for y in (rounded(x, bits), x)]
        return 2 * (i + 1) * (each[0] - each[1])  # the mean of the factors is 2

    increases = {
        name: {bits: change(i, name, bits) for bits in WIDTHS}
        for i, name in enumerate(names)
    }
    batches = ((jnp.float32(factor),) for factor in (1.0, 3.0))
    new = cage.choose_bits(
        RULES,
        params,
        bits=7,
        loss=loss,
        batches=batches,
        progress=lambda *told: seen.append(told),
    )
    assert len(traces) == 1
    assert seen[-1] == ("batch 2: v/kernel", 16, 16)
    least, widths = brute_force(names, params, increases, 7)
    assert widths_of(new, names) == widths
    total = capsys.readouterr().out.partition("chosen, at most 7: ")[2]
    # Differences of float32 losses of thousands.
    assert float(total.split()[5]) == pytest.approx(least, rel=1e-2)


# --- squared gradients ----------------------------------------------------------------


def test_fisher_is_the_mean_of_squared_gradients(rng):
    params = {
        "w": jnp.asarray(rng.normal(size=(4, 3)), jnp.bfloat16),
        "count": jnp.int32(3),
    }
    inputs = rng.normal(size=(5, 4)).astype(np.float32)

    def loss(params, x):
        return jnp.sum((x @ params["w"].astype(jnp.float32)) ** 2) / 2

    batches = [(jnp.asarray(x[None]),) for x in inputs]
    found = fisher(loss, params, iter(batches))
    w, x = np.asarray(params["w"], np.float64), inputs.astype(np.float64)
    gradients = np.einsum("bi,bo->bio", x, x @ w)
    # Gradients are bfloat16, of 8 bits.
    np.testing.assert_allclose(found["w"], (gradients**2).mean(0), rtol=2e-2)
    assert found["w"].dtype == jnp.float32
    assert found["count"] == 0
    beside = fisher(loss, {"params": params, "grids": {}}, batches)
    np.testing.assert_array_equal(beside["w"], found["w"])
    with pytest.raises(ValueError, match="`batches` must have a batch"):
        fisher(loss, params, [])
    with pytest.raises(TypeError, match="`batches` must be tuples"):
        fisher(loss, params, [jnp.ones(4)])


# --- errors ---------------------------------------------------------------------------


def test_a_budget_that_cannot_be_met_names_the_least_bits(params):
    with pytest.raises(ValueError, match=r"`bits` must be at least 6 here.*got 5\.9"):
        cage.choose_bits(RULES, params, bits=5.9, show=False)
    for choices in ((2, 3, 4, 8), ("int2", "int3", "int4", "int8")):
        new = cage.choose_bits(RULES, params, bits=6, choices=choices, show=False)
        assert widths_of(new, "qkvo") == (2, 2, 2, 2)
    uneven = {"w": jnp.ones((7, 13))}
    rules = cage.Rules([(".*", cage.int4())])
    with pytest.raises(ValueError, match="at least") as error:
        cage.choose_bits(rules, uneven, bits=1, show=False)
    named = float(str(error.value).partition("at least ")[2].partition(" ")[0])
    cage.choose_bits(rules, uneven, bits=named, show=False)


def test_codes_in_place_of_floats(params):
    codes = cage.quantize(params, RULES)
    calls = [
        ("params", lambda: cage.choose_bits(RULES, codes, show=False)),
        ("curvature", lambda: cage.choose_bits(RULES, params, curvature=codes)),
        ("params", lambda: fisher(sum, codes, [])),
    ]
    for name, call in calls:
        text = rf"`{name}` must be floats; got codes at '\w/kernel'.*cage\.dequantize"
        with pytest.raises(TypeError, match=text):
            call()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_curvature_that_is_none_names_its_parameter(params, curvature, value):
    curvature["v"]["kernel"] = curvature["v"]["kernel"].at[3, 2].set(value)
    with pytest.raises(ValueError, match="`v/kernel`: `curvature` must be finite"):
        cage.choose_bits(RULES, params, bits=7, curvature=curvature, show=False)


def test_arguments_that_do_not_fit(params, curvature):
    def error(kind, text, rules=RULES, params=params, **options):
        with pytest.raises(kind, match=text):
            cage.choose_bits(rules, params, **{"bits": 7, "show": False} | options)

    def loss(params):
        return params["q"]["kernel"][0, 0]

    error(TypeError, "`rules` must be Rules", rules=[(".*", "int4")])
    error(ValueError, "no parameter is quantized", rules=cage.Rules([(".*", None)]))
    error(TypeError, "`bits` must be a number", bits="int4")
    error(TypeError, "`choices` must be an int; got 'nf4'", choices=("int2", "nf4"))
    error(TypeError, "`choices` must be a list", choices=4)
    error(ValueError, "`bits` must be from 2 to 8", choices=(1, 4))
    error(ValueError, "got both", curvature=curvature, loss=loss, batches=[()])
    error(ValueError, "`batches` must come with `loss`", loss=loss)
    error(ValueError, "`loss` must come with `batches`", batches=[()])
    error(TypeError, "`together` must be a list", together=".*")
    error(ValueError, "matches 3 and ties none", together=["(q|k|v)/kernel"])
    error(ValueError, "must be a regular expression", together=["("])
    zeros = jax.tree.map(jnp.zeros_like, curvature)
    error(ValueError, "`curvature` must be positive somewhere", curvature=zeros)
    flat = jax.tree.map(jnp.ravel, curvature)
    error(ValueError, "`k/kernel`: `curvature` must have the shape", curvature=flat)
    broken = params | {"k": {"kernel": params["k"]["kernel"].at[0, 0].set(np.nan)}}
    error(ValueError, "`k/kernel`: `params` must have finite values", params=broken)

    shapes = jax.eval_shape(lambda: params)
    error(TypeError, "`k/kernel`: `params` must have values", params=shapes)

    def only_k_breaks(of):
        x = of["k"]["kernel"]
        return jnp.where(jnp.all(x == params["k"]["kernel"]), 1.0, jnp.nan)

    error(ValueError, "`k/kernel`: `loss`", loss=only_k_breaks, batches=[()])
