"""Batches, and the progress through them, as the pieces of this folder take them."""

from collections.abc import Callable, Iterable, Iterator

# Called with what is done, the number done and that of all.
Progress = Callable[[str, int, int], None]


def checked_batches(batches: Iterable[tuple]) -> Iterator[tuple]:
    """Walks batches once.

    Raises:
      TypeError: for what cannot be walked, and a batch that is no tuple of arguments.
      ValueError: if there are none.
    """
    empty = True
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"`batches` must be tuples of arguments, one for each batch; got "
            f"{type(batches).__name__}. Use [(x,) for x in batches]."
        )
    for batch in batches:
        if not isinstance(batch, (tuple, list)):
            raise TypeError(
                f"`batches` must be tuples of arguments; got one of "
                f"{type(batch).__name__}. Use [(x,) for x in batches]."
            )
        empty = False
        yield tuple(batch)
    if empty:
        raise ValueError(
            "`batches` must have a batch; got none. Pass a list of tuples of arguments."
        )
