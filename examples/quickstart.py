"""Trains a digit classifier with 2-bit weights, with CAGE and without: 30 seconds."""

import jax
import jax.numpy as jnp
import optax
from jax.nn.initializers import he_normal
from sklearn import datasets, model_selection

import cage_jax as cage

STEPS = 2000
RATE = optax.cosine_decay_schedule(3e-3, STEPS)
FULL = cage.Rules([(r".*", None)])
rules = cage.Rules([(r".*kernel", "int2"), (r".*", None)])

x, y = datasets.load_digits(return_X_y=True)
parts = model_selection.train_test_split(x / 16, y, stratify=y, random_state=0)
x, x_test, y, y_test = map(jnp.asarray, parts)


def logits(params, x):
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


def loss(params, rules, x, y):
    rounded = cage.fake_quant(params, rules)  # gradients pass straight through
    return optax.softmax_cross_entropy_with_integer_labels(logits(rounded, x), y).mean()


def train(rules, tx, seed=0):
    def step(number, carry):
        params, state = carry
        batch = batches[number]
        gradients = jax.grad(loss)(params, rules, x[batch], y[batch])
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    keys = jax.random.split(jax.random.key(seed), 3)
    batches = jax.random.randint(keys[2], (STEPS, 64), 0, len(y))
    params = {
        "hidden": {"kernel": he_normal()(keys[0], (64, 64)), "bias": jnp.zeros(64)},
        "output": {"kernel": he_normal()(keys[1], (64, 10)), "bias": jnp.zeros(10)},
    }
    return jax.lax.fori_loop(0, STEPS, step, (params, tx.init(params)))[0]


def show(name, params, rules):
    right = (logits(cage.fake_quant(params, rules), x_test).argmax(-1) == y_test).mean()
    size = rules.report(params).bytes_after
    print(f"{name:26}{right:>8.1%}{loss(params, rules, x_test, y_test):>9.3f}{size:>9}")


if __name__ == "__main__":
    print(f"{'on unseen digits':26}{'accuracy':>8}{'loss':>9}{'bytes':>9}")
    full = train(FULL, optax.adamw(RATE))
    show("full precision", full, FULL)
    show("rounded afterwards (PTQ)", full, rules)
    show("straight-through (STE)", train(rules, optax.adamw(RATE)), rules)
    tx = cage.cage_adamw(RATE, rules, total_steps=STEPS)
    params = train(rules, tx)
    show("STE + CAGE", params, rules)

    codes = cage.quantize(params, rules)
    cage.export.save(codes, "digits.safetensors", overwrite=True)
    saved = cage.dequantize(cage.load("digits.safetensors").params)
    print(f"The codes read a {y_test[0]} as {logits(saved, x_test[0]).argmax()}.")
