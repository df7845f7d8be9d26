"""What a REPL and a notebook show of the library's objects."""

import dataclasses
import html.parser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import cage_jax as cage
import cage_jax.flax
from cage_jax.core.tables import html_table
from cage_jax.llama.loaded import Model
from cage_jax.program import model_report

INT4 = cage.int4(group_size=32)
RULES = cage.Rules([(".*kernel", INT4), (".*", None)])
PARAMS = {"kernel": np.ones((64, 32), np.float32), "bias": np.ones(32, np.float32)}


def test_quantizers_and_rules_are_a_line():
    assert repr(INT4) == "Quantizer(int4 absmax, group 32, identity)"
    assert repr(cage.Rules([("a", INT4)] * 5)) == (
        "Rules([('a', int4 absmax, group 32, identity), "
        "('a', int4 absmax, group 32, identity), ... 3 more])"
    )
    for make in (cage.int8, cage.nf4, cage.nvfp4, cage.mxfp4, cage.q4_1, cage.lsq):
        assert len(repr(make())) <= 100


def test_a_quantized_linen_module_is_a_line():
    model = cage.flax.quantize_activations(nn.Dense(8), RULES)
    assert repr(model) == f"QuantizedLinen(Dense, {RULES!r})"


def test_codes_are_a_line_without_their_values():
    codes = cage.quantize(PARAMS["kernel"], INT4)
    assert repr(codes) == (
        "QuantizedArray((64, 32), float32, int4 absmax, group 32 of axis -2, identity, "
        "1280 bytes)"
    )
    # Of parts of it, as in a tree of shapes or under vmap, nothing is counted.
    assert "bytes" not in repr(jax.tree.map(lambda x: x[:1], codes))
    assert repr(jax.tree.map(lambda x: None, codes)).startswith("QuantizedArray(None, ")


def test_a_loaded_model_is_a_line_and_has_no_names():
    codes = cage.quantize(PARAMS, RULES)
    model = Model(codes, None, {})
    assert repr(model) == (
        "Model(params: 2 arrays, 1 of them codes; config: no Llama; tokenizer: none)"
    )
    config = dataclasses.make_dataclass("Config", [("layers", int)])(30)
    assert repr(Model(codes, config, {"tokenizer.json": b"{}"})).endswith(
        "config: a Llama of 30 layers; tokenizer: tokenizer.json)"
    )
    assert model[0] is model.params is codes and model[1:] == (None, {})
    text = r"Use model\.params\['kernel'\] for codes, or model\.floats\(\)\['kernel'\]"
    with pytest.raises(TypeError, match=text):
        model["kernel"]


@pytest.mark.parametrize("options", [{}, {"statistics": True}, {"freeze_scale": True}])
def test_states_are_a_line(options):
    tx = cage.cage_sgd(0.1, RULES, total_steps=1000, **options)
    state = tx.init(PARAMS)[1]
    assert repr(state).startswith("CageState(cage_count=0, grids=")
    for each in (state, state.curvature, *(state.grids or {}).values()):
        assert "\n" not in repr(each)
        assert len(repr(each)) <= 120
    traced = []
    jax.jit(lambda state: traced.append(repr(state)))(state)
    assert traced[0].startswith("CageState(cage_count=int32[], ")


def test_what_is_gone_or_no_number_has_a_repr_too():
    state = cage.contrib.averaging().init({"w": jnp.ones(3)})
    assert repr(state) == "AveragingState(averaging_count=0, average=1 array)"
    state.averaging_count.delete()
    assert repr(state) == "AveragingState(averaging_count=int32[], average=1 array)"
    key = cage.curvature.hutchinson().init({"w": (INT4, PARAMS["kernel"])})
    assert "\n" not in repr(key)


class Cells(html.parser.HTMLParser):
    """Reads the cells of a table, line by line, and the rest of the text."""

    def __init__(self, text):
        super().__init__()
        self.lines, self.notes, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.lines.append([])
        elif tag in ("th", "td"):
            self.lines[-1].append("")

    def handle_data(self, data):
        if self.tags[-1] == "p":
            self.notes.append(data)
        else:
            self.lines[-1][-1] += data


def test_a_report_is_its_table():
    params = {**PARAMS, "<b>": np.ones((2, 2), np.float32)}
    rules = cage.Rules([("norm", "int8"), *RULES])
    with pytest.warns(UserWarning, match="'norm' matches no parameter"):
        report = rules.report(params)
    assert repr(report) == str(report)
    found = Cells(report._repr_html_())
    head, *rows, total = found.lines
    assert head == ["path", "shape", "quantizer", "bits", "bytes", "becomes"]
    # A reader of HTML gets each path back, so that none is taken for a tag.
    assert [row[0] for row in rows] == [row.path for row in report.rows]
    assert total[-1] == str(report.bytes_after)
    assert "unused rule: 'norm'" in found.notes
    assert {"b", "script"}.isdisjoint(found.tags)


def test_a_report_of_a_model_is_its_table():
    report = model_report.report(
        lambda p, x: x @ p["kernel"], RULES, PARAMS, jnp.ones((2, 64))
    )
    assert repr(report) == str(report)
    found = Cells(report._repr_html_())
    assert [line[0] for line in found.lines] == ["path", "bias", "kernel"]
    assert found.notes == [f"- {each}" for each in report.findings]


def test_columns_of_words_are_on_the_left():
    found = html_table([("a", "b"), ("c", "1")], left=1)
    assert found.count('style="text-align: left"') == 2
    assert found.count('style="text-align: right"') == 2


def test_a_report_leaves_out_what_is_no_array():
    """An Equinox module has its activation among its leaves."""
    tree = {"kernel": PARAMS["kernel"], "activation": jax.nn.relu, "name": "dense"}
    report = cage.Rules([(".*", "int4")]).report(tree)
    assert [row.path for row in report.rows] == ["kernel"]
    assert [row.path for row in RULES.report({**tree, "rate": 0.5}).rows] == [
        "kernel",
        "rate",
    ]
