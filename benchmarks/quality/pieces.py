"""SmolLM2-135M at 3 and 4 bits: what each piece of a fine-tuning is worth.

The pieces are those of `examples/finetune_smollm2.py`. Each cell is a fine-tuning with
all of them, with one left out, or with none, from the base, the texts and the judges of
`finetuning`. What each stage ends with has a checkpoint.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import finetune_smollm2
import prose
from cells import Table
from checkpoints import RunFolder
from finetuning import Texts, load_texts
from finetuning_stages import Finetuning, Pieces, Recipe, Sizes, Target, inputs_of
from rich.console import Console
from rich.progress import Progress

import cage_jax as cage
from cage_jax.llama.perplexity import perplexity

LEARNING_RATE, SEQUENCE, JUDGED = 1e-4, 256, 4096
RUNS = Path("runs/quality/pieces")
ALL = Pieces(start="gptq", blocks=True, distill=True, cage=True, scales=True)
ARMS = {
    "all": ALL,
    "all but GPTQ": ALL._replace(start="rounded"),
    "all but blocks": ALL._replace(blocks=False),
    "all but distillation": ALL._replace(distill=False),
    "all but CAGE": ALL._replace(cage=False),
    "all but scales": ALL._replace(scales=False),
    "none": Pieces("rounded", blocks=False, distill=False, cage=False, scales=False),
}
# Thousands of tokens that the whole model is trained on. GPTQ and each epoch of the
# blocks read 16 thousand more, the base 8 thousand.
LENGTHS = {50: 200, 140: 550}
TARGETS: dict[str, Target] = {"int3 group 64": "int3", "W4A4": "w4a4"}
TINY = {"lengths": {50: 2}, "calibration": 2, "base": 1, "sequence": 16, "judged": 64}


def names() -> list[str]:
    """Returns the names of all cells, in the order of what they tell."""
    arms = ["all", "none", *(arm for arm in ARMS if arm not in ("all", "none"))]
    short = [f"int3 group 64, 50 thousand tokens: {arm}" for arm in arms]
    others = [
        "W4A4, 50 thousand tokens: all",
        "int3 group 64, 140 thousand tokens: all",
    ]
    return [*short[:2], *others, *short[2:]]


def losses(
    name: str, tuning: Finetuning, teacher: Any, texts: Texts, console: Console
) -> dict[str, dict[str, float]]:
    """Fine-tunes as a cell says; returns the losses after each stage by text."""
    found: dict[str, dict[str, float]] = {}
    target = TARGETS[name.partition(",")[0]]

    def judge(stage, params, inputs):
        found[stage] = {
            text: round(
                perplexity(
                    params,
                    tokens,
                    tuning.model.config,
                    context=tuning.sizes.sequence,
                    inputs=inputs,
                ).loss,
                6,
            )
            for text, tokens in texts.judges.items()
        }
        console.print(f"{name}, {stage}: {found[stage]}", highlight=False)

    def report(stage, codes):
        judge(stage, cage.dequantize(codes), inputs_of(target))

    judge("full precision", teacher, None)
    tuning.finetune(target, teacher, report)
    return found


def measure(
    console: Console,
    *,
    lengths: dict[int, int] = LENGTHS,
    calibration: int = 64,
    base: int = 32,
    sequence: int = SEQUENCE,
    judged: int = JUDGED,
    only: Sequence[str] = (),
    table: Table | None = None,
    data: Path = prose.DATA,
    runs: Path = RUNS,
) -> Table:
    """Fills the table, cell by cell, as `finetuning.measure` does."""
    settings = {
        "steps": lengths,
        "calibration": calibration,
        "base_steps": base,
        "sequence": sequence,
        "evaluation_tokens": judged,
        "learning_rate": LEARNING_RATE,
    }
    table = table or Table("pieces", settings)
    model = finetune_smollm2.load_model(None)
    texts = load_texts(model, (600 + base) * sequence, judged, data)

    def tuning_in(folder, bars, pieces, steps):
        sizes = Sizes(
            base=base,
            steps=steps,
            scales=max(1, steps // 10),
            calibration=calibration,
            epochs=2,
            batch=1,
            sequence=sequence,
        )
        recipe = Recipe(pieces, sizes, LEARNING_RATE, save_every=25)
        judged = next(iter(texts.judges.values()))
        return Finetuning(model, texts.train, judged, recipe, folder, bars)

    @functools.cache
    def teacher():
        with (
            RunFolder(runs / "base", settings, resume=True) as folder,
            Progress(console=console) as bars,
        ):
            return tuning_in(folder, bars, ALL, 0).base()

    def one(name):
        what, _, arm = name.partition(": ")
        steps = lengths[int(what.partition(", ")[2].split()[0])]
        place = runs / "".join(c if c.isalnum() else "_" for c in name)
        start = teacher()
        with (
            RunFolder(place, settings | {"cell": name}, resume=True) as folder,
            Progress(console=console) as bars,
        ):
            tuning = tuning_in(folder, bars, ARMS[arm], steps)
            return losses(name, tuning, start, texts, bars.console)

    table.measure(only or names(), one, console)
    return table
