"""The study's table of pieces: what each is worth in a fine-tuning of SmolLM2."""

import finetuning
import numpy as np
import pieces
import pytest
from cells import Table
from rich.console import Console

from cage_jax import llama
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.loaded import Model

pytestmark = [
    pytest.mark.usefixtures("as_users_have_it"),
    pytest.mark.filterwarnings("ignore:the recommended pull"),
    pytest.mark.filterwarnings("ignore:`batches` have fewer rows"),
]
CONFIG = LlamaConfig(vocabulary=256, width=64, hidden=64, layers=2, heads=2)


@pytest.fixture
def measure(monkeypatch, rng, tmp_path):
    written = rng.integers(97, 100, 4000).astype(np.int32)
    texts = finetuning.Texts(written, {"novel": written[:64], "law": written[64:128]})
    model = Model(llama.initial_params(CONFIG, seed=0), CONFIG, {})
    monkeypatch.setattr(pieces.finetune_smollm2, "load_model", lambda name: model)
    monkeypatch.setattr(pieces, "load_texts", lambda *_: texts)

    def run(*only):
        table = Table("pieces", {}, folder=None)
        options = pieces.TINY | {"runs": tmp_path, "table": table}
        return pieces.measure(Console(quiet=True), only=only, **options).cells

    return run


def test_a_cell_has_the_losses_after_each_stage(measure):
    first, second = (f"int3 group 64, 50 thousand tokens: {a}" for a in ("all", "none"))
    found = measure(first, second)
    stages = ["full precision", "rounded", "gptq", "blocks", "trained", "scales"]
    assert [*found[first]] == stages
    assert found[first]["scales"] != found[first]["trained"]
    assert [*found[second]] == ["full precision", "rounded", "trained"]
    assert found[first]["rounded"] == found[second]["rounded"]
    assert set(found[first]["gptq"]) == {"novel", "law"}
    # What was done before is read, with the same result.
    assert measure(first)[first] == found[first]


def test_names_are_those_of_cells():
    names = pieces.names()
    assert len(set(names)) == len(names) == 9
    for name in names:
        what, _, arm = name.partition(": ")
        target, _, length = what.partition(", ")
        assert arm in pieces.ARMS and target in pieces.TARGETS
        assert int(length.split()[0]) in pieces.LENGTHS
