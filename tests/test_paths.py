"""Paths of parameters: trees of all kinds read alike."""

import collections
import dataclasses
import functools
import itertools
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest
from cases import assert_raises
from flax import nnx

import cage_jax as cage
from cage_jax import Rules, int4
from cage_jax.arrays.paths import flatten_with_paths, path_in_errors

RULES = Rules([("(layers/[01]|up)/kernel", int4())])


class Pair(NamedTuple):
    kernel: object
    bias: object


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("kernel", "bias"), meta_fields=()
)
@dataclasses.dataclass
class Dense:
    kernel: object
    bias: object


class Linen(nn.Module):
    partitioned: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        if self.partitioned:
            init = nn.with_partitioning(init, (None, None))
        for name in ("up", "down"):
            x = nn.Dense(4, kernel_init=init, name=name)(x)
        return x


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.up = nnx.Linear(4, 4, rngs=rngs)


def dense(kind=dict):
    return kind(kernel=np.ones((4, 4), np.float32), bias=np.ones(4, np.float32))


def paths(tree):
    return flatten_with_paths(tree)[0]


def test_plain_trees_read_alike():
    for kind, sequence in itertools.product((dict, Pair, Dense), (list, tuple)):
        tree = {"layers": sequence([dense(kind), dense(kind)]), "up": dense(kind)}
        assert set(paths(tree)) == {
            f"{layer}/{leaf}"
            for layer in ("layers/0", "layers/1", "up")
            for leaf in ("kernel", "bias")
        }
        assert list(RULES.quantized(tree)) == [
            "layers/0/kernel",
            "layers/1/kernel",
            "up/kernel",
        ]


def test_dicts_of_numbers_read_as_lists_do():
    assert paths({"layers": {0: 1.0, 1: 2.0}}) == paths({"layers": [1.0, 2.0]})


@pytest.mark.parametrize("partitioned", [False, True])
def test_linen(partitioned):
    shapes = functools.partial(Linen(partitioned).init, jax.random.key(0))
    variables = jax.eval_shape(shapes, np.ones((1, 4), np.float32))
    expected = ["down/bias", "down/kernel", "up/bias", "up/kernel"]
    for tree in (variables, variables["params"], nn.unbox(variables)):
        assert paths(tree) == expected
        assert list(RULES.quantized(tree)) == ["up/kernel"]


def test_nnx():
    model = nnx.eval_shape(lambda: Layers(nnx.Rngs(0)))
    state = nnx.state(model)
    expected = [
        f"{layer}/{leaf}"
        for layer in ("layers/0", "layers/1", "up")
        for leaf in ("bias", "kernel")
    ]
    trees = (
        state,
        nnx.to_pure_dict(state),
        nnx.split(model)[1],
        nnx.state(model, nnx.Param),
    )
    for tree in trees:
        assert paths(tree) == expected
        assert list(RULES.quantized(tree)) == [f"{path}" for path in expected[1::2]]
    assert paths(model) == expected
    with pytest.raises(TypeError, match=r"Use nnx.state\(model, nnx.Param\)"):
        RULES.quantized(model)  # it may have other state


def test_every_layout_gives_the_same_report():
    model = Layers(nnx.Rngs(0))
    state = nnx.state(model)
    pure = jax.tree.map(np.asarray, nnx.to_pure_dict(state))
    plain = {"layers": [pure["layers"][0], pure["layers"][1]], "up": pure["up"]}
    assert RULES.report(state).rows == RULES.report(plain).rows


def test_what_is_left_out_and_what_is_not():
    class Attention(NamedTuple):
        query: object
        value: object

    leaf = np.ones(1, np.float32)
    # Only Flax's boxes are seen through: here `value` is a layer's name.
    assert paths({"attention": Attention(leaf, leaf)}) == [
        "attention/query",
        "attention/value",
    ]
    assert paths({"value": leaf}) == ["value"]
    assert paths({"value": nnx.Param(leaf)}) == ["value"]
    assert paths({"params": leaf}) == ["params"]
    assert paths({"params": {"params": leaf}}) == ["params"]
    assert paths({"batch_stats": {"mean": leaf}}) == ["batch_stats/mean"]
    assert paths([{"params": leaf}]) == ["0/params"]
    assert paths(leaf) == [""]


def test_arrays_in_one_box_have_paths_of_their_own():
    cache = nnx.Variable({"key": np.ones(1), "value": np.ones(1)})
    assert paths({"cache": cache}) == ["cache/key", "cache/value"]
    assert paths({"cache": nn.Partitioned([1.0, 2.0], ("x",))}) == [
        "cache/0",
        "cache/1",
    ]


def test_two_leaves_of_one_path_are_refused():
    kernel = np.ones((4, 4), np.float32)
    rules = Rules([(".*", int4())])
    for tree, text in (
        (
            {"a/b": kernel, "a": {"b": kernel}},
            r"^`a/b`: .*\['a'\]\['b'\] and \['a/b'\]",
        ),
        (
            collections.OrderedDict({1: kernel, "1": kernel}),
            r"^`1`: .*\[1\] and \['1'\]",
        ),
        (
            {"params": [kernel], "0": kernel},
            r"^`0`: .* got \['0'\] and \['params'\]\[0\]",
        ),
    ):
        assert_raises(
            (lambda call=call, tree=tree: call(tree, rules), ValueError, text)
            for call in (
                cage.fake_quant,
                cage.quantize,
                cage.quantization_error,
                cage.with_grids,
                lambda tree, rules: rules.report(tree),
                lambda tree, rules: cage.coupled(rules, strength=1.0).init(tree),
            )
        )


def test_a_registered_node_without_keys():
    @jax.tree_util.register_pytree_node_class
    class Node:
        def __init__(self, child):
            self.child = child

        def tree_flatten(self):
            return (self.child,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    assert paths({"a": Node(np.ones(1, np.float32))}) == ["a/0"]


def test_errors_begin_with_the_path():
    for raised, kind in (
        (ValueError("bad"), ValueError),
        (TypeError("bad"), TypeError),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "bad"), ValueError),
    ):
        with (
            pytest.raises(kind, match=r"^`mlp/up`: .*bad") as caught,
            path_in_errors("mlp/up"),
        ):
            raise raised
        assert caught.value.__cause__ is raised


def test_errors_of_jax_begin_with_the_path_too():
    rules = Rules([("a", int4())])

    @jax.jit
    def concrete(tree):
        return rules.map(lambda path, quantizer, x: np.asarray(x), tree)

    with pytest.raises(TypeError, match=r"^`a`: .*traced"):
        concrete({"a": np.ones((4, 4), np.float32)})


def test_other_errors_are_left_alone():
    with pytest.raises(KeyError, match=r"^'x'$"), path_in_errors("a"):
        raise KeyError("x")
