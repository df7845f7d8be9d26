"""The study's small pretrained models: letters, sentences, tones."""

import itertools

import g2p
import jax
import minilm
import numpy as np
import pitch
import pretrained
import pretrained_report
import pytest
from cells import Table
from rich.console import Console

pytestmark = [
    pytest.mark.usefixtures("as_users_have_it"),
    pytest.mark.filterwarnings("ignore:the recommended pull"),
]

ENTRIES = [
    ("ab", ["AE1", "B"]),
    ("cab", ["K", "AE1", "B"]),
    ("badge", ["B", "AE1", "JH"]),
    ("a" * 12, ["AA1"] * 12),
]
WIDTH = 8
SHAPES = {
    "enc_emb": (len(g2p.LETTERS), WIDTH),
    "dec_emb": (len(g2p.PHONEMES), WIDTH),
    "fc_w": (len(g2p.PHONEMES), WIDTH),
    "fc_b": (len(g2p.PHONEMES),),
} | {
    f"{part}_{kind}_{gate}": (3 * WIDTH, WIDTH)[: 2 if kind == "w" else 1]
    for part in ("enc", "dec")
    for kind in "wb"
    for gate in ("ih", "hh")
}


@pytest.fixture
def params(rng):
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def gru(params, part, x, h):
    """One step in float64, as its paper has it."""

    def parts(kind, value):
        weight, bias = params[f"{part}_w_{kind}"], params[f"{part}_b_{kind}"]
        return np.split(weight @ value + bias, 3)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    (reset, update, new), (r, z, n) = parts("ih", x), parts("hh", h)
    gate, new = sigmoid(update + z), np.tanh(new + sigmoid(reset + r) * n)
    return (1 - gate) * new + gate * h


def test_the_model_is_two_grus(params):
    words = g2p.encode(ENTRIES)
    found = g2p.logits(jax.tree.map(np.float32, params), words)
    for row, (word, sounds) in enumerate(ENTRIES):
        h = np.zeros(WIDTH)
        for letter in [*word, "</s>"]:
            h = gru(params, "enc", params["enc_emb"][g2p.LETTERS.index(letter)], h)
        for step, sound in enumerate(["<s>", *sounds]):
            h = gru(params, "dec", params["dec_emb"][g2p.PHONEMES.index(sound)], h)
            expected = params["fc_w"] @ h + params["fc_b"]
            np.testing.assert_allclose(found[row, step], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def task(params):
    params = jax.tree.map(np.float32, params)
    words = g2p.encode(ENTRIES)
    return g2p.task_of(params, words, words)._replace(steps=40, rates=(1e-2,))


def test_cells_are_trainings_that_share_batches(task):
    cells = pretrained.Cells(task, {})
    (full,) = cells.measure("full precision").values()
    (rounded,) = cells.measure("int2, rounded").values()
    assert full["KL"] == 0 < rounded["KL"]
    found = {
        arm: cells.measure(f"int2, KL, from rounded: {arm}, seed 0")
        for arm in ("ste", "recommended")
    }
    assert set(found["ste"]) == {"last", "averaged"}
    assert found["ste"]["last"]["KL"] < rounded["KL"]
    assert found["ste"]["last"] != found["recommended"]["last"]
    again = pretrained.Cells(task, {}).measure("int2, KL, from rounded: ste, seed 0")
    assert again == found["ste"]


def test_what_is_measured_is_not_measured_again(task, tmp_path):
    console, names = Console(quiet=True), ["full precision", "int3, rounded"]
    first = pretrained.fill("g2p", task, console, names[:1], table=table(tmp_path))
    assert [*first.cells] == names[:1]
    never = task._replace(judge=None)
    with pytest.raises(TypeError):
        pretrained.fill("g2p", never, console, names, table=table(tmp_path))
    pretrained.fill("g2p", never, console, names[:1], table=table(tmp_path))


def table(folder):
    return Table("g2p", {}, folder)


def test_names_are_those_of_cells():
    names = g2p.names(seeds=2)
    assert len(set(names)) == len(names)
    trained = [pretrained.TRAINED.fullmatch(name) for name in names if "seed" in name]
    assert all(trained)
    recipes = len(pretrained.ARMS) + 2 * len(pretrained.BETWEEN)
    rates = [parts["rate"] for parts in trained if parts["rate"]]
    assert rates == ["0.0001", "0.0003", "0.001"] * 2
    bounds = 2 * len(pretrained.BOUNDS)
    assert len(trained) == 2 * 2 * recipes + len(rates) + bounds


def test_the_bound_of_what_is_recommended_is_one_of_those_that_are_compared(task):
    """At a rate of which no step could go beyond the grid, which has a bound too."""
    task = task._replace(rates=(1e-3,))
    half, recommended, unbounded = (
        pretrained.Cells(task, {}).measure(f"int2, KL, from rounded: {arm}, seed 0")
        for arm in ("half", "recommended", "unbounded")
    )
    assert half == recommended != unbounded


def test_the_rate_of_a_width_is_the_best_on_another_seed(task):
    task = task._replace(rates=(1e-3, 1e-2), steps=10)
    name, tried = "int2, KL, from rounded: ste, seed 0", {}
    cells = pretrained.Cells(task, tried)
    with pytest.raises(ValueError, match=r"'int2, KL, .* at 0.001, seed 100' is not"):
        cells.measure(name)
    for key in g2p.names(seeds=0):
        if "int2" in key and ("at 0.0001," in key or "at 0.001," in key):
            tried[key.replace("0.001", "0.01").replace("0.0001", "0.001")] = {
                "last": {"KL": 1.0}
            }
    best, worst = tried
    tried[best] = {"last": {"KL": 0.5}}
    low = cells.measure(name)
    tried[best], tried[worst] = tried[worst], tried[best]
    high = cells.measure(name)
    alone = [
        pretrained.Cells(task._replace(rates=(rate,)), {}).measure(name)
        for rate in (1e-3, 1e-2)
    ]
    assert [low, high] == alone and low != high


def test_a_package_that_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match="'no-such-package' must be installed"):
        pretrained.packaged_file("no-such-package", "file")


def test_the_tables():
    scores = {"cross-entropy": 1.0, "KL": 0.0, "words right": 0.5}
    trained = "int2, KL, from GPTQ: {}, seed {}".format
    cells = {
        "full precision": {"": scores},
        "int2, GPTQ": {"": scores | {"cross-entropy": 5.0}},
    }
    for seed, ste in enumerate((3.0, 4.0)):
        cells[trained("ste", seed)] = {
            "last": scores | {"cross-entropy": ste},
            "averaged": scores | {"cross-entropy": ste + 0.5},
        }
    for seed, loss in enumerate((2.0, 3.0)):
        cells[trained("recommended", seed)] = {"last": {"cross-entropy": loss}}
    for rate in ("0.001", "0.01"):
        name = f"int2, KL, from rounded: ste at {rate}, seed 100"
        found = float(rate)
        cells[name] = {"last": {"KL": found}, "averaged": {"KL": 1 + found}}
    record = {"cells": cells}
    rows = pretrained_report.rates("KL")(record)
    assert rows.header[1:] == ["0.001", "0.01"]
    assert rows.cells == [["int2", "0.001", "0.010"]]
    for bound, found in (("half", 0.25), ("unbounded", 0.75)):
        cells[f"int2, KL, from rounded: {bound}, seed 100"] = {"last": {"KL": found}}
    rows = pretrained_report.bounds("KL")(record)
    assert rows.header[3:] == ["0.1", "0.5", "2", "no bound"]
    assert rows.cells == [["int2", "0.001", "1.001", "-", "0.250", "-", "0.750"]]
    rows = pretrained_report.means("cross-entropy")(record)
    (line,) = [dict(zip(rows.header, line)) for line in rows.cells]
    assert line["trained"] == "int2, KL, from GPTQ"
    assert line["full precision"] == "1.000"
    assert line["rounded after training (PTQ)"] == "5.000"
    assert line["straight through (STE)"] == "3.500 ± 0.500"
    rows = pretrained_report.recovered("cross-entropy")(record)
    (line,) = [dict(zip(rows.header, line)) for line in rows.cells]
    assert line["CAGE as recommended"] == "40%, 2 of 2"
    assert line["STE, last fifth averaged"] == "-20%, 0 of 2"
    assert "PARQ" not in line


def test_a_sentence_is_near_itself_in_few_bits(rng):
    found = rng.normal(size=(20, 8))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    same = minilm.measures(found, found)
    assert same == {"distance": 0, "Spearman": 1, "same nearest": 1}
    other = minilm.measures(found, -found)
    assert other["distance"] == 2 and other["Spearman"] == 1


def test_the_embeddings_are_those_of_transformers(rng):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    torch = pytest.importorskip("torch", reason="the oracle")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=minilm.LAYERS,
        num_attention_heads=minilm.HEADS,
        intermediate_size=32,
        initializer_range=0.5,
        layer_norm_eps=minilm.EPSILON,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    tokens = rng.integers(1, 50, (3, 9))
    tokens[1, 5:] = 0
    known = torch.from_numpy(tokens != 0)
    with torch.no_grad():
        states = model(torch.from_numpy(tokens), attention_mask=known.long())[0]
        mean = (states * known[..., None]).sum(1) / known.sum(1, keepdim=True)
        expected = torch.nn.functional.normalize(mean).numpy()
    params = {k.replace(".", "/"): v.numpy() for k, v in model.state_dict().items()}
    found = minilm.embeddings(params, minilm.Sentences(tokens))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


CHANNELS = (1, 8, 4, 4, 4, 4, 8)


@pytest.fixture
def crepe(rng):
    """Arrays of random weights by torchcrepe's names."""
    arrays = {"classifier.weight": (360, 32), "classifier.bias": (360,)}
    for number, (before, own) in enumerate(itertools.pairwise(CHANNELS), start=1):
        width = 512 if number == 1 else 64
        arrays[f"conv{number}.weight"] = (own, before, width, 1)
        kinds = ("weight", "bias", "running_mean", "running_var")
        arrays |= {f"conv{number}_BN.{kind}": (own,) for kind in kinds}
        arrays[f"conv{number}.bias"] = (own,)
    values = {name: rng.normal(size=shape) / 8 for name, shape in arrays.items()}
    return {
        name: np.float32(np.abs(value) if "var" in name else value)
        for name, value in values.items()
    }


def test_the_pitch_is_that_of_torch(crepe):
    torch = pytest.importorskip("torch", reason="the oracle")
    layers = torch.nn.functional
    tones = pitch.draw(jax.random.key(0), 3)
    arrays = {name: torch.from_numpy(array) for name, array in crepe.items()}
    x = torch.from_numpy(np.array(tones.samples))[:, None]
    for number in range(1, 7):
        first = number == 1
        x = layers.pad(x, (254, 254) if first else (31, 32))
        kernel, bias = (arrays[f"conv{number}.{kind}"] for kind in ("weight", "bias"))
        x = layers.conv1d(x, kernel[..., 0], bias, stride=4 if first else 1)
        norm = [
            arrays[f"conv{number}_BN.{kind}"]
            for kind in ("running_mean", "running_var", "weight", "bias")
        ]
        x = layers.batch_norm(layers.relu(x), *norm, eps=pitch.EPSILON)
        x = layers.max_pool1d(x, 2)
    x = x.permute(0, 2, 1).reshape(3, -1)
    expected = x @ arrays["classifier.weight"].T + arrays["classifier.bias"]
    found = pitch.logits(pitch.as_params(crepe), tones)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_tones_have_their_pitch():
    """Harmonics of it explain a tone; those of a semitone above do not."""
    tones = jax.tree.map(np.float64, pitch.draw(jax.random.key(1), 200))
    np.testing.assert_allclose(tones.samples.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(tones.samples.std(axis=1), 1, rtol=1e-4)

    def explained(samples, cents):
        order = np.arange(1, pitch.HARMONICS + 1)
        turns = 10 * 2 ** (cents / 1200) / pitch.RATE * order
        angles = 2 * np.pi * np.arange(pitch.SAMPLES)[:, None] * turns[turns < 0.5]
        waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        rest = samples - waves @ np.linalg.lstsq(waves, samples)[0]
        return 1 - rest.var()

    found, above = (
        np.array([explained(x, c + away) for x, c in zip(*tones)]) for away in (0, 100)
    )
    assert np.median(found) > 0.98 and (found > above).mean() > 0.98


def test_the_pitch_of_logits(rng):
    """A bump around a bin means that bin; 20 cents apart, the first at 31.7 Hz."""
    bins = rng.uniform(5, 350, 20)
    bump = np.exp(-0.5 * np.square((np.arange(360) - bins[:, None]) / 1.25))
    with np.errstate(divide="ignore"):
        found = np.maximum(np.log(bump / (1 - bump)), -50)
    hertz = 10 * 2 ** (np.asarray(pitch.cents_of(np.float32(found))) / 1200)
    expected = 31.7017 * 2 ** (bins * 20 / 1200)
    np.testing.assert_allclose(hertz, expected, rtol=0.002)
