"""The largest logits of a teacher on disk, so that it runs once for each batch."""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.checks import check_choice, check_float_dtype, check_int
from cage_jax.arrays.names import names_checked
from cage_jax.finetuning.batches import Progress, checked_batches
from cage_jax.finetuning.distillation.top_logits import TopLogits, check_temperature
from cage_jax.finetuning.run_folder import Digest, RunFolder, read_run, values_of
from cage_jax.program.tracing import check_function, split_arrays


@names_checked
def cache_teacher(
    function: Callable,
    params: Any,
    batches: Iterable[tuple],
    folder: Any,
    *,
    k: int = 64,
    temperature: float = 1.0,
    dtype: jax.typing.DTypeLike = "float16",
    progress: Progress | None = None,
) -> "TeacherCache":
    """Writes the largest logits of a teacher for each batch.

    It can be stopped at any moment, and goes on when it is called again. A token takes
    `4 * k + 4` bytes, `6 * k + 4` with a vocabulary of more than 65,536: a million
    tokens with 64 logits 260 MB.

    Args:
      function: a function of parameters, and of the arguments of a batch, that returns
        logits, (..., vocabulary).
      params: the teacher's parameters.
      batches: the arguments of `function` after the parameters, a tuple for each batch,
        always in the same order.
      folder: where to write; made if it is missing. A file for each batch, whole or not
        at all. Functions are not compared: another one needs another folder.
      k: how many logits of each token.
      temperature: the temperature of the distillation.
      dtype: what log-probabilities are rounded to, "float16" or "bfloat16". The first
        is 8 times finer.
      progress: called with what is done, the number of batches done and that of all, 0
        if `batches` has no length.

    Returns:
      The folder as a `TeacherCache`.

    Raises:
      TypeError: for a batch that is no tuple, and logits that are no floats.
      ValueError: without batches; for a folder of another teacher or other settings, or
        with other batches; for a batch whose logits are all NaN; for a damaged file,
        and arguments out of range.

    Example:
      >>> from cage_jax import finetuning
      >>> import jax.numpy as jnp
      >>> import tempfile
      >>> def apply(params, tokens):
      ...     return params["logits"][tokens]
      >>> params = {"logits": jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]))}
      >>> tokens = jnp.array([1, 0, 1, 1])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     cache = finetuning.cache_teacher(apply, params, [(tokens,)], folder, k=1)
      ...     top = cache.at(0, tokens)
      >>> top.ids.ravel().tolist()
      [2, 0, 2, 2]
    """
    check_function(
        function, "cache_teacher(model.apply, params, ...)", "Use its apply."
    )
    check_int("k", k, "64 is enough for most.", least=1)
    check_temperature(temperature)
    check_float_dtype("dtype", dtype)
    dtype = np.dtype(dtype)
    check_choice("dtype", dtype.name, ("float16", "bfloat16"))

    @functools.partial(jax.jit, static_argnums=2)
    def largest(params, arrays, static):
        args, _ = static.joined(arrays)
        return TopLogits.of(function(params, *args), k, temperature=temperature)

    total = operator.length_hint(batches)
    for number, args in enumerate(checked_batches(batches)):
        arrays, static = split_arrays(args, {})
        if number == 0:
            # What is wrong raises before a folder belongs to it.
            largest.eval_shape(params, arrays, static)
            run = {
                "the teacher's parameters": str(Digest().add(params)),
                "k": int(k),
                "temperature": float(temperature),
                "dtype": dtype.name,
            }
            files = RunFolder(folder, run)
            cache = TeacherCache(folder)
        if cache.has(number):
            cache.at(number, *args)
        else:
            top = largest(params, arrays, static)
            if top.rest.size and bool(jnp.isnan(top.rest).all()):
                raise ValueError(
                    f"`params` must give logits without NaN; got NaN for all tokens of "
                    f"batch {number}. Look for it in the teacher's parameters and the "
                    f"batch, or compute in float32. This batch was not written."
                )
            files.write(_name(number), _as_arrays(top, _digest(args), dtype))
        if progress is not None:
            progress("batches of the teacher", number + 1, total)
    return cache


class TeacherCache:
    """The largest logits of a teacher, as `cache_teacher` wrote them.

    `cache[i]` are the `TopLogits` of batch `i`, and `len(cache)` counts the batches.
    `cache.at(i, *args)` also checks that they are those of these arguments.

    Args:
      folder: the folder.

    Raises:
      ValueError: if it is not the folder of a teacher.

    Example:
      >>> from cage_jax import finetuning
      >>> finetuning.TeacherCache("nowhere")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: `folder` must be the folder of a run; got 'nowhere', ...
    """

    def __init__(self, folder: Any):
        run = read_run(folder)
        if not {"k", "temperature", "dtype"} <= set(run):
            raise ValueError(
                f"`folder` must be that of a teacher; got {str(folder)!r}, of a run "
                f"with {', '.join(run)}. Use the folder of cache_teacher."
            )
        self._folder, self._files = str(folder), RunFolder(folder, run)
        self._k, self._temperature = run["k"], run["temperature"]
        self._dtype = jnp.dtype(run["dtype"])

    def __repr__(self) -> str:
        settings = f"k={self._k}, temperature={self._temperature:g}"
        return f"TeacherCache({self._folder!r}, {settings})"

    def __len__(self) -> int:
        count = 0
        while self.has(count):
            count += 1
        return count

    def has(self, number: int) -> bool:
        """Tells whether a batch is there."""
        return self._files.has(_name(number))

    def __getitem__(self, number: int) -> TopLogits:
        return self._read(number)[1]

    def at(self, number: int, *args: Any) -> TopLogits:
        """Reads the logits of a batch.

        Args:
          number: the place of the batch among those that were given.
          args: its arguments, as then.

        Raises:
          IndexError: if it is not there.
          ValueError: for other arguments, or a damaged file.
        """
        digest, top = self._read(number)
        if not np.array_equal(digest, _digest(args)):
            raise ValueError(
                f"`args` must be the arguments of batch {number} when the teacher ran; "
                f"got others. Give the same batches in the same order, or use another "
                f"folder."
            )
        return top

    def _read(self, number):
        """Returns the digest of a batch, and its logits."""
        check_int("number", number, "Use the place of a batch, from 0.")
        if number < 0 or not self.has(number):
            raise IndexError(
                f"`number` must be that of a batch in {self._folder!r}; got "
                f"{number}. Call cache_teacher again for those that are missing."
            )

        likes = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((32,), np.uint8),
                ((-1,), np.int64),
                ((-1, self._k), self._dtype),
                ((-1,), np.uint8),
                ((-1,), np.float32),
            )
        ]
        found = self._files.read(_name(number), likes)
        assert found is not None
        digest, (vocabulary, *lead), logits, ids, rest = found
        ids = ids.view(_dtype_of_ids(vocabulary)).astype(np.int32)
        top = TopLogits(
            jnp.array(logits.reshape(*lead, self._k)),
            jnp.array(ids.reshape(*lead, self._k)),
            jnp.array(rest.reshape(lead)),
            self._temperature,
            int(vocabulary),
        )
        return digest, top


def _as_arrays(top, digest, dtype):
    """Returns what is written of a batch, as `TeacherCache` reads it."""
    shape = np.array([top.vocabulary, *top.rest.shape], np.int64)
    ids = np.asarray(top.ids).astype(_dtype_of_ids(top.vocabulary))
    logits, rest = (
        np.asarray(top.logits.astype(dtype)),
        np.asarray(top.rest, np.float32),
    )
    return digest, shape, logits, ids, rest


def _dtype_of_ids(vocabulary):
    return np.uint16 if vocabulary <= 2**16 else np.int32


def _name(number):
    return f"batch{number:08d}"


def _digest(args):
    """Returns the digest of a batch's arguments; integers of all widths are alike."""

    def wide(x):
        x = values_of(x)
        return x.astype(np.int64) if np.issubdtype(x.dtype, np.integer) else x

    return np.frombuffer(
        bytes.fromhex(str(Digest().add(jax.tree.map(wide, args)))), np.uint8
    )
