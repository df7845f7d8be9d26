"""Fields of config.json: a part of what `python tests/config_grammar.py` compares."""

import collections

import pytest

pytest.importorskip("torch", reason="the oracle is in PyTorch")
pytest.importorskip("transformers", reason="the oracle")

import config_grammar

from cage_jax.llama import config_fields


@pytest.mark.parametrize("kind", config_grammar.KINDS)
def test_logits_are_those_of_transformers_or_the_file_is_refused(
    kind, as_users_have_it
):
    begin = config_grammar.KINDS.index(kind)
    found = config_grammar.run(kind, begin, 20)
    assert config_grammar.wrong(found) == []
    counts = collections.Counter(one.verdict for one in found.values())
    assert counts["equal"] > 80 and counts["refused"] > 600


@pytest.mark.parametrize("kind", config_grammar.KINDS)
def test_what_transformers_writes_is_read(kind):
    found = config_grammar.Comparison().outcome(config_grammar.whole(kind))
    assert found.verdict == "equal"


def test_a_field_that_is_new_is_refused():
    """Each field that transformers has is in a table, or refused."""
    known = {*config_fields.READ.values(), *config_fields._SUPPORTED}
    known |= {*config_fields._WITHOUT_EFFECT.split(), *config_fields._OTHER_PLACES}
    for kind in config_grammar.KINDS:
        assert set(config_grammar.whole(kind)) <= known
    assert len(set(config_grammar.fields_of_others()) - known) > 500
