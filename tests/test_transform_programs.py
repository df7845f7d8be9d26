"""The correction in compiled programs: a silent phase costs nothing, nor memory."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import cage_jax as cage

RULES = cage.Rules([(r".*kernel", cage.int4(group_size=4))])


def primitives(jaxpr, *, in_branches, inside=False):
    """The names of all primitives, inside conditional branches or outside of them."""
    found = set()
    for equation in jaxpr.eqns:
        branch = equation.primitive.name == "cond"
        if inside == in_branches:
            found.add(equation.primitive.name)
        if branch and not in_branches:
            continue
        for inner in jaxprs_in_params(equation.params):
            found |= primitives(inner, in_branches=in_branches, inside=inside or branch)
    return found


@pytest.mark.parametrize("freeze_scale", [False, True])
@pytest.mark.parametrize(
    ("quantizer", "work", "instruction"),
    [
        # Rounding on a known grid is elementwise: it costs no pass over memory.
        (cage.int4(), {"reduce_max"}, "reduce"),
        (cage.int4(hadamard=8), {"reduce_max", "round", "dot_general"}, "dot"),
    ],
    ids=["plain", "rotated"],
)
def test_passes_over_an_array_stand_in_a_branch(
    quantizer, work, instruction, freeze_scale
):
    params = {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}
    rules = cage.Rules([("kernel", quantizer)])
    strength = cage.silence_then_ramp(100)
    tx = cage.decoupled(
        optax.sgd(0.1),
        rules,
        strength=strength,
        learning_rate=0.1,
        freeze_scale=freeze_scale,
    )
    arguments = params, tx.init(params), params
    jaxpr = jax.make_jaxpr(tx.update)(*arguments).jaxpr
    assert work <= primitives(jaxpr, in_branches=True)
    assert not work & primitives(jaxpr, in_branches=False)
    # The compiler leaves it there.
    text = jax.jit(tx.update).lower(*arguments).compile().as_text()
    assert "conditional(" in text
    assert f" {instruction}(" in text
    assert f" {instruction}(" not in reached_without_a_branch(text)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "strength", [1.0, cage.silence_then_ramp(100)], ids=["constant", "ramp"]
)
@pytest.mark.parametrize(
    ("quantizer", "statistics"),
    [
        (cage.int4(group_size=128), False),
        (cage.quest(4), False),
        (cage.int4(group_size=128), True),
        (cage.quest(4), 10),
    ],
    ids=str,
)
def test_one_parameter_at_a_time_is_in_memory(quantizer, statistics, strength):
    rules = cage.Rules([(".*", quantizer)])
    tx = cage.cage_adamw(1e-3, rules, strength=strength, statistics=statistics)
    (many, _), (one, _) = compiled_step(tx, 8), compiled_step(tx, 1)
    assert many <= 4
    assert many <= 1.5 * one + 0.1


def compiled_step(tx, count):
    """The bytes of intermediate results, over those of one parameter, and the HLO."""

    def step(gradients, params, state):  # in the order of what it donates
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    shape = (1024, 512)
    params = [jax.ShapeDtypeStruct(shape, jnp.float32)] * count
    state = jax.eval_shape(tx.init, params)
    donating = jax.jit(step, donate_argnums=(1, 2))
    compiled = donating.lower(params, params, state).compile()
    size = compiled.memory_analysis().temp_size_in_bytes / (4 * math.prod(shape))
    return size, compiled.as_text()


@pytest.mark.usefixtures("standard_promotion")
def test_before_adam_a_pulled_gradient_is_computed_and_stored_once():
    """Adam reads it twice, and one parameter after the other is in memory."""
    rules = cage.Rules([(".*", cage.int4(group_size=128))])
    chosen = cage.recommended(1e-3, 1000, coupled=True)
    tx = optax.chain(cage.coupled(rules, **chosen), optax.adam(1e-3))
    stored, text = compiled_step(tx, 4)
    assert text.count(" round-nearest-even(") == 4
    assert stored < 1.2


def reached_without_a_branch(text):
    """The text of the computations that an HLO module runs unconditionally."""
    bodies, entry = {}, None
    for block in re.split(r"\n(?=\S)", text):
        header = re.match(r"(ENTRY )?%?([\w.\-]+) ", block)
        if header:
            bodies[header[2]] = block
            entry = header[2] if header[1] else entry
    seen, queue = set(), [entry]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in bodies[name].splitlines()[1:]:
            if " conditional(" not in line:
                queue += [n for n in re.findall(r"%?([\w.\-]+)", line) if n in bodies]
    return "\n".join(bodies[name] for name in seen)


def test_a_known_zero_adds_nothing():
    params = {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}
    for strength in (0.0, 0, optax.constant_schedule(0.0)):
        tx = cage.coupled(RULES, strength=strength)
        jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
        assert jaxpr.outvars[:2] == jaxpr.invars[:2], strength
        names = primitives(jaxpr, in_branches=False)
        names |= primitives(jaxpr, in_branches=True)
        assert not names & {"round", "cond", "reduce_max", "mul"}, strength


def test_init_and_later_steps_compile_nothing(compilations, rng, standard_promotion):
    params, *gradients = (
        {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        for kernel, bias in zip(
            rng.normal(size=(3, 8, 3)).astype(np.float32),
            rng.normal(size=(3, 3)).astype(np.float32),
        )
    )
    tx = cage.cage_adamw(0.1, RULES, strength=2.0)
    jax.block_until_ready(tx.init(params))  # zeros for Adam's moments
    with compilations(0):
        state = cage.cage_adamw(0.1, RULES, strength=2.0).init(params)
    tx.update(gradients[0], state, params)
    with compilations(0):
        tx.update(gradients[1], state, params)
