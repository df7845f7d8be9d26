"""Train steps and trainings of the paper's 30 M Llama, for `gpu.py --all`.

The steps are timed in bfloat16, with STE and with CAGE; the trainings compare full
precision, STE and CAGE on the tokens that `gpu_day.pack` took along, seed by seed.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gpu_day
import jax
import jax.numpy as jnp
import lm
import numpy as np
import optax
import utilization
from sizes import SIZES

import cage_jax as cage

ROUNDS, CALLS = 5, 10
VOCABULARY = 8192  # of the timed steps
STRENGTH = 10.0  # the paper's, from the first step on
ARMS = ("full", "STE", "CAGE")
SEEDS = 20  # more than there is ever time for
SAVE_SECONDS = 60.0
VALIDATION_BATCHES = 8


class Kind(NamedTuple):
    """A train step that is timed.

    Attributes:
      optimizer: AdamW alone, or with the pull of the paper or the recommended one.
      a_bits: bits of inputs, 16 for none.
      quantized: whether anything is.
      implementation: of the weights' `fake_quant` and of the optimizer's step, which is
        the fused one unless "xla" is asked for; None for what a user gets.
    """

    optimizer: str = "AdamW"
    a_bits: int = 4
    quantized: bool = True
    implementation: Literal["xla", "pallas"] | None = "xla"


KINDS = {
    "bfloat16": Kind(quantized=False),
    "W4A16 STE": Kind(a_bits=16),
    "W4A4 STE": Kind(),
    "W4A4 STE, kernels": Kind(implementation="pallas"),
    "W4A4 CAGE": Kind("paper"),
    "W4A4 CAGE, kernels": Kind("paper", implementation="pallas"),
    "W4A4 CAGE, recommended": Kind("recommended"),
    "W4A4 CAGE, recommended, kernels": Kind("recommended", implementation="pallas"),
    "W4A4 CAGE, recommended, as chosen": Kind("recommended", implementation=None),
}


def model_of(tiny: bool, a_bits: int, vocabulary: int, seed: int) -> lm.LanguageModel:
    """Returns the 30 M model with large microbatches, or the smallest one."""
    size = SIZES["tiny" if tiny else "30m"]
    microbatch = size.microbatch if tiny else 128
    options = {"w_bits": 4, "a_bits": a_bits, "kv_bits": None, "seed": seed}
    return lm.LanguageModel(
        size, microbatch=microbatch, vocabulary=vocabulary, **options
    )


def chosen(report: bool) -> dict[str, Any]:
    """Tunes the kernels of the recommended step, or reports what would run."""
    model = model_of(False, 4, VOCABULARY, 0)
    tx = _optimizer(model, KINDS["W4A4 CAGE, recommended"])
    params = jax.eval_shape(model.initial_params)
    found = cage.tune(params, model.rules, optimizer=tx, report=report)
    return {"table": str(found).splitlines(), "faults": list(found.faults)}


# --- timed steps ----------------------------------------------------------------------


def steps(findings: gpu_day.Findings) -> None:
    """Times each kind of step."""
    # The last one has all that the others have, and runs without a GPU too.
    kinds = dict(list(KINDS.items())[-1:]) if findings.tiny else KINDS
    for name, kind in kinds.items():
        findings.add(name, partial(_timed, kind, findings.tiny))


def _timed(kind: Kind, tiny: bool) -> dict[str, Any]:
    model = model_of(tiny, kind.a_bits, VOCABULARY, 0)
    tx = _optimizer(model, kind)
    run = jax.jit(_step(model, tx, kind), donate_argnums=0)
    shape = model.size.batch, model.size.sequence + 1
    windows = jax.random.randint(jax.random.key(0), shape, 0, VOCABULARY, jnp.int32)
    params, before = jax.jit(lambda: model.first_state(tx))()
    state = params, optax.tree_utils.tree_set(before, cage_count=jnp.int32(900))
    begun = time.perf_counter()
    program = run.lower(state, windows).compile()
    compiled = time.perf_counter() - begun
    times = []
    for number in range(ROUNDS + 1):
        begun = time.perf_counter()
        for _ in range(1 if tiny else CALLS):  # gradients are read in one of ten
            state, loss = program(state, windows)
        jax.block_until_ready((state, loss))
        if number or tiny:
            times.append((time.perf_counter() - begun) / (1 if tiny else CALLS))
    seconds, tokens = statistics.median(times), shape[0] * model.size.sequence
    operations = tokens * utilization.operations(model.size, VOCABULARY)
    peak = utilization.peak_of(jax.devices()[0].device_kind)
    return {
        "seconds": times,
        "tokens a second": tokens / seconds,
        "MFU": peak and operations / seconds / peak,
        "seconds to compile": compiled,
        "bytes beside the state": program.memory_analysis().temp_size_in_bytes,
        "loss": float(loss),
    }


def _optimizer(model, kind):
    rate, correction = optax.constant_schedule(1e-3), {"strength": 0.0}
    if kind.optimizer == "paper":
        correction["strength"] = STRENGTH
    elif kind.optimizer == "recommended":
        correction = cage.recommended(rate, 1000)
    return cage.cage_adamw(rate, model.rules, weight_decay=0.1, **correction)


def _step(model, tx, kind) -> Callable:
    """Returns a step of AdamW after clipping, fused unless XLA's form is asked for."""
    weights, implementation = None, kind.implementation
    if kind.quantized:
        weights = partial(
            cage.fake_quant, quantizer=model.rules, implementation=implementation
        )
    clip = optax.clip_by_global_norm(1.0)

    def step(state, windows):
        params, before = state
        quantized = kind.quantized
        loss, gradients = model.gradient(params, windows, quantized, weights=weights)
        gradients, _ = clip.update(gradients, clip.init(params))
        if implementation != "xla":
            after = tx.fused_step(
                gradients, before, params, implementation=implementation
            )
            return after, loss
        updates, after = tx.update(gradients, before, params)
        return (optax.apply_updates(params, updates), after), loss

    return step


# --- trainings ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Training:
    """How each arm is trained.

    Attributes:
      steps: of the optimizer.
      batch: windows a step.
    """

    steps: int = 3000
    batch: int = 128


def trainings(findings: gpu_day.Findings) -> None:
    """Trains all arms from one seed after another, from where the last call ended."""
    with np.load(gpu_day.ROOT / gpu_day.TOKENS) as file:
        tokens = {name: file[name] for name in file}
    vocabulary = int(tokens["vocabulary"])
    asked = Training(8, 8) if findings.tiny else Training()
    for seed in range(1 if findings.tiny else SEEDS):
        for arm in ARMS[-1:] if findings.tiny else ARMS:
            model = model_of(findings.tiny, 4, vocabulary, seed)
            path = findings.folder / f"llama_{arm}_{seed}.npz"
            run = partial(_trained, model, arm, asked, tokens, path, findings.ends)
            findings.add(f"{arm}, seed {seed}", run)


def _trained(model, arm, asked, tokens, path, ends) -> dict[str, Any]:
    """Trains an arm; its losses. What is not ended in time is kept in `path`."""
    quantized = arm != "full"
    rate = lm.learning_rate(model.size.learning_rate, asked.steps, 0.1)
    correction = {"strength": 0.0}
    if arm == "CAGE":
        correction = cage.recommended(rate, asked.steps)
    tx = model.optimizer(rate, **correction)
    model.microbatch = min(model.microbatch, asked.batch)
    learn, length = model.step(tx), model.size.sequence + 1
    text, held_out = (jnp.asarray(tokens[name]) for name in ("train", "held_out"))
    shared = jax.random.key(model.seed)

    def windows(text, key):
        begins = jax.random.randint(key, [asked.batch], 0, len(text) - length)
        return text[begins[:, None] + jnp.arange(length)]

    @partial(jax.jit, donate_argnums=0)
    def step(state, text):
        trained, losses, number, seconds = state
        batch = windows(text, jax.random.fold_in(shared, number))
        trained, loss = learn(trained, batch, quantized)
        return trained, losses.at[number].set(loss), number + 1, seconds

    @jax.jit
    def validation(params, text):
        weights = cage.fake_quant(params, model.rules) if quantized else params
        keys = jax.random.split(jax.random.key(0), VALIDATION_BATCHES)
        each = jax.lax.map(
            lambda key: model.cross_entropy(weights, windows(text, key), quantized),
            keys,
        )
        return each.mean()

    def first_state():
        trained = model.first_state(tx)
        return trained, jnp.zeros([asked.steps]), jnp.int32(0), jnp.float32(0)

    state = _restored(path, jax.eval_shape(first_state)) or jax.jit(first_state)()
    done, saved, began = int(state[2]), time.monotonic(), time.monotonic()
    before = float(state[3])
    for number in range(done, asked.steps):
        state = step(state, text)
        if number % 20:
            continue
        jax.block_until_ready(state)
        now = time.monotonic()
        if now > ends or now - saved > SAVE_SECONDS:
            spent = jnp.float32(before + now - began)
            _save(path, (*state[:3], spent))
            saved = time.monotonic()
        if now > ends:
            raise TimeoutError(f"no time after {number + 1} of {asked.steps} steps")
    (params, optimizer), losses, *_ = jax.block_until_ready(state)
    path.unlink(missing_ok=True)
    return {
        "validation": float(validation(params, held_out)),
        "losses": losses[:: max(1, asked.steps // 300)].tolist(),
        "skipped": int(optimizer.total_notfinite),
        "seconds": before + time.monotonic() - began,
        "tokens": asked.steps * asked.batch * (length - 1),
        "tokens of the text": len(tokens["train"]),
        "bytes a token": float(tokens["bytes_per_token"]),
    }


def _save(path: Path, state: Any) -> None:
    """Writes all arrays completely or not at all."""
    part = path.with_name("part.npz")
    np.savez(part, *jax.tree.leaves(state))
    part.replace(path)


def _restored(path: Path, like: Any) -> Any:
    """Reads arrays into a tree of their shapes; None if there are none."""
    if not path.exists():
        return None
    with np.load(path) as file:
        leaves = [jnp.asarray(file[name]) for name in file]
    found = jax.tree.unflatten(jax.tree.structure(like), leaves)
    if jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, like):
        raise ValueError(
            f"the checkpoint must be one of this training; {path} has arrays of other "
            f"shapes. Remove it."
        )
    return found
