"""Reports: bits and bytes of each parameter by hand, and what shards cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cage_jax import Rules, int4, int8, quantize, quest
from cage_jax.program import model_report as diagnostics

RULES = Rules(
    [
        ("up", int4(group_size=16)),
        ("down", int8(symmetric=False)),
        ("half", quest(3, hadamard=32)),
        ("odd", int4(axis=None)),
        ("s|e", int4()),
        ("norm", None),
    ]
)


def ones(*shape, dtype="float32"):
    return jnp.asarray(np.ones(shape, dtype))


PARAMS = {
    "up": ones(64, 32),
    "down": ones(32, 8),
    "half": ones(32, 8, dtype="bfloat16"),
    "odd": ones(3, 1),
    "s": ones(),
    "e": ones(0, 4),
    "norm": ones(32),
    "steps": np.zeros(2, np.int32),
}

# By hand: codes, a float32 scale for each group, a zero point where there is one.
BITS = {
    "up": 64 * 32 * 4 + (4 * 32) * 32,
    "down": 32 * 8 * 8 + 8 * (32 + 8),
    "half": 32 * 8 * 3 + 8 * 32,
    "odd": 3 * 4 + 32,
}
BEFORE = {
    "up": 64 * 32 * 4,
    "down": 32 * 8 * 4,
    "half": 32 * 8 * 2,
    "odd": 3 * 4,
    "s": 4,
    "e": 0,
    "norm": 128,
    "steps": 8,
}
REASONS = {
    "s": "a scalar",
    "e": "no elements",
    "norm": "left alone by rule 6 'norm'",
    "steps": "no rule matches",
}


@pytest.mark.parametrize(
    "params", [PARAMS, jax.eval_shape(lambda: PARAMS)], ids=["arrays", "shapes"]
)
def test_rows(params):
    report = RULES.report(params)
    assert [row.path for row in report.rows] == sorted(PARAMS)
    for row in report.rows:
        x = PARAMS[row.path]
        assert (row.shape, row.dtype, row.size) == (x.shape, x.dtype, x.size)
        quantizer = RULES.match(row.path) if row.path in BITS else None
        assert row.quantizer == (quantizer and quantizer.at(x.shape))
        assert row.quantized_bits == BITS.get(row.path)
        assert row.reason == REASONS.get(row.path)
        assert row.bytes_before == BEFORE[row.path]
        after = BEFORE[row.path]
        if row.path in BITS:
            after = (BITS[row.path] + 7) // 8
        assert row.bytes_after == after
        assert row.bits_per_weight == (8 * after / x.size if x.size else 0.0)


def test_totals():
    report = RULES.report(PARAMS)
    after = {n: (BITS[n] + 7) // 8 if n in BITS else BEFORE[n] for n in PARAMS}
    assert report.bytes_before == sum(BEFORE.values())
    assert report.bytes_after == sum(after.values())
    size = sum(x.size for x in PARAMS.values())
    assert report.bits_per_weight == 8 * sum(after.values()) / size
    assert report.unused_rules == ()


def test_bytes_are_those_of_the_codes(x64):
    rules = Rules([("up", int4(group_size=16)), ("down", int8(symmetric=False))])
    for dtype in ("float32", "bfloat16", "float64"):
        params = {"up": ones(64, 32, dtype=dtype), "down": ones(32, 8, dtype=dtype)}
        for row in rules.report(params).rows:
            codes = jax.eval_shape(
                functools.partial(quantize, quantizer=row.quantizer), params[row.path]
            )
            assert row.bytes_after == codes.nbytes, (row.path, dtype)


def test_text():
    rules = Rules([("b", int4()), ("c", None), ("d", int8())])
    params = {"a": ones(2), "b": ones(4, 2), "c": ones(2, 2)}
    with pytest.warns(UserWarning, match="the rule 'd' matches no parameter"):
        report = rules.report(params)
    assert str(report).splitlines() == [
        "path   shape   quantizer                        bits  bytes  becomes",
        "a      (2,)    - no rule matches               32.00      8        8",
        "b      (4, 2)  int4 absmax, axis -2, identity  12.00     32       12",
        "c      (2, 2)  - left alone by rule 2 'c'      32.00     16       16",
        "total  14                                      20.57     56       36",
        "unused rule: 'd'",
    ]


def test_quantizers_of_inputs_have_a_line():
    rules = Rules([(r"w", int8(), int8(axis=-1)), (r".*", None)])
    text = str(rules.report({"w": np.ones((4, 2), np.float32), "b": np.ones(2)}))
    assert text.endswith(
        "inputs of 1 parameters, such as w: int8 absmax, axis -1, identity; quantized "
        "only in what quantize_activations(model, rules) or "
        "cage.flax.fake_quant(model, rules) returns"
    )


def test_scales_that_cost_too_much():
    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    axes = "Set `axis` to the axes of its inputs, such as axis=0 for (in, heads, size) "
    axes += "and axis=(0, 1, 2) for the kernel of a convolution."
    leave = "Leave it alone by a rule with None, or use axis=None for one scale."
    table = [  # by hand: a float32 scale for each 16, 1, 8 and 2 weights
        (int4(axis=-2), shape(3, 3, 16, 32), (2, 4, (3, 3, 1, 32), 18432, 3456, axes)),
        (int4(axis=-2), shape(3, 3, 1, 64), (32, 4, (3, 3, 1, 64), 2304, 2592, leave)),
        (int4(), shape(8, 4096), (4, 4, (1, 4096), 131072, 32768, leave)),
        (
            int4(group_size=2),
            shape(64, 64, dtype=jnp.bfloat16),
            (
                16,
                4,
                (32, 64),
                8192,
                10240,
                "Use a larger group_size, or leave it alone",
            ),
        ),
        (int4(axis=(0, 1, 2)), shape(3, 3, 16, 32), None),
        (int4(), shape(24, 512), None),  # a third, 32 bits for 24 * 4
        (int4(), shape(23, 512), (1.4, 4, (1, 512), 47104, 7936, leave)),
        (int4(), shape(8, 256), None),  # small
        (int4(group_size=8), shape(64, 64), None),  # as it was asked for
        (None, shape(3, 3, 1, 64), None),
        (quest(2), shape(128, 128), None),
    ]
    for quantizer, array, expected in table:
        report = Rules([("a.*", quantizer)]).report({"a": array, "ab": array})
        if expected is None:
            assert report.costs == ()
            continue
        spent, codes, scales, before, after, remedy = expected
        (found,) = report.costs
        assert found.startswith(
            f"`a` and 1 more: its scales cost {spent:.1f} bits a weight beside codes "
            f"of {codes}, since few weights share one: {scales} scales for "
            f"{array.shape} weights, {before} bytes become {after}. {remedy}"
        )
        assert str(report).endswith("\n" + found)


def test_nothing_to_report():
    report = Rules([]).report({})
    assert (report.rows, report.bytes_before, report.bits_per_weight) == ((), 0, 0.0)
    assert str(report).splitlines()[-1].split() == ["total", "0", "0.00", "0", "0"]


def test_leaves_that_are_no_arrays():
    tree = {"count": 3, "key": jax.random.key(0), "rate": 0.1, "up": ones(64, 32)}
    rows = Rules([("up", int4(group_size=16))]).report(tree).rows
    assert [row.reason for row in rows] == ["a scalar", "a scalar", "a scalar", None]
    assert [row.shape for row in rows] == [(), (), (), (64, 32)]
    assert rows[0].bytes_before == rows[2].bytes_before == 4


MESH = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))


def sharded(shape, *axes):
    sharding = NamedSharding(MESH, P(*axes))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def test_what_shards_cut():
    rules = Rules([("rotated.*", quest(4, axis=-2)), ("groups", int4(group_size=32))])
    params = {
        "rotated": [
            sharded((256, 8), ("data", "model")),
            sharded((256, 8), ("data", "model"), None),
            sharded((3, 512, 8), None, "model", "data"),
        ],
        "groups": sharded((192, 8), "data"),
    }
    expected = (
        "`groups`: `group_size` should divide what a device has of axis -2, or devices "
        "send each other weights at each step; got group_size=32, 48 of 192 on a "
        "device. Shard another axis, or use group_size=16.",
        "`rotated/0` and 1 more: `hadamard` should divide what a device has of axis "
        "-2, or devices send each other weights at each step; got hadamard=128, 32 of "
        "256 on a device. Shard another axis, or use hadamard=32.",
    )
    with pytest.warns(UserWarning) as seen:
        report = rules.report(params)
    assert tuple(str(each.message) for each in seen) == report.splits == expected
    assert all(each.filename == __file__ for each in seen)
    assert tuple(str(report).splitlines()[-2:]) == expected
    cut = {row.path for row in report.rows if row.split is not None}
    assert cut == {"groups", "rotated/0", "rotated/1"}


def test_a_share_without_a_common_divisor_has_no_other_size():
    with pytest.warns(UserWarning, match="3 of 12 on a device. Shard another axis.$"):
        Rules([("w", int4(group_size=2))]).report({"w": sharded((12, 2), "data")})


def test_shards_that_cut_nothing():
    table = [
        (int4(), sharded((192, 8), "data")),
        (int4(axis=None), sharded((192, 8), "data", "model")),
        (int4(group_size=96), sharded((192, 8), "data")),
        (int4(group_size=24), sharded((192, 8), "data")),
        (int4(group_size=32), sharded((192, 8), None, "data")),
        (quest(4, hadamard=16), sharded((192, 8), "data")),
        (int4(), sharded((250, 8), "data")),  # which no array can be
        (quest(4, hadamard=2), sharded((250, 8), "data")),
    ]
    for quantizer, array in table:
        report = Rules([("w", quantizer)]).report({"w": array})
        assert report.splits == (), quantizer


def test_the_report_of_a_model_has_it_among_its_findings(rng):
    weight = jnp.asarray(rng.normal(size=(192, 8)), jnp.float32)
    weight = jax.device_put(weight, NamedSharding(MESH, P("data")))
    report = diagnostics.report(
        lambda params, x: x @ params["w"],
        Rules([("w", int4(group_size=32))]),
        {"w": weight},
        ones(2, 192),
    )
    (found,) = [each for each in report.findings if "on a device" in each]
    assert found.startswith("`w`: `group_size` should divide")
