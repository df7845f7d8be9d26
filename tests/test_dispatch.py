"""The form of a computation that a program gets, by platform and partitioning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cage_jax.arrays.dispatch import (
    Variant,
    Variants,
    by_default,
    dispatch,
    if_divided,
    on_request,
)

# Constants that tell the forms apart in a program's text.
DEFAULT, TPU, CUDA, XLA_TPU = NUMBERS = 1234.5, 2345.5, 3456.5, 4567.5


def form(number):
    return lambda tree: {"a": jnp.sin(tree["x"]) * number, "b": tree["x"].sum()}


def tpu():
    return Variant("tpu", form(TPU), by_default)


def cuda(when=by_default):
    return Variant("cuda", form(CUDA), when)


def both(x, implementation=None):
    kernels = Variants((tpu(), cuda()))
    return dispatch(form(DEFAULT), kernels, {"x": x}, implementation=implementation)


def forms(function, *args, platforms=("tpu",)):
    """Finds the forms in a program for platforms that need not be here."""
    text = export.export(jax.jit(function), platforms=platforms)(*args).mlir_module()
    return {number for number in NUMBERS if f"{number:e}"[:7] in text}


X = jnp.arange(8.0)


def test_the_form_is_that_of_the_platform():
    assert forms(both, X, platforms=["cpu"]) == {DEFAULT}
    assert forms(both, X, platforms=["tpu"]) == {TPU}
    assert forms(both, X, platforms=["cuda"]) == {CUDA}
    assert forms(both, X, platforms=["rocm"]) == {DEFAULT}
    # One program for all of them has a form for each.
    every = forms(both, X, platforms=["cpu", "tpu", "cuda"])
    assert every == {DEFAULT, TPU, CUDA}

    def for_tpu(x):
        return dispatch(form(DEFAULT), Variants((tpu(),)), {"x": x})

    assert forms(for_tpu, X, platforms=["cuda"]) == {DEFAULT}


def test_here_it_is_the_default_with_its_derivatives():
    found = both(X)
    assert jax.tree.structure(found) == jax.tree.structure({"a": 0, "b": 0})
    np.testing.assert_array_equal(found["a"], jnp.sin(X) * DEFAULT)
    assert found["b"] == 28

    def total(x):
        return both(x)["a"].sum()

    np.testing.assert_allclose(jax.grad(total)(X), DEFAULT * np.cos(X), rtol=1e-5)
    hessian = jax.jit(jax.hessian(total))(X)
    np.testing.assert_allclose(
        np.diagonal(hessian), -DEFAULT * np.sin(X), rtol=1e-5, atol=1e-3
    )


TRANSFORMED = {
    "jit": jax.jit(both),
    "vmap": lambda x: jax.vmap(both)(x.reshape(2, 4)),
    "vmap of another axis": lambda x: jax.vmap(both, 1)(x.reshape(2, 4))["a"],
    "scan": lambda x: jax.lax.scan(lambda c, x: (c, both(x)), 0, x.reshape(2, 4)),
    "remat": lambda x: jax.checkpoint(both)(x),
    "cond": lambda x: jax.lax.cond(x[0] > 0, both, both, x),
    "while": lambda x: jax.lax.fori_loop(0, 3, lambda _, x: both(x)["a"], x),
}


def test_a_transformation_keeps_both():
    for name, function in TRANSFORMED.items():
        assert forms(function, X) == {TPU}, name
        assert forms(function, X, platforms=["cpu"]) == {DEFAULT}, name


def test_vmap_maps_the_right_axis():
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    found = jax.vmap(both, 1, 0)(x)
    np.testing.assert_array_equal(found["b"], x.sum(0))
    np.testing.assert_array_equal(found["a"], (jnp.sin(x) * DEFAULT).T)


def test_what_a_compiler_partitions_gets_the_default():
    auto = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(auto, P("d"))
    partitioned = jax.jit(both, in_shardings=whole)
    assert forms(partitioned, X) == {DEFAULT}
    with jax.set_mesh(jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))):
        x = jax.device_put(X, P("d"))
        assert jax.typeof(jax.jit(both)(x)["a"]).sharding.spec == P("d")
        assert forms(both, x) == {DEFAULT}


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_inside_of_shard_map_each_device_gets_the_kernel(kind):
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(kind, kind))
    x, out = jax.device_put(X, NamedSharding(mesh, P("d"))), {"a": P("d"), "b": P("d")}

    def local(x):
        found = both(x)
        return found | {"b": found["b"][None]}

    manual = jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=out)
    assert forms(manual, x) == {TPU}
    np.testing.assert_array_equal(manual(x)["b"], X.reshape(4, 2).sum(1))
    # Where one axis is left to the compiler, it partitions what is inside.
    partly = jax.shard_map(
        local, mesh=mesh, in_specs=P("d"), out_specs=out, axis_names={"d"}
    )
    assert forms(partly, x) == {DEFAULT}


def test_a_named_implementation_runs_or_raises():
    def named(name):
        return lambda x: both(x, name)

    assert forms(named("xla"), X) == {DEFAULT}
    assert forms(named("pallas"), X) == {TPU}
    with pytest.raises(ValueError, match=r"`implementation` .*'pallas', and there is "):
        jax.jit(named("pallas"))(X)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    partitioned = jax.jit(named("pallas"), in_shardings=NamedSharding(mesh, P("d")))
    with pytest.raises(ValueError, match=r"partitions .* wrap the call in a shard_map"):
        forms(partitioned, X)
    with pytest.raises(ValueError, match=r"`implementation` must be one of .*'cuda'"):
        both(X, "cuda")
    with pytest.raises(ValueError, match="none for this quantizer and shape"):
        dispatch(form(DEFAULT), Variants(), {"x": X}, implementation="pallas")


def test_the_error_says_why_there_is_no_kernel():
    def run(x, *found, wide="it is odd"):
        missing = ("tpu", "it is odd"), ("cuda", wide)
        variants = Variants(found, missing)
        return dispatch(form(DEFAULT), variants, {"x": x}, implementation="pallas")

    with pytest.raises(ValueError, match=r"and shape: it is odd \(tpu, cuda\)\. Use"):
        run(X)
    with pytest.raises(ValueError, match=r"it is odd \(tpu\); it is wide \(cuda\)\."):
        run(X, wide="it is wide")
    with pytest.raises(ValueError, match=r"none for tpu: it is odd \(tpu\)\. Use"):
        forms(lambda x: run(x, cuda()), X)


def test_what_was_not_measured_is_run_by_name_alone():
    kernels = Variants((tpu(), cuda(on_request)))

    def run(implementation):
        def run(x):
            return dispatch(
                form(DEFAULT), kernels, {"x": x}, implementation=implementation
            )

        return run

    assert forms(run(None), X, platforms=["cuda"]) == {DEFAULT}
    assert forms(run(None), X, platforms=["tpu"]) == {TPU}
    assert forms(run("pallas"), X, platforms=["cuda"]) == {CUDA}
    mapped = jax.vmap(run(None))
    assert forms(mapped, X.reshape(2, 4), platforms=["cuda"]) == {DEFAULT}


def test_a_platform_may_have_a_form_of_its_own_where_it_can_be_partitioned():
    def run(implementation, *kernels):
        variants = Variants((*kernels, Variant("tpu", form(XLA_TPU), if_divided(4))))
        return lambda x: dispatch(
            form(DEFAULT), variants, {"x": x}, implementation=implementation
        )

    for name in (None, "xla"):
        assert forms(run(name), X) == {XLA_TPU}
        assert forms(run(name), X, platforms=["cuda"]) == {DEFAULT}
    assert forms(run(None, tpu()), X) == {TPU}
    assert forms(run("xla", tpu()), X) == {XLA_TPU}
    with pytest.raises(ValueError, match="none for this quantizer and shape"):
        forms(run("pallas"), X)
    assert forms(jax.vmap(run(None)), X.reshape(2, 4)) == {XLA_TPU}

    for devices, found in ((4, XLA_TPU), (8, DEFAULT)):
        mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, P("d"))
        partitioned = jax.jit(run(None, tpu()), in_shardings=sharding)
        assert forms(partitioned, X) == {found}


def test_outside_of_jit_equal_closures_are_compiled_once(
    compilations, standard_promotion
):
    def scaled(x, factor, offset):
        kernel = Variant("tpu", lambda x: x * factor, by_default)
        default = functools.partial(
            lambda x, offset: x * factor + offset, offset=offset
        )
        return dispatch(default, Variants((kernel,)), x)

    np.testing.assert_array_equal(scaled(X, 2.0, 1.0), 2 * X + 1)
    with compilations(0):
        scaled(X, 2.0, 1.0)
    # What is closed over, or bound, makes another function of it.
    np.testing.assert_array_equal(scaled(X, 3.0, 1.0), 3 * X + 1)
    np.testing.assert_array_equal(scaled(X, 2.0, 4.0), 2 * X + 4)
    kinds = [scaled(jnp.arange(8), factor, 0).dtype for factor in (2, 2.0)]
    assert kinds == [jnp.int32, jnp.float32]
    # An array has no hash: the function is compiled at each call.
    for offset in (jnp.ones(8), 2 * jnp.ones(8)):
        np.testing.assert_array_equal(scaled(X, 2.0, offset), 2 * X + offset)


def test_without_compilation_it_is_the_default():
    with jax.disable_jit():
        np.testing.assert_array_equal(both(X)["a"], jnp.sin(X) * DEFAULT)
