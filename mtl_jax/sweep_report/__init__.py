"""The report of a sweep, or of several sweeps and runs: a page, tables, TensorBoard scalars.

write(folder)                 report.html, results.md and results.tex into the sweep's folder
write_many(folders, output)   the same over several sweeps and training runs
SweepReport(folders)          for who wants the table for the terminal, too
"""

from collections.abc import Sequence
from pathlib import Path

from mtl_jax.storage import replace_text, storage_errors
from mtl_jax.sweep_report import documents, events
from mtl_jax.sweep_report.differences import compare_checkpoints
from mtl_jax.sweep_report.gather import gather_results
from mtl_jax.sweep_report.lines import dataset_lines
from mtl_jax.sweep_report.page import Page

__all__ = ["SweepReport", "text_table", "write", "write_many"]


class SweepReport:
    """What one or several sweeps and training runs found."""

    def __init__(self, folders: Sequence[str | Path]):
        """Reads the folders and does the statistics.

        Args:
          folders: of sweeps and runs; a sweep that is not finished counts with the cells it has.

        Raises:
          UserError: a folder is neither a sweep nor a run, has no results yet, or holds a damaged
            file.
        """
        self._material = gather_results([Path(folder) for folder in folders])
        self._found = dataset_lines(self._material)
        self._differences = compare_checkpoints(self._found, self._material.checkpoints)

    def write(self, output: str | Path, tensorboard: bool = False) -> Path:
        """Writes report.html, results.md and results.tex.

        Args:
          output: the folder to write to; made if it is not there.
          tensorboard: also write the scalars of every checkpoint below `output/tensorboard`.

        Returns:
          The path of report.html.

        Raises:
          UserError: the files cannot be written, or tensorboardX is wanted but not installed.
        """
        target = Path(output)
        page = target / "report.html"
        everything = self._material, self._found, self._differences
        if tensorboard:  # first: a missing package is told before any file is touched
            events.write(target / "tensorboard", self._found)
        with storage_errors("write the report", target):
            replace_text(target / "results.md", documents.markdown(*everything))
            replace_text(target / "results.tex", documents.latex(*everything))
            replace_text(page, Page(*everything).render())
        return page

    def table(self) -> str:
        """The results for the terminal: a line per checkpoint, shots, protocol and dataset."""
        return documents.terminal(self._found)


def write(folder: str | Path, tensorboard: bool = False) -> Path:
    """Writes the report of a sweep beside its cells and returns the path of report.html.

    Raises:
      UserError: see `SweepReport`.
    """
    return SweepReport([folder]).write(folder, tensorboard)


def write_many(
    folders: Sequence[str | Path], output: str | Path, tensorboard: bool = False
) -> Path:
    """Writes one report over several sweeps and runs and returns the path of report.html.

    Raises:
      UserError: see `SweepReport`.
    """
    return SweepReport(folders).write(output, tensorboard)


def text_table(folder: str | Path) -> str:
    """Returns the results of a sweep as a table for the terminal.

    Raises:
      UserError: see `SweepReport`.
    """
    return SweepReport([folder]).table()
