"""A teacher's largest logits on disk: what is read, resumed and refused."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cage_jax import finetuning

RANDOM = np.random.default_rng(0)
PARAMS = {"logits": jnp.asarray(3 * RANDOM.standard_normal((20, 41)), jnp.float32)}
BATCHES = [(RANDOM.integers(0, 20, (2, 3)),) for _ in range(3)]


def apply(params, tokens):
    return params["logits"][tokens]


def cached(folder, params=PARAMS, batches=BATCHES, function=apply, **options):
    return finetuning.cache_teacher(
        function, params, batches, folder, **({"k": 5} | options)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_read_are_the_rounded_logits(tmp_path, dtype):
    done = []
    cache = cached(
        tmp_path, dtype=dtype, temperature=2.0, progress=lambda *args: done.append(args)
    )
    assert [each[1:] for each in done] == [(1, 3), (2, 3), (3, 3)]
    assert len(cache) == len(list(cache)) == 3
    for number, (tokens,) in enumerate(BATCHES):
        top = cache.at(number, jnp.asarray(tokens))  # ints of another width
        logits = np.float64(PARAMS["logits"])[tokens] / 2
        order = np.argsort(-logits, -1)[..., :5]
        np.testing.assert_array_equal(top.ids, order)
        assert top.ids.dtype == np.int32 and top.logits.dtype == dtype
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        inside = np.take_along_axis(p, order, -1)
        epsilon = float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(
            np.float64(top.logits), np.log(inside), rtol=epsilon / 2 + 1e-5, atol=1e-6
        )
        rest = np.log(1 - inside.sum(-1))
        np.testing.assert_allclose(top.rest, rest, rtol=1e-4)
        assert (top.vocabulary, top.temperature) == (41, 2.0)


def test_ids_of_a_large_vocabulary_are_kept(tmp_path):
    params = {"logits": jnp.zeros((1, 2**16 + 9)).at[0, 2**16 + 3].set(5.0)}
    cache = cached(tmp_path, params, [(np.zeros(1, int),)], k=1)
    assert cache[0].ids.tolist() == [[2**16 + 3]]


def test_a_stopped_run_goes_on_and_does_nothing_twice(tmp_path, monkeypatch):
    whole = cached(tmp_path / "whole")
    replaced = type(tmp_path).replace
    for stop in range(4):  # run.json, and a file for each batch
        left = [stop]

        def replace(self, target, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return replaced(self, target)

        folder = tmp_path / str(stop)
        monkeypatch.setattr(type(tmp_path), "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            cached(folder)
        monkeypatch.setattr(type(tmp_path), "replace", replaced)
        before = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
        assert len(before) == max(stop - 1, 0)
        cached(folder)
        assert all(path.stat().st_mtime_ns == at for path, at in before.items())
        for path in (tmp_path / "whole").glob("*.npz"):
            assert (folder / path.name).read_bytes() == path.read_bytes()
    assert len(whole) == 3


def test_what_does_not_belong_to_the_cache_is_refused(tmp_path):
    cache = cached(tmp_path)
    other = {"logits": PARAMS["logits"] + 1}
    refused = [
        (lambda: cached(tmp_path, other), "differs in the teacher's parameters"),
        (lambda: cached(tmp_path, k=6), "differs in k"),
        (lambda: cached(tmp_path, temperature=2), "differs in temperature"),
        (lambda: cached(tmp_path, batches=BATCHES[::-1]), "the arguments of batch 0"),
        (lambda: cache.at(1, BATCHES[0][0]), "the arguments of batch 1"),
        (lambda: cached(tmp_path / "new", k=42), "`k` must be from 1 to 41; got 42"),
        (lambda: cached(tmp_path / "new", temperature=0), "must be above 0"),
        (lambda: cached(tmp_path / "new", dtype="float32"), "`dtype` must be one of"),
        (lambda: cached(tmp_path / "new", batches=[]), "`batches` must have a batch"),
        (lambda: finetuning.TeacherCache(tmp_path / "new"), "the folder of a run"),
    ]
    for call, text in refused:
        with pytest.raises(ValueError, match=text):
            call()
    assert not (tmp_path / "new").exists()
    for number in (3, -1):
        with pytest.raises(IndexError, match="Call cache_teacher again"):
            cache[number]


def test_damaged_files_are_told(tmp_path):
    cache = cached(tmp_path)
    path = tmp_path / "batch00000001.npz"
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    for damaged in (
        content[: len(content) // 2],
        b"",
        content[:middle] + flipped + content[middle + 1 :],
    ):
        path.write_bytes(damaged)
        for read in (lambda: cache[1], lambda: cached(tmp_path)):
            with pytest.raises(ValueError, match="must have whole files; cannot read"):
                read()
    path.unlink()
    assert len(cached(tmp_path)) == 3
    assert path.read_bytes() == content
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json cannot be read"):
        finetuning.TeacherCache(tmp_path)
