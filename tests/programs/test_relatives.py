"""The benchmarks of related methods: what they compute, and their tables."""

import intervention
import jax
import jax.numpy as jnp
import minilm
import newer_rivals
import numpy as np
import pytest
import quadratics
import relatives
import synthetic
import tuned_digits
import video

pytestmark = pytest.mark.usefixtures("as_users_have_it")


def test_images_of_fashion_are_means_of_pixels(rng):
    pixels = rng.integers(0, 256, (2, 28, 28), np.uint8)
    part = relatives.images.Images(pixels, np.zeros(2, np.uint8))
    found = relatives.reduced(part)
    want = np.zeros((2, 8, 8))
    for i in range(28):
        for j in range(28):
            want[:, (i + 2) // 4, (j + 2) // 4] += pixels[:, i, j] / 16
    np.testing.assert_allclose(found, want.reshape(2, 64))


def test_a_pruned_network_stays_sparse(monkeypatch):
    monkeypatch.setattr(relatives, "SPARSITIES", (0.5,))
    found = relatives.pruning(relatives.Settings(seeds=1, steps=8))
    # The last pruning is in step 3 of the 3 in which the sparsity rises.
    assert found["50%, zeros of locked"] == pytest.approx([0.5], abs=1e-3)
    assert found["50%, zeros without the lock"][0] < 0.1
    assert all(0 <= value <= 1 for values in found.values() for value in values)


def test_differences_are_paired():
    figures = {
        "a: rounded": [0.5, 0.7],
        "a: vector": [0.6, 0.8],
        "b: rounded": [0.1, 0.2],
        "b: vector": [0.3, 0.2],
    }
    record = {"figures": figures, "settings": {"part": "vectors"}}
    rows = relatives.table(record)
    assert [cells[2] for cells in rows.cells] == ["", "10.0 ± 0.0", "", "10.0 ± 10.0"]
    assert rows.cells[0][:2] == ["a: rounded", "60.0 ± 10.0"]
    figures = {"real images": [0.5, 0.7], "noise": [0.4, 0.6]}
    cells = synthetic.table({"figures": figures}).cells
    assert cells == [["real images", "60.0 ± 10.0", ""]] + [
        ["noise", "50.0 ± 10.0", "-10.0 ± 0.0"]
    ]


def test_synthetic_images_have_the_statistics_of_the_network():
    keys = jax.random.split(jax.random.key(0), 3)
    params = synthetic.initial(keys[0])
    real = 0.5 + 2 * jax.random.normal(keys[1], (20, 8, 8, 1))
    _, _, known = synthetic.network(params, real)

    def away(x):
        found = synthetic.network(params, x)[2]
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), found, known)
        return sum(jax.tree.leaves(squares))

    noise, made = (
        jax.jit(synthetic.synthesized, static_argnums=(3, 4))(
            keys[2], params, known, 20, steps
        )
        for steps in (0, 30)
    )
    assert away(made) < 0.3 * away(noise)
    wrong = [
        synthetic.cross_entropy(synthetic.network(params, x)[0], jnp.arange(20) % 10)
        for x in (made, noise)
    ]
    assert wrong[0] < wrong[1]


def test_taps_do_not_change_the_embeddings(rng):
    shapes = {
        "embeddings/word_embeddings/weight": (50, 24),
        "embeddings/position_embeddings/weight": (16, 24),
        "embeddings/token_type_embeddings/weight": (2, 24),
    }
    dense = {f"attention/self/{name}": (24, 24) for name in ("query", "key", "value")}
    dense |= {"attention/output/dense": (24, 24), "output/dense": (24, 32)}
    dense["intermediate/dense"] = 32, 24
    norms = ["embeddings/LayerNorm"]
    for number in range(minilm.LAYERS):
        layer = f"encoder/layer/{number}"
        for name, shape in dense.items():
            shapes[f"{layer}/{name}/weight"] = shape
            shapes[f"{layer}/{name}/bias"] = shape[:1]
        norms += [
            f"{layer}/{name}/LayerNorm" for name in ("attention/output", "output")
        ]
    shapes |= {f"{name}/{part}": (24,) for name in norms for part in ("weight", "bias")}
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }
    tokens = rng.integers(1, 50, (3, 9))
    tokens[1, 5:] = 0
    sentences = minilm.Sentences(jnp.asarray(tokens))
    names = []

    def tap(name, x):
        names.append(name)
        return x

    found = intervention.embeddings(params, sentences, tap)
    want = minilm.embeddings(params, sentences)
    np.testing.assert_allclose(found, want, atol=1e-4)  # float32, six layers
    assert len(names) == len(set(names)) == 5 * minilm.LAYERS


def test_the_table_of_interventions():
    measures = dict.fromkeys(intervention.MEASURES, 0.5)
    arms = {
        name: [measures | {"distance": 0.1 * (n + seed)} for seed in range(2)]
        for n, name in enumerate(intervention.ARMS)
    }
    rows = intervention.table({"rounded": measures, "arms": arms})
    assert [len(cells) for cells in rows.cells] == [len(rows.header)] * 3
    assert rows.cells[2][1] == "0.150 ± 0.050"
    assert rows.cells[2][-1] == "+0.1000 ± 0.0000"


def test_newer_rivals_are_compared_with_ste(monkeypatch):
    monkeypatch.setattr(newer_rivals, "SETTINGS", {"W4, SGD": (4, "SGD")})
    losses = newer_rivals.final_losses(4, "SGD", 1, 2)
    problems = jax.tree.map(np.float64, quadratics.problems(1))

    def rounded(x):
        step = np.abs(x).max() / 7
        return step * np.round(x / step)

    def loss_of(x, number):
        away = (rounded(x) - problems.optimum[number]).ravel()
        return away, away @ problems.curvature[number] @ away / 2

    for number in np.flatnonzero(problems.noise == 0):
        x = problems.optimum[number].copy()
        for rate in (0.1, 0.055):  # a cosine of two steps to a tenth
            away, _ = loss_of(x, number)
            x -= rate * (problems.curvature[number] @ away).reshape(x.shape)
        expected = loss_of(x, number)[1]
        np.testing.assert_allclose(losses["STE"][number], expected, rtol=1e-3)
    record = newer_rivals.measure(1, 2)
    rows = newer_rivals.table(record)
    assert rows.header == ["method", "W4, SGD"]
    methods = [*newer_rivals.RIVALS, "CAGE as recommended"]
    assert [cells[0] for cells in rows.cells] == methods
    for name in methods:
        figures = record["figures"]["W4, SGD"][name]
        ratio = losses[name] / losses["STE"]
        np.testing.assert_allclose(np.log(figures["share"]), np.log(ratio).mean())
        assert figures["won"] == np.mean(ratio < 1)


def test_tuning_starts_from_rounding_and_scales_learn_slowly():
    data = relatives.digits()
    params = relatives.initial(jax.random.key(0))
    x, labels = (np.asarray(each) for each in data.test)

    def rounded(x, axis, most):
        step = np.abs(x).max(axis, keepdims=True) / most
        step = np.where(step == 0, 1, step)
        return step * np.clip(np.round(x / step), -most - 1, most)

    x = x.astype(np.float64)
    for layer in jax.tree.map(np.float64, params["backbone"]):
        kernel = rounded(layer["kernel"], 0, 1)
        x = np.maximum(rounded(x, 1, 7) @ kernel + layer["bias"], 0)
    found = x @ np.float64(params["head"]["kernel"])  # its bias is 0
    away = np.log(np.exp(found).sum(1)) - found[np.arange(len(x)), labels]
    right = (found.argmax(1) == labels).mean()
    method, key = tuned_digits.METHODS[tuned_digits.STE], jax.random.key(1)
    tuned = tuned_digits.tune(method, params, data, key, 0.0, 1)
    # A code of an input may fall on the other side in float32.
    assert tuned["loss"] == pytest.approx(away.mean(), rel=1e-3)
    assert tuned["right"] == pytest.approx(right, abs=0.01)
    assert tuned["trained"] == 64 * 128 + 128 * 128

    trained = {"x": {"b": jnp.ones(1), "scale": jnp.ones(1)}}
    tx = tuned_digits._optimizer(0.5, 1)
    updates, _ = tx.update(trained, tx.init(trained))
    moved = [updates["x"][name].item() for name in ("b", "scale")]
    np.testing.assert_allclose(moved, [-0.5, -0.005], rtol=1e-5)  # Adam's in float32


def test_tuned_arms_are_compared_with_straight_through():
    def runs(*right):
        return [{"right": each, "loss": 0.5, "trained": 3000} for each in right]

    arms = {tuned_digits.STE: runs(0.5, 0.7), "RoSTE": runs(0.6, 0.8)}
    figures = {"arms": arms, "rates": {"RoSTE": 0.01}}
    cells = tuned_digits.table({"figures": figures}).cells
    assert cells[1] == ["RoSTE", "3,000", "0.01", "70.0 ± 10.0", "10.0 ± 0.0", "0.500"]


def test_clips_take_less_memory_than_a_backward_pass():
    found = tuned_digits.memory(layers=8, width=64, tokens=512)
    kept = 4 * 8 * 512 * 64 / 2**20  # inputs of the layers, in MiB
    assert found["two points"] < kept < found["backward"]


def test_the_table_of_a_video():
    figures = {
        "teacher": [30.0, 31.0],
        "4 bits, QAT": [20.0, 21.0],
        "4 bits, distilled": [20.5, 21.5],
    }
    rows = video.table({"figures": figures})
    assert rows.cells == [
        ["teacher", "30.50 ± 0.50", ""],
        ["4 bits, QAT", "20.50 ± 0.50", ""],
        ["4 bits, distilled", "21.00 ± 0.50", "+0.50 ± 0.00"],
    ]
