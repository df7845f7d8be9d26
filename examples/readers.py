"""Losses of exported files, computed by the programs that run them."""

import os
from pathlib import Path

import numpy as np


def transformers_losses(folder: Path, windows: np.ndarray) -> np.ndarray:
    """Computes the loss of each token in transformers on CPU, in float32.

    Args:
      folder: of a model that `cage_jax.export.compressed_tensors` wrote.
      windows: tokens, (count, length); all but the first are predicted.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # its progress bars would overwrite ours
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # Decodes FP4 as bfloat16, which holds it exactly, and everything else as float32.
    config = transformers.AutoConfig.from_pretrained(folder)
    narrow = config.dtype == torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if narrow else torch.float32
    )
    with torch.no_grad():
        model(torch.zeros((1, 1), dtype=torch.long))  # unpacks the codes
    # The model's own `float` refuses weights that were loaded from codes.
    torch.nn.Module.float(model).eval()
    losses = []
    with torch.no_grad():
        for window in windows:
            tokens = torch.from_numpy(window[None].astype(np.int64))
            logits = model(tokens).logits[0, :-1].double()
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits, tokens[0, 1:], reduction="none"
                )
            )
    return torch.cat(losses).numpy()


def llama_cpp_losses(file: Path, windows: np.ndarray) -> np.ndarray:
    """Computes the loss of each token in llama.cpp, token by token.

    Args:
      file: of a model that `cage_jax.export.gguf` wrote.
      windows: as above.
    """
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(file)
    options.n_ctx = windows.shape[1] + 8
    options.n_parallel = 1
    options.warmup = False
    options.verbosity = -1
    server = xllamacpp.Server(options)

    def ask(before, wanted, count):
        """Forces the next token, which does not change its log-probability."""
        found = server.handle_completions(
            {
                "prompt": before,
                "n_predict": 1,
                "n_probs": count,
                "temperature": 0,
                "cache_prompt": True,
                "logit_bias": [[wanted, 1e6]],
            }
        )
        if "choices" not in found:
            raise RuntimeError(f"llama.cpp did not read {file.name}: {found}")
        return found["choices"][0]["logprobs"]

    def chance(before, token):
        said = ask(before, token, 1)
        if said is not None:
            return said["content"][0]["logprob"]
        # llama.cpp does not output a part of a letter. So ask for a whole letter, and
        # look for the token among all probabilities.
        said = ask(before, "a", 10**6)
        tops = {each["id"]: each for each in said["content"][0]["top_logprobs"]}
        return tops[token]["logprob"]

    losses = []
    for window in windows:
        tokens = window.tolist()
        losses += [-chance(tokens[:i], tokens[i]) for i in range(1, len(tokens))]
    return np.asarray(losses)
