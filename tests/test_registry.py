"""A new format is a class and a line in the registry: then all programs know it."""

import dataclasses
import functools

import numpy as np
import pytest
from cases import assert_same
from small_llama import TIED, params_of

import cage_jax as cage
from cage_jax.cli.main import main
from cage_jax.export.native import save
from cage_jax.llama.loaded import Model
from cage_jax.quantizers.formats import Format
from cage_jax.quantizers.registry import PRESETS, Preset


@dataclasses.dataclass(frozen=True)
class Powers(Format):
    """Powers of two with either sign, and zero."""

    bits: int

    @functools.cached_property
    def values(self):
        powers = 2.0 ** -np.arange(2 ** (self.bits - 1) - 1)
        return np.concatenate([-powers, [0], powers[::-1]])

    def __str__(self):
        return f"powers{self.bits}"


@pytest.fixture
def quantizer(monkeypatch):
    make = functools.partial(cage.Quantizer, Powers(3))
    line = Preset(Powers, make, "powers of two")
    monkeypatch.setitem(PRESETS, "powers3", line)
    return line.make(group_size=8)


def test_in_programs(quantizer, rng):
    x = rng.standard_normal((16, 8)).astype(np.float32)
    size = np.repeat(np.abs(x.reshape(2, 8, 8)).max(1), 8, axis=0)
    values = np.array([-1, -0.5, -0.25, 0, 0.25, 0.5, 1])
    nearest = np.abs(x / size - values[:, None, None]).argmin(0)
    np.testing.assert_allclose(cage.fake_quant(x, quantizer), size * values[nearest])
    rules = cage.Rules([(r".*", "powers3")])
    assert str(rules.report({"w": x}).rows[0].quantizer).startswith("powers3 absmax")


def test_in_files(quantizer, rng, tmp_path):
    codes = cage.quantize(rng.standard_normal((16, 8)).astype(np.float32), quantizer)
    cage.export.save({"w": codes}, tmp_path / "codes.safetensors")
    found = cage.load(tmp_path / "codes.safetensors").params
    assert_same(found, {"w": codes})


def test_in_the_command_line(quantizer, tmp_path, capsys):
    floats, codes = str(tmp_path / "floats"), str(tmp_path / "codes")
    save(Model(params_of(TIED), TIED, {}), floats)
    flags = ["--weights", "powers3", "--group-size", "8", "--quiet"]
    assert main(["quantize", floats, codes, *flags]) == 0
    on_stack = dataclasses.replace(quantizer, axis=-2)
    assert cage.load(codes).params["layers"]["up"]["kernel"].quantizer == on_stack
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    assert "powers of two" in capsys.readouterr().out
