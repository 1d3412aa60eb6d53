"""The results of all checkpoints as TensorBoard scalars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl_jax.errors import UserError
from mtl_jax.storage import storage_errors
from mtl_jax.sweep_report.lines import Line


def write(folder: Path, found: Sequence[Line]) -> None:
    """Writes `zeroshot/DATASET/mean`, `/median` and `/iqr` of every checkpoint at its step.

    Each run, number of shots and protocol is a run of its own in TensorBoard. Earlier event files
    of this folder are replaced: no step appears twice.

    Args:
      folder: for the event files.
      found: lines; only those under their first metric are written.

    Raises:
      UserError: tensorboardX is not installed, or there is no space or permission.
    """
    try:
        import tensorboardX
    except ImportError as error:
        raise UserError(
            "TensorBoard scalars need the package tensorboardX: install it with "
            "`pip install 'mtl_jax[tensorboard]'`, or do without them."
        ) from error
    with storage_errors("write TensorBoard events", folder):
        for old in folder.rglob("events.out.tfevents.*"):
            old.unlink()
        writers: dict[Path, Any] = {}
        for line in found:
            if not line.main:
                continue
            view = line.view
            name = f"{view.checkpoint.run}_{view.shots}shot_{view.protocol}".replace("/", "_")
            if folder / name not in writers:
                writers[folder / name] = tensorboardX.SummaryWriter(str(folder / name))
            low, high = line.quartiles
            for kind, value in (("mean", line.mean), ("median", line.median), ("iqr", high - low)):
                writers[folder / name].add_scalar(
                    f"zeroshot/{line.dataset}/{kind}", value, view.checkpoint.step
                )
        for writer in writers.values():
            writer.close()
