"""What `gpu.py --all` runs on the day that a GPU is there, and `--pack` takes along.

The parts run in the order of what they are worth, each in a process of its own with a
time limit, so that what fails leaves the rest alone. What they find is in a JSON file
at any time: a second call goes on where the first one ended, and tries again what
failed. Nothing but JAX, Flax, Optax, NumPy, SciPy and pytest is needed there.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "tests", "examples", ".")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

# Of the folder that `pack` makes.
LARGEST = 60_000_000
TOKENS = "tokens.npz"
_PACKED = (
    "cage_jax/**/*.py",
    "cage_jax_cli.py",
    "benchmarks/*.py",
    "benchmarks/results/gpu.json",
    "examples/*.py",
    "tests/*.py",
)
# A part that the program ends itself has this long to write what it has.
_GRACE = 20


class Part(NamedTuple):
    """A part of the program.

    Attributes:
      name: of its function in `PARTS`, and of its file.
      minutes: the most that it may take, of the time that is left.
    """

    name: str
    minutes: float


ORDER = (
    Part("machine", 2),
    Part("tests", 5),
    Part("agreement", 4),
    Part("kernels", 8),
    Part("choices", 4),
    Part("steps", 8),
    Part("llama", 60),
)


class Findings:
    """What a part has found so far, in a file that is whole at any time.

    Args:
      path: the file, read if it is there.
      tiny: whether all is as small as it can be, on a CPU.
      ends: when the part has to end, by `time.monotonic`.
    """

    def __init__(self, path: Path, tiny: bool, ends: float):
        self.path, self.tiny, self.ends = path, tiny, ends
        self.found = read(path)

    @property
    def folder(self) -> Path:
        """The folder of all parts."""
        return self.path.parent

    def add(self, name: str, function: Callable[[], Any]) -> None:
        """Keeps what a function returns, or the traceback of its error.

        What is there already is left alone, and so is what there is no time for. An
        error of the device may spoil all that follows, so it ends the process.
        """
        import jax

        if name in self.found or time.monotonic() > self.ends:
            return
        try:
            self.found[name] = {"result": function()}
        except Exception as error:
            self.found[name] = {"error": traceback.format_exc()[-4000:]}
            if isinstance(error, jax.errors.JaxRuntimeError):
                write(self.path, self.found)
                sys.exit(1)
        write(self.path, self.found)


def read(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file; nothing, if it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file completely or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def run(folder: Path, minutes: float, tiny: bool) -> dict[str, Any]:
    """Runs all parts for so long; what came of them, which is in `gpu_day.json` too.

    Args:
      folder: for the files of the parts. If it has some already, the run goes on.
      minutes: the most that all parts may take.
      tiny: whether to run all as small as it can be, on a CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ends, report = time.monotonic() + 60 * minutes, folder / "gpu_day.json"
    for part in ORDER:
        path = folder / f"{part.name}.json"
        if path.exists():  # what failed is tried once more
            found = read(path)
            write(path, {k: v for k, v in found.items() if "error" not in v})
        seconds = min(60 * part.minutes, ends - time.monotonic())
        outcome = _ran(part.name, path, tiny, seconds)
        print(f"{part.name}: {outcome['status']}, {outcome['seconds']:.0f} s")
        found = {"outcome": outcome, "found": read(path)}
        write(report, read(report) | {part.name: found})
    return read(report)


def _ran(name, path, tiny, seconds):
    """Runs a part in processes of its own: a new one after an error of the device."""
    began, status, log = time.monotonic(), "no time left", path.with_suffix(".log")
    before = -1
    while (left := seconds - (time.monotonic() - began)) > _GRACE:
        there, before = before, len(read(path))
        if there == before:  # it ended without a result, and would do so again
            break
        command = [sys.executable, __file__, name, str(path), str(left - _GRACE)]
        places = [str(ROOT / each) for each in FOLDERS] + os.getenv(
            "PYTHONPATH", ""
        ).split(os.pathsep)
        with log.open("w") as out:
            try:
                done = subprocess.run(
                    [*command, *["--tiny"] * tiny],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=left,
                    check=False,
                    env=os.environ
                    | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
                    | ({"JAX_PLATFORMS": "cpu"} if tiny else {}),
                )
            except subprocess.TimeoutExpired:
                status = "stopped at its time limit"
                break
        status = "done" if done.returncode == 0 else f"ended with {done.returncode}"
        if done.returncode == 0:
            break
    said = log.read_text(errors="replace")[-4000:] if log.exists() else ""
    failed = [key for key, each in read(path).items() if "error" in each]
    outcome = {"status": status, "seconds": time.monotonic() - began, "failed": failed}
    return outcome | ({} if status == "done" else {"output": said})


def pack(folder: Path, text: list[Path], vocabulary: int) -> int:
    """Makes a folder that has all that `gpu.py --all` needs; returns its bytes.

    Args:
      folder: new or empty.
      text: files to train on; by default the sources of Python's standard library.
      vocabulary: 256 for bytes; more for a byte-level BPE, trained on the text.

    Raises:
      ValueError: if there is something in the folder, or too much text.
    """
    import numpy as np
    from tokens import load_tokens

    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"`--pack` must name a new or empty folder; got {str(folder)!r}, which has "
            f"files. Name another."
        )
    for pattern in _PACKED:
        for path in ROOT.glob(pattern):
            new = folder / path.relative_to(ROOT)
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, new)
    tokens = load_tokens(
        text=text, vocabulary=vocabulary, cache=ROOT / "runs/tokens", sequence=512
    )
    np.savez_compressed(
        folder / TOKENS,
        train=tokens.train,
        held_out=tokens.held_out,
        vocabulary=tokens.vocabulary,
        bytes_per_token=tokens.bytes_per_token,
    )
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    if size > LARGEST:
        raise ValueError(
            f"`--pack` must make a folder of at most {LARGEST:,} bytes; got {size:,}. "
            f"Use less text."
        )
    return size


# --- the parts ------------------------------------------------------------------------


def machine(findings: Findings) -> None:
    """What the machine is, and that it computes."""
    import jax
    import jax.numpy as jnp
    import measurement

    def product():
        x = jnp.ones((256, 256), jnp.bfloat16)
        return float(jax.jit(lambda x: (x @ x).sum())(x))

    findings.add("environment", lambda: measurement.environment("flax"))
    findings.add("devices", lambda: [device.device_kind for device in jax.devices()])
    findings.add("a product", product)


def tests(findings: Findings) -> None:
    """The tests of the kernels: on a GPU they are run there and not interpreted."""
    from xml.etree import ElementTree

    def outcome():
        results = findings.folder / "tests.xml"
        # Without a configuration: its options may need packages that are not there.
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull]
        command += ["-p", "no:cacheprovider", f"--rootdir={ROOT}"]
        command += [f"--junitxml={results}", str(ROOT / "tests/test_pallas_gpu.py")]
        command += ["-k", "test_all_else_stays"] * findings.tiny
        platform = "cpu" if findings.tiny else "cuda"
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"JAX_PLATFORMS": platform},
            timeout=max(1.0, findings.ends - time.monotonic()),
        )
        if not results.exists():
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        cases = list(ElementTree.parse(results).iter("testcase"))
        failures = {
            case.get("name"): (each.text or "")[-1500:]
            for case in cases
            for each in case
            if each.tag in ("failure", "error")
        }
        return {"run": len(cases), "failures": failures}

    findings.add("test_pallas_gpu", outcome)


def agreement(findings: Findings) -> None:
    """Checks of each kernel, and how far its results are from those of XLA."""
    import gpu

    for case in gpu.CASES[: 1 if findings.tiny else None]:
        if gpu.kernel(case, gpu.SMALL, findings.tiny) is not None:
            findings.add(str(case), lambda case=case: _agreement(case, findings.tiny))


def _agreement(case, tiny):
    import gpu
    import jax
    import numpy as np

    gpu.check(case, interpret=tiny)
    arrays = gpu.arrays(case, gpu.SMALL, seed=1)
    ours = jax.jit(gpu.kernel(case, gpu.SMALL, tiny))(*arrays)
    theirs = jax.jit(gpu.xla(case))(*arrays)
    pairs = [(np.float64(a), np.float64(b)) for a, b in zip(ours, theirs)]
    return {
        "equal": [float(np.mean(a == b)) for a, b in pairs],
        "largest difference, to the largest value": [
            float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs
        ],
    }


def kernels(findings: Findings) -> None:
    """The table of kernels: a record that may replace the one in `results/`."""
    import gpu
    import jax
    import measurement

    shape = gpu.SMALL if findings.tiny else gpu.SHAPE
    findings.add("copy", lambda: gpu.copied(shape))
    for case in gpu.CASES[: 1 if findings.tiny else None]:
        findings.add(str(case), lambda case=case: gpu.timed(case, shape, findings.tiny))
    figures = gpu.before()["figures"]
    for name, figure in figures.items():
        if "result" in findings.found.get(name, {}):
            figure["ms"] = findings.found[name]["result"]
    environment = measurement.environment("jax-cuda13-plugin")
    environment["machine"]["gpu"] = jax.devices()[0].device_kind
    copy = findings.found.get("copy", {}).get("result")
    write(findings.folder / "gpu.json", gpu.record(figures, copy, environment))


def choices(findings: Findings) -> None:
    """Lets the machine choose its kernels for the 30 M model; the steps have them."""
    import gpu_training

    findings.add("tune", lambda: gpu_training.chosen(findings.tiny))


def steps(findings: Findings) -> None:
    """Train steps of the 30 M model."""
    import gpu_training

    gpu_training.steps(findings)


def llama(findings: Findings) -> None:
    """Trainings of the 30 M model on real text, for the time that is left."""
    import gpu_training

    gpu_training.trainings(findings)


PARTS: dict[str, Callable[[Findings], None]] = {
    function.__name__: function
    for function in (machine, tests, agreement, kernels, choices, steps, llama)
}


def main() -> int:
    """Runs one part, in a process that `run` starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("path", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    if asked.tiny:
        import gpu

        gpu.ROUNDS, gpu.CALLS, gpu.SMALL = 1, 1, (512, 512)
    ends = time.monotonic() + asked.seconds
    PARTS[asked.part](Findings(asked.path, asked.tiny, ends))
    return 0


if __name__ == "__main__":
    sys.exit(main())
