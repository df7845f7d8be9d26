"""A tokenizer as small as there are, with the files that transformers has."""

from typing import Any

VOCABULARY = 300  # bytes, the end of a text, and a few pairs of letters


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
