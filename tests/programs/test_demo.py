"""The demo, and how all programs start and end."""

import contextlib
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import demo
import program
import pytest

EXAMPLES = pathlib.Path(demo.__file__).parent


def start(code, *arguments):
    """A Python process that Ctrl-C reaches together with its own processes."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=EXAMPLES,
        start_new_session=True,
    )


def end(process):
    try:
        printed, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, printed


# --- Ctrl-C ---------------------------------------------------------------------------

DEMO = """
import sys
import demo, program

out, part = sys.argv[1:]
command = [part, out]
demo.parts = lambda out: [demo.Part("part", "a second", "stands in", command)]
sys.argv = ["demo.py", "--out", out]
program.run(demo.main, stopped="")
"""
# Saving takes longer than the quarter of a second that `subprocess.call` waits.
PART = """
import pathlib, signal, sys, time

folder = pathlib.Path(sys.argv[1])
try:
    (folder / "started").touch()
    time.sleep(60)
except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / "saving").touch()
    time.sleep(SECONDS)
    (folder / "w2").mkdir()
    (folder / "w2" / "settings.json").touch()
    sys.exit(130)
"""


def interrupted_demo(folder, seconds, signs):
    """Exit status and output of a demo that gets a Ctrl-C at each sign."""
    part = folder / "part.py"
    part.write_text(PART.replace("SECONDS", str(seconds)))
    process = start(DEMO, folder, part)
    for sign in signs:
        deadline = time.monotonic() + 30
        while not (folder / sign).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)  # `Popen.wait` takes two in a quarter of a second for one
        os.killpg(process.pid, signal.SIGINT)
    return end(process)


def test_after_ctrl_c_a_part_may_save(tmp_path):
    status, printed = interrupted_demo(tmp_path, 0.6, ["started"])
    assert (tmp_path / "w2" / "settings.json").exists()
    assert status == 130
    assert "part stopped" in printed and "`make demo`" in printed
    assert "Traceback" not in printed


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    status, printed = interrupted_demo(tmp_path, 50, ["started", "saving"])
    assert not (tmp_path / "w2").exists()
    assert status == 130
    assert "Traceback" not in printed


COMPUTES = """
import jax, program

def main():
    multiply = lambda _, x: x @ x
    jax.jit(lambda x: jax.lax.fori_loop(0, 10**6, multiply, x))(jax.numpy.eye(1000))
    raise KeyboardInterrupt

program.run(main, stopped="nothing was written.")
"""
IMPORTS = """
import os, program, signal, time

with program.imports("__main__"):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
"""


def test_ctrl_c_ends_in_a_line_and_a_status_is_passed_on():
    status = "import program; program.run(lambda: {}, stopped='')"
    stopped = 130, "stopped; nothing was written.\n"
    expected = {COMPUTES: stopped, IMPORTS: stopped}
    expected |= {status.format(number): (number, "") for number in (0, 2, 130)}
    processes = {code: start(code) for code in expected}
    for code, process in processes.items():
        assert end(process) == expected[code], code


# --- what is missing or wrong ---------------------------------------------------------


@pytest.fixture
def handler():
    """Programs take Ctrl-C over."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_missing_package_is_named(monkeypatch, handler):
    for name, package in (
        ("demo", "tyro"),
        ("digits", "sklearn"),
        ("train_lm", "tyro"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            for module in [name for name in sys.modules if name.startswith(package)]:
                patch.setitem(sys.modules, module, None)
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        assert package in ended.value.code
        assert 'pip install -e ".[demo]"' in ended.value.code
        assert "\n" not in ended.value.code


def test_who_imports_a_program_gets_its_errors():
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ModuleNotFoundError), program.imports("digits"):
        import no_module_of_this_name  # noqa: F401
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.fixture
def statuses(monkeypatch):
    """The commands that the demo runs; each ends with what is appended to `ends`."""
    commands, ends = [], []

    def status(command):
        commands.append(command)
        return ends.pop(0)

    monkeypatch.setattr(demo, "_status", status)
    return commands, ends


def test_flags_are_read_before_anything_starts(monkeypatch, statuses):
    monkeypatch.chdir(EXAMPLES)
    for flag, status in (("--help", 0), ("--bogus", 2), ("--out=demo.py", 2)):
        monkeypatch.setattr(sys, "argv", ["demo.py", flag])
        try:
            found = demo.main()
        except SystemExit as ended:
            found = ended.code
        assert found == status, flag
        assert statuses[0] == []


def test_the_demo_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, statuses):
    commands, ends = statuses
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    ends += [0, 0, 130, 0, 0, 0, 0]
    assert demo.main() == 130
    assert not any("--resume" in command for command in commands)
    assert "starts again" in capsys.readouterr().out
    (tmp_path / "w2").mkdir()
    (tmp_path / "w2" / "settings.json").touch()
    assert demo.main() == 0
    assert ["--resume" in command for command in commands[-2:]] == [True, False]
    assert "Going on" in capsys.readouterr().out


def test_a_part_that_fails_is_the_last(tmp_path, monkeypatch, capsys, statuses):
    commands, ends = statuses
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    ends.append(3)
    assert demo.main() == 3
    assert len(commands) == 1
    assert "quick start ended with status 3" in capsys.readouterr().out
    monkeypatch.undo()
    # A signal is told as a shell does.
    code = "import os; os.kill(os.getpid(), 9)"
    assert demo._status([sys.executable, "-c", code]) == 137


def test_a_limit_names_the_flag():
    class Settings:
        peak_rate = (3, 4)

    limits = [program.Limit("peak_rate", lambda _: False, "small", "Use 1.")]
    with pytest.raises(ValueError, match=r"`--peak-rate` must be small; got 3 4. Use"):
        program.check(Settings, limits)
