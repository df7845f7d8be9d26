"""Parity with the order of the authors' PyTorch code, over a whole small training.

The training loop and the quantizer are written in torch from the published formulas:
clip the gradients to norm 1, optimizer step, scheduler step, CAGE step.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cage_jax as cage

torch = pytest.importorskip("torch", reason="the reference is in PyTorch")

pytestmark = pytest.mark.usefixtures("standard_promotion")

STEPS, PEAK, SILENCE = 20, 10.0, 0.4
LEARNING_RATE, DECAY, BETAS = 0.02, 0.1, (0.9, 0.95)
BITS, BLOCK = 4, 16
# 20 steps of float32 and float64 arithmetic in another order of operations; a single
# weight that is rounded to another level would move by 1e-4 and more.
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def problem():
    """A regression by two layers; (in, out) kernels, of which both are quantized."""
    rng = np.random.default_rng(0)
    params = {
        "up": {"kernel": rng.normal(size=(32, 16)) / 6, "bias": np.zeros(16)},
        "down": {"kernel": rng.normal(size=(16, 4)) / 4, "bias": np.zeros(4)},
    }
    x, y = rng.normal(size=(STEPS, 64, 32)), rng.normal(size=(STEPS, 64, 4))
    return params, x, y


# --- in torch ------------------------------------------------------------------------


def rotate(w):
    matrix = torch.ones((1, 1), dtype=w.dtype)
    while len(matrix) < BLOCK:
        top, bottom = torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)
        matrix = torch.cat([top, bottom])
    blocks = w.reshape(-1, BLOCK, w.shape[1])
    return torch.einsum("ij,bjc->bic", matrix / BLOCK**0.5, blocks).reshape(w.shape)


class Quest(torch.autograd.Function):
    """Fake quantization with the scale by column, and the gradient of the clip rule."""

    @staticmethod
    def forward(ctx, w):
        rotated = rotate(w)
        scale = 2.5139305786 * rotated.square().mean(0, keepdim=True).sqrt()
        step = 2 * scale / (2**BITS - 1)
        clipped = torch.clamp(rotated, -scale, scale)
        levels = torch.clamp(
            torch.round(clipped / step + 0.5) - 0.5,
            -(2 ** (BITS - 1)) + 0.5,
            2 ** (BITS - 1) - 0.5,
        )
        ctx.save_for_backward(rotated.abs() <= scale)
        return rotate(levels * step)

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return rotate(rotate(gradient) * inside)


def clip_to_norm_one(params):
    # Not `clip_grad_norm_`, which adds 1e-6 to the norm: 2e-9 in the parameters.
    norm = torch.sqrt(sum(p.grad.square().sum() for p in params))
    for p in params:
        p.grad.div_(torch.clamp(norm, min=1.0))


def strength_at(r):
    return PEAK * (r - SILENCE) / (1 - SILENCE) if r > SILENCE else 0.0


def scheduler_of(name, optimizer):
    if name == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            LEARNING_RATE,
            total_steps=STEPS + 2,
            pct_start=0.2,
            cycle_momentum=False,
        )
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t / STEPS)) / 2
    )


@functools.cache
def torch_training(schedule, dtype, mistake=None):
    """The last parameters, and the learning rates of all steps and the next."""
    kind = getattr(torch, dtype)
    numbers, x, y = problem()
    params = {
        f"{layer}/{name}": torch.tensor(value, dtype=kind, requires_grad=True)
        for layer, parts in numbers.items()
        for name, value in parts.items()
    }
    x, y = torch.tensor(x, dtype=kind), torch.tensor(y, dtype=kind)
    optimizer = torch.optim.AdamW(
        params.values(), LEARNING_RATE, BETAS, eps=1e-8, weight_decay=DECAY
    )
    scheduler = scheduler_of(schedule, optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    kernels = [p for path, p in params.items() if path.endswith("kernel")]
    for step in range(STEPS):
        optimizer.zero_grad()
        hidden = x[step] @ Quest.apply(params["up/kernel"]) + params["up/bias"]
        out = torch.tanh(hidden) @ Quest.apply(params["down/kernel"])
        # A large loss, so that the clipping is at work.
        loss = 10 * (out + params["down/bias"] - y[step]).square().mean()
        loss.backward()
        clip_to_norm_one(params.values())
        before = [p.detach() - Quest.apply(p.detach()) for p in kernels]
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
        counted = step if mistake == "counting from 0" else step + 1
        rate = rates[-2] if mistake == "this learning rate" else rates[-1]
        with torch.no_grad():
            for p, old in zip(kernels, before):
                wrong = old if mistake == "error before" else p - Quest.apply(p)
                p.sub_(rate * strength_at(counted / STEPS) * wrong)
    return {path: p.detach().numpy() for path, p in params.items()}, rates


# --- in jax --------------------------------------------------------------------------


@functools.cache
def jax_training(schedule, dtype):
    rates = jnp.asarray(torch_training(schedule, dtype)[1], dtype)
    if schedule == "cosine":
        lr = optax.cosine_decay_schedule(LEARNING_RATE, STEPS, alpha=0.1)
    else:

        def lr(count):
            return rates[count]

    rules = cage.Rules([(r".*kernel", cage.quest(BITS, hadamard=BLOCK))])
    b1, b2 = BETAS
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        cage.post_step(
            optax.adamw(lr, b1, b2, eps=1e-8, weight_decay=DECAY),
            rules,
            strength=cage.silence_then_ramp(STEPS, PEAK, SILENCE),
            learning_rate=lr,
        ),
    )

    def loss(params, x, y):
        params = cage.fake_quant(params, rules)
        hidden = jnp.dot(x, params["up"]["kernel"]) + params["up"]["bias"][None]
        out = jnp.dot(jnp.tanh(hidden), params["down"]["kernel"])
        return 10 * jnp.mean((out + params["down"]["bias"][None] - y) ** 2)

    @jax.jit
    def step(params, state, x, y):
        gradient = jax.grad(loss)(params, x, y)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, x, y = jax.tree.map(lambda a: jnp.asarray(a, dtype), problem())
    state = tx.init(params)
    for i in range(STEPS):
        params, state = step(params, state, x[i], y[i])
    return {
        f"{layer}/{name}": np.asarray(value)
        for layer, parts in params.items()
        for name, value in parts.items()
    }


def largest_difference(a, b):
    return max(np.abs(a[path] - b[path]).max() for path in a)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_is_that_of_the_reference(schedule, dtype):
    with jax.enable_x64(dtype == "float64"):
        ours = jax_training(schedule, dtype)
    theirs, _ = torch_training(schedule, dtype)
    start = problem()[0]["up"]["kernel"]
    assert np.abs(theirs["up/kernel"] - start).max() > 0.05
    assert largest_difference(ours, theirs) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    "mistake", ["error before", "this learning rate", "counting from 0"]
)
def test_each_known_mistake_would_be_seen(mistake):
    with jax.enable_x64(True):
        ours = jax_training("cosine", "float64")
    theirs, _ = torch_training("cosine", "float64", mistake)
    # Far above the float32 tolerance too.
    assert largest_difference(ours, theirs) > 50 * TOLERANCE["float32"]
