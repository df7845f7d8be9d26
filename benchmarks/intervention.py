"""Teacher Intervention on MiniLM-L6 at ternary weights and 8-bit inputs.

It is compared with distillation of the same tensors without replacing any. Both train
the encoder from the same weights, on the same batches, for the same number of steps.
The model and the text are those of `quality/minilm.py`.
"""

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measurement
import numpy as np
import optax
import tyro
from measurement import Rows
from rich.console import Console

import cage_jax as cage
from cage_jax import contrib

sys.path.insert(0, str(Path(__file__).resolve().parent / "quality"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import minilm
import prose
from minilm import HEADS, LAYERS, Sentences

RATE = 1e-4  # as in quality/minilm.py, with its warm-up and floor
WARM_UP, FLOOR = 0.05, 0.1
ARMS = {"distillation": False, "Teacher Intervention": True}
MEASURES = ("distance", "Spearman", "same nearest")
TRAINED = "encoder/"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compares Teacher Intervention with plain distillation."""

    seeds: int = 5
    """Trainings of each arm."""
    steps: int = 60
    """Steps of a training; the teacher intervenes in the first half."""
    held_out: int = 128
    """Sentences that judge."""
    data: Path = prose.DATA
    """Folder with the package of speeches."""
    tiny: bool = False
    """One short training of each arm, to see that everything works."""


def embeddings(params: dict[str, Any], sentences: Sentences, tap) -> jax.Array:
    """Computes `minilm.embeddings` with taps in each layer."""
    known = sentences.tokens != 0
    length = sentences.tokens.shape[1]
    x = jnp.take(params["embeddings/word_embeddings/weight"], sentences.tokens, axis=0)
    x += params["embeddings/position_embeddings/weight"][:length]
    x += params["embeddings/token_type_embeddings/weight"][0]
    x = minilm._norm(params, "embeddings/LayerNorm", x)
    for number in range(LAYERS):
        path = f"encoder/layer/{number}"
        query, key, value = (
            minilm._heads(minilm._dense(params, f"{path}/attention/self/{name}", x))
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        scores = scores / math.sqrt(x.shape[-1] // HEADS)
        scores = jnp.where(known[:, None, None], scores, -1e9)
        weights = tap(f"{path}/map", jax.nn.softmax(tap(f"{path}/scores", scores)))
        context = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        context = tap(f"{path}/context", context)
        mixed = minilm._dense(params, f"{path}/attention/output/dense", context)
        x = minilm._norm(params, f"{path}/attention/output/LayerNorm", x + mixed)
        x = tap(f"{path}/output", x)
        hidden = minilm._dense(params, f"{path}/intermediate/dense", x)
        hidden = jax.nn.gelu(hidden, approximate=False)
        out = minilm._dense(params, f"{path}/output/dense", hidden)
        x = tap(
            f"{path}/hidden", minilm._norm(params, f"{path}/output/LayerNorm", x + out)
        )
    mean = jnp.sum(x * known[..., None], axis=1) / jnp.sum(known, axis=1)[:, None]
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def rules() -> cage.Rules:
    """Ternary weights by output channel, inputs of 8 bits by token."""
    weights, inputs = contrib.twn(axis=-1), cage.int8(axis=-1)
    return cage.Rules([(minilm.KERNELS, weights, inputs), (r".*", None)])


class Study:
    """The teacher, the student's model and the sentences."""

    def __init__(self, settings: Settings):
        self.settings, self.rules = settings, rules()
        self.teacher = minilm.load_weights()
        learned, held_out = minilm.load_sentences(settings.data)
        self.tokens = jnp.asarray(learned.tokens)
        self.held_out = Sentences(jnp.asarray(held_out.tokens[: settings.held_out]))
        self.model = contrib.tapped(embeddings)

        def with_stage(params, sentences, given, stage):
            return self.model(params, sentences, teacher=given, stage=stage)

        self.student = cage.quantize_activations(with_stage, self.rules)
        self.target = np.asarray(
            jax.jit(minilm.embeddings)(self.teacher, self.held_out)
        )

    def judged(self, params: dict[str, Any]) -> dict[str, float]:
        """Returns the measures of parameters, as quantized."""

        @jax.jit
        def outputs(params, sentences):
            params = cage.fake_quant(params, self.rules)
            return self.student(params, sentences, None, 3)[0]

        return minilm.measures(np.asarray(outputs(params, self.held_out)), self.target)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with the schedule of the table of MiniLM."""
        steps = self.settings.steps
        rate = optax.warmup_cosine_decay_schedule(
            0.0, RATE, round(WARM_UP * steps), steps, FLOOR * RATE
        )
        return optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.0)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
    def step(self, frozen, params, state, key, stage):
        """Trains for one step, of either arm."""
        rows = jax.random.randint(key, (minilm.BATCH,), 0, len(self.tokens))
        batch = Sentences(self.tokens[rows])
        target, given = self.model(frozen, batch)

        def loss(params):
            weights = cage.fake_quant({**frozen, **params}, self.rules)
            found, own = self.student(weights, batch, given, stage)
            return minilm.distance(found, target, batch) + contrib.tap_distance(
                own, given
            )

        updates, state = self.optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def trained(self, seed: int, intervenes: bool) -> dict[str, float]:
        """Trains one arm; returns its measures."""
        stage_of = contrib.intervention_stage(max(1, self.settings.steps // 2))
        params = {
            name: jnp.copy(x)
            for name, x in self.teacher.items()
            if name.startswith(TRAINED)
        }
        state = self.optimizer.init(params)
        for number, key in enumerate(
            jax.random.split(jax.random.key(seed), self.settings.steps)
        ):
            stage = stage_of(number) if intervenes else jnp.int32(3)
            params, state = self.step(self.teacher, params, state, key, stage)
        return self.judged({**self.teacher, **params})


def measure(settings: Settings, console: Console) -> dict[str, Any]:
    """Trains both arms of each seed."""
    study = Study(settings)
    arms: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    rounded = study.judged(study.teacher)
    for seed in range(settings.seeds):
        for name, intervenes in ARMS.items():
            arms[name].append(study.trained(seed, intervenes))
            console.print(f"seed {seed}, {name}: {arms[name][-1]}", highlight=False)
    shown = {name: getattr(settings, name) for name in ("seeds", "steps", "held_out")}
    return {
        "name": "intervention",
        "benchmark": "intervention",
        "title": f"MiniLM-L6 at ternary weights and 8-bit inputs after "
        f"{settings.steps} steps of {minilm.BATCH} sentences",
        "environment": measurement.environment(),
        "settings": shown | {"rate": RATE, "warm_up": WARM_UP, "floor": FLOOR},
        "rounded": rounded,
        "arms": arms,
        "targets": [],
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record, for the console and for the README."""
    cells = [["rounded", *(f"{record['rounded'][name]:.3f}" for name in MEASURES), ""]]
    plain = np.array([each["distance"] for each in record["arms"]["distillation"]])
    for arm, found in record["arms"].items():
        values = {name: np.array([each[name] for each in found]) for name in MEASURES}
        difference = values["distance"] - plain
        told = f"{_estimate(difference, '+.4f')}" if difference.any() else ""
        cells.append(
            [arm, *(_estimate(values[name], ".3f") for name in MEASURES), told]
        )
    return Rows(
        ["training", "1 - cosine", "Spearman", "same nearest", "1 - cosine, paired"],
        cells,
    )


def _estimate(values, form):
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0
    return f"{np.mean(values):{form}} ± {error:{form.replace('+', '')}}"


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    if settings.tiny:
        settings = dataclasses.replace(settings, seeds=1, steps=2, held_out=16)
    console.print(
        f"Training {len(ARMS)} x {settings.seeds} encoders for {settings.steps} steps: "
        f"four minutes on an idle core."
    )
    record = measure(settings, console)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
