"""The form that runs: by what was measured, by counted bytes, by a comparison."""

import json
import pathlib
import subprocess
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import cage_jax as cage
from cage_jax.arrays.dispatch import PRIMITIVE, Variant, Variants, dispatch
from cage_jax.arrays.jaxprs import subjaxprs
from cage_jax.pallas import candidates, choices, gpu, tuned
from cage_jax.pallas.agreement import disagreement
from cage_jax.pallas.choices import Choice
from cage_jax.pallas.tuned import Measured
from cage_jax.program import tuning

HERE, H200 = "cpu", "NVIDIA H200"
QUANTIZER, SHAPE = cage.quest(4), (512, 2048)


@pytest.fixture(autouse=True)
def nothing_is_known(tmp_path, monkeypatch):
    """A file of its own for each test, and no comparison that was made before."""
    monkeypatch.setattr(tuned, "path", lambda: tmp_path / "a" / "kernels.json")
    monkeypatch.setattr(choices, "_AGREED", {})
    tuned.known.cache_clear()
    yield
    tuned.known.cache_clear()


def doubled(x):
    return 2 * x


def exact(x):
    return x + x


def wrong(x):
    return x + x.at[3].set(0)


def failing(x):
    raise NotImplementedError("no such instruction")


def choice(kernel, untuned="compare", shape=SHAPE):
    """A toy that doubles."""

    def arguments(shape):
        return (jax.random.normal(jax.random.key(0), shape),)

    about = "double", QUANTIZER, shape, "float32"
    return Choice(*about, lambda _: kernel, arguments, (), untuned)


def run(x, kernel, untuned="compare", platform="cpu", implementation=None):
    """`2 * x`, with a constant that tells the kernel."""
    marked = Variant(
        platform, lambda x: kernel(x) * 1.2345, choice(kernel, untuned, x.shape)
    )
    variants = Variants((marked,))
    return dispatch(doubled, variants, x, implementation=implementation)


def runs_kernel(*args, **options):
    """Whether the kernel is in a program that is compiled here."""
    x = jnp.ones(SHAPE)
    return "1.2345" in jax.jit(lambda x: run(x, *args, **options)).lower(x).as_text()


def runs_elsewhere(untuned="compare", kind=H200):
    """Whether it is in one for a GPU that is not here."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        function = partial(run, kernel=exact, untuned=untuned, platform="cuda")
        traced = jax.jit(function).trace(jnp.ones(SHAPE))
        return "1.2345" in traced.lower(lowering_platforms=("cuda",)).as_text()


def keep(kind, kernel, what=exact):
    tuned.keep(kind, {choice(what).name: Measured(kernel)})


def test_without_a_measurement_the_rule_decides():
    assert runs_kernel(exact, "kernel")
    assert not runs_kernel(exact, "xla")
    assert runs_kernel(exact, "xla", implementation="pallas")
    assert not runs_kernel(exact, "kernel", implementation="xla")
    # Nothing can be compared on a device that is not here.
    assert runs_elsewhere("kernel") and not runs_elsewhere("compare")


def test_what_was_measured_decides_also_elsewhere():
    keep(HERE, kernel=False)
    assert not runs_kernel(exact, "kernel")
    assert runs_kernel(exact, "kernel", implementation="pallas")
    keep(HERE, kernel=True)
    assert runs_kernel(exact, "xla")
    assert not runs_kernel(exact, "xla", implementation="xla")
    assert not runs_elsewhere()
    keep(H200, kernel=True)
    assert runs_elsewhere() and not runs_elsewhere(kind="NVIDIA B200")


def test_another_version_is_as_if_nothing_was_measured(monkeypatch):
    keep(HERE, kernel=True)
    for name in ("jax 0.10.0", "jaxlib", "kernels"):
        with monkeypatch.context() as patch:
            patch.setattr(tuned, "versions", lambda name=name: name)
            assert not runs_kernel(exact, "xla")
    assert runs_kernel(exact, "xla")


def test_versions_have_all_that_a_choice_depends_on(monkeypatch, tmp_path):
    fresh = tuned.versions.__wrapped__
    assert f"jax {jax.__version__}, jaxlib " in fresh() == fresh()
    before = fresh()
    source = tmp_path / "pallas" / "gpu.py"
    source.parent.mkdir()
    source.write_text("1")
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "pallas" / "tuned.py"))
    one = fresh()
    source.write_text("2")
    assert len({before, one, fresh()}) == 3


COMPILED = {
    "jit": lambda x: jax.jit(partial(run, kernel=exact))(x),
    "eagerly": lambda x: run(x, exact),
    "vmap": lambda x: jax.vmap(partial(run, kernel=exact))(x[None])[0],
    "scan": lambda x: jax.lax.scan(lambda c, x: (c, run(x, exact)), 0, x[None])[1][0],
    "while another is traced": lambda x: jax.jit(
        lambda y: y * run(np.ones(SHAPE, np.float32), exact)
    )(x),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_kernel_that_agrees_runs(name):
    with jax.debug_nans(True):
        found = COMPILED[name](jnp.ones(SHAPE))
    np.testing.assert_allclose(found, 2 * 1.2345)
    assert [*choices._AGREED.values()] == [True]


def test_both_forms_are_compared_once_on_a_small_array():
    shapes = []

    def arguments(shape):
        shapes.append(shape)
        return (jnp.ones(shape),)

    mine = choice(exact)._replace(arguments=arguments)
    variants = Variants((Variant("cpu", exact, mine),))
    for factor in (1.0, 2.0):
        jax.jit(lambda x, n=factor: n * dispatch(doubled, variants, x))(jnp.ones(SHAPE))
    # Its groups are whole, and there are fewer of them.
    assert shapes == [(512, 512)]


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (wrong, "a line of result 0 differs by 0.5 "),
        (failing, "NotImplementedError: no such"),
    ],
)
def test_a_wrong_kernel_never_runs_and_is_reported(kernel, why):
    with pytest.warns(UserWarning, match=why) as found:
        assert not runs_kernel(kernel)
    (text,) = (str(each.message) for each in found)
    assert "form runs instead" in text and "/issues: double (512, 512)" in text
    assert tuned.versions() in text and "cpu" in text and repr(QUANTIZER) in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runs_kernel(kernel)


X = jax.random.normal(jax.random.key(0), (256, 512)).at[0, 0].set(jnp.nan)
RIGHT = {
    "last places": X * (1 + 2**-20),
    "an element at a tie": X.at[7, 9].add(0.5),
}
WRONG = {
    "a row left out": X.at[7].set(0),
    "a column of another": X.at[:, 5].set(X[:, 6]),
    "all a little": X * 1.01,
    "a NaN": X.at[7, 9].set(jnp.nan),
    "no NaN": X.at[0, 0].set(0),
    "an infinity": X.at[7, 9].set(jnp.inf),
    "another shape": X[:, :256],
    "another dtype": X.astype(jnp.bfloat16),
}


def test_which_results_agree():
    assert not disagreement([X], [X], exact=True)
    for name, found in RIGHT.items():
        assert not disagreement([X, found], [X, X], exact=False), name
        assert "result 1 differ" in disagreement([X, found], [X, X], exact=True), name
    for name, found in WRONG.items():
        assert disagreement([X, found], [X, X], exact=False), name
        assert disagreement([X, found], [X, X], exact=True), name


DAMAGED = {
    "no JSON": "{",
    "another table": "[1]",
    "no choices": json.dumps({"a": {"b": 1}}),
    "a choice of another form": json.dumps({"a": {"b": {"kernel": 1}}}),
    "a field too many": json.dumps({"a": {"b": {"kernel": True, "c": 1}}}),
    "too deep": "[" * 10**5,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_and_replaced(name):
    tuned.path().parent.mkdir()
    tuned.path().write_text(DAMAGED[name])
    with pytest.warns(UserWarning, match=r"kernels.json` cannot be read .*tune again"):
        assert not runs_kernel(exact, "xla")
    with pytest.warns(UserWarning, match="cannot be read"):
        keep(HERE, kernel=True)
    tuned.known.cache_clear()
    assert runs_kernel(exact, "xla")


@pytest.mark.parametrize("name", ["fcntl.flock", "os.fsync"])
def test_a_file_that_cannot_be_written_stays_and_the_choices_here(name, monkeypatch):
    keep(H200, kernel=True)
    before = tuned.path().read_bytes()

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(name, full)
        with pytest.warns(UserWarning, match="could not be written .no space left"):
            keep(HERE, kernel=True)
    assert tuned.path().read_bytes() == before
    files = {each.name for each in tuned.path().parent.iterdir()}
    assert files == {"kernels.json", "kernels.lock"}
    assert runs_kernel(exact, "xla")


KEEPS = """
import pathlib, sys, time
from cage_jax.pallas import tuned

here = pathlib.Path(sys.argv[2])
(here / sys.argv[1]).touch()
while len([*here.iterdir()]) < 2:  # until the other one has started too
    time.sleep(0.001)
for number in range(20):
    entry = {f"{sys.argv[1]} {number}": tuned.Measured(True, "", 2.0, 1.0)}
    tuned.keep("a kind", entry)
"""


def test_processes_that_tune_at_once_keep_all(tmp_path, monkeypatch):
    monkeypatch.undo()  # the path is that of a user
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, here = pathlib.Path(cage.__file__).parents[1], tmp_path / "started"
    here.mkdir()
    started = [
        subprocess.Popen([sys.executable, "-c", KEEPS, name, str(here)], cwd=folder)
        for name in ("one", "two")
    ]
    assert [process.wait(120) for process in started] == [0, 0]
    (entries,) = json.loads(
        (tmp_path / "cage_jax" / "kernels.json").read_text()
    ).values()
    names = {f"{name} {n}" for name in ("one", "two") for n in range(20)}
    assert {*entries} == names
    assert entries["one 3"] == {
        "kernel": True,
        "fault": "",
        "xla_ms": 2.0,
        "kernel_ms": 1.0,
    }


# --- the kernels themselves -----------------------------------------------------------

NAMES = "fake_quant", "masked_gradient", "adamw_step"


@pytest.fixture
def gpu_here(monkeypatch):
    """The CPU as a GPU: its kernels are those for a GPU, interpreted."""
    module = {name: partial(getattr(gpu, name), interpret=True) for name in NAMES}
    monkeypatch.setitem(sys.modules, "interpreted", SimpleNamespace(**module))
    monkeypatch.setitem(candidates._MODULES, "cuda", "interpreted")

    def of_platform(platform, function, when):
        return Variant("cpu" if platform == "cuda" else platform, function, when)

    monkeypatch.setattr(candidates, "Variant", of_platform)
    monkeypatch.setattr(candidates, "SMALLEST", 0)
    monkeypatch.setattr(tuning, "_ROUNDS", 2)
    monkeypatch.setattr(tuning, "WITH_KERNELS", ("cpu",))
    return sys.modules["interpreted"]


PARAMS = {name: jax.ShapeDtypeStruct((256, 128), "float32") for name in ("a", "b")}
RULES = cage.Rules([(".*", cage.int4(axis=-1, group_size=32, gradient="clip"))])
OPERATIONS = ["fake_quant", "fake_quant with a mask", "masked_gradient"]


def test_tuning_compares_and_times_each_form_once(gpu_here):
    found = cage.tune(PARAMS, RULES)
    assert [each.operation for each in found.forms] == OPERATIONS
    assert {each.paths for each in found.forms} == {("a", "b")}
    assert found.faults == () and found.kind == HERE
    for form in found.forms:
        assert form.why == "measured" and min(form.xla_ms, form.kernel_ms) > 0
        assert form.is_kernel == (form.kernel_ms < form.xla_ms)
    # Another process finds the same.
    tuned.known.cache_clear()
    assert cage.tune(PARAMS, RULES, report=True) == found
    text = str(found)
    assert "a and 1 more" in text and str(tuned.path()) in text


def test_a_kernel_that_is_wrong_is_rejected_and_reported(gpu_here):
    right = gpu_here.masked_gradient
    gpu_here.masked_gradient = lambda *args, **more: 1.5 * right(*args, **more)
    with pytest.warns(UserWarning, match="kernel of masked_gradient .*Please send"):
        found = cage.tune(PARAMS, RULES)
    (text,) = found.faults
    assert "/issues: masked_gradient (256, 128) float32" in text and text in str(found)
    *others, form = found.forms
    assert not form.is_kernel and "numbers of result 0 differ" in form.why
    assert {each.why for each in others} == {"measured"}
    tuned.known.cache_clear()
    assert cage.tune(PARAMS, RULES, report=True).forms == found.forms


OPTIONS = {
    "": {"strength": 1.0},
    ", weighted": {"total_steps": 100},
    ", at_updated": {"strength": 1.0, "placement": "post_step"},
    ", measured": {"strength": 1.0, "statistics": True},
    ", moment in bfloat16": {"strength": 1.0, "mu_dtype": "bfloat16"},
}


def dispatched(jaxpr):
    """The equations of a program that have variants."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == PRIMITIVE:
            yield eqn
        else:
            for inner in subjaxprs(eqn.params):
                yield from dispatched(inner)


def form(values):
    return [(each.shape, each.dtype) for each in values]


@pytest.mark.parametrize("shape", [(1024, 512), (2, 512, 512)], ids=str)
@pytest.mark.parametrize("axis", [-2, -1])
def test_arguments_have_the_form_of_those_in_a_program(axis, shape, standard_promotion):
    quantizer = cage.quest(4, axis=axis)
    rules, x = cage.Rules([(".*", quantizer)]), jax.ShapeDtypeStruct(shape, "float32")
    in_training = partial(tuning._in_training, quantizer=quantizer)
    programs = [jax.make_jaxpr(in_training)(x)]
    for options in OPTIONS.values():
        tx = cage.cage_adamw(1e-3, rules, **options)
        state = jax.eval_shape(tx.init, {"x": x})
        programs.append(jax.make_jaxpr(tx.fused_step)({"x": x}, state, {"x": x}))
    found = {}
    for eqn in (eqn for each in programs for eqn in dispatched(each.jaxpr)):
        for variant in eqn.params["variants"].found:
            if isinstance(choice := variant.when, Choice):
                arguments = jax.eval_shape(partial(choice.arguments, shape))
                passed = [var.aval for var in eqn.invars]
                assert form(jax.tree.leaves(arguments)) == form(passed), choice.name
                results = jax.eval_shape(eqn.params["function"], *arguments)
                results = jax.tree.leaves(results)
                assert form(results) == form(var.aval for var in eqn.outvars)
                replaced = [arguments[place] for place in choice.replaced]
                assert form(replaced) == form(results[: len(replaced)])
                found.setdefault(choice.operation, []).append(choice)
    assert [*found] == [*OPERATIONS, *(f"adamw_step{name}" for name in OPTIONS)]
    names = {choice.name for each in found.values() for choice in each}
    assert len(names) == len(found)
