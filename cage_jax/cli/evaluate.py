"""`cage-jax eval`: perplexity of a text."""

import argparse
import time

from cage_jax.cli.command import Command, at_least, load_llama
from cage_jax.cli.terminal import Terminal
from cage_jax.export.files import as_path
from cage_jax.export.text import encoded


def add_arguments(flags: argparse.ArgumentParser) -> None:
    """Adds the text and how it is divided."""
    flags.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="files in UTF-8"
    )
    flags.add_argument(
        "--context", type=at_least(2), default=512, help="tokens per window (512)"
    )
    flags.add_argument(
        "--tokens", type=at_least(2), help="number of tokens to use (all)"
    )
    flags.add_argument(
        "--batch", type=at_least(1), default=1, help="windows per batch (1)"
    )


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Prints the perplexity."""
    from cage_jax.llama.perplexity import perplexity, windows  # needs Flax

    text = "".join(_read_text(path) for path in options.text)
    model, config = load_llama(options.model, terminal)
    if options.context > config.context:
        raise ValueError(
            f"`--context` must be at most {config.context}, the longest sequence of "
            f"the model; got {options.context}. Use --context 512."
        )
    tokens = encoded(model.tokenizer, text)[: options.tokens]
    if len(tokens) < 2:
        raise ValueError(
            f"`--text` must have at least two tokens, since the first is not "
            f"predicted; got {len(tokens)}. Give a longer text."
        )
    params = model.floats()
    count = -(-len(windows(tokens, options.context)) // options.batch)
    started = time.perf_counter()
    found = perplexity(
        params,
        tokens,
        config,
        context=options.context,
        batch=options.batch,
        track=lambda parts: terminal.track(parts, "evaluating windows", count),
    )
    seconds = time.perf_counter() - started
    content = {
        "perplexity": found.value,
        "loss": found.loss,
        "tokens": found.tokens,
        "context": options.context,
        "seconds": seconds,
    }
    terminal.result(
        content,
        f"perplexity {found.value:.3f} ({found.loss:.4f} nats per token, of "
        f"{found.tokens:,} tokens in windows of {min(options.context, len(tokens))}; "
        f"{seconds:.0f} s)",
    )
    return 0


def _read_text(path):
    try:
        return as_path(path, "--text").read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"`--text` must be readable files; got {path}: {error.strerror}. Check the "
            f"name."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`--text` must be UTF-8; got {path}, which is not at byte {error.start}. "
            f"Convert it first."
        ) from error


COMMAND = Command(
    "eval",
    "compute the perplexity of a model on a text",
    "model.gguf --text moby-dick.txt --context 512",
    add_arguments,
    run,
)
