"""Audits of shipped files: each kind of difference, made by hand in the file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises, random_codes
from small_llama import (
    CONFIG,
    arrays_of,
    leaves_by_path,
    on_host,
    params_of,
    with_codes,
    with_kernels,
    with_leaf,
)

import cage_jax as cage
from cage_jax import export
from cage_jax.export import MalformedFileError, TensorName, safetensors_files
from cage_jax.export.native import save
from cage_jax.llama.loaded import Model

INT4 = cage.ct_w4a16(group_size=32, scale_dtype="float32")
UP = "model.layers.1.mlp.up_proj"


def told(audit):
    """The path and the kind of each finding."""
    return {(finding.path, finding.kind) for finding in audit.findings}


def text_of(audit):
    """The text of the only finding."""
    (finding,) = audit.findings
    return finding.text


# --- compressed-tensors ---------------------------------------------------------------

CODES = on_host(with_kernels(INT4))
LEAF = CODES["layers"]["up"]["kernel"]


@pytest.fixture
def folder(tmp_path):
    export.compressed_tensors(CODES, CONFIG, tmp_path / "it")
    return tmp_path / "it"


def rewrite(folder, new, config=None):
    """Puts other tensors into a folder, None for none, and others in its config."""
    arrays = arrays_of(folder) | new
    file = folder / "model.safetensors"
    file.unlink()
    kept = {name: array for name, array in arrays.items() if array is not None}
    safetensors_files.write(file, kept)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] |= config or {}
    path.write_text(json.dumps(content))


def test_the_same_llama(folder):
    audit = cage.audit(folder, CODES)
    matrices = 7 * CONFIG.layers + 1  # each of three tensors
    assert audit.ok and len(audit.rows) == len(arrays_of(folder)) - 2 * matrices
    assert {row.result for row in audit.rows} == {"same"}
    assert all(row.trained == row.shipped for row in audit.rows)
    assert str(audit).splitlines()[-1].split()[-2:] == ["as", "trained"]


def test_codes_are_computed_again_under_the_rules(folder):
    params = params_of()
    rules = cage.Rules([(r"layers/up/kernel", dataclasses.replace(INT4, axis=-2))])
    codes = CODES | {}
    codes["layers"] = (
        CODES["layers"]
        | cage.quantize({"layers": {"up": params["layers"]["up"]}}, rules)["layers"]
    )
    export.compressed_tensors(codes, CONFIG, folder, overwrite=True)
    trained = with_leaf(CODES, "layers/up/kernel", params["layers"]["up"]["kernel"])
    assert cage.audit(folder, trained, rules).ok
    # In another training the scales are learned, and given beside the parameters.
    other = cage.Rules([(r"layers/up/kernel", cage.lsq(4, axis=-2, group_size=32))])
    start = cage.with_grids({"layers": {"up": params["layers"]["up"]}}, other)
    variables = {"params": trained, "grids": start["grids"]}
    found = told(cage.audit(folder, variables, other))
    assert (f"{UP}.weight", "scales") in found and (f"{UP}.weight", "codes") in found


def test_a_code_of_the_file_differs(folder):
    words = arrays_of(folder)[f"{UP}.weight_packed"].copy()
    words[3, 1] ^= 1 << 8  # the third nibble of the second word: input 8 + 2
    rewrite(folder, {f"{UP}.weight_packed": words})
    audit = cage.audit(folder, CODES)
    trained = int(LEAF.codes[1, 10, 3])
    shipped = ((trained + 8) ^ 1) - 8
    assert told(audit) == {(f"{UP}.weight", "codes")}
    assert text_of(audit) == (
        f"1 of 8192 codes differ, first at (3, 10): {shipped} in the file, {trained} "
        f"in training"
    )
    assert not audit.ok and text_of(audit) in str(audit)


def test_a_scale_of_the_file_differs(folder):
    scales = arrays_of(folder)[f"{UP}.weight_scale"].copy()
    scales[5, 1] *= 2
    rewrite(folder, {f"{UP}.weight_scale": scales})
    audit = cage.audit(folder, CODES)
    assert told(audit) == {(f"{UP}.weight", "scales")}
    assert text_of(audit).startswith("1 of 256 scales differ, first at (5, 1): ")
    assert "rounded to" not in text_of(audit)


def test_scales_that_were_rounded_to_the_dtype_of_the_file(folder):
    scales = arrays_of(folder)[f"{UP}.weight_scale"].astype(jnp.bfloat16)
    rewrite(folder, {f"{UP}.weight_scale": scales})
    text = text_of(cage.audit(folder, CODES))
    lost = np.sum(scales.astype(np.float32) != np.asarray(LEAF.scale[1]).T)
    assert text.startswith(f"{lost} of 256 scales differ")
    assert text.endswith("; all are those of training, rounded to bfloat16")


def parts_of(module):
    return {f"{module}.weight_{part}": None for part in ("packed", "scale", "shape")}


def test_a_layer_that_the_file_leaves_in_floats(folder, rng):
    floats = rng.standard_normal((128, 64)).astype(np.float32)
    rewrite(folder, parts_of(UP) | {f"{UP}.weight": floats})
    audit = cage.audit(folder, CODES)
    # Readers look for codes there, since it is not in `ignore`.
    assert told(audit) == {(f"{UP}.weight", "floats"), (UP, "config")}
    rewrite(folder, {}, {"ignore": [UP]})
    assert told(cage.audit(folder, CODES)) == {(f"{UP}.weight", "floats")}


def test_a_layer_that_only_the_file_quantizes(folder):
    floats = params_of()["layers"]["up"]["kernel"]
    audit = cage.audit(folder, with_leaf(CODES, "layers/up/kernel", floats))
    layers = "model.layers.0.mlp.up_proj.weight", f"{UP}.weight"
    assert told(audit) == {(layer, "quantized") for layer in layers}
    assert "int4 full range absmax" in str(audit.findings[0])


def test_what_config_says_of_layers(folder):
    absent = ["model.layers.7.mlp.up_proj", UP, "re:.*(a+)+b"]
    rewrite(folder, {}, {"ignore": absent})
    audit = cage.audit(folder, CODES)
    assert told(audit) == {(absent[0], "config"), (UP, "config")}
    assert "the file has no such layer" in audit.findings[0].text
    group = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = group["config_groups"].values()
    norm = "model.norm"
    group["targets"] = [
        row.path.removesuffix(".weight")
        for row in cage.audit(folder, CODES).rows
        if "int4" in row.trained and UP not in row.path
    ]
    rewrite(folder, {}, {"ignore": [], "config_groups": {"all": group}})
    audit = cage.audit(folder, CODES)
    assert told(audit) == {(UP, "config")} and "as a target" in text_of(audit)
    group["targets"] += [UP, norm]
    rewrite(folder, {}, {"config_groups": {"all": group}})
    assert told(cage.audit(folder, CODES)) == {(norm, "config")}


def test_shapes_tensors_and_parameters_without_another(folder):
    down = "model.layers.0.mlp.down_proj"
    new = {"model.norm.weight": np.ones(63, np.float32), "odd.weight": np.ones((2, 2))}
    rewrite(folder, new | parts_of(down))
    audit = cage.audit(folder, CODES)
    assert {
        ("model.norm.weight", "shape"),
        ("odd.weight", "extra"),
        ("layers/down/kernel", "missing"),
    } <= told(audit)
    assert f"the file has no tensor `{down}.weight`" in str(audit)


def test_floats_that_were_rounded(folder):
    norm = np.asarray(CODES["norm"]["scale"])
    rounded = norm.astype(jnp.bfloat16)
    change = np.abs(rounded.astype(np.float64) - norm) / np.abs(norm.astype(float))
    rewrite(folder, {"model.norm.weight": rounded})
    audit = cage.audit(folder, CODES)
    (row,) = [row for row in audit.rows if row.path == "model.norm.weight"]
    assert audit.ok and row.cast == pytest.approx(change.max(), 1e-5)
    assert (row.trained, row.shipped) == ("float32", "bfloat16")
    rounded = rounded.copy()
    rounded[7] *= 2
    rewrite(folder, {"model.norm.weight": rounded})
    text = text_of(cage.audit(folder, CODES))
    lost = np.sum(rounded.astype(np.float32) != norm)
    assert text.startswith(f"{lost} of 64 values differ")
    # A value that the dtype cannot hold is lost, and not rounded.
    trained = with_leaf(CODES, "norm/scale", np.full(64, 1e6, np.float32))
    rewrite(folder, {"model.norm.weight": np.full(64, np.inf, np.float16)})
    assert told(cage.audit(folder, trained)) == {("model.norm.weight", "values")}


def test_other_schemes(tmp_path):
    for quantizer in (
        cage.fp8(),
        cage.nvfp4(),
        cage.int4(symmetric=False, group_size=32),
    ):
        path = tmp_path / str(quantizer.format)
        codes = on_host(with_kernels(quantizer))
        export.compressed_tensors(codes, CONFIG, path)
        assert cage.audit(path, codes).ok, quantizer
        leaf = codes["layers"]["up"]["kernel"]
        for name in ("zero_point", "tensor_divisor"):
            if (part := getattr(leaf, name)) is None:
                continue
            part = part.copy()
            part[1, 0, 0] = -2
            other = dataclasses.replace(leaf, **{name: part})
            trained = with_leaf(codes, "layers/up/kernel", other)
            audit = cage.audit(path, trained)
            assert told(audit) == {(f"{UP}.weight", f"{name.replace('_', ' ')}s")}


def test_a_rotation_that_is_folded_into_the_weights_before(tmp_path):
    quantizer = cage.int4(hadamard=32)
    trained = on_host(with_codes(params_of(), "layers/output/kernel", quantizer))
    export.compressed_tensors(trained, CONFIG, tmp_path / "it")
    assert cage.audit(tmp_path / "it", trained).ok


# --- other kinds of files -------------------------------------------------------------


def test_a_gguf(tmp_path):
    pytest.importorskip("gguf")
    codes = on_host(with_kernels(cage.q4_0()))
    codes = with_codes(codes, "embedding/embedding", cage.q8_0(axis=-1))
    path = tmp_path / "it.gguf"
    export.gguf(codes, CONFIG, path)
    assert cage.audit(path, codes).ok
    leaf = codes["layers"]["query"]["kernel"]
    numbers, scale = np.array(leaf.codes), np.array(leaf.scale)
    numbers[1, 40, 5] = ~numbers[1, 40, 5]
    scale[1, 0, 2] *= 2
    other = dataclasses.replace(leaf, codes=numbers, scale=scale)
    audit = cage.audit(path, with_leaf(codes, "layers/query/kernel", other))
    place = "blk.1.attn_q.weight"
    assert told(audit) == {(place, "codes"), (place, "scales")}
    # In the file the halves of a head, rows 0 to 7 and 8 to 15, alternate.
    assert "1 of 8192 codes differ, first at (10, 40)" in str(audit)
    assert "1 of 256 scales differ, first at (4, 0)" in str(audit)
    # One layer of floats, in a file of half the floats.
    mixed = on_host(params_of())
    separate = {
        f"layers/{number}/{path.removeprefix('layers/')}": leaf[number]
        for path, leaf in leaves_by_path(mixed).items()
        if path.startswith("layers/")
        for number in range(CONFIG.layers)
    }
    separate |= {k: v for k, v in leaves_by_path(mixed).items() if "layers" not in k}
    one = random_codes(np.random.default_rng(0), cage.q4_0(axis=-2), (64, 128))
    export.gguf(
        separate | {"layers/0/up/kernel": one},
        CONFIG,
        path,
        float_dtype="float16",
        overwrite=True,
    )
    audit = cage.audit(path, mixed | {"more": np.ones(3, np.float32)})
    assert told(audit) == {("blk.0.ffn_up.weight", "quantized"), ("more", "missing")}
    (row,) = [row for row in audit.rows if row.path == "blk.1.ffn_up.weight"]
    kernel = np.asarray(mixed["layers"]["up"]["kernel"][1], np.float64)
    change = np.abs(kernel.astype(np.float16) - kernel) / np.abs(kernel)
    assert row.shipped == "float16" and row.cast == pytest.approx(change.max(), 1e-3)


def test_a_gguf_of_another_architecture(rng, tmp_path):
    pytest.importorskip("gguf")
    from small_gguf import file_of

    tensors = {
        "token_embd.weight": ("BF16", (11, 64)),
        "blk.0.attn_norm.weight": ("F32", (64,)),
        "blk.0.attn_q.weight": ("F16", (64, 64)),
        "blk.0.ffn_up_exps.weight": ("F16", (3, 32, 64)),
        "rope_freqs.weight": ("F32", (5,)),
    }
    heads = {f"granitemoe_DOT_attention_DOT_head_count{n}": 4 for n in ("", "_kv")}
    template = file_of(tmp_path / "floats.gguf", rng, tensors, "granitemoe", **heads)
    floats = export.read_tensors(template)
    assert cage.audit(template, floats).ok
    q4_0 = cage.q4_0(axis=-1)
    rules = cage.Rules([(r".*(_q|_exps)\.weight", q4_0), (".*", None)])
    shipped = cage.quantize(floats, rules)
    shipped["token_embd.weight"] = floats["token_embd.weight"] * 2
    file = tmp_path / "it.gguf"
    export.gguf(shipped, template, file)
    assert told(cage.audit(file, floats, rules)) == {("token_embd.weight", "values")}
    less = {k: v for k, v in shipped.items() if k != "blk.0.attn_norm.weight"}
    audit = cage.audit(file, less | {"more": np.ones(3, np.float32)})
    assert told(audit) == {("blk.0.attn_norm.weight", "extra"), ("more", "missing")}

    # By the names of transformers, which has other rows, and experts one by one.
    layer = "model.layers.0"
    query = np.asarray(rng.standard_normal((64, 64)), np.float32)
    experts = np.asarray(rng.standard_normal((3, 32, 64)), np.float32)
    trained = {
        "model.embed_tokens.weight": floats["token_embd.weight"],
        f"{layer}.input_layernorm.weight": np.ones(64, np.float32),
        f"{layer}.self_attn.q_proj.weight": query,
    }
    named = [f"{layer}.mlp.experts.{number}.up_proj.weight" for number in range(3)]
    trained |= dict(zip(named, experts))
    names = [
        TensorName(r".*\.q_proj\.weight", "blk.0.attn_q.weight"),
        TensorName(r".*layernorm\.weight", "blk.0.attn_norm.weight"),
        TensorName(r".*up_proj\.weight", "blk.0.ffn_up_exps.weight"),
        TensorName(r".*embed_tokens\.weight", "token_embd.weight"),
    ]
    rules = cage.Rules([(r".*(q|up)_proj\.weight", q4_0), (".*", None)])
    codes = cage.quantize(trained, rules)
    export.gguf(codes, template, file, names=names, overwrite=True)
    assert cage.audit(file, trained, rules, names=names).ok
    # A row of queries and an expert that others have.
    query[[0, 1]] = query[[1, 0]]
    trained |= {named[0]: experts[1], named[1]: experts[0]}
    assert {
        path for path, _ in told(cage.audit(file, trained, rules, names=names))
    } == {
        "blk.0.attn_q.weight",
        "blk.0.ffn_up_exps.weight",
    }


def test_a_native_folder_and_a_file_of_a_tree(tmp_path):
    save(Model(CODES, CONFIG, {}), tmp_path / "it")
    assert cage.audit(tmp_path / "it", CODES).ok
    scale = np.array(LEAF.scale)
    scale[0, 1, 3] = np.nextafter(scale[0, 1, 3], np.float32(9))
    other = with_leaf(CODES, "layers/up/kernel", dataclasses.replace(LEAF, scale=scale))
    audit = cage.audit(tmp_path / "it", other)
    assert told(audit) == {("layers/up/kernel", "scales")}
    assert "1 of 512 scales differ, first at (0, 1, 3)" in text_of(audit)
    params = {"a": np.ones((32, 4), np.float32), "b": np.ones(3, np.float32)}
    path = tmp_path / "tree.safetensors"
    rules = cage.Rules([("a", "int4")])
    export.save(cage.quantize(params, rules), path)
    assert cage.audit(path, params, rules).ok
    more = {"a": params["a"], "c": params["b"]}
    assert told(cage.audit(path, more, rules)) == {("b", "extra"), ("c", "missing")}
    rules = cage.Rules([("a", cage.int4(symmetric=False))])
    kinds = {kind for _, kind in told(cage.audit(path, params, rules))}
    assert "zero points" in kinds
    rules = cage.Rules([("a", cage.int4(hadamard=32))])
    assert ("a", "rotation") in told(cage.audit(path, params, rules))
    params |= {"a": np.ones((32, 5), np.float32)}
    assert told(cage.audit(path, params)) == {("a", "shape")}


def test_a_program_and_a_folder_of_orbax(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    params = {"a": np.linspace(-1, 1, 64, dtype=np.float32).reshape(32, 2)}
    rules = cage.Rules([("a", cage.int4())])
    codes = cage.quantize(params, rules)
    export.save_orbax(codes, tmp_path / "orbax")
    arguments = [jnp.ones((1, 32), jnp.float32)]
    export.stablehlo(
        lambda params, x: x @ params["a"], codes, tmp_path / "it", arguments=arguments
    )
    negative = {"a": -2 * params["a"]}
    for name in ("orbax", "it"):
        assert cage.audit(tmp_path / name, params, rules).ok
        found = told(cage.audit(tmp_path / name, negative, rules))
        assert found == {("a", "codes"), ("a", "scales")}


def test_shapes_that_are_no_shapes(folder):
    for shape in ([128], [128, -64], [[128, 64]]):
        rewrite(folder, {f"{UP}.weight_shape": np.array(shape, np.int64)})
        with pytest.raises(MalformedFileError, match=f"`{UP}`: "):
            cage.audit(folder, CODES)
    rewrite(folder, {f"{UP}.weight_shape": np.array([2**62, 64], np.int64)})
    assert told(cage.audit(folder, CODES)) == {(f"{UP}.weight", "shape")}
    kernel = CODES["layers"]["up"]["kernel"].codes[:, :, :-1]
    trained = with_leaf(CODES, "layers/up/kernel", np.asarray(kernel, np.float32))
    rewrite(folder, {f"{UP}.weight_shape": np.array([127, 64], np.int64)})
    with pytest.raises(MalformedFileError, match=f"`{UP}`: .* of a matrix"):
        cage.audit(folder, trained)


# The tensors of a model that no program knows; a name for two of its parameters.
FLAT = {"h.0.qkv.weight": (24, 64), "h.1.qkv.weight": (24, 64), "norm.weight": (64,)}
NAMES = [
    TensorName("qk", "h.{}.qkv.weight", "lio"),
    TensorName("v", "h.{}.qkv.weight", "lio"),
]


def test_a_flat_folder_of_any_model(tmp_path, rng):
    folder = tmp_path / "floats"
    folder.mkdir()
    floats = {
        name: rng.standard_normal(shape).astype(jnp.bfloat16)
        for name, shape in FLAT.items()
    }
    safetensors_files.write(folder / "model.safetensors", floats)
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    quantizer = cage.ct_w4a16(axis=-2, group_size=32, scale_dtype="bfloat16")
    codes = {
        "qk": random_codes(rng, quantizer, (2, 64, 16), "bfloat16"),
        "v": random_codes(rng, quantizer, (2, 64, 8), "bfloat16"),
        "norm/weight": floats["norm.weight"],
    }
    out = tmp_path / "out"
    export.compressed_tensors(codes, folder, out, names=NAMES)
    assert cage.audit(out, codes, names=NAMES).ok
    numbers = np.array(codes["v"].codes)
    numbers[1, 9, 4] = ~numbers[1, 9, 4]
    other = codes | {"v": dataclasses.replace(codes["v"], codes=numbers)}
    audit = cage.audit(out, other, names=NAMES)
    assert told(audit) == {("h.1.qkv.weight", "codes")}
    assert "1 of 1536 codes differ, first at (20, 9)" in text_of(audit)
    mixed = codes | {"v": np.zeros((2, 64, 8), np.float32)}
    assert {kind for _, kind in told(cage.audit(out, mixed, names=NAMES))} == {"layout"}
    # The folder of floats, by the names of its own tensors.
    assert cage.audit(folder, export.read_tensors(folder)).ok
    audit = cage.audit(folder, export.read_tensors(folder) | {"more": np.ones(2)})
    assert told(audit) == {("more", "missing")}


# --- errors ---------------------------------------------------------------------------


def test_errors(tmp_path):
    path = tmp_path / "it.safetensors"
    params = {"up": np.ones((32, 4), np.float32)}
    export.save(params, path)
    int4 = cage.int4()
    random = cage.Rules([("up", dataclasses.replace(int4, rounding="stochastic"))])
    assert_raises(
        [
            (
                lambda: cage.audit(tmp_path / "no", params),
                FileNotFoundError,
                "`path` must be a file or a folder; got .* which does not exist",
            ),
            (
                lambda: cage.audit(path, Model(params, None, {})),
                TypeError,
                "`params` must be a tree of arrays; got Model. Use model.params",
            ),
            (
                lambda: cage.audit(path, {"up": "text"}),
                TypeError,
                "`up`: `params` must be arrays and QuantizedArrays; got str",
            ),
            (
                lambda: cage.audit(path, jax.eval_shape(lambda: params)),
                TypeError,
                "`up`: `params` must have values; got a shape",
            ),
            (
                lambda: cage.audit(None, params),
                TypeError,
                "`file` must be a path; got NoneType",
            ),
            (
                lambda: cage.audit(path, params, int4),
                TypeError,
                "`rules` must be Rules; got Quantizer",
            ),
            (
                lambda: cage.audit(path, params, cage.Rules([("upp", int4)])),
                ValueError,
                "`rules` must match a parameter; .* nearest path is 'up'",
            ),
            (
                lambda: cage.audit(path, params, random),
                ValueError,
                "`up`: `rules` must round to the nearest level .* Give the codes",
            ),
            (
                lambda: cage.audit(path, params, names="ours"),
                ValueError,
                "`names` must be a table; got 'ours'",
            ),
        ]
    )
