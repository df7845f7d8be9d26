"""SmolLM2-135M, fine-tuned to few bits from one base that all methods share.

The base is trained a little in full precision, so that no method has to learn the text.
A training with CAGE as published is that of STE until its silence ends: it branches off
there. Each cell is one training; what is under way has checkpoints.
"""

import functools
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import finetune_smollm2
import jax
import jax.numpy as jnp
import layout
import numpy as np
import optax
import prose
from batches import Batches, Windows
from cells import Table
from checkpoints import RunFolder
from methods import AVERAGED_SHARE, METHODS, Method, Training, full
from rich.console import Console
from rich.progress import track
from text import pieces

import cage_jax as cage
from cage_jax import contrib, llama
from cage_jax.export.text import tokenizer_of
from cage_jax.llama.loaded import Model
from cage_jax.llama.perplexity import perplexity

SEEDS = 3
BATCH, LEARNING_RATE, FLOOR = 1, 1e-4, 0.1


class Size(NamedTuple):
    """How long the trainings are, and how long the windows.

    Of each text that judges, as many tokens are taken as evaluation has.
    """

    base_steps: int
    steps: int
    sequence: int
    evaluation_tokens: int


PUBLISHED = Size(32, 96, 256, 4096)
TINY = {"seeds": 2, "size": Size(1, 2, 16, 64)}
# Presidents before are of another century's English; those after judge.
YEARS, LATER = (1961, 2012), (2013, 2021)
RUNS = Path("runs/quality/finetuning")
SAVE_SECONDS = 600.0
BASE = "base"
# Each a training of its own; full precision is one for all targets.
ARMS = ("ste", "cage", "recommended", "ste0")
ARMS += tuple(name for name in METHODS if name not in ARMS)
# CAGE as published is silent so long.
_SILENCE = 0.8
_NAME = re.compile(r"(?:(?P<target>.+): )?(?P<arm>\w+), seed (?P<seed>\d+)")


class Target(NamedTuple):
    """What becomes of the layers' weights, and of what they are multiplied with."""

    rules: cage.Rules
    inputs: cage.Quantizer | None = None


def _layers(weights, inputs=None):
    return Target(cage.Rules([(r"layers/.*/kernel", weights), (r".*", None)]), inputs)


TARGETS = {
    "int3 group 64": _layers(cage.int3(axis=-2, group_size=64)),
    "W4A4": _layers(cage.quest(4, axis=-2, hadamard=64), cage.quest(4, hadamard=64)),
    "MXFP4": _layers(cage.mxfp4(axis=-2), cage.mxfp4()),
    "int2 group 64": _layers(cage.int2(axis=-2, group_size=64)),
}
_FLOATS = Target(cage.Rules([(r".*", None)]))


class Texts(NamedTuple):
    """Tokens to train on, and those of the texts that judge, by their names."""

    train: np.ndarray
    judges: dict[str, np.ndarray]


def load_texts(
    model: Model, needed: int, judged: int, folder: Path = prose.DATA
) -> Texts:
    """Speeches and the standard library, half and half; later speeches and a novel.

    Args:
      model: whose tokenizer it is.
      needed: tokens to train on.
      judged: tokens of each of the other texts.
      folder: of the packages that `prose` names.

    Raises:
      ValueError: for packages that are missing.
    """
    tokenizer = tokenizer_of(model.tokenizer)

    def tokens(texts, count):
        found: list[int] = []
        for text in texts:
            found += tokenizer.encode(text, add_special_tokens=False).ids
            if len(found) >= count:
                break
        return np.asarray(found[:count], np.int32)

    library = (
        block.decode("utf-8", errors="ignore")
        for held_out, block in pieces(())
        if not held_out
    )
    half = -(-needed // 2)
    first, last = LATER
    return Texts(
        np.concatenate(
            [tokens(prose.speeches(*YEARS, folder), half), tokens(library, half)]
        ),
        {
            f"speeches of {first} to {last}": tokens(
                prose.speeches(*LATER, folder), judged
            ),
            "Moby Dick": tokens([prose.moby_dick(folder)], judged),
        },
    )


def names(seeds: int = SEEDS) -> list[str]:
    """Returns the names of all cells, the first seed before the second."""
    return [
        name
        for seed in range(seeds)
        for name in (
            f"full, seed {seed}",
            *(f"{target}: {arm}, seed {seed}" for target in TARGETS for arm in ARMS),
        )
    ]


class State(NamedTuple):
    """What a training goes on from."""

    params: Any
    optimizer: Any


class Finetuning:
    """The trainings of a model on some texts, with checkpoints in a folder."""

    def __init__(
        self,
        model: Model,
        texts: Texts,
        folder: RunFolder,
        console: Console,
        size: Size = PUBLISHED,
    ):
        self._model, self._texts = model, texts
        self._folder, self._console = folder, console
        self._size = size
        self._sharding = layout.batch_sharding(layout.mesh_of(jax.devices()[:1]))

    def losses(self, name: str) -> dict[str, dict[str, float | None]]:
        """What a cell's training comes to: by label and text, nats a token.

        What diverged has None.

        A label is the target's name, a colon and the method's; that of full precision
        has no target. Beside STE is its average, and beside full precision what
        rounding it comes to at each target.
        """
        parts = _NAME.fullmatch(name)
        assert parts is not None
        label, arm, seed = parts["target"], parts["arm"], int(parts["seed"])
        if arm == "full":
            params = self._ended(name, _FLOATS, Method("", weights=full), seed).params
            rounded = {
                f"{label}: ptq": self._judged(cage.fake_quant(params, t.rules), t)
                for label, t in TARGETS.items()
            }
            return {"full": self._judged(params, _FLOATS)} | rounded
        target = TARGETS[label]
        found = self._ended(name, target, _method(arm), seed, arm == "ste0")
        arms = {arm: found.params}
        if arm == "ste":
            arms["averaged"] = contrib.averaged(found.optimizer)
        return {
            f"{label}: {arm}": self._judged(cage.fake_quant(x, target.rules), target)
            for arm, x in arms.items()
        }

    @functools.cached_property
    def base(self) -> Any:
        """The parameters that all begin with."""
        steps = self._size.base_steps
        with self._folder.checkpoints(f"{BASE} end") as end:
            if end.latest_step() is not None:
                return end.restore(steps, _abstract(self._model.params))
            self._console.print(f"{steps} steps in full precision, which all share")
            method, training = Method("", weights=full), _training(_FLOATS, steps)
            optimizer = _optimizer(method, training)
            state = State(self._model.params, optimizer.init(self._model.params))
            run = self._step(optimizer, method, training, None)
            params = self._stretch(BASE, 0, steps, state, run, seed=10**6).params
            end.save(steps, params)
            end.wait()
        self._folder.forget(BASE)
        return params

    def _ended(self, name, target, method, seed, to_zero=False) -> State:
        """The end of all steps."""
        steps = self._size.steps
        training = _training(target, steps, 0.0 if to_zero else FLOOR)
        optimizer = _optimizer(method, training)
        run = self._step(optimizer, method, training, target.inputs)
        branch, place = 0, _place(name)
        state = State(self.base, optimizer.init(self.base))
        if method.optimizer in (_silent, METHODS["cage"].optimizer):
            branch = int(_SILENCE * steps)
            trunk = _place(f"{name.partition(':')[0]} trunk, seed {seed}")
            state = self._trunk(trunk, branch, state, training, target, seed)
        state = self._stretch(place, branch, steps, state, run, seed)
        self._folder.forget(place)
        if branch and method.optimizer is not _silent:
            self._folder.forget(trunk)  # this one is the last that goes on from it
        return state

    def _trunk(self, place, stop, state, training, target, seed):
        silent = METHODS["ste"]._replace(optimizer=_silent)
        run = self._step(_optimizer(silent, training), silent, training, target.inputs)
        return self._stretch(place, 0, stop, state, run, seed)

    def _step(self, optimizer, method, training, inputs):
        """`(state, windows, step, key) -> (state, loss)`, jitted."""

        def loss(params, tokens, step, key):
            weights = method.weights(training, params, step, key)
            logits = llama.logits(
                weights, tokens[:, :-1], self._model.config, inputs=inputs
            )
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        @partial(jax.jit, donate_argnums=0)
        def run(state, tokens, step, key):
            value, gradient = jax.value_and_grad(loss)(state.params, tokens, step, key)
            updates, after = optimizer.update(gradient, state.optimizer, state.params)
            return State(optax.apply_updates(state.params, updates), after), value

        return run

    def _stretch(self, place, start, stop, state, run, seed) -> State:
        """From one step to another, or from a checkpoint in between."""
        source = Windows(self._texts.train, self._size.sequence)
        batches = Batches(source, batch=BATCH, seed=seed, sharding=self._sharding)
        key = jax.random.key(seed)
        with self._folder.checkpoints(place) as checkpoints:
            done = checkpoints.latest_step()
            if done is not None:
                state = checkpoints.restore(done, _abstract(state))
            else:
                done, state = start, jax.tree.map(jnp.copy, state)
            following, saved = batches.start(done), time.monotonic()
            for step in track(
                range(done, stop),
                f"steps from {done} to {stop}",
                console=self._console,
                disable=done == stop,
            ):
                state, loss = run(
                    state,
                    next(following),
                    jnp.int32(step),
                    jax.random.fold_in(key, step),
                )
                diverged = not jnp.isfinite(loss)
                if (
                    diverged
                    or step == stop - 1
                    or time.monotonic() - saved > SAVE_SECONDS
                ):
                    checkpoints.save(step + 1, state)
                    saved = time.monotonic()
                if diverged:
                    self._console.print(f"the loss is {loss} after {step} steps")
                    break
            checkpoints.wait()
        return state

    def _judged(self, weights, target) -> dict[str, float | None]:
        """By text; None where the weights are not finite."""
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(weights)):
            return dict.fromkeys(self._texts.judges)
        config, inputs = self._model.config, target.inputs
        context = self._size.sequence
        found = {
            name: perplexity(
                weights, tokens, config, context=context, inputs=inputs
            ).loss
            for name, tokens in self._texts.judges.items()
        }
        return {name: round(loss, 6) for name, loss in found.items()}


def _training(target, steps, floor=FLOOR):
    rate = optax.cosine_decay_schedule(LEARNING_RATE, steps, floor)
    base = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.0)
    return Training(target.rules, steps, rate, base)


def _silent(training):
    """STE, with the state that CAGE has."""
    return cage.decoupled(
        training.base, training.rules, learning_rate=training.rate, strength=0.0
    )


def _method(arm):
    """STE has the state of CAGE, which goes on from a part of it."""
    if arm == "ste":
        return METHODS["ste"]._replace(optimizer=_silent)
    return METHODS["ste" if arm == "ste0" else arm]


def _optimizer(method, training):
    averaged = max(1, round(AVERAGED_SHARE * training.steps))
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        method.optimizer(training),
        contrib.averaging(1.0, start=training.steps - averaged),
    )


def _place(name):
    return re.sub(r"\W+", "_", name)


def _abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def measure(
    console: Console,
    *,
    seeds: int = SEEDS,
    size: Size = PUBLISHED,
    only: Sequence[str] = (),
    table: Table | None = None,
    data: Path = prose.DATA,
    runs: Path = RUNS,
) -> Table:
    """Fills the table, cell by cell, as `quadratics.measure` does.

    Args:
      console: is told of each.
      seeds: of each training.
      size: of the trainings.
      only: the names of some cells; none for all.
      table: to fill; None for the one that is kept.
      data: folder of the packages that `prose` names.
      runs: folder of the checkpoints.
    """
    settings = size._asdict() | {
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "floor": FLOOR,
    }
    table = table or Table("finetuning", settings)
    model = finetune_smollm2.load_model(None)
    needed = (size.base_steps + SEEDS * size.steps) * BATCH * size.sequence + 1
    with RunFolder(runs, settings, resume=True) as folder:
        texts = load_texts(model, needed, size.evaluation_tokens, data)
        tuning = Finetuning(model, texts, folder, console, size)
        table.measure(only or names(seeds), tuning.losses, console)
    return table
