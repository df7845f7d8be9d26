"""Numbers in the sentences of pages, from the benchmarks' files that they are of."""

import json
import re
from pathlib import Path

import effect
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import report

import cage_jax as cage
from cage_jax import curvature

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def page(name):
    return " ".join((ROOT / name).read_text().split())


def figures(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["figures"]


def numbers(pattern, name):
    """The numbers in a sentence, which must be there once."""
    (found,) = re.findall(pattern, page(name))
    return [float(each) for each in found]


def recovered(*rows, name="CAGE as recommended"):
    """What a method recovers of the gap in lines of the study's summary."""
    header, cells = report.summary()
    place, found = header.index(name), set()
    for row in rows:
        lines = [line for line in cells if re.fullmatch(row, line[0])]
        assert lines, row
        for line in lines:
            found |= {int(each) for each in re.findall(r"-?\d+", line[place])}
    return [min(found), max(found)]


def test_what_is_recovered():
    text = r"(-?\d+) to (-?\d+) %"
    readme, converged = "README.md", r"language model, 1 x 64, 4000 steps, rate to 10%"
    found = numbers(rf"\*\*{text}\*\*, most at 2 and 3 bits", readme)
    assert found == recovered(r".*MLP, rate to 10%", converged)
    found = numbers(rf"; {text} with weights alone quantized", readme)
    assert found == recovered(rf"{converged}, weights alone")
    found = numbers(rf"\*\*{text}\*\* in convolutional networks and small V", readme)
    assert found == recovered(r".*(CNN|ViT), rate to 10%")
    found = numbers(rf"\*\*{text}\*\* in training that is cut short", readme)
    assert found == recovered(r"SmolLM2.*", r".*1000 steps, rate to 10%")
    found = numbers(rf"recovers {text} of the gap to full prec", "docs/strength.md")
    to_zero = r"(?!quadratics).*, rate to 0%"
    assert found == recovered(to_zero)
    found = numbers(rf"the published one {text}: next", "docs/strength.md")
    assert found == recovered(to_zero, name="CAGE as published")


def test_what_the_pieces_of_a_fine_tuning_are_worth():
    number = r"(\d+\.\d)"
    stages = ("in full precision", "rounded", "after GPTQ", "after blocks")
    pattern = ", ".join(f"{number} {stage}" for stage in stages)
    pattern += rf", {number} after 200 steps .{{,60}}and {number} after its scales"
    found = re.findall(f"perplexity of {pattern}", page("docs/finetuning.md"))
    record = json.loads((report.RESULTS / "pieces.json").read_text())
    losses = [
        [stage["speeches of 2013 to 2021"] for stage in cell.values()]
        for target in ("int3 group 64", "W4A4")
        for cell in [record["cells"][f"{target}, 50 thousand tokens: all"]]
    ]
    np.testing.assert_array_equal(np.float64(found), np.exp(losses).round(1))


def test_what_a_step_costs():
    steps = {
        (each["size"], step["step"]): step["to_base"]
        for each in figures("optimizer_step")
        for step in each["steps"]
    }
    sizes = ("30M", "100M")

    def cost(name):
        return [round(steps[size, f"cage_jax, {name}"], 1) for size in sizes]

    pattern = r"then (\S+) times \(int4\) or (\S+) to (\S+) times \(rotated\)"
    (found,) = re.findall(pattern, page("README.md"))
    assert [float(found[0])] * 2 == cost("int4, recommended, active")
    assert [*map(float, found[1:])] == cost("quest, recommended, active")
    (most,) = re.findall(r"at most (\S+) times as long as AdamW's", page("README.md"))
    silent = max(cost("int4, recommended, silent") + cost("quest, recommended, silent"))
    assert float(most) == silent


def test_what_a_sharded_step_costs():
    found = numbers(r"its step takes (\S+) to (\S+) of AdamW's", "docs/pods.md")
    ours = [figures("sharding")[f"{n}, CAGE"]["to AdamW"] for n in (1, 2, 4, 8)]
    assert found == [round(min(ours), 2), round(max(ours), 2)]
    found = numbers(r"from (\d+) to (\d+) chips", "docs/pods.md")
    chips = [
        int(n) * int(m)
        for n, m in (
            re.findall(r":(\d+)x(\d+)", name)[0] for name in figures("tpu_aot")
        )
    ]
    assert found == [min(chips), max(chips)]


def test_what_a_step_of_llama_3_needs_of_a_chip():
    v5e, v6e = (
        [
            (each["memory"] / 1e9, each["traffic"])
            for name, each in figures("llama3_aot").items()
            if name.startswith(topology)
        ]
        for topology in ("v5e:8x8", "v6e:4x4")
    )
    pattern = (
        r"needs (\S+) GB of each chip.* and (\S+) GB with AdamW in bf.* moves (\S+) % "
        r"more bytes.* step it needs (\S+) GB .*On 16 v6e both need (\S+) GB, and CAGE "
        r"moves (\S+) % more bytes; with a teacher (\d+\.\d) GB"
    )

    def more(steps):
        (_, adamw), (_, ours), _ = steps
        return round(100 * (ours / adamw - 1), 1)

    assert round(v6e[0][0], 1) == round(v6e[1][0], 1)
    gigabytes = [round(each, 1) for each, _ in (v5e[1], v5e[0], v5e[2], v6e[1], v6e[2])]
    expected = [*gigabytes[:2], more(v5e), *gigabytes[2:4], more(v6e), gigabytes[4]]
    assert numbers(pattern, "docs/pods.md") == expected


def test_quadratics_where_hutchinsons_estimate_is_ahead():
    assert "than both published strengths in eight of nine problems" in page(
        "docs/placements.md"
    )
    shares = [
        {name: arm["share"] for name, arm in each["arms"].items()}
        for each in figures("effect_quadratic")
    ]
    published = ("CAGE 10/.8", "CAGE 3/.5")
    ahead = [
        each["Hutchinson, 1/.5"] < min(each[name] for name in published)
        for each in shares
    ]
    assert (sum(ahead), len(ahead)) == (8, 9)


def test_errors_of_normal_numbers():
    """The bounds of the page on bad results are errors of the page on quantizers."""
    row = r"\| `(\w+)\([^|]*\)` \|[^|]*\|[^|]*\|[^|]*\| (\S+) \| (?:yes|no) \|"
    found = re.findall(row, page("docs/quantizers.md"))
    errors = dict(reversed(found))  # of the first line of each name
    text = r"normal numbers: int8 (\S+), int4 (\S+), int3 (\S+), int2 (\S+) \|"
    found = numbers(text, "docs/worse.md")
    for name, bound in zip(("int8", "int4", "int3", "int2"), found):
        assert bound == pytest.approx(float(errors[name]) ** 0.5, rel=0.2), name


def test_bytes_of_the_state_of_each_curvature():
    rows, columns = 96, 64
    params = {"kernel": jnp.ones((rows, columns))}
    rules = cage.Rules([(r".*", cage.int4())])

    def size(source):
        tx = cage.coupled(rules, strength=1.0, curvature=source)
        state = jax.eval_shape(tx.init, params)
        # But for counts and keys.
        leaves = [x for x in jax.tree.leaves(state) if x.size >= min(rows, columns)]
        return sum(x.size * x.dtype.itemsize for x in leaves)

    text = page("docs/placements.md")
    row = r"\| `(\w+)\(\)` \|[^|]*\|[^|]*\| ([^|]*) \|"
    assert dict(re.findall(row, text)) == {
        "second_moment": "0",
        "fisher": "4",
        "hutchinson": "4",
        "gauss_newton": "4",
        "kronecker": "4 (rows / columns + columns / rows)",
        "hessian": "0",
    }
    weights = rows * columns
    assert size(curvature.fisher()) == 4 * weights
    assert size(curvature.hutchinson()) == 4 * weights
    assert size(curvature.gauss_newton()) == 4 * weights
    assert size(curvature.hessian()) == 0
    per_weight = 4 * (rows / columns + columns / rows)
    assert size(curvature.kronecker()) == per_weight * weights
    assert "takes 8 bytes for each input and each output" in text
    assert size(curvature.fisher(factored=True)) == 8 * (rows + columns)


def test_methods_in_the_network_of_digits():
    found, rivals = figures("tuned_digits"), "docs/rivals.md"

    def right(*names):
        runs = [found["arms"][name] for name in names]
        means = [np.mean([run["right"] for run in each]) for each in runs]
        return [round(100 * mean, 1) for mean in means]

    text = r"LR-QAT comes to (\S+) % right, L4Q to (\S+) % and DL-QAT to (\S+) %"
    told = numbers(rf"{text}, and .{{,70}} to (\S+) %", rivals)
    assert told == right("LR-QAT", "L4Q", "DL-QAT", "straight through")
    trained = [found["arms"][n][0]["trained"] for n in ("straight through", "LR-QAT")]
    assert trained[0] == 12 * trained[1]
    told = numbers(r"stays at (\S+) %; rotating all of it gives (\S+) %", rivals)
    assert told == right("RoSTE", "straight through, all rotated")
    text = r"rounded to (\S+) % right, clips come to (\S+) %, and .{,50} to (\S+) %\."
    names = "rounded", "ZeroQAT, clips of frozen weights", "ZeroQAT, all weights"
    assert numbers(text, rivals) == right(*names)
    text = r"plans (\d+) MiB of temporary memory, and (\d+) MiB for the gradient of all"
    memory = [found["memory"][name] for name in ("two points", "backward")]
    assert numbers(text, rivals) == [round(each) for each in memory]


def test_the_video_by_bits():
    text = (
        r"has (\S+) dB in full precision; at 4 bits (\S+) rounded, (\S+) trained and "
    )
    text += r"(\S+) distilled, at 2 bits (\S+), (\S+) and (\S+)\."
    arms = [
        f"{n} bits, {arm}" for n in (4, 2) for arm in ("rounded", "QAT", "distilled")
    ]
    found = figures("video")
    want = [round(np.mean(found[name]), 2) for name in ("full precision", *arms)]
    assert numbers(text, "docs/rivals.md") == want


def test_how_many_damaged_files_there_are():
    counts = set(re.findall(r"(\d+,000) damaged", page("Makefile")))
    counts |= set(re.findall(r"damages (\S+) files", page("docs/export.md")))
    fuzzing = (ROOT / "tests" / "fuzzing.py").read_text()
    (default,) = re.findall(r'"--files".*?default=([\d_]+)', fuzzing, re.DOTALL)
    assert counts == {f"{int(default):,}"}


@pytest.mark.usefixtures("standard_promotion")
def test_doses_and_silences_on_a_quadratic():
    """By a loop of its own; the standard error over seeds is about 0.06."""
    strength, number = "docs/strength.md", r"([\d.]+)"
    doses = [0.01, 0.2, 0.7, 4.0]
    text = rf"{number} at a dose of 0.01, {number} at 0.2, {number} at 0.7 and {number}"
    told = numbers(rf"is {text} at 4\.", strength)
    found = losses_over_ste(doses, floor=0.1)
    np.testing.assert_allclose(found, told, atol=0.15)
    assert found[2] < min(found[0], found[1], found[3])
    linear = {"silence": 0.8, "power": 1.0}
    (later,) = losses_over_ste([0.7], floor=0.1, **linear)
    assert abs(found[2] - later) < 0.15
    text = rf"the first gains \({number}\) and the second costs \({number}\)"
    to_zero = [losses_over_ste([0.7], floor=0.0, **each)[0] for each in ({}, linear)]
    np.testing.assert_allclose(to_zero, numbers(text, strength), atol=0.15)
    assert to_zero[0] < 1 < to_zero[1]


def losses_over_ste(doses, floor, seeds=8, steps=1500, **ramp):
    """Final losses of doses over that of none, means over seeds."""
    problem, quantizer = effect.Problem(4, True, 100, "adam"), cage.int4()
    rules = cage.Rules([("x", quantizer)])
    rate = optax.cosine_decay_schedule(0.01, steps, floor)
    unit = cage.ramp_to_dose(rate, steps, 1.0, **ramp)

    def loss(x, curvature, optimum):
        offset = cage.fake_quant(x, quantizer) - optimum
        return jnp.sum(offset * (curvature @ offset)) / 2

    def one(dose, key, curvature, optimum):
        tx = cage.cage_adamw(
            rate, rules, strength=lambda count: dose * unit(count), weight_decay=0.0
        )

        def step(carry, number):
            params, state = carry
            key_now = jax.random.fold_in(key, number)
            noise = 0.1 * jax.random.normal(key_now, optimum.shape)
            gradient = jax.grad(loss)(params["x"], curvature, optimum) + noise
            updates, state = tx.update({"x": gradient}, state, params)
            return (optax.apply_updates(params, updates), state), None

        first = {"x": optimum}, tx.init({"x": optimum})
        ((params, _), _) = jax.lax.scan(step, first, jnp.arange(steps))
        return loss(params["x"], curvature, optimum)

    by_seed = jax.vmap(one, (None, 0, 0, 0))
    run = jax.jit(jax.vmap(by_seed, (0, None, None, None)))
    keys = jax.random.split(jax.random.key(0), seeds)
    hessians = map(jnp.asarray, effect.hessians(problem, seeds))
    found = np.mean(run(jnp.array([0.0, *doses]), keys, *hessians), 1)
    return found[1:] / found[0]
