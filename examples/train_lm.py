"""Trains a Llama-style language model at few bits and shows what CAGE gains.

All arms share the initial weights, the batches and, while CAGE is still silent, the
same steps. Run `python examples/train_lm.py --tiny` for a run of a minute.
"""

import program

with program.imports(__name__):
    import jax
    import processes
    import tyro
    from checkpoints import Failed, RunFolder, newest_in_words
    from experiment import ARMS, Experiment, Settings, identity
    from outcome import (
        Result,
        check_codes,
        plot,
        results_of,
        skipped,
        summary,
        table_of,
        verdict,
        write_json,
    )
    from rich.console import Console
    from rich.markup import escape
    from training import Stopped, train


def run(settings: Settings, console: Console) -> dict[str, Result]:
    """Trains all arms, with checkpoints in `settings.out`."""
    experiment = Experiment(settings.resolved())
    with _folder(experiment) as folder, jax.set_mesh(experiment.mesh):
        return results_of(experiment, train(experiment, folder, console))


def _folder(experiment):
    settings = experiment.settings
    return RunFolder(settings.out, identity(experiment), resume=settings.resume)


def main() -> int:
    """Runs the program; returns the exit status."""
    settings, console = tyro.cli(Settings, description=__doc__), Console()
    try:
        processes.join(settings.cluster)
        console = Console(quiet=not processes.is_first(), soft_wrap=True)
        experiment = Experiment(settings.resolved(), say=console.print)
        with _folder(experiment) as folder, jax.set_mesh(experiment.mesh):
            if settings.resume and not folder.resumed:
                console.print(
                    f"--resume finds no run in {escape(str(settings.out))}, so this "
                    f"one starts from the beginning."
                )
            announce(experiment, console)
            results = results_of(experiment, train(experiment, folder, console))
            conclude(experiment, results, console)
    except Stopped as stopped:
        console.print(
            f"stopped by {stopped}; all steps so far are saved. Go on with --resume "
            f"and the same flags."
        )
        return stopped.exit_code
    except Exception as error:
        return _failed(error, settings)
    return 0


def _failed(error, settings):
    """Prints an error in each process, and returns the exit status."""
    console = Console(soft_wrap=True)
    who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    if processes.lost(error):
        console.print(
            f"[red]error[/]: {who}another process of the run has ended or cannot be "
            f"reached, so this one ends too ({escape(str(error).splitlines()[0])}). In "
            f"{escape(str(settings.out))} {newest_in_words(settings.out)}. Start all "
            f"processes again with --resume."
        )
        program.leave(1)
    if not isinstance(error, (ValueError, Failed)):
        raise error
    console.print(f"[red]error[/]: {who}{escape(str(error))}")
    return 1 if isinstance(error, Failed) else 2


def conclude(
    experiment: Experiment, results: dict[str, Result], console: Console
) -> None:
    """Writes and prints the results of the arms."""
    settings = experiment.settings
    rows = summary(experiment, results)
    console.print(table_of(rows, settings))
    if warning := skipped(rows, settings.steps):
        console.print(f"[yellow]{warning}[/]")
    codes = None
    if arm := next(
        (arm for arm in ("cage", "ste", "averaged") if arm in results), None
    ):
        codes = check_codes(experiment, results[arm], settings.out / "codes")
        same = "the same" if codes["loss"] == results[arm].loss else "ANOTHER"
        console.print(
            f"The codes of {ARMS[arm]}, saved and loaded back, give {same} validation "
            f"loss: {codes['loss']:.6f}."
        )
    outcome = program.TINY if settings.tiny else verdict(results)
    if outcome:
        console.print(outcome)

    def write():
        write_json(experiment, rows, codes, settings.out / "results.json")
        plot(experiment, results, settings.out / "curves.png")

    processes.by_first(write)
    written = "Table, plot and codes" if codes else "Table and plot"
    console.print(f"{written} are in {escape(str(settings.out))}.")


def announce(experiment: Experiment, console: Console) -> None:
    """Announces the run."""
    settings, report = experiment.settings, experiment.report
    size = experiment.model.size
    weights = sum(row.size for row in report.rows)
    quantized = sum(row.size for row in report.rows if row.quantizer)
    steps = sum(segment.stop - segment.start for segment in experiment.segments)
    unit, mesh = experiment.unit, experiment.mesh
    lines = [
        f"A Llama of {size.layers} layers x {size.width}, "
        f"{weights / 1e6:.2f} M parameters, of which {quantized / weights:.0%} are "
        f"quantized: {next(row.quantizer for row in report.rows if row.quantizer)}.",
        f"{len(experiment.tokens.train) / 1e6:.1f} M {unit}s of text, "
        f"{settings.steps} steps of {settings.batch} x {settings.sequence} {unit}s; in "
        f"all {steps} steps:",
    ]
    for part in experiment.segments:
        after = f" after {part.parent.name}" if part.parent else ""
        lines.append(f"  {part.name:<6} {part.stop - part.start:>6} steps{after}")
    if settings.distill:
        windows, length = experiment.written
        lines.append(
            f"All but full start from its end and learn its logits, on {windows} x "
            f"{length} {unit}s that it writes."
        )
    if "cage" in settings.arms:
        lines.append(
            f"CAGE's dose is {experiment.dose():.2f} (the paper's: 1.6 to 2.9)."
        )
    if settings.size == "demo":
        lines.append("All arms of the standard run take about 8 minutes on 2 cores.")
    if mesh.size > 1:
        lines.append(
            f"{mesh.size} devices, {mesh.shape['data']} x {mesh.shape['model']} (data "
            f"x model), in {jax.process_count()} process(es)."
        )
    console.print(escape("\n".join(lines)))


if __name__ == "__main__":
    program.run(
        main,
        stopped="what was saved before is kept, and --resume goes on from there.",
    )
