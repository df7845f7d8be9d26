"""Starts a program in several processes on one machine, to simulate a pod.

    python examples/launch.py 4 examples/train_lm.py --tiny

runs `examples/train_lm.py --tiny` in four processes, each with its own devices. The
program is the same as for a single process: JAX tells it about the others.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

import program

# After one process has failed, the others get this long to notice and report it.
PATIENCE_SECONDS = 45


def environment(index: int, count: int, port: int, devices: int) -> dict[str, str]:
    """Returns the environment that tells a process about the others."""
    address = f"127.0.0.1:{port}"
    flags = os.environ.get("XLA_FLAGS", "")
    return os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    }


def free_port() -> int:
    """Returns a port of this machine on which nothing listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def launch(command: list[str], count: int, devices: int) -> int:
    """Runs the processes; returns the exit status of the first that failed, or 0."""
    port = free_port()
    running = {
        index: subprocess.Popen(
            [sys.executable, *command],
            env=environment(index, count, port, devices),
        )
        for index in range(count)
    }

    def pass_on(number, frame):
        for process in running.values():
            process.send_signal(number)

    # Ctrl-C reaches the processes directly, since they are in the same group.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, pass_on)
    failed, deadline = 0, None
    while running:
        for index, process in list(running.items()):
            status = process.poll()
            if status is None:
                continue
            del running[index]
            if status and not failed:
                failed = status if status > 0 else 128 - status
                deadline = time.monotonic() + PATIENCE_SECONDS
                print(f"process {index} ended with status {failed}", file=sys.stderr)
        if deadline is not None and time.monotonic() > deadline:
            for index, process in running.items():
                print(f"process {index} is ended too", file=sys.stderr)
                process.kill()
            deadline = None
        time.sleep(0.1)
    return failed


def main() -> int:
    """Runs the program; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--devices",
        type=_count,
        default=1,
        help="simulated CPU devices of each process, if JAX finds no accelerator",
    )
    parser.add_argument("processes", type=_count, help="number of processes")
    parser.add_argument("program", help="Python program to run")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of that program")
    asked = parser.parse_args()
    return launch([asked.program, *asked.flags], asked.processes, asked.devices)


def _count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {text}")
    return int(text)


if __name__ == "__main__":
    program.run(main, stopped="the processes were told.")
