"""What a sweep will cost, before it starts: rows, tokens, and the time that they will take."""

import collections
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from mtl_jax import buckets, flops, model, sweep_files
from mtl_jax.errors import UserError
from mtl_jax.evaluate import Engine
from mtl_jax.placement import Placement
from mtl_jax.protocols import PASSES
from mtl_jax.sweeps.cells import Amount, Cell
from mtl_jax.sweeps.checkpoints import Checkpoint

# The batch by which a device is measured: rows, encoder tokens, decoder tokens.
_PROBE = (8, 64, 8)
_PROBE_CALLS = 2


@dataclasses.dataclass(frozen=True)
class Estimate:
    """How long the missing passes will take.

    Attributes:
      seconds: of one process.
      source: what the estimate is from, in words.
    """

    seconds: float
    source: str


def estimate(cells: Sequence[Cell], root: Path) -> Estimate:
    """The time that the missing passes of a plan will take.

    From the seconds of cells that are on disk, of these checkpoints, if every kind of pass is among
    them; otherwise from the FLOPs and a small batch that is measured now.

    Args:
      cells: of the plan.
      root: of the sweep.
    """
    wanted: dict[str, float] = collections.defaultdict(float)
    for cell in cells:
        amount = cell.question.amount(tuple(cell.missing()))
        for kind, units in _units(amount).items():
            wanted[kind] += units * cell.checkpoint.parameters
    wanted = {kind: units for kind, units in wanted.items() if units}
    if not wanted:
        return Estimate(0.0, "nothing is missing")
    checkpoints = {cell.checkpoint.name: cell.checkpoint for cell in cells}
    rates, count = _history(checkpoints, root)
    if all(kind in rates for kind in wanted):
        seconds = sum(units * rates[kind] for kind, units in wanted.items())
        return Estimate(seconds, f"the time that {count:,} cells on disk took")
    return _measured(cells)


def _units(amount: Amount) -> dict[str, float]:
    """Tokens of what is ranked, rows of what is generated: that takes as long as it goes on."""
    ranked = sum((i + t) * count for (i, t), count in amount.ranked.items())
    return {"rank": float(ranked), "generate": float(sum(amount.generated.values()))}


def _history(checkpoints: Mapping[str, Checkpoint], root: Path) -> tuple[dict[str, float], int]:
    """Seconds for each unit and parameter by kind, and how many cells tell so."""
    seconds: dict[str, float] = collections.defaultdict(float)
    units: dict[str, float] = collections.defaultdict(float)
    count = 0
    for path in sorted((root / sweep_files.CELLS).glob(f"*/*/*/{sweep_files.CELL_FACTS}")):
        facts = sweep_files.read_facts(path.parent)
        if facts.checkpoint not in checkpoints:
            continue
        count += 1
        parameters = checkpoints[facts.checkpoint].parameters
        for name, spent in facts.seconds.items():
            if spent > 0 and name in PASSES:
                kind = PASSES[name].kind
                seconds[kind] += spent
                units[kind] += parameters * (facts.tokens[name] if kind == "rank" else facts.n)
    return {kind: seconds[kind] / units[kind] for kind in seconds if units[kind]}, count


def _measured(cells: Sequence[Cell]) -> Estimate:
    """From FLOPs, at the rate of a model of one layer and the same widths."""
    checkpoint = cells[0].checkpoint
    small = dataclasses.replace(checkpoint.model_config, num_encoder_layers=1, num_decoder_layers=1)
    params = model.init(small, jax.random.key(0))
    engine = Engine(small, Placement())
    rows, inputs, targets = _PROBE
    tokens = np.ones(inputs, np.int32)
    of_kind = {
        "rank": [buckets.Request(i, tokens, [tokens[:targets]]) for i in range(rows)],
        # No token ends it, so that it goes on for as long as it may.
        "generate": [buckets.Request(i, tokens, (), 0, targets, -1) for i in range(rows)],
    }
    work = flops.flops_per_step(small, rows, inputs, targets, training=False)
    rates = {}
    for kind, requests in of_kind.items():
        shape = (rows, inputs, targets if kind == "rank" else 0)
        batch = buckets.Batch(*shape, requests=tuple(requests))
        list(engine.answers(params, [batch], 1))  # compiles
        start = time.perf_counter()
        list(engine.answers(params, [batch] * _PROBE_CALLS, 1))
        rates[kind] = work * _PROBE_CALLS / (time.perf_counter() - start)
    seconds = 0.0
    for cell in cells:
        amount, shape_of = cell.question.amount(tuple(cell.missing())), cell.checkpoint.model_config
        for kind, lengths in (("rank", amount.ranked), ("generate", amount.generated)):
            for (i, t), count in lengths.items():
                made = flops.flops_per_step(shape_of, count, i, t, training=False)
                seconds += made / rates[kind]
    return Estimate(seconds, "the FLOPs (answers of full length) and a small batch measured here")


def table(cells: Sequence[Cell]) -> str:
    """The plan, a line for each checkpoint, dataset and number of shots, and the sum of all.

    Raises:
      UserError: there are no cells.
    """
    if not cells:
        raise UserError("The sweep has no cells.")
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        key = cell.checkpoint.name, cell.question.info.dataset, cell.question.shots
        groups.setdefault(key, []).append(cell)
    header = (
        *("checkpoint", "dataset", "prompts", "shots", "passes", "done", "rows"),
        *("encoder tokens", "decoder tokens", "cut"),
    )
    lines: list[tuple[str, ...]] = [header]
    for (checkpoint, dataset, shots), members in groups.items():
        lines.append((checkpoint, dataset, str(len(members)), str(shots), *_amounts(members)))
    lines.append(("in all", "", str(len(cells)), "", *_amounts(cells)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    texts = ("checkpoint", "dataset", "passes")
    return "".join(
        "  ".join(
            cell.ljust(width) if name in texts else cell.rjust(width)
            for cell, width, name in zip(line, widths, header, strict=True)
        ).rstrip()
        + "\n"
        for line in lines
    )


def _amounts(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Passes, finished cells, what is missing (rows and tokens), and examples that are cut."""
    passes = dict.fromkeys(name for cell in cells for name in cell.question.passes)
    missing = [cell.question.amount(tuple(cell.missing())) for cell in cells]
    done = sum(not amount.rows for amount in missing)
    return (
        ",".join(passes),
        str(done),
        f"{sum(amount.rows for amount in missing):,}",
        f"{sum(amount.tokens(0) for amount in missing):,}",
        f"{sum(amount.tokens(1) for amount in missing):,}",
        f"{sum(cell.question.cut for cell in cells):,}",
    )
