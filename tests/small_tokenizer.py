"""Tokenizers as small as there are, with the files that transformers has."""

import json
from typing import Any

VOCABULARY = 300  # bytes, the end of a text, and a few pairs of letters
TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it "
    "was the age of foolishness, it was the epoch of belief, it was the epoch of "
    "incredulity, in the year 1775, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair."
)
SAMPLES = [
    TEXT,
    "In 2024, 12345 people's naïve cafés — 東京!\n\n\t  It'll<|im_start|>user\nbe.  ",
    "    indented\r\n\r\nHELLO'S we've 3.14159 <|endoftext|> 👩‍👩‍👧",
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}"
    r"]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def small_tokenizer(text: str) -> Any:
    """A byte-level BPE of `VOCABULARY` tokens, trained on a text."""
    import tokenizers

    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=byte_level.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def files_of(tokenizer: Any) -> dict[str, bytes]:
    """Its files by name."""
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": b'{"eos_token": "<|endoftext|>"}',
    }


def split_tokenizer(kind: str = "smollm", template: bool = False) -> dict[str, bytes]:
    """Trains a byte-level BPE of 319 tokens, and gives files as of transformers.

    Args:
      kind: how it splits texts: "gpt-2", "smollm" or "llama-bpe".
      template: whether it puts a token in front of each text.
    """
    import tokenizers

    pre, split = tokenizers.pre_tokenizers, tokenizers.Regex(LLAMA_3)
    steps = {
        "gpt-2": lambda: pre.ByteLevel(add_prefix_space=False),
        "smollm": lambda: pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        ),
        "llama-bpe": lambda: pre.Sequence(
            [
                pre.Split(split, "isolated"),
                pre.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    model = tokenizers.models.BPE(ignore_merges=kind == "llama-bpe")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = steps[kind]()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=318,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens(["naïve cafés"])  # one that is not special, with a space
    if template:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A",
            special_tokens=[("<|im_start|>", 1)],
        )
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|endoftext|>"},
        "pad_token": None,
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def parsed(files: dict[str, bytes]) -> Any:
    """Reads the tokenizer of files."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
