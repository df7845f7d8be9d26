"""Compiles for an H200 that is not here, and reads what its assembler reports.

The plugin of JAX for CUDA needs no GPU for that and no toolkit but its assembler, which
XLA runs as a program of its own: one that has it report registers stands in its place.
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TARGET = Path(__file__).resolve().with_name("h200.txtpb")
_USAGE = re.compile(
    r"Function properties for (cage_\w+?)\s+(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


class Usage(NamedTuple):
    """What a thread of a kernel has.

    Attributes:
      registers: 255 at most.
      spilled: bytes that it stores elsewhere and loads for want of registers.
    """

    registers: int
    spilled: int


def missing() -> str | None:
    """What has to be installed, or None."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "jax_cuda13_plugin is missing; install the extra `cuda`"
    if assembler() is None:
        return "ptxas is missing; install the extra `cuda`, or put CUDA's on the PATH"
    return None


def assembler() -> str | None:
    """CUDA's: on the PATH, or as `nvidia-cuda-nvcc` brings it."""
    found = shutil.which("ptxas")
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or []:
        found = found or next(map(str, Path(folder).glob("*/bin/ptxas")), None)
    return found


def watched(folder: Path) -> Callable[[], dict[str, Usage]]:
    """Has the assembler report; to be called before JAX compiles for the first time.

    Args:
      folder: an empty one.

    Returns:
      A function that gives what kernels of this package use, by their names, of those
      that were compiled since it was called last.
    """
    log, program = folder / "log", folder / "bin" / "ptxas"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n"{assembler()}" -v "$@" 2>>"{log}"\n')
    program.chmod(0o755)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={folder}"

    def usage():
        text = log.read_text() if log.exists() else ""
        log.write_text("")
        return {
            name: Usage(int(registers), int(stores) + int(loads))
            for name, _, stores, loads, registers in _USAGE.findall(text)
        }

    return usage


def device() -> Any:
    """One of an H200's topology."""
    from jax.experimental import topologies

    (found,) = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h200",
        target_config=TARGET.read_text(),
        topology="1x1x1",
    ).devices
    return found


def compiled(function: Callable, *args: Any, donated: tuple[int, ...] = ()) -> Any:
    """A program of arrays, given by their shapes and dtypes, for an H200."""
    import jax
    from jax.sharding import (
        AbstractDevice,
        AbstractMesh,
        SingleDeviceSharding,
        use_abstract_mesh,
    )

    here = SingleDeviceSharding(device())
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), args
    )
    # From JAX 0.11 on Triton's lowering asks the mesh for the GPU where there is none.
    kind = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        lowered = jax.jit(function, donate_argnums=donated).lower(*args)
    flags = os.environ.get("XLA_FLAGS", "")
    folder = re.search(r"--xla_gpu_cuda_data_dir=(\S+)", flags)
    # Beside an installed `nvidia-cuda-nvcc`, JAX names that one's folder over the flag.
    options = {"xla_gpu_cuda_data_dir": folder[1]} if folder else {}
    return lowered.compile(compiler_options=options)
