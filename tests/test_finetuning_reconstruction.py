"""Block-wise reconstruction: its streams, its steps, its folder, what it refuses."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_llama
from cases import assert_raises, assert_same

import cage_jax as cage
from cage_jax import llama
from cage_jax.finetuning import Block, blocks, reconstruct, reconstruction_memory
from cage_jax.quantizers.scales import Calibrated

WIDTH = 16
INT3 = cage.Rules([(r"layers/.*w", cage.int3(axis=-2))])
LSQ = cage.Rules([(r"layers/.*w", cage.lsq(3, axis=-2))])
EPOCHS = 10
FAST = {"learning_rate": 3e-3, "grid_learning_rate": 3e-3, "epochs": EPOCHS}


def layer(params, x):
    return x + jnp.tanh(x @ params["w"] + params["b"][None])


def layer_in_numpy(params, x):
    return x + np.tanh(x @ params["w"] + params["b"])


def int3_in_numpy(w):
    """Rounds each column to -3 ... 3 times a third of its largest value."""
    scale = np.max(np.abs(w), 0) / 3
    return np.round(w / scale) * scale


def first(params, x):
    return x @ params["stem"]


@pytest.fixture
def params(rng):
    layers = [
        {
            "w": rng.standard_normal((WIDTH, WIDTH)) / 4,
            "b": rng.standard_normal(WIDTH) / 4,
        }
        for _ in range(3)
    ]
    tree = {"layers": layers, "stem": np.eye(WIDTH), "head": np.eye(WIDTH)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.fixture
def batches(rng):
    """Correlated features, so that a layer's error can be made smaller."""
    mixing = rng.standard_normal((WIDTH, WIDTH)) * 0.5 ** np.arange(WIDTH)[:, None]
    return [
        ((rng.standard_normal((8, WIDTH)) @ mixing).astype(np.float32),)
        for _ in range(4)
    ]


def layers_of(params):
    return blocks(layer, params, r"layers/\d+")


def stacked(params):
    layers = jax.tree.map(lambda *xs: jnp.stack(xs), *params["layers"])
    return params | {"layers": layers}


# --- what is computed -----------------------------------------------------------------


def test_both_streams_are_those_of_a_walk_in_numpy(params, batches):
    found = reconstruct(layers_of(params), INT3, params, batches, first=first, **FAST)
    in_float64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    trained = jax.tree.map(lambda x: np.asarray(x, np.float64), found.params)
    x = target = np.concatenate([each for (each,) in batches]).astype(np.float64)
    for number, name in enumerate(["layers/0", "layers/1", "layers/2"]):
        start, end = (each["layers"][number] for each in (in_float64, trained))
        target, before, x = (
            layer_in_numpy(start, target),
            layer_in_numpy(start | {"w": int3_in_numpy(start["w"])}, x),
            layer_in_numpy(end | {"w": int3_in_numpy(end["w"])}, x),
        )
        expected = [np.sum((y - target) ** 2) / np.sum(target**2) for y in (before, x)]
        # Float32 against float64.
        np.testing.assert_allclose(found.errors[name], expected, rtol=1e-4)
        assert expected[1] < expected[0]
    assert found.elsewhere == ("head", "stem")
    assert_same(found.params["head"], params["head"])


def linear(params, x):
    return x @ params["w"]


def test_a_step_is_on_the_mean_squared_error_of_the_rounded_block(rng):
    w, x = rng.standard_normal((4, 4)), rng.standard_normal((8, 4))
    start = w + rng.standard_normal((4, 4)) / 10
    found = reconstruct(
        [Block(linear, "layers/0")],
        INT3,
        {"layers": [{"w": start.astype(np.float32)}]},
        [(x.astype(np.float32),)],
        teacher={"layers": [{"w": w.astype(np.float32)}]},
        epochs=1,
        optimizer=lambda rules, total: optax.sgd(0.05),
    )
    gradient = 2 / x.size * x.T @ (x @ int3_in_numpy(start) - x @ w)
    expected = start - 0.05 * gradient
    trained = found.params["layers"][0]["w"]
    assert isinstance(trained, np.ndarray)  # as it was given
    np.testing.assert_allclose(trained, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bits", "rate"), [(2, 2e-5), (3, 1e-5)])
def test_the_rates_are_those_of_efficientqat(rng, bits, rate):
    """The first step of Adam is the rate, whatever the gradient."""
    rules = cage.Rules([("w", cage.lsq(bits, axis=-2))])
    w = {"w": jnp.asarray(rng.standard_normal((8, 8)), jnp.float32)}
    variables = cage.with_grids(w, rules)
    x = rng.standard_normal((8, 8)).astype(np.float32)
    found = reconstruct(
        [Block(lambda w, x: x @ w, "w")], rules, variables, [(x,)], epochs=1
    )
    pairs = [
        (found.params["params"]["w"], w["w"], rate),
        (found.params["grids"]["w"].scale, variables["grids"]["w"].scale, 1e-4),
    ]
    for new, old, expected in pairs:
        moved = np.abs(np.asarray(new, np.float64) - np.asarray(old, np.float64))
        # Float32 weights near 1 have steps of 1e-7; clipped ones do not move.
        np.testing.assert_allclose(np.median(moved), expected, atol=1e-7)


def test_learned_grids_and_codes_as_a_start_lower_each_error(params, batches):
    codes = cage.quantize(params, INT3)
    start = cage.with_grids(cage.dequantize(codes), LSQ)
    found = reconstruct(
        layers_of(start),
        LSQ,
        start,
        batches,
        first=first,
        teacher=cage.with_grids(params, LSQ),  # whose grids are left out
        **FAST,
    )
    assert all(after < before for before, after in found.errors.values())
    assert set(found.params) == {"params", "grids"}
    scales = [each["grids"]["layers/1/w"].scale for each in (start, found.params)]
    assert not np.array_equal(*scales)
    assert re.match(r"layers/0: 0\.\d+ -> 0\.\d+\nlayers/1: ", str(found))


def test_codes_of_gptq_are_a_better_start_and_made_better(params, batches):
    def apply(params, x):
        x = first(params, x)
        for each in params["layers"]:
            x = layer(each, x)
        return x

    codes = cage.gptq(apply, INT3, params, batches)
    options = {"teacher": params, "first": first} | FAST
    rounded, found = (
        reconstruct(layers_of(start), INT3, start, batches, **options).errors
        for start in (params, cage.dequantize(codes))
    )
    assert found["layers/0"][0] < 0.8 * rounded["layers/0"][0]
    assert all(after < before for before, after in found.values())


def test_a_block_that_training_makes_worse_is_left(params, batches):
    found = reconstruct(
        layers_of(params), INT3, params, batches, first=first, learning_rate=10.0
    )
    assert all(after == before for before, after in found.errors.values())
    assert_same(found.params, params)


def test_stacked_layers_are_trained_as_listed_ones(params, batches):
    quantizer = cage.int8(axis=None, scale=Calibrated())
    rules = cage.Rules([(r"layers/.*w", cage.lsq(3, axis=-2), quantizer)])

    def listed(params, x):
        for each in params["layers"]:
            x = layer(each, x)
        return x

    def scanned(params, x):
        return jax.lax.scan(lambda x, p: (layer(p, x), None), x, params["layers"])[0]

    results = []
    for function, tree in ((listed, params), (scanned, stacked(params))):
        variables = cage.with_grids(tree, rules)
        grids = cage.calibrate(function, rules, tree, batches)["grids"]
        variables["grids"] |= grids
        if function is listed:
            found = layers_of(variables)
        else:
            found = blocks(layer, variables, "layers", stacked=True)
        results.append(reconstruct(found, rules, variables, batches, **FAST))
    ones, rows = results
    for a, b in zip(ones.errors.values(), rows.errors.values()):
        # The programs differ in an axis of 1, and sum alike.
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert all(after < before for before, after in ones.errors.values())
    for number in range(3):
        listed_w = ones.params["params"]["layers"][number]["w"]
        row = rows.params["params"]["layers"]["w"][number]
        np.testing.assert_allclose(listed_w, row, atol=1e-7)
        for end in ("", "/inputs"):
            alone = ones.params["grids"][f"layers/{number}/w{end}"].scale
            row = rows.params["grids"][f"layers/w{end}"].scale[number]
            np.testing.assert_allclose(alone, row, rtol=1e-6)


def test_inputs_are_quantized_for_the_student_alone(params, batches):
    by_rules = cage.Rules([(r"layers/.*w", cage.int3(axis=-2), cage.int4(axis=-1))])
    by_hand = cage.Rules([(r"layers/.*w", cage.int3(axis=-2))])

    def rounded(params, x):
        y = cage.fake_quant(x, cage.int4(axis=-1))
        return x + jnp.tanh(y @ params["w"] + params["b"][None])

    options = {"first": first} | FAST
    one = reconstruct(layers_of(params), by_rules, params, batches, **options)
    made = blocks(rounded, params, r"layers/\d+", teacher=layer)
    other = reconstruct(made, by_hand, params, batches, **options)
    for a, b in zip(one.errors.values(), other.errors.values()):
        np.testing.assert_allclose(a, b, rtol=1e-5)  # two programs of one formula
    assert all(after < before for before, after in one.errors.values())


def test_cage_pulls_each_block_to_its_grid(params, batches):
    seen = []

    def optimizer(rules, total):
        seen.append((str(rules), total))
        return cage.cage_adamw(1e-3, rules, strength=100.0)

    found = reconstruct(
        layers_of(params), INT3, params, batches, first=first, optimizer=optimizer
    )
    (one,) = seen  # of three equal blocks
    assert one[1] == 2 * len(batches)
    errors = [cage.quantization_error(each, INT3) for each in (params, found.params)]
    before, after = (
        sum(float(jnp.sum(jnp.square(e["w"]))) for e in each["layers"])
        for each in errors
    )
    assert after < before / 2


def test_trees_of_activations_integers_and_blocks_of_several_paths(rng):
    """Masks and counts go through; only floats are trained and compared."""

    def masked(places, x):
        w, rest = places
        values, mask = x
        moved = jnp.where(mask[None], values + values @ w, values)
        return moved + rest["b"][None], mask

    params = {
        "w": jnp.asarray(rng.standard_normal((8, 8)), jnp.float32),
        "rest": {"b": jnp.zeros(8), "count": jnp.arange(3)},
        "next": {"w": jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)},
    }
    rules = cage.Rules([(r".*w", cage.int3(axis=-2))])
    chain = [Block(masked, ("w", "rest")), Block(lambda p, x: x[0] @ p["w"], "next")]
    x = rng.standard_normal((4, 8)).astype(np.float32)
    batches = [(x, np.arange(8) % 2 == 0)]
    found = reconstruct(chain, rules, params, batches, learning_rate=1e-3, epochs=20)
    assert [*found.errors] == ["w, rest", "next"]
    assert all(after < before for before, after in found.errors.values())
    assert_same(found.params["rest"]["count"], params["rest"]["count"])


# --- the Llama ------------------------------------------------------------------------


def test_a_llama_in_blocks_is_the_llama(rng):
    config, params = small_llama.CONFIG, small_llama.params_of()
    tokens = jnp.asarray(rng.integers(0, config.vocabulary, (2, 12)))
    inputs = cage.int8(axis=-1)
    x = llama.embed(params, tokens)
    for block in llama.blocks(config, inputs=inputs):
        assert block.teacher is llama.blocks(config)[0].function
        row = jax.tree.map(lambda leaf: leaf[block.row], params["layers"])  # noqa: B023
        x = jax.jit(block.function)(row, x)
    # The rest of the model is that of one without layers.
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.norm_epsilon)
    logits = x * params["norm"]["scale"][None, None] @ params["head"]["kernel"]
    expected = llama.logits(params, tokens, config, inputs=inputs)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_llama_is_reconstructed(rng):
    config, params = small_llama.CONFIG, small_llama.params_of()
    rules = cage.Rules([(r"layers/.*kernel", cage.int2(axis=-2, group_size=32))])
    batches = [(rng.integers(0, config.vocabulary, (2, 16)),) for _ in range(3)]
    found = reconstruct(
        llama.blocks(config),
        rules,
        params,
        batches,
        first=llama.embed,
        learning_rate=1e-3,
    )
    assert [*found.errors] == ["layers[0]", "layers[1]"]
    assert found.elsewhere == ("embedding/embedding", "head/kernel", "norm/scale")

    @jax.jit
    def logits(params):
        return llama.logits(params, jnp.asarray(batches[0][0]), config)

    rounded, trained = (cage.fake_quant(each, rules) for each in (params, found.params))
    before, after = (
        float(jnp.mean(jnp.square(logits(each) - logits(params))))
        for each in (rounded, trained)
    )
    assert after < before


# --- one program, one block in memory, one folder -------------------------------------


def test_equal_blocks_are_traced_as_often_as_one(params, batches):
    traced = []

    def counted(params, x):
        traced.append(x.shape)
        return layer(params, x)

    counts = []
    for number in (1, 3):
        traced.clear()
        some = params | {"layers": params["layers"][:number]}
        made = blocks(counted, some, r"layers/\d+")
        reconstruct(made, INT3, some, batches, first=first)
        counts.append(len(traced))
    assert counts[0] == counts[1]


def test_activations_are_kept_on_the_host(params, rng):
    """At the end of a block no batch is left in an array of jax.

    They are kept in another dtype, since on a CPU NumPy reads the memory of jax.
    """
    shape = 40, WIDTH
    batches = [(rng.standard_normal(shape).astype(np.float32),) for _ in range(8)]
    left = []

    def progress(what, done, total):
        if what == "blocks":
            left.append([x for x in jax.live_arrays() if x.shape == shape])

    options = {"progress": progress, "stream_dtype": "bfloat16"}
    reconstruct(layers_of(params), INT3, params, batches, **options)
    assert left == [[], [], []]


def test_memory_is_said_beforehand(params, batches):
    like = jax.ShapeDtypeStruct((8, WIDTH), "float32")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    memory = reconstruction_memory(
        layers_of(params), INT3, shapes, [(like,)] * 5, first=first
    )
    block = 4 * (WIDTH * WIDTH + WIDTH)
    assert memory[:2] == (5 * 2 * 4 * 8 * WIDTH, 2 * block)
    assert 0 <= memory.optimizer - 2 * block < 100  # moments, and some counts
    halved = reconstruction_memory(
        layers_of(params), INT3, params, batches, stream_dtype="bfloat16"
    )
    assert halved.streams == len(batches) * 2 * 2 * 8 * WIDTH
    assert str(memory).startswith("host: 0.00512 MB of activations; device: ")


def test_activations_in_bfloat16_change_the_errors_a_little(params, batches):
    before = [
        reconstruct(
            layers_of(params), INT3, params, batches, stream_dtype=dtype, epochs=1
        ).errors["layers/0"][0]
        for dtype in (None, "bfloat16")
    ]
    # Eight bits of a number, squared, against an error of some percent.
    np.testing.assert_allclose(*before, rtol=0.02)
    assert before[0] != before[1]


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("form", ["list", "stack"])
def test_a_run_goes_on_with_equal_bits_wherever_it_was_stopped(
    params, batches, tmp_path, form
):
    tree = params if form == "list" else stacked(params)
    pattern = r"layers/\d+" if form == "list" else "layers"
    made = blocks(layer, tree, pattern, stacked=form == "stack")
    start = cage.with_grids(tree, LSQ)

    def run(folder=None, progress=None):
        return reconstruct(
            made, LSQ, start, iter(batches), folder=folder, progress=progress, **FAST
        )

    expected = run()
    said = []

    def stop_at(step):
        def progress(*what):
            said.append(what)
            if what == step:
                raise Stopped

        return progress

    total = EPOCHS * len(batches)
    steps = [("blocks", 1, 3)]
    if form == "list":
        steps += [(made[1].name, 5, total), ("blocks", 2, 3), ("blocks", 3, 3)]
    for step in steps:
        folder = tmp_path / f"{step[0].replace('/', '')}{step[1]}"
        with pytest.raises(Stopped):
            run(folder, stop_at(step))
        said.clear()
        found = run(folder, stop_at(None))
        assert_same(found.params, expected.params)
        assert found.errors == expected.errors
        # Blocks that were done before are not trained again.
        trained = {name for name, *_ in said} - {"blocks"}
        done = step[1] if step[0] == "blocks" else 1
        assert trained == {block.name for block in made[done:]}
        assert not [path for path in folder.iterdir() if path.suffix == ".part"]


def test_bfloat16_parameters_come_back_from_a_folder(params, batches, tmp_path):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    halves = [(x.astype(jnp.bfloat16),) for (x,) in batches]
    found = [
        reconstruct(layers_of(half), INT3, half, halves, folder=tmp_path, **FAST)
        for _ in range(2)
    ]
    assert found[0].params["layers"][0]["w"].dtype == jnp.bfloat16
    assert_same(found[0].params, found[1].params)


def test_a_folder_of_another_call_is_refused(params, batches, tmp_path):
    def call(rules=INT3, params=params, batches=batches, **options):
        options = {"teacher": params, "folder": tmp_path, "first": first} | options
        reconstruct(layers_of(params), rules, params, batches, **options)

    call()
    other = cage.Rules([(r"layers/.*w", cage.int3(axis=-2, gradient="clip"))])
    moved = jax.tree.map(lambda x: 2 * x, params)
    cases = {
        "rules": {"rules": other},
        "params": {"params": moved, "teacher": params},
        "teacher": {"teacher": moved},
        "batches": {"batches": batches[1:]},
        "settings": {"learning_rate": 1e-3},
        "stream_dtype": {"stream_dtype": "bfloat16"},
    }
    for name, changed in cases.items():
        text = f"must belong to the same call; got '.*', which differs in {name}\\."
        with pytest.raises(ValueError, match=text):
            call(**changed)
    file = tmp_path / "block1.npz"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="must have whole files; cannot read"):
        call()
    assert json.loads((tmp_path / "run.json").read_text())["blocks"] == [
        "layers/0",
        "layers/1",
        "layers/2",
    ]


# --- errors ---------------------------------------------------------------------------


def test_what_is_refused(params, batches):
    made = layers_of(params)
    nan = [(np.full((8, WIDTH), np.nan, np.float32),)]
    narrow = Block(lambda p, x: (x @ p)[:, :4], "head")
    with_head = cage.Rules([(r"layers/.*w|head", cage.int3(axis=-2))])

    def call(blocks=made, rules=INT3, params=params, batches=batches, **options):
        return lambda: reconstruct(blocks, rules, params, batches, **options)

    def infinite(params, x):
        return layer(params, x) / 0

    def wrong_student(params, x):
        return layer(params, x)[:4]

    shared = cage.Rules([(r"layers/.*w", cage.int3(axis=(0, 1, 2)))])
    noisy = dataclasses.replace(cage.int3(axis=-2), rounding="stochastic")
    assert_raises(
        [
            (call(blocks=[]), TypeError, "`blocks` must be one Block or more"),
            (call(blocks=[layer]), TypeError, "must be one Block or more"),
            (
                call(blocks=[Block(layer, "layer/0")]),
                ValueError,
                "must have paths of the parameters; got 'layer/0' .*`layers/0/",
            ),
            (
                call(blocks=[*made, made[1]]),
                ValueError,
                "`layers/1/b`: .* in one of `blocks`; got it in layers/1 and in",
            ),
            (
                call(
                    [Block(layer, "layers", 0), Block(layer, "layers")],
                    params=stacked(params),
                ),
                ValueError,
                r"`layers/b`: .* got it in layers\[0\] and in layers\.",
            ),
            (
                call([Block(layer, "layers", 3)], params=stacked(params)),
                ValueError,
                "`row` must be one of the first axis; got 3",
            ),
            (
                call([Block(layer, "layers", 0)], shared, stacked(params)),
                ValueError,
                "`layers/w`: a stack of layers must have scales for each layer",
            ),
            (
                call([made[0], narrow, made[1]], with_head),
                ValueError,
                r"layers/1 must take what head returns, float32\[8, 4\]; got",
            ),
            (
                call([Block(wrong_student, "layers/0", None, layer)]),
                ValueError,
                r"`layers/0`: .* must return floats, .* got \(4, 16\) and \(8, 16\)",
            ),
            (
                call(rules=cage.Rules([("w", cage.int3(axis=-2))])),
                ValueError,
                "`rules` must quantize a parameter of `blocks`",
            ),
            (
                call(rules=cage.Rules([(r".*w", noisy)])),
                ValueError,
                "must round to the nearest value",
            ),
            (call(rules=LSQ), ValueError, "`layers/0/w`: `grid` must be given"),
            (
                call(params=cage.quantize(params, INT3)),
                TypeError,
                "`params` must be floats; got codes at 'layers/0/w'",
            ),
            (
                call(teacher=params | {"stem": jnp.ones(3)}),
                ValueError,
                r"`stem`: `teacher` must .* float32\[3\] in place of float32\[16, 16\]",
            ),
            (call(batches=[]), ValueError, "must have a batch; got none"),
            (call(batches=[batches[0][0]]), TypeError, "must be tuples of arguments"),
            (call(batches=nan), ValueError, "finite inputs .* in batch 0"),
            (
                call([made[0], Block(infinite, "layers/1")]),
                ValueError,
                "layers/1 must return finite numbers; .* full-precision block in batch",
            ),
            (
                call([made[0], Block(infinite, "layers/1", None, layer)]),
                ValueError,
                "layers/1 must return finite numbers; .* quantized block in batch",
            ),
            (
                call(optimizer=lambda rules, total: optax.scale(np.nan)),
                ValueError,
                "the loss of layers/0 must be finite; got .* at step 2",
            ),
            (call(epochs=0), ValueError, "`epochs` must be at least 1"),
            (call(learning_rate=0), ValueError, "`learning_rate` must be above 0"),
            (
                call(learning_rate=1e-3, optimizer=lambda rules, total: optax.sgd(1)),
                ValueError,
                "`learning_rate` must not come with an `optimizer`; got 0.001",
            ),
            (
                lambda: blocks(layer, params, "layer"),
                ValueError,
                "`pattern` must match the path .* Did you mean",
            ),
            (
                lambda: blocks(layer, params | {"stem": 0}, ".*", stacked=True),
                ValueError,
                "`stacked` must have one number of layers",
            ),
        ]
    )


def test_blocks_without_a_rule_are_said_and_passed(params, batches):
    rules = cage.Rules([(r"layers/[02]/w", cage.int3(axis=-2))])
    with pytest.warns(UserWarning, match="are not trained: layers/1. Their") as said:
        found = reconstruct(
            layers_of(params), rules, params, batches, first=first, **FAST
        )
    assert len(said) == 1
    assert_same(found.params["layers"][1], params["layers"][1])
    assert found.errors["layers/1"][0] == found.errors["layers/1"][1] > 0
    assert found.errors["layers/2"][1] < found.errors["layers/2"][0]


def test_layers_have_the_order_of_their_numbers(rng):
    layers = {f"layer_{i}": {"w": rng.standard_normal((4, 4))} for i in range(12)}
    found = blocks(linear, {"params": layers}, r"layer_\d+")
    assert [block.paths for block in found] == [f"layer_{i}" for i in range(12)]
