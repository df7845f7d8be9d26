"""The knapsack of choices: one option for each item, the least loss in a budget."""

import numpy as np

_MOST_UNITS = 2**18
_MOST_CELLS = 2**28  # bytes that remember which option was the best


def least_loss(sizes: np.ndarray, losses: np.ndarray, budget: int) -> list[int]:
    """Returns the index of one option for each item.

    Sizes are counted in units, and the least loss is found for each number of units,
    item after item. If the sizes have a large common divisor, as those of layers of a
    few shapes do, that is the unit and nothing has a smaller loss. Otherwise the unit
    is the room above the smallest options divided by 2^18, or by 2^28 over the number
    of items if that is less; each size is rounded up to units, and nothing has a
    smaller loss with these sizes.

    Args:
      sizes: (items, options), whole numbers.
      losses: (items, options), finite.
      budget: the largest sum of sizes, at least that of the smallest options.

    Source: Dudzinski and Walukiewicz 1987, the dynamic programme of the multiple-choice
    knapsack problem.
    """
    smallest = sizes.min(axis=1, keepdims=True)
    extra = sizes - smallest
    room = int(min(budget - smallest.sum(), extra.max(axis=1).sum()))
    most = min(_MOST_UNITS, _MOST_CELLS // len(sizes))
    unit = max(int(np.gcd.reduce(extra, axis=None)), -(-room // most), 1)
    extra, room = -(-extra // unit), room // unit
    best = np.zeros(room + 1)  # the least loss within so many units
    picks = np.empty((len(sizes), room + 1), np.uint8)
    for item, (more, loss) in enumerate(zip(extra, losses)):
        each = np.full((len(more), room + 1), np.inf)
        for option, units in enumerate(more):
            if units <= room:
                each[option, units:] = best[: room + 1 - units] + loss[option]
        best, picks[item] = each.min(axis=0), each.argmin(axis=0)
    left = int(best.argmin())  # the fewest units with this loss
    chosen = []
    for item in reversed(range(len(sizes))):
        chosen.append(int(picks[item, left]))
        left -= int(extra[item, chosen[-1]])
    return chosen[::-1]
