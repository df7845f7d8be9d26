"""The CAGE paper's Llama of 30 million weights, in bfloat16, for a large GPU or a TPU.

As `language_models`, of another size and text; all devices share the batches. The paper
trains on 3 billion tokens of C4, this table on a tenth. How fast it goes is in
../train_step.py --size 30m.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import language_models
from cells import Table
from rich.console import Console
from sizes import SIZES

SEEDS = 1
BITS = (4, 3)
_SIZE = SIZES["30m"]
MODEL = language_models.Model(_SIZE.layers, _SIZE.width, _SIZE.steps // 10)
VOCABULARY = 32_000
# Bytes: more than the steps have tokens, some four bytes each.
LIMIT = 2_000_000_000
RUNS = Path("runs/quality/paper")
_FEW = {"vocabulary": 256, "batch": 2, "microbatch": 2, "sequence": 16}
TINY = {"seeds": 2, "steps": 10, "dtype": "float32", **_FEW}


def names(seeds: int = SEEDS) -> list[str]:
    """Returns the names of all cells."""
    return [
        language_models.name_of(bits, bits, MODEL, 0.1, seed)
        for seed in range(seeds)
        for bits in BITS
    ]


def measure(
    console: Console,
    *,
    seeds: int = SEEDS,
    steps: int | None = None,
    only: Sequence[str] = (),
    table: Table | None = None,
    vocabulary: int = VOCABULARY,
    text: Sequence[Path] = (),
    dataset: str | None = None,
    runs: Path = RUNS,
    **changes: Any,
) -> Table:
    """Fills the table, cell by cell, as `language_models.measure` does.

    Args:
      console: is told of each.
      seeds: of each setting.
      steps: of each training, for a trial; None for the published ones.
      only: the names of some cells; none for all.
      table: to fill; None for the one that is kept.
      vocabulary: of a BPE, made of the text.
      text: files.
      dataset: instead of files, a dataset on the hub, or its folder.
      runs: folder of the checkpoints.
      **changes: other settings of `train_lm.py`, for a trial.

    Raises:
      ValueError: for neither, or both.
    """
    if table is None and not text and dataset is None:
        raise ValueError(
            "`--dataset` or `--text` must be given: a gigabyte of text, such as "
            "`--dataset HuggingFaceFW/fineweb-edu`."
        )
    source: dict[str, Any] = {"text": tuple(text), "dataset": dataset}
    if dataset is not None:
        source["limit"] = LIMIT
    return language_models.measure(
        console,
        steps=steps,
        only=only or names(seeds),
        table=table,
        runs=runs,
        name="paper",
        devices=None,
        vocabulary=vocabulary,
        **source,
        **changes,
    )
