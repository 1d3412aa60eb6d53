"""`mtl-jax report`: the page of a run or a sweep, or one page over several."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mtl_jax import report, sweep_files, sweep_report
from mtl_jax.errors import UserError
from mtl_jax.storage import read_jsonl, replace_text, storage_errors


def main(args: argparse.Namespace) -> int:
    """Rebuilds the page of every run or sweep and prints its results, or puts them side by side.

    Raises:
      UserError: a folder that holds no run and no sweep, a damaged file, runs that cannot be
        compared, or flags that do not fit each other.
    """
    _check_flags(args)
    if args.representations:
        # TensorFlow reads the inputs; its notices would bury ours.
        from mtl_jax import quiet_tensorflow, represent

        quiet_tensorflow.load()
        for folder in args.run_dirs:
            report.require_run(folder)
            print(f"States: {represent.represent(Path(folder), args.examples or 64)}")
    if args.compare:
        write_comparison(args.run_dirs, args.output or ".", args.lower_is_better, args.tasks)
        return 0
    if args.output:
        _write_sweeps(args.run_dirs, args.output, args.tensorboard)
        return 0
    for folder in args.run_dirs:
        if sweep_files.is_sweep(Path(folder)):
            _write_sweeps([folder], folder, args.tensorboard)
            continue
        page = report.write_report(folder)
        print(report.results_table(read_jsonl(Path(folder) / "results.jsonl")), end="")
        print(f"Report: {page}")
    return 0


def _write_sweeps(folders: Sequence[str | Path], output: str | Path, tensorboard: bool) -> None:
    made = sweep_report.SweepReport(folders)
    page = made.write(output, tensorboard)
    print(made.table(), end="")
    print(f"Report: {page}")


def _check_flags(args: argparse.Namespace) -> None:
    for name in ("tasks", "lower_is_better"):
        if getattr(args, name) and not args.compare:
            raise UserError(f"--{name} is of --compare: add that, or remove it.")
    if args.tensorboard and args.compare:
        raise UserError("--tensorboard is not of --compare: remove one of them.")
    sweeps = [folder for folder in args.run_dirs if sweep_files.is_sweep(Path(folder))]
    if args.tensorboard and not (sweeps or args.output):
        raise UserError(
            "--tensorboard is of sweeps: a run writes its own with Run.tensorboard = True."
        )
    for name in ("compare", "representations"):
        if sweeps and getattr(args, name):
            raise UserError(
                f"--{name} is of runs, and {sweeps[0]} is a sweep: to put sweeps side by side, "
                "give --output alone."
            )
    if args.examples is not None and not args.representations:
        raise UserError("--examples is of --representations: add that, or remove it.")


def write_comparison(
    run_dirs: Sequence[str | Path],
    output: str | Path,
    lower: Sequence[str] = (),
    tasks: Sequence[str] = (),
) -> None:
    """Writes comparison.html, .json and .md of runs into a folder, and prints the table.

    trade_offs.csv has the points of the trade-off plots, where there are some.

    Args:
      run_dirs: the runs, methods x seeds, and those of single tasks.
      output: the folder.
      lower: metrics that count mistakes.
      tasks: the two of the trade-off plot; empty: those whose gradients conflict most.

    Raises:
      UserError: a folder that holds no run, or runs that cannot be compared.
    """
    from mtl_jax import comparison_html
    from mtl_jax.analysis import trade_offs
    from mtl_jax.analysis.comparison import compare
    from mtl_jax.analysis.files import write_csv, write_json

    for run_dir in run_dirs:
        report.require_run(run_dir)
    comparison = compare(run_dirs, lower=lower, tasks=tasks)
    folder = Path(output)
    markdown = comparison_html.markdown(comparison)
    with storage_errors("write the comparison", folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "comparison.html", comparison_html.render(comparison))
        replace_text(folder / "comparison.md", markdown)
    write_json(folder / "comparison.json", comparison.as_json())
    if comparison.trade_offs:
        table = trade_offs.rows(comparison.trade_offs)
        write_csv(folder / "trade_offs.csv", trade_offs.COLUMNS, table)
    print(markdown, end="")
    print(f"Comparison: {folder / 'comparison.html'}")
