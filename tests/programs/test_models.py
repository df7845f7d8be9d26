"""Models that others wrote, unedited: W4A8 with CAGE."""

import pathlib
import re
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cage_jax as cage
from cage_jax import Rules, fake_quant, int4, int8
from cage_jax.flax import quantize_activations, report, resolve

STEPS = 20
SILENCE = 0.5

pytestmark = [
    pytest.mark.usefixtures("as_users_have_it"),
    # What the models do, not this library.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def as_users_have_it(standard_promotion):
    """Flax promotes dtypes and ranks by itself."""
    with jax.numpy_rank_promotion("allow"):
        yield
    # The next model has no program in common with this one.
    jax.clear_caches()


def drawn(rng, like):
    """Parameters to start from; a model's own initializers take long to compile."""

    def of(path, leaf):
        if leaf.ndim > 1:
            return rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        at_zero = re.search("bias|mean", jax.tree_util.keystr(path))
        return np.full(leaf.shape, 0 if at_zero else 1)

    return jax.tree.map_with_path(
        lambda path, leaf: jax.device_put(of(path, leaf).astype(leaf.dtype)), like
    )


def optimizer(rules, learning_rate):
    strength = cage.silence_then_ramp(STEPS, silence=SILENCE)
    return cage.cage_adamw(learning_rate, rules, strength=strength, statistics=True)


def check_training(losses, statistics):
    """The loss fell, and CAGE pulled in the second half."""
    assert np.all(np.isfinite(losses))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:2])
    ratios = [float(each.correction_ratio) for each in statistics]
    assert all(ratio == 0 for ratio in ratios[: int(STEPS * SILENCE)])
    assert ratios[-1] > 0


def windows(rows, length, seed):
    """Bytes of a source file of Python itself."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = np.frombuffer((folder / "argparse.py").read_bytes(), np.uint8)
    starts = np.random.default_rng(seed).integers(0, len(text) - length - 1, rows)
    found = np.stack([text[start : start + length + 1] for start in starts])
    return jnp.asarray(found.astype(np.int32))


PROJECTIONS = ["attn/q_proj/w", "attn/k_proj/w", "attn/v_proj/w", "attn/o_proj/w"]
PROJECTIONS += ["mlp/gate_proj/kernel", "mlp/up_proj/kernel", "mlp/down_proj/kernel"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_llama_of_tunix(tied):
    llama = pytest.importorskip("tunix.models.llama3.model")
    from flax import nnx

    config = llama.ModelConfig(
        num_layers=2,
        vocab_size=256,
        embed_dim=64,
        hidden_dim=128,
        num_heads=4,
        head_dim=16,
        num_kv_heads=2,
        norm_eps=1e-5,
        rope_theta=10_000,
        weight_tying=tied,
        remat_config=llama.RematConfig.BLOCK if tied else llama.RematConfig.NONE,
    )
    plain = nnx.eval_shape(lambda: llama.Llama3(config, rngs=nnx.Rngs(0)))
    nnx.update(plain, drawn(np.random.default_rng(0), nnx.state(plain)))
    inputs = int8()
    rules = Rules(
        [
            (r".*attn/._proj/w", int4(), inputs),
            (r".*mlp/.*kernel", int4(group_size=32), inputs),
            (r"lm_head/w", int8(), inputs),
            (r"embedder/input_embedding", int8(), inputs if tied else None),
        ]
    )
    tokens = windows(4, 32, 0)[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(32), (4, 32))
    mask = jnp.tril(jnp.ones((32, 32), bool))[None]
    rules = resolve(rules, plain, tokens, positions, None, mask)
    axes = {re.sub(r"layers/\d/", "", p): q.axis for p, q in rules.resolved.items()}
    assert axes == {
        **dict.fromkeys(PROJECTIONS, -3),  # (in, heads, size)
        **dict.fromkeys((name for name in PROJECTIONS if "kernel" in name), -2),
        "attn/o_proj/w": (-3, -2),  # (heads, size, out)
        "embedder/input_embedding": -1,
        **({} if tied else {"lm_head/w": -2}),
    }
    model = quantize_activations(plain, rules)

    found = {
        layer.weight.path: layer
        for layer in report(plain, rules, tokens, positions, None, mask).layers
    }
    multiplied = {f"layers/{i}/{name}" for i in (0, 1) for name in PROJECTIONS}
    multiplied.add("embedder/input_embedding" if tied else "lm_head/w")
    assert {path for path, layer in found.items() if layer.inputs} == multiplied
    for path in multiplied:
        (each,) = found[path].inputs
        assert each.quantizer == inputs and 0 < each.measured.error < 0.02
        assert found[path].measured.error < 0.2
    norms = {path for path in found if re.search("norm", path)}
    assert len(norms) == 5
    assert all(found[path].weight.quantizer is None for path in norms)
    assert set(found) == multiplied | norms | {"embedder/input_embedding"}

    tx = optimizer(rules, 1e-2)
    trained = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, trained, batch):
        def loss(model):
            graphdef, state, rest = nnx.split(model, nnx.Param, ...)
            quantized = nnx.merge(graphdef, fake_quant(state, rules), rest)
            logits, _ = quantized(batch[:, :-1], positions, None, mask)
            found = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch[:, 1:]
            )
            return found.mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        trained.update(model, gradient)
        return value

    losses, statistics = [], []
    for number in range(STEPS):
        losses.append(float(step(model, trained, windows(4, 32, number))))
        state = nnx.as_pure(trained.opt_state)
        statistics.append(optax.tree_utils.tree_get(state, "statistics"))
    check_training(losses, statistics)


def test_the_resnet_of_flaxmodels(monkeypatch):
    resnet = pytest.importorskip("flaxmodels.resnet.resnet")
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    images = np.repeat(np.repeat(np.tile(images, 3), 2, 1), 2, 2)

    # A block of each kind, and one more.
    monkeypatch.setitem(resnet.LAYERS, "small", [1, 1, 1, 0])
    plain = resnet.ResNet(
        architecture="small", output="logits", pretrained=None, num_classes=10
    )
    x = jnp.asarray(images[:32])
    like = jax.eval_shape(plain.init, jax.random.key(0), x)
    variables = drawn(np.random.default_rng(0), like)
    rules = Rules(
        [
            (r"Conv_0/kernel", int8(), int8()),
            (r".*Conv_.*kernel", int4(), int8()),
            (r"Dense_0/kernel", int8(), int8()),
        ]
    )
    rules = resolve(rules, plain, x, variables=like, train=False)
    for path, quantizer in rules.resolved.items():
        assert quantizer.axis == ((-4, -3, -2) if "Conv" in path else -2), path
    model = quantize_activations(plain, rules)

    found = {
        layer.weight.path: layer
        for layer in report(plain, rules, x, variables=variables, train=False).layers
    }
    convolutions = {"Conv_0/kernel"}
    for i in range(3):
        convolutions |= {
            f"BasicBlock_{i}/Conv_{j}/kernel" for j in range(3 if i else 2)
        }
    multiplied = convolutions | {"Dense_0/kernel"}
    assert {path for path, layer in found.items() if layer.inputs} == multiplied
    for path in multiplied:
        (each,) = found[path].inputs
        assert each.quantizer == rules.match_inputs(path)
        assert found[path].weight.quantizer == rules.match(path)
        assert 0 < each.measured.error < 0.05
    assert "BatchNorm_0/scale" in found and "Dense_0/bias" in found

    tx = optimizer(rules, 1e-3)

    @jax.jit
    def step(params, rest, state, x, y):
        def loss(params):
            variables = {"params": fake_quant(params, rules), **rest}
            logits, updated = model.apply(variables, x, mutable=["batch_stats"])
            found = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return found.mean(), updated

        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), rest, state, value

    params = variables["params"]
    rest = {"batch_stats": variables["batch_stats"]}
    state, losses, statistics = tx.init(params), [], []
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.integers(0, len(images), 32)
        batch = jnp.asarray(images[rows]), jnp.asarray(labels[rows])
        params, rest, state, value = step(params, rest, state, *batch)
        losses.append(float(value))
        statistics.append(optax.tree_utils.tree_get(state, "statistics"))
    check_training(losses, statistics)
