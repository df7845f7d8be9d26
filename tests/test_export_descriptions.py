"""Quantizers through JSON: all of them, and what a hostile file can say."""

import dataclasses
import inspect
import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cage_jax as cage
from cage_jax import formats, scale_types, scales
from cage_jax.export.descriptions import classes, describe, quantizer_of
from cage_jax.export.files import MalformedFileError
from cage_jax.export.rules_json import rules_from_json, rules_to_json
from cage_jax.quantizers.formats import Codebook, Float, Integer, MidRise
from cage_jax.quantizers.registry import PRESETS
from cage_jax.quantizers.scales import (
    AbsMax,
    Calibrated,
    Fixed,
    FourOverSix,
    Learned,
    MinMax,
    Percentile,
    Searched,
)

AXES = {"axis": -1}, {"axis": (0, 1), "group_size": (None, 8)}, {"axis": None}
OPTIONS = {
    "int2": [*AXES, {"symmetric": False}, {"hadamard": 32}],
    "int3": [{"group_size": 8}, {"narrow": False}, {"scale": AbsMax(0.7)}],
    "int4": [{"group_size": 32}, {"scale": Searched(20, 0.3)}, {"gradient": "trust"}],
    "int8": [{"scale": Fixed(2.0**-5)}, {"scale": Percentile(99)}],
    "quest": [{"bits": 1}, {"bits": 4, "gradient": "trust", "hadamard": None}],
    "fp8": [{"name": "e5m2"}],
    "mxfp8": [{"name": "e5m2", "rounding": "up"}],
    "mxfp6": [{"name": "e3m2"}],
    "mxfp4": [{"rounding": "nearest"}],
    "nvfp4": [
        {"tensor_divisor": False},
        {"scale": FourOverSix()},
        {"scale": Learned(start=Searched(most=1.5))},
    ],
    "nf4": [{"group_size": 16}],
    "ternary": [{"axis": -2, "group_size": 64}],
    "binary": [{"axis": None}],
    "q4_0": [{"axis": -1}],
    "q4_1": [{"axis": -1}],
    "q8_0": [{"axis": -1}],
    "ct_w4a16": [{"symmetric": False}, {"scale_dtype": "bfloat16"}],
    "ct_w8a8": [{"scale_dtype": "float32"}],
    "lsq": [{"bits": 3, "offset": True}, {"start": AbsMax(0.9), "narrow": True}],
    "seq": [{"levels": 3}],
}


def there_and_back(quantizer):
    return quantizer_of(json.loads(json.dumps(describe(quantizer), allow_nan=False)))


def test_every_preset_is_tried():
    assert set(PRESETS) == set(OPTIONS)


def test_presets_there_and_back():
    for name, preset in PRESETS.items():
        needed = {"bits": 2} if name == "quest" else {}
        for options in [*OPTIONS[name], needed]:
            quantizer = preset.make(**options)
            again = there_and_back(quantizer)
            assert again == quantizer
            assert hash(again) == hash(quantizer)
            assert str(again) == str(quantizer)


def test_others_there_and_back():
    for quantizer in [
        cage.Quantizer(Integer(4), Calibrated(Percentile(99.5), decay=0.9)),
        cage.Quantizer(Integer(4), Calibrated()),
        cage.Quantizer(Codebook(tuple(np.float32([-1, 0.1, 2])), "mine")),
        cage.Quantizer(MidRise(3), hadamard=64, hadamard_seed=7),
        cage.Quantizer(Float("e4m3"), rounding="stochastic"),
        cage.Quantizer(Integer(4), AbsMax(1)),
    ]:
        assert there_and_back(quantizer) == quantizer


floats = st.floats(1e-30, 1e30)
any_format = st.one_of(
    st.builds(Integer, st.integers(2, 8), st.booleans()),
    st.builds(Integer, st.integers(2, 8), st.just(False), signed=st.booleans()),
    st.builds(MidRise, st.integers(1, 8)),
    st.lists(st.floats(-9, 9), min_size=2, max_size=9, unique=True).map(
        lambda levels: Codebook(tuple(sorted(levels)))
    ),
)
any_scale = st.one_of(
    st.builds(AbsMax, floats), st.builds(Fixed, floats), st.just(MinMax())
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    any_format,
    any_scale,
    st.integers(-3, 3) | st.just("contracted"),
    st.none() | st.integers(1, 256),
    st.sampled_from([None, 2, 128]),
    st.sampled_from(["identity", "clip", "trust"]),
)
def test_any_quantizer_there_and_back(format, scale, axis, size, hadamard, gradient):
    try:
        quantizer = cage.Quantizer(
            format,
            scale,
            axis=axis,
            group_size=size,
            hadamard=hadamard,
            gradient=gradient,
        )
    except ValueError:  # such as MinMax with a codebook
        return
    assert there_and_back(quantizer) == quantizer


def test_defaults_but_the_axis_are_left_out():
    assert describe(cage.int4()) == {
        "class": "Quantizer",
        "axis": "contracted",
        "format": {"class": "Integer", "bits": 4},
    }


def test_a_description_without_an_axis_is_of_an_older_file():
    older = {"class": "Quantizer", "format": {"class": "Integer", "bits": 4}}
    assert quantizer_of(older) == cage.int4(axis=-2)


def test_every_class_is_known():
    bases = formats.Format, scales.ScaleRule, scale_types.ScaleType
    found = {
        kind
        for module in (formats, scales, scale_types)
        for kind in vars(module).values()
        if inspect.isclass(kind)
        and issubclass(kind, bases)
        and not kind.__name__.startswith("_")
        and not inspect.isabstract(kind)
    }
    assert set(classes().values()) == found | {cage.Quantizer}


@dataclasses.dataclass(frozen=True)
class Integer4(Integer):
    """A class that a user wrote."""


def test_a_class_of_a_user_is_refused():
    with pytest.raises(TypeError, match=r"got Integer4 of .*test_export_descriptions"):
        describe(cage.Quantizer(Integer4(4)))
    impostor = dataclasses.make_dataclass("Integer", [], bases=(Integer,), frozen=True)
    with pytest.raises(TypeError, match="got Integer of"):
        describe(cage.Quantizer(impostor(4)))


# --- hostile files --------------------------------------------------------------------


def changed(**fields):
    return describe(cage.int4()) | fields


def scale(**fields):
    return changed(scale={"class": "AbsMax", **fields})


def nested(depth):
    found = {"class": "AbsMax"}
    for _ in range(depth):
        found = {"class": "Calibrated", "rule": found}
    return changed(scale=found)


def test_malformed():
    quantizer_of(nested(1))
    for description, message in [
        (None, "must have a 'class'; got None"),
        ([], r"must have a 'class'; got \[\]"),
        ({"class": "Integer", "bits": 4}, "one of .'Quantizer'.; got 'Integer'"),
        ({"class": "os.system"}, "newer version"),
        ({"class": ["Quantizer"]}, "newer version"),
        ({"class": "Quantizer"}, "missing 1 required .*'format'"),
        (changed(format="Integer"), "must have a 'class'; got 'Integer'"),
        (changed(format={"class": "Integer16"}), "got 'Integer16': written by a newer"),
        (changed(format={"class": "AbsMax"}), "a Format must be one of"),
        (changed(shift=3), "got 'shift': written by a newer version"),
        (changed(__init__=3), "got '__init__'"),
        (changed(axis="all"), "`axis` of Quantizer must be .*; got 'all'"),
        (changed(axis=1.5), "`axis` of Quantizer"),
        (changed(axis=True), "`axis` of Quantizer"),
        (changed(axis=[[1]]), "`axis` of Quantizer"),
        (changed(group_size=0), "`group_size` must be at least 1"),
        (changed(group_size=[1] * 1000), "`group_size` of Quantizer"),
        (changed(hadamard=48), "`hadamard` must be"),
        (changed(hadamard=16, hadamard_seed=-1), "`hadamard_seed` must"),
        (changed(gradient="through"), "`gradient` of Quantizer"),
        (changed(gradient=["clip"]), "`gradient` of Quantizer"),
        (changed(format={"class": "Integer", "bits": 99}), "`bits` must be from"),
        (changed(format={"class": "Integer", "bits": "4"}), "`bits` of Integer"),
        (changed(format={"class": "Integer", "bits": 4, "narrow": 2}), "`narrow` of"),
        (changed(format={"class": "Codebook", "levels": [0]}), "`levels` must be"),
        (changed(format={"class": "Codebook", "levels": [0, "1"]}), "`levels` of"),
        (
            changed(format={"class": "Codebook", "levels": [-math.inf, 1]}),
            "`levels` of",
        ),
        (changed(format={"class": "Codebook", "levels": [1.0] * 10**6}), "`levels`"),
        (scale(clip=math.nan), "`clip` of AbsMax must be float"),
        (scale(clip=10**400), "`clip` of AbsMax must be float"),
        (scale(clip=-1), "`clip` must be above 0"),
        (scale(clip={"class": "AbsMax"}), "`clip` of AbsMax"),
        (
            changed(scale={"class": "Learned", "start": {"class": "Learned"}}),
            "`start` must be a rule",
        ),
        (changed(scale={"class": "SignedMax"}, format={"class": "Integer"}), "missing"),
        (nested(2), "`rule` must be a rule"),
        (nested(400), "nested so deeply|`rule` must be"),
    ]:
        with pytest.raises(MalformedFileError, match=message) as caught:
            quantizer_of(description)
            pytest.fail(message)
        assert len(str(caught.value)) < 1000


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["class", "bits", "rule"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), value=plain)
def test_anything_is_a_quantizer_or_malformed(data, value):
    description = describe(
        data.draw(st.sampled_from([cage.nvfp4(), cage.nf4(), cage.int4(axis=(0, 1))]))
    )
    place = description
    while (key := data.draw(st.sampled_from([*place, "new"]))) in place:
        if not isinstance(place[key], dict) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    try:
        quantizer = quantizer_of(description)
    except MalformedFileError:
        return
    assert there_and_back(quantizer) == quantizer


# --- rules ----------------------------------------------------------------------------


def test_rules_come_back_from_json_with_their_axes():
    rules = cage.Rules([("a/.*", "mxfp4", "int8"), ("b", None, cage.int8(axis=None))])
    shape = jax.ShapeDtypeStruct((4, 32, 64), np.float32)

    def apply(params, x):
        return x @ params["a"]["w"]

    rules = cage.resolve(rules, apply, {"a": {"w": shape}}, np.ones((4, 2, 32)))
    assert rules.match("a/w").axis == -2
    found = rules_from_json(rules_to_json(rules))
    assert found == rules and hash(found) == hash(rules)
    for text in (
        "",
        "[]",
        "{}",
        '{"rules": 3, "resolved": {}}',
        '{"rules": [["(", null, null]], "resolved": {}}',
        '{"rules": [[1, null, null]], "resolved": {}}',
        '{"rules": [["a", {"class": "os"}, null]], "resolved": {}}',
        '{"rules": [], "resolved": {"a": null}}',
        '{"rules": [], "resolved": []}',
        "[" * 100_000,
    ):
        with pytest.raises(MalformedFileError):
            rules_from_json(text)
