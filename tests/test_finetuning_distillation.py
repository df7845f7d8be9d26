"""Distillation: the divergence from a teacher, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cage_jax as cage
from cage_jax import finetuning
from cage_jax.finetuning.distillation import chunks


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def oracle(student, teacher, temperature=1.0, where=None, top=None):
    """The divergence and its gradient in float64; the rest beyond `top` ids as one."""
    student, teacher = np.float64(student), np.float64(teacher)
    log_q, log_p = (
        log_softmax(student / temperature),
        log_softmax(teacher / temperature),
    )
    q, p = np.exp(log_q), np.exp(log_p)
    if where is None:
        where = np.ones(student.shape[:-1], bool)
    if top is None:
        each, slope = (p * (log_p - log_q)).sum(-1), q - p
    else:
        inside = np.zeros(student.shape, bool)
        np.put_along_axis(inside, top, True, -1)
        p_rest = np.where(inside, 0, p).sum(-1, keepdims=True)
        q_rest = np.where(inside, 0, q).sum(-1, keepdims=True)
        each = np.where(inside, p * (log_p - log_q), 0).sum(-1)
        each += (p_rest * np.log(p_rest / q_rest))[..., 0]
        slope = np.where(inside, q - p, q * (1 - p_rest / q_rest))
    weights = where / where.sum() * temperature**2
    return (each * weights).sum(), slope * weights[..., None] / temperature


def logits(shape, seed, dtype=np.float32, size=3.0):
    values = size * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, dtype)


SHAPE = 6, 41  # of most logits, so that few programs are compiled
ALL = np.ones(6, bool)


@functools.partial(jax.jit, static_argnums=(2,))
def found(student, teacher, temperature=1.0, where=ALL):
    def loss(student):
        return finetuning.kl(student, teacher, temperature=temperature, where=where)

    return jax.value_and_grad(loss)(student)


@functools.partial(jax.jit, static_argnums=(1, 2))
def top_of(teacher, k, temperature=1.0):
    return finetuning.TopLogits.of(teacher, k, temperature=temperature)


# Float32 sums of hundreds of terms; gradients of bfloat16 have 8 bits, twice rounded.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


@pytest.mark.parametrize(
    ("dtype", "temperature"), [("float32", 2.5), ("bfloat16", 1.0)]
)
def test_value_and_gradient_are_those_of_the_formula(dtype, temperature, monkeypatch):
    monkeypatch.setattr(chunks, "_AT_ONCE", 4 * 301)  # four rows, and three are left
    student, teacher = (logits((5, 3, 301), seed, dtype) for seed in (0, 1))
    where = np.random.default_rng(2).random((5, 3)) < 0.6
    # Those that do not count may be anything.
    student = jnp.where(where[..., None], student, jnp.nan)
    value, gradient = found(student, teacher, temperature, jnp.asarray(where))
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    safe = jnp.where(where[..., None], student, 0)
    right, slope = oracle(safe, teacher, temperature, where)
    np.testing.assert_allclose(value, right, rtol=1e-5)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(
        np.float64(gradient), slope, rtol=tolerance, atol=tolerance * 1e-2
    )


@pytest.mark.parametrize(("k", "temperature"), [(7, 1.0), (40, 2.5)])
def test_largest_logits_count_the_others_as_one(k, temperature):
    student, teacher = logits(SHAPE, 0), logits(SHAPE, 1)
    # Neither rest may come from a difference: here it is 1e-9 of the whole.
    student, teacher = student.at[0, 3].set(40), teacher.at[1, 2].set(40)
    top = top_of(teacher, k, temperature)
    value, gradient = found(student, top, temperature)
    right, slope = oracle(student, teacher, temperature, top=np.asarray(top.ids))
    np.testing.assert_allclose(value, right, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=2e-5, atol=1e-8)
    order = np.argsort(-np.asarray(teacher), -1)[:, :k]
    np.testing.assert_array_equal(top.ids, order)
    log_p = log_softmax(np.float64(teacher) / temperature)
    expected = np.take_along_axis(log_p, order, -1)
    np.testing.assert_allclose(top.logits, expected, rtol=1e-5, atol=1e-6)
    outside = np.ones(teacher.shape, bool)
    np.put_along_axis(outside, order, False, -1)
    rest = np.log(np.where(outside, np.exp(log_p), 0).sum(-1))
    np.testing.assert_allclose(top.rest, rest, rtol=1e-5)


def test_all_logits_as_the_largest_are_all_of_them():
    student, teacher = logits(SHAPE, 0), logits(SHAPE, 1)
    teacher = teacher.at[:, 5].set(-jnp.inf)
    top = top_of(teacher, 41)
    assert np.isneginf(top.rest).all()
    for a, b in zip(found(student, teacher), found(student, top)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_logits_as_large_as_the_least_one_are_partly_among_the_others():
    top = top_of(jnp.zeros((1, 10)), 4)
    np.testing.assert_allclose(np.exp(top.rest), 0.6, rtol=1e-6)


def test_entries_without_probability_add_nothing():
    teacher = logits(SHAPE, 1).at[:, :5].set(-jnp.inf)
    student = logits(SHAPE, 0).at[:, :3].set(-jnp.inf)
    right, slope = oracle(student[:, 3:], teacher[:, 3:].at[:, :2].set(-1e9))
    value, gradient = found(student, teacher)
    np.testing.assert_allclose(value, right, rtol=1e-5)
    np.testing.assert_allclose(gradient[:, 3:], slope, rtol=1e-5, atol=1e-7)
    assert not gradient[:, :3].any()
    top = top_of(teacher, 40)  # four of them are -inf
    np.testing.assert_allclose(found(student, top)[0], right, rtol=1e-5)
    never = student.at[0, 7].set(-jnp.inf)
    assert np.isposinf(found(never, teacher)[0])


def test_nan_makes_nan_and_no_token_makes_zero():
    student, teacher = logits(SHAPE, 0), logits(SHAPE, 1)
    for x, y in [(student.at[1, 2].set(jnp.nan), teacher)] * 2 + [
        (student, teacher.at[1, 2].set(jnp.nan))
    ]:
        top = top_of(y, 40)
        assert np.isnan(found(x, y)[0]) and np.isnan(found(x, top)[0])
    value, gradient = found(student * jnp.nan, teacher, 1.0, ~ALL)
    assert value == 0 and not gradient.any()


def test_the_teacher_gets_no_gradient_and_the_second_derivative_is_right():
    student, teacher = logits(SHAPE, 0), logits(SHAPE, 1)
    q = np.exp(log_softmax(np.float64(student)))
    v = np.random.default_rng(3).standard_normal(SHAPE)
    right = q * (v - (q * v).sum(-1, keepdims=True)) / 6

    assert not jax.jit(jax.grad(finetuning.kl, 1))(student, teacher).any()

    @jax.jit
    @jax.grad
    def second(student, teacher):
        return (jax.grad(finetuning.kl)(student, teacher) * v).sum()

    for each in (teacher, top_of(teacher, 41)):
        np.testing.assert_allclose(second(student, each), right, rtol=1e-5, atol=1e-7)


def test_one_array_like_the_logits_is_enough():
    """It holds the gradient, or a copy in 16 bits, since inputs are not overwritten."""
    tokens, vocabulary = 128, 50_257
    shape = jax.ShapeDtypeStruct((tokens, vocabulary), jnp.bfloat16)
    of = functools.partial(finetuning.TopLogits.of, k=64)
    top, chunk = jax.eval_shape(of, shape), 4 * chunks._AT_ONCE
    step = jax.value_and_grad(finetuning.kl)
    cases = [(step, (shape, shape)), (step, (shape, top)), (of, (shape,))]
    for function, args in cases:
        memory = jax.jit(function).lower(*args).compile().memory_analysis()
        most = 2 * tokens * vocabulary + 6 * chunk
        assert memory.temp_size_in_bytes < most, args


@pytest.mark.parametrize(
    ("axes", "kind"),
    [
        (("x", None), jax.sharding.AxisType.Explicit),
        ((None, "x"), jax.sharding.AxisType.Auto),
    ],
)
def test_logits_divided_over_devices(axes, kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    place = jax.NamedSharding(mesh, jax.P(*axes))
    student, teacher = logits((8, 64), 0), logits((8, 64), 1)
    sharded = [jax.device_put(each, place) for each in (student, teacher)]
    for a, b in zip(found(*sharded, 1.0, None), oracle(student, teacher)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    if axes[0]:  # each device has tokens of its own
        compiled = found.lower(*sharded, 1.0, None).compile()
        assert "all-gather" not in compiled.as_text()
    top = top_of(sharded[1], 5)
    right = oracle(student, teacher, top=np.asarray(top.ids))
    for a, b in zip(found(sharded[0], top, 1.0, None), right):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_part_of_the_tokens_on_each_device():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def mean(student, teacher):
        return jax.lax.pmean(finetuning.kl(student, teacher), "x")

    spec = jax.P("x")
    spread = jax.shard_map(mean, mesh=mesh, in_specs=(spec, spec), out_specs=jax.P())
    student, teacher = logits((16, 64), 0), logits((16, 64), 1)
    result = jax.jit(jax.value_and_grad(spread))(student, teacher)
    for a, b in zip(result, oracle(student, teacher)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_bad_arguments_of_the_divergence_are_explained():
    x, kl, of = jnp.zeros((4, 20)), finetuning.kl, finetuning.TopLogits.of
    top = of(x, 3, temperature=2.0)
    errors = [
        (lambda: kl(x, x[:, :19]), ValueError, "student's vocabulary, 20 .* got 19"),
        (lambda: kl(x, x[:3]), ValueError, r"student's tokens, \(4,\); got \(3,\)"),
        (lambda: kl(x[:3], top, temperature=2.0), ValueError, "student's tokens"),
        (lambda: kl(x[:, 1:], top, temperature=2.0), ValueError, "vocabulary, 19"),
        (lambda: kl(x, top), ValueError, "largest logits, 2; got 1"),
        (lambda: kl(x, x, temperature=0), ValueError, "`temperature` must be above 0"),
        (lambda: kl((x, x), x), TypeError, "`student_logits` must be an array of fl"),
        (lambda: kl(x, x > 0), TypeError, "`teacher_logits` must be an array of fl"),
        (lambda: kl(x, x, where=x[:, 0]), TypeError, "`where` must be .* bools"),
        (lambda: kl(x, x, where=x > 0), ValueError, r"\(4,\); got \(4, 20\)"),
        (lambda: of(x, 21), ValueError, "`k` must be from 1 to 20; got 21"),
    ]
    for call, kind, text in errors:
        with pytest.raises(kind, match=text):
            call()


# --- the loss of a student ------------------------------------------------------------


def apply(params, tokens):
    hidden = jnp.tanh(params["embedding"][tokens])
    return hidden @ params["head"], {"hidden": hidden}


def logits_alone(params, tokens):
    return apply(params, tokens)[0]


PARAMS = {"embedding": logits((41, 8), 5), "head": logits((8, 41), 6, size=0.5)}
TOKENS = jnp.asarray(np.random.default_rng(7).integers(0, 41, (2, 3)))
RULES = cage.Rules([("head", "int3", "int8"), (".*", None)])


def known(tokens):
    return tokens > 9


def test_the_student_is_quantized_and_the_teacher_is_not():
    loss = cage.distill(logits_alone, RULES, PARAMS, where=known, dtype=None)
    value, gradient = jax.jit(jax.value_and_grad(loss))(PARAMS, TOKENS)
    rounded = cage.quantize_activations(logits_alone, RULES)
    head = cage.fake_quant(PARAMS["head"], cage.int3())
    own, back = jax.vjp(lambda p: rounded(p, TOKENS), {**PARAMS, "head": head})
    right, slope = oracle(
        own, logits_alone(PARAMS, TOKENS), 1.0, np.asarray(known(TOKENS))
    )
    np.testing.assert_allclose(value, right, rtol=1e-5)
    (expected,) = back(jnp.asarray(slope, jnp.float32))
    for name, each in expected.items():
        np.testing.assert_allclose(gradient[name], each, rtol=1e-4, atol=1e-6)


def test_a_teacher_may_be_given_in_many_forms():
    teacher = logits_alone(PARAMS, TOKENS)
    of_params = cage.distill(logits_alone, RULES, PARAMS, dtype=None)
    right = of_params(PARAMS, TOKENS)
    of_model = cage.distill(logits_alone, RULES, lambda x: logits_alone(PARAMS, x))
    of_call = cage.distill(logits_alone, RULES)
    top = top_of(teacher, 41)
    found = [
        of_model(PARAMS, TOKENS),
        of_call(PARAMS, TOKENS, teacher=teacher),
        of_call(PARAMS, TOKENS, teacher=top),
        jax.jit(lambda loss, *args: loss(*args))(of_params, PARAMS, TOKENS),
    ]
    np.testing.assert_allclose(found, float(right), rtol=1e-5)


def test_parameters_that_can_be_called_are_no_function_of_the_batch():
    class Callable(dict):  # as an Equinox module
        def __call__(self, tokens):
            return 0 * logits_alone(self, tokens)

    jax.tree_util.register_pytree_node(
        Callable,
        lambda each: ((*each.values(),), (*each,)),
        lambda names, values: Callable(zip(names, values)),
    )
    params = Callable(PARAMS)
    rules = cage.Rules([(".*", None)])  # the student is the teacher
    loss = cage.distill(logits_alone, rules, params, dtype=None)
    assert len(jax.tree.leaves(loss)) == 2
    np.testing.assert_allclose(loss(params, TOKENS), 0, atol=1e-6)
    other = cage.distill(logits_alone, rules, params)(PARAMS, TOKENS)  # a function
    right, _ = oracle(logits_alone(PARAMS, TOKENS), np.zeros((2, 3, 41)))
    np.testing.assert_allclose(other, right, rtol=1e-5)


def test_the_teacher_is_an_input_of_the_program_that_takes_the_loss():
    loss = cage.distill(logits_alone, RULES, PARAMS)
    leaves = jax.tree.leaves(loss)
    assert [each.dtype for each in leaves] == [jnp.bfloat16] * 2
    step = jax.make_jaxpr(lambda loss, *args: jax.grad(loss)(*args))
    assert not [x for x in step(loss, PARAMS, TOKENS).consts if np.size(x) > 1]
    assert jax.tree.structure(loss) == jax.tree.structure(jax.tree.map(abs, loss))


def test_features_add_their_relative_error():
    other = {**PARAMS, "embedding": 2 * PARAMS["embedding"]}
    options = {"where": known, "dtype": None}
    both = cage.distill(apply, RULES, other, features=0.5, **options)
    alone = cage.distill(logits_alone, RULES, other, **options)
    added = both(PARAMS, TOKENS) - alone(PARAMS, TOKENS)
    x, y = (np.float64(apply(p, TOKENS)[1]["hidden"]) for p in (PARAMS, other))
    counts = np.asarray(known(TOKENS))
    x, y = x[counts], y[counts]
    right = 0.5 * np.square(x - y).mean() / np.square(y).mean()
    np.testing.assert_allclose(added, right, rtol=1e-4)


def test_learned_grids_are_trained():
    rules = cage.Rules([("head", cage.lsq(3)), (".*", None)])
    variables = cage.with_grids(PARAMS, rules)
    loss = cage.distill(logits_alone, rules, PARAMS)
    gradient = jax.jit(jax.grad(loss))(variables, TOKENS)
    assert np.abs(gradient["grids"]["head"].scale).min() > 0


def test_bad_arguments_of_the_loss_are_explained():
    def call(*args, where=None, features=0.0, **given):
        loss = cage.distill(*args, where=where, features=features)
        return loss(PARAMS, TOKENS, **given)

    top = finetuning.TopLogits.of(logits_alone(PARAMS, TOKENS), 3)
    student = logits_alone, RULES
    others = {**PARAMS, "head": PARAMS["head"][:, 1:]}
    wide = {**PARAMS, "embedding": logits((41, 9), 5), "head": logits((9, 41), 6)}
    errors = [
        (lambda: call(*student), ValueError, "`teacher` must be given"),
        (lambda: call(*student, top), TypeError, "belong to one batch"),
        (
            lambda: call(*student, cage.quantize(PARAMS, RULES)),
            TypeError,
            "`teacher` must be floats; got codes at 'head'",
        ),
        (lambda: call(*student, others), ValueError, "vocabulary, 41 entries; got 40"),
        (
            lambda: call(*student, PARAMS, where=TOKENS),
            TypeError,
            "`where` must be a fu",
        ),
        (lambda: call(*student, PARAMS, features=1), TypeError, "return .logits, feat"),
        (lambda: call(apply, RULES, PARAMS), TypeError, "take them out of what it ret"),
        (lambda: call(apply, RULES, wide, features=1), ValueError, "the same hidden"),
        (lambda: call(*student, PARAMS, features=-1), ValueError, "at least 0"),
        (lambda: call(logits_alone, "int4", PARAMS), TypeError, "`rules` must be"),
    ]
    for run, kind, text in errors:
        with pytest.raises(kind, match=text):
            run()
    with pytest.warns(UserWarning, match="no parameter is quantized"):
        call(logits_alone, cage.Rules([("nothing", "int4")]), PARAMS)
