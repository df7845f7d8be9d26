"""The dimensions of a Llama model."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from cage_jax.arrays.checks import check_int, check_number, make_plain
from cage_jax.llama.config_fields import READ, check_layers, dimensions_of, in_terms_of
from cage_jax.llama.rope import RopeScaling

# Limits for files: far above any model, far below sizes that exhaust memory.
_MOST, _MOST_LAYERS = 2**24, 2**12
# Limits that float32 holds, far from any model's.
_RANGES: dict[str, Any] = {
    "rope_theta": {"least": 1, "most": 1e30},
    "norm_epsilon": {"least": 1e-30, "most": 1},
}
_REMEDY = "Use the dimensions of the model."


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The dimensions of a Llama-style model: RMSNorm, RoPE, SwiGLU, grouped heads.

    With more fields, it is a Mistral, a Qwen 2 or a Qwen 3.

    Args:
      vocabulary: number of tokens.
      width: width of the residual stream.
      hidden: width of the SwiGLU.
      layers: number of layers.
      heads: number of query heads.
      kv_heads: number of key and value heads; None for `heads`.
      head_size: width of a head; None for `width / heads`.
      rope_theta: base of the rotary embedding.
      norm_epsilon: constant that the norms add to the mean square.
      tied: whether the head shares the weights of the embedding.
      context: length of the longest sequence.
      bos: the token that begins a text, or None.
      eos: the tokens that end it.
      qkv_bias: whether queries, keys and values have biases, as in Qwen 2.
      qk_norm: whether each head's query and key have a norm before they are rotated,
        as in Qwen 3.
      rope_scaling: a `RopeScaling` of the rotary embedding, as in Llama 3, or None.
      window: number of tokens, itself included, that a token attends to in each layer,
        as in Mistral; None for all before it.

    Raises:
      TypeError, ValueError: if the numbers do not describe a model.

    Example:
      >>> from cage_jax.llama.config import LlamaConfig
      >>> config = LlamaConfig(vocabulary=256, width=64, hidden=192, layers=2, heads=4)
      >>> config.head_size, config.kv_heads
      (16, 4)
      >>> config.shapes()["layers/gate/kernel"]
      (2, 64, 192)
    """

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int = None  # type: ignore[assignment]
    head_size: int = None  # type: ignore[assignment]
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tied: bool = False
    context: int = 2048
    bos: int | None = None
    eos: tuple[int, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    window: int | None = None

    def __post_init__(self):
        make_plain(self)
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        counts = ("vocabulary", "width", "hidden", "layers", "heads", "kv_heads")
        for name in (*counts, "context"):
            most = _MOST_LAYERS if name == "layers" else _MOST
            check_int(name, getattr(self, name), _REMEDY, least=1, most=most)
        if self.head_size is None:
            if self.width % self.heads:
                raise ValueError(
                    f"`heads` must divide the width; got heads={self.heads}, width="
                    f"{self.width}. Pass the `head_size` too, or other heads."
                )
            object.__setattr__(self, "head_size", self.width // self.heads)
        check_int("head_size", self.head_size, _REMEDY, least=1, most=_MOST)
        if self.head_size % 2:
            raise ValueError(
                f"`head_size` must be even, because RoPE rotates pairs; got "
                f"{self.head_size}. Use 64 or 128."
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"`kv_heads` must divide `heads`; got kv_heads={self.kv_heads}, heads="
                f"{self.heads}. Use None for as many as `heads`."
            )
        if self.window is not None:
            check_int("window", self.window, _REMEDY, least=1, most=_MOST)
        for name, limits in _RANGES.items():
            check_number(name, getattr(self, name), _REMEDY, **limits)
        for name in ("tied", "qkv_bias", "qk_norm"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"`{name}` must be a bool; got {value!r}. Use True.")
        if self.qkv_bias and self.qk_norm:
            raise ValueError(
                "`qkv_bias` and `qk_norm` must not both be True, since no file of "
                "transformers has both alone; got both. Use one of them."
            )
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise TypeError(
                f"`rope_scaling` must be a RopeScaling or None; got "
                f"{self.rope_scaling!r}. Use RopeScaling(factor)."
            )
        if not isinstance(self.eos, tuple):
            raise TypeError(
                f"`eos` must be a tuple; got {self.eos!r}. Use (2,) for one token."
            )
        remedy = "Use a token of the vocabulary, or none."
        begins = () if self.bos is None else (self.bos,)
        for name, tokens in (("bos", begins), ("eos", self.eos)):
            for token in tokens:
                check_int(name, token, remedy, least=0, most=self.vocabulary - 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each parameter by path, with stacked layers."""
        width, hidden = self.width, self.hidden
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        biases = {
            f"{name}/bias": (size,)
            for name, size in (("query", queries), ("key", keys), ("value", keys))
        }
        norms = {f"{name}_norm/scale": (self.head_size,) for name in ("query", "key")}
        layer = {
            "attention_norm/scale": (width,),
            "query/kernel": (width, queries),
            "key/kernel": (width, keys),
            "value/kernel": (width, keys),
            **(biases if self.qkv_bias else {}),
            **(norms if self.qk_norm else {}),
            "output/kernel": (queries, width),
            "mlp_norm/scale": (width,),
            "gate/kernel": (width, hidden),
            "up/kernel": (width, hidden),
            "down/kernel": (hidden, width),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "embedding/embedding": (self.vocabulary, width)
        }
        shapes |= {
            f"layers/{name}": (self.layers, *shape) for name, shape in layer.items()
        }
        shapes["norm/scale"] = (width,)
        if not self.tied:
            shapes["head/kernel"] = (width, self.vocabulary)
        return shapes

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the dimensions from a `config.json` of transformers.

        Args:
          config: the file as a dict.

        Raises:
          TypeError, ValueError: if the model is not a Llama, Mistral, Qwen 2 or Qwen 3,
            has features that `LlamaConfig` lacks, such as other biases or windows in
            some layers alone, or has fields whose effect is not known.
        """
        found = dimensions_of(config)
        try:
            made = cls(**found)
        except (TypeError, ValueError) as error:
            raise type(error)(in_terms_of(error, READ)) from error
        check_layers(config, made.layers, made.window)
        return made

    def to_huggingface(self, dtype: str = "float32") -> dict[str, Any]:
        """Returns the `config.json` of transformers as a dict.

        Args:
          dtype: dtype of the model in the file.
        """
        scaling = self.rope_scaling
        rope = scaling.fields() if scaling else {"rope_type": "default"}
        plain = "llama" if self.window is None else "mistral"
        kind = "qwen2" if self.qkv_bias else "qwen3" if self.qk_norm else plain
        windows = {} if self.window is None else {"sliding_window": self.window}
        if windows and kind != "mistral":
            windows |= {"use_sliding_window": True, "max_window_layers": 0}
        return {
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "model_type": kind,
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rms_norm_eps": self.norm_epsilon,
            # Older and newer versions of transformers read different places.
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, **rope},
            **({"rope_scaling": rope} if self.rope_scaling else {}),
            **windows,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos,
            "eos_token_id": list(self.eos)
            if len(self.eos) > 1
            else (*self.eos, None)[0],
            "dtype": dtype,
            "torch_dtype": dtype,
        }
