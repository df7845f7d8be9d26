"""Tables of rules: what they match, what they are, and what they refuse."""

import copy
import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises

import cage_jax as cage
from cage_jax import Quantizer, Rules, fake_quant, int2, int4, int8, quest
from cage_jax.quantizers.registry import PRESETS


def ones(*shape):
    return np.ones(shape, np.float32)


PARAMS = {
    "blocks": [
        {"attention": {"kernel": ones(32, 16)}, "mlp": ones(32, 16)},
        {"attention": {"kernel": ones(32, 16)}, "mlp": ones(32, 16)},
    ],
    "embed": ones(64, 32),
    "scale": ones(),
    "none": None,
}


def quantized(rules, params=PARAMS):
    return {path: quantizer for path, (quantizer, _) in rules.quantized(params).items()}


# --- matching -------------------------------------------------------------------------


def test_the_first_match_wins():
    rules = Rules(
        [
            ("blocks/0/.*", int8()),
            (".*attention/kernel", int4()),
            ("embed", None),
            (".*", int2()),
        ]
    )
    assert quantized(rules) == {
        "blocks/0/attention/kernel": int8(axis=-2),
        "blocks/0/mlp": int8(axis=-2),
        "blocks/1/attention/kernel": int4(axis=-2),
        "blocks/1/mlp": int2(axis=-2),
    }


def test_the_whole_path_must_match():
    table = {
        "mlp": False,
        "blocks": False,
        "blocks/0/ml": False,
        "blocks/0/mlp": True,
        "blocks/./m.p": True,
        r"blocks/\d+/mlp": True,
        "Blocks/0/mlp": False,
        "(?i)Blocks/0/mlp": True,
        "mlp|blocks/0/mlp": True,
    }
    for pattern, matches in table.items():
        found = Rules([(pattern, int4())]).match("blocks/0/mlp")
        assert found == (int4() if matches else None), pattern


def test_no_rule_no_quantizer():
    assert Rules([]).match("a") is None
    assert fake_quant(PARAMS, Rules([]))["embed"] is PARAMS["embed"]
    assert len(Rules([])) == 0


def test_none_leaves_alone():
    rules = Rules([("embed", None), (".*", int4())])
    assert rules.match("embed") is None
    assert fake_quant(PARAMS, rules)["embed"] is PARAMS["embed"]


def test_a_single_array_has_the_empty_path():
    rules = Rules([("", int4())])
    x = ones(4, 2)
    assert quantized(rules, x) == {"": int4(axis=-2)}
    assert rules.map(lambda path, quantizer, x: path, x) == ""


# --- map and quantized ----------------------------------------------------------------


def test_map_visits_what_is_quantized():
    rules = Rules([(".*mlp", int8()), ("scale", int8())])
    result = rules.map(lambda path, quantizer, x: (path, quantizer, x.shape), PARAMS)
    assert result["blocks"][1]["mlp"] == ("blocks/1/mlp", int8(axis=-2), (32, 16))
    assert result["embed"] is PARAMS["embed"]
    assert result["scale"] is PARAMS["scale"]
    assert result["none"] is None


def test_map_with_a_second_tree():
    rules = Rules([("a", int8())])
    tree = {"a": ones(2, 2), "b": ones(2, 2)}
    rest = {"a": None, "b": "left"}
    result = rules.map(lambda path, quantizer, x, other: (x, other), tree, rest)
    assert result["a"] == (tree["a"], None)
    assert result["b"] == "left"


def test_errors_of_the_function_name_the_parameter():
    def fail(path, quantizer, x):
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^`blocks/0/mlp`: no$"):
        Rules([(".*mlp", int8())]).map(fail, PARAMS)


def test_on_shapes():
    shapes = jax.eval_shape(lambda: PARAMS)
    rules = Rules([(".*mlp", int4())])
    assert list(quantized(rules, shapes)) == ["blocks/0/mlp", "blocks/1/mlp"]


# --- a table is a value ---------------------------------------------------------------


def test_is_a_value():
    table = [(".*kernel", int4(group_size=32)), (".*", None)]
    rules = Rules(table)
    assert rules == Rules(tuple(table)) == Rules(iter(table)) == Rules(rules)
    assert hash(rules) == hash(Rules(table))
    assert rules != Rules(table[:1])
    assert rules != Rules(table[::-1])
    assert rules != table
    assert [(rule.pattern, rule.weights) for rule in rules] == table
    assert len(rules) == 2
    assert copy.deepcopy(rules) == copy.copy(rules) == rules
    assert pickle.loads(pickle.dumps(rules)) == rules
    assert repr(rules) == (
        "Rules([('.*kernel', int4 absmax, group 32, identity), ('.*', None)])"
    )


def test_is_static_and_no_schedule():
    rules = Rules([(".*", int4())])
    assert not callable(rules)
    traces = []

    def traced(params, rules):
        traces.append(rules)
        return fake_quant(params, rules)

    compiled = jax.jit(traced, static_argnums=1)
    compiled(PARAMS, rules)
    compiled(PARAMS, Rules([(".*", int4())]))
    assert len(traces) == 1

    def optimizer(learning_rate, rules, quantizer):
        assert isinstance(rules, Rules)
        assert isinstance(quantizer, Quantizer)
        return optax.sgd(learning_rate)

    injected = optax.inject_hyperparams(optimizer, static_args=("rules", "quantizer"))
    injected(0.1, rules, int4()).init(PARAMS)
    # Even where nobody says that they are static.
    optax.inject_hyperparams(optimizer)(0.1, rules, int4()).init(PARAMS)


def test_has_no_attributes_to_set():
    with pytest.raises(AttributeError):
        Rules([]).rules = []


# --- warnings -------------------------------------------------------------------------


def test_a_rule_that_decides_nothing():
    table = [
        (
            [("blocks/0/attn/kernel", int4()), (".*", None)],
            "the rule 'blocks/0/attn/kernel' matches no parameter. The nearest path is "
            "'blocks/0/attention/kernel'.",
        ),
        (
            [("mlp", int4()), (".*", None)],
            "the rule 'mlp' matches no parameter: a pattern must match the whole path, "
            "such as 'blocks/0/mlp'. Use '.*(mlp).*'.",
        ),
        (
            [("embd|mlp", int4()), (".*", None)],
            "the rule 'embd|mlp' matches no parameter: a pattern must match the whole "
            "path, such as 'blocks/0/mlp'. Use '.*(embd|mlp).*'.",
        ),
        (
            [(".*", None), (".*mlp", int4())],
            "the rule '.*mlp' decides nothing: an earlier rule takes all that it "
            "matches, such as 'blocks/0/mlp'. Move it up or leave it out.",
        ),
    ]
    for rules, message in table:
        rules = Rules(rules)
        with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as seen:
            report = rules.report(PARAMS)
        assert seen[0].filename == __file__
        assert len(seen) == len(report.unused_rules) == 1, message
        if "Use '" in message:
            remedy = message.split("Use '")[1].removesuffix("'.")
            assert Rules([(remedy, int4())]).quantized(PARAMS), message


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        (".*kernel/value", "layers/0/kernel"),
        ("params/head/kernel", "head/kernel"),
        (r".*scale\.value", "layers/1/scale"),
        (r"layers/\d+/weight", "layers/0/kernel"),
        ("layers/3/kernal", "layers/3/kernel"),
        ("layers/3/foo", "layers/3/bias"),  # at least of the same layer
        ("head/.*gain", "head/kernel"),
    ],
)
def test_the_nearest_path_ends_alike(pattern, nearest):
    layer = {"bias": 1.0, "kernel": 1.0, "scale": 1.0}
    params = {"head": {"kernel": 1.0}, "layers": [layer] * 4}
    if "scale" in pattern:
        params["layers"] = [{"bias": 1.0}, layer]
    (text,) = Rules([(pattern, int4())]).why_unused(params)
    left_out = " Paths have no params/ in front and no /value at the end."
    is_left_out = "params" in pattern or "value" in pattern
    assert text == (
        f"the rule {pattern!r} matches no parameter. The nearest path is {nearest!r}."
        f"{left_out * is_left_out}"
    )


def test_without_a_near_path_any_one_is_told():
    (text,) = Rules([(".*w", int4())]).why_unused({"dense": {"kernel": 1.0}})
    assert text == (
        "the rule '.*w' matches no parameter. A path is, for one, 'dense/kernel'."
    )


def test_a_parameter_may_have_the_name_value():
    (text,) = Rules([("up/value", int4())]).why_unused({"down": {"value": 1.0}})
    assert text.endswith("The nearest path is 'down/value'.")


def test_no_warning_without_a_cause():
    report = Rules([(".*mlp", int4()), (".*", None)]).report(PARAMS)
    assert report.unused_rules == ()


def test_no_parameter_at_all():
    with pytest.warns(UserWarning, match=r"^the rule 'a' matches no parameter\.$"):
        Rules([("a", int4())]).report({})


# --- bad input ------------------------------------------------------------------------


def test_the_name_of_a_preset_stands_for_it():
    rules = cage.Rules([("up", "int4"), ("down", "nf4", "int8"), ("head", None, "lsq")])
    up, down, head = rules
    assert (up.weights, up.inputs) == (cage.int4(), None)
    assert (down.weights, down.inputs) == (cage.nf4(), cage.int8())
    assert (head.weights, head.inputs) == (None, cage.lsq())
    same = [("up", cage.int4()), ("down", cage.nf4(), cage.int8())]
    assert rules == cage.Rules([*same, ("head", None, cage.lsq())])


def test_every_preset_that_needs_no_setting_has_a_name():
    for name in PRESETS:
        if name == "quest":
            text = "`x`: a preset .* got 'quest', which needs `bits`"
            with pytest.raises(ValueError, match=text):
                cage.Rules([("x", name)])
            continue
        rule = cage.Rules([("x", name, name)]).rule_of("x")
        assert rule.weights == getattr(cage, name)()
        # A scale for each token, or one for all.
        assert rule.inputs.axis in ("contracted", None)


def test_an_unknown_name_of_a_preset():
    with pytest.raises(ValueError) as raised:
        cage.Rules([(".*kernel", "int5")])
    text = str(raised.value)
    assert text.startswith(
        "`.*kernel`: a preset must be one of int8, int4, int3, int2, "
    )
    assert text.endswith("got 'int5'. Did you mean `int8` or `int4` or `int3`?")


def test_bad_tables():
    table = [
        ({".*": int4()}, TypeError, "{'.*'", "Use Rules([("),
        (".*", TypeError, "'.*'", "Use Rules([("),
        (int4(), TypeError, "Quantizer(", "Use Rules([("),
        (None, TypeError, "None", "Use Rules([("),
        (3, TypeError, "3", "Use Rules([("),
        ([".*"], TypeError, "the entry '.*'", "Use Rules([("),
        ([(".*", int4(), 1)], TypeError, "1.", "Use Rules([("),
        ([(".*", int4(), int4)], TypeError, "<function", "Call the preset: int4(...)."),
        ([(".*", int4(), None, 1)], TypeError, "the entry ('.*'", "Use Rules([("),
        ([(re.compile(".*"), int4())], TypeError, "re.compile", "Use Rules([("),
        ([(".*", int4)], TypeError, "<function", "Call the preset: int4(...)."),
        ([(".*", quest)], TypeError, "<function", "Call the preset: quest(...)"),
        ([("*.kernel", int4())], ValueError, "'*.kernel'", "Write '.*' for any text"),
        ([("(a", int4())], ValueError, "'(a'", "Write '.*' for any text"),
    ]
    for rules, error, value, remedy in table:
        call = functools.partial(Rules, rules)
        got = f"^`rules` must .*got .*{re.escape(value)}"
        assert_raises([(call, error, got), (call, error, re.escape(remedy))])


def test_leaves_that_cannot_be_quantized():
    functions = {
        "map": lambda rules, tree: rules.map(lambda path, quantizer, x: x, tree),
        "quantized": Rules.quantized,
        "report": Rules.report,
        "fake_quant": lambda rules, tree: fake_quant(tree, rules),
    }
    leave_alone = "layers/0/w', None)"
    table = [
        (np.ones((4, 4), np.int32), "int32", leave_alone),
        (np.ones((4, 4), bool), "bool", leave_alone),
        (np.ones((4, 4), np.complex64), "complex64", leave_alone),
        (jnp.asarray(np.int32(3)), "int32", leave_alone),
        (jax.random.key(0), "key<fry>", leave_alone),
        (1.0, "float", "jnp.asarray"),
    ]
    rules = Rules([("layers/.*", int4())])
    left_alone = Rules([("layers/0/w", None), ("layers/.*", int4())])
    for leaf, value, remedy in table:
        tree = {"layers": [{"w": leaf}]}
        start = r"^`layers/0/w`: a quantized param"
        got = f"{start}.*got .*{re.escape(value)}"
        for function in functions.values():
            call = functools.partial(function, rules, tree)
            assert_raises(
                [(call, TypeError, got), (call, TypeError, re.escape(remedy))]
            )
        assert left_alone.map(lambda path, quantizer, x: None, tree) is not None
        assert left_alone.quantized(tree) == {}, value


def test_a_group_that_does_not_divide_names_the_parameter():
    rules = Rules([(".*mlp", int4(group_size=48)), (".*", None)])
    message = (
        r"^`blocks/0/mlp`: `group_size` must divide axis -2 of `x`; got group_size=48, "
        r"x\.shape=\(32, 16\)\. Use 32, or None"
    )
    with pytest.raises(ValueError, match=message):
        rules.report(PARAMS)
    with pytest.raises(ValueError, match=message):
        fake_quant(PARAMS, rules)


def test_numpy_leaves():
    tree = {"a": np.ones((4, 2), np.float32)}
    assert list(quantized(Rules([("a", int4())]), tree)) == ["a"]


def test_a_closing_rule_may_have_nothing_left():
    rules = Rules([(".*kernel", int4()), (".*", None)])
    assert not rules.report({"kernel": ones(8, 3)}).unused_rules
    with pytest.warns(UserWarning, match="matches no parameter"):
        Rules([(".*kernel", int4()), ("bias", None)]).report({"kernel": ones(8, 3)})
