"""GPTQ as a loop over inputs in float64, and what it is tried on."""

import warnings

import ml_dtypes
import numpy as np

import cage_jax as cage

INPUTS, OUTPUTS, ROWS = 32, 8, 96
INT4 = cage.int4(group_size=8)


def some(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(seed, rows=ROWS, inputs=INPUTS):
    """Inputs that depend on each other, so that errors are worth spreading."""
    return some(seed, rows, 6) @ some(9, 6, inputs) + some(seed + 1, rows, inputs) / 3


def multiply(params, x):
    return x @ params["w"]


def run(function, quantizer, params, *batches, pattern=".*", **options):
    rules = cage.Rules([(pattern, quantizer)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fewer rows.*")
        return cage.gptq(function, rules, params, [*batches], **options)


def absmax(end, levels=None, rounded=lambda scale: scale):
    """Returns a rule: the scale, the zero point, and codes that are forced."""

    def find(w):
        scale = rounded(np.abs(w).max(0) / end)
        forced = np.full(w.shape, np.nan)
        first = np.abs(w).argmax(0), np.arange(w.shape[1])
        forced[first] = nearest(w[first] / scale, levels)
        return scale, 0, forced

    return find, levels


def minmax(w):
    top, bottom = np.maximum(w.max(0), 0), np.minimum(w.min(0), 0)
    scale = (top - bottom) / 15
    zero = np.clip(np.round(-8 - bottom / scale), -8, 7)
    forced, columns = np.full(w.shape, np.nan), np.arange(w.shape[1])
    for row in (w.argmax(0), w.argmin(0)):
        forced[row, columns] = nearest(w[row, columns] / scale + zero, np.arange(-8, 8))
    return scale, zero, forced


def nearest(position, levels):
    return levels[np.abs(position[..., None] - levels).argmin(-1)]


def by_the_formula(w, x, rule, levels, group, damping=0.01):
    """GPTQ as a loop over inputs; returns code values and positions before rounding."""
    w, x = w.astype(np.float64), x.astype(np.float64)
    h = x.T @ x
    h += damping * np.diag(h).mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes, positions = np.zeros(w.shape), np.zeros(w.shape)
    for i in range(len(w)):
        if i % group == 0:
            scale, zero, forced = rule(w[i : i + group])
        positions[i] = w[i] / scale + zero
        code = nearest(positions[i], levels)
        codes[i] = np.where(np.isnan(forced[i % group]), code, forced[i % group])
        error = (w[i] - (codes[i] - zero) * scale) / upper[i, i]
        w[i:] -= np.outer(upper[i, i:], error)
    return codes, positions


E2M1 = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
W = some(0, INPUTS, OUTPUTS)
W[2, 3] = 4  # sets the divisor of NVFP4 before there are errors
DIVISOR = 448 * 6 / np.abs(W).max()


def e4m3(scale):
    return (scale * DIVISOR).astype(ml_dtypes.float8_e4m3fn).astype(float) / DIVISOR


def e8m0(scale):
    return 2.0 ** (np.floor(np.log2(6 * scale)) - 2)


INT3, NF4 = np.arange(-3, 4), cage.nf4().format.values
FORMULAS = {
    "channel": (cage.int3(), *absmax(3, INT3), INPUTS),
    "group": (cage.int3(group_size=8), *absmax(3, INT3), 8),
    "zero point": (
        cage.int4(group_size=16, symmetric=False),
        minmax,
        np.arange(-8, 8),
        16,
    ),
    "nf4": (cage.nf4(group_size=16), *absmax(1, NF4), 16),
    "mxfp4": (cage.mxfp4(), *absmax(6, E2M1, e8m0), 32),
    "nvfp4": (cage.nvfp4(), *absmax(6, E2M1, e4m3), 16),
    "rotated": (cage.int3(group_size=8, hadamard=8), *absmax(3, INT3), 8),
}


QUANTIZERS = {name: formula[0] for name, formula in FORMULAS.items()} | {
    "q4_0": cage.q4_0(axis=-2),
    "q4_1": cage.q4_1(axis=-2),
    "tensor": cage.int4(axis=None),
    "outputs": cage.int4(axis=-1, group_size=4),
    "searched": cage.int4(scale=cage.scales.Searched(count=4), group_size=16),
    "learned": cage.lsq(4),
    "four over six": cage.nvfp4(scale=cage.scales.FourOverSix()),
}
