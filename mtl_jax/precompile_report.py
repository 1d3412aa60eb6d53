"""What `mtl-jax precompile` found, as tables."""

from collections.abc import Callable
from typing import Any


def text(report: dict[str, Any]) -> str:
    """The report as tables, from the values of `as_json`."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    chip, batch, evaluation = report["chip"], report["batch"], report["evaluation"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    slices = f"{report['slices']} slices of " if report["slices"] > 1 else ""
    lines = [
        f"T5 with {report['parameters']:,} parameters on {slices}{report['topology']} "
        f"({report['device']})",
        f"Mesh: {mesh}; remat {report['remat']}; {report['dtype']}; {report['optimizer']}",
        f"Attention: {report['attention']}",
        f"Training: {batch['rows']} rows of {batch['inputs_length']} + {batch['targets_length']} "
        f"tokens in {batch['microbatches']} microbatches",
        f"Evaluation: {evaluation['rows']} rows of {evaluation['inputs_length']} + "
        f"{evaluation['targets_length']} tokens; generates {evaluation['max_decode_length']}",
        f"Mixture: {report['mixture'] or 'none; what is kept per task is left out'}",
        f"Compiled with {versions}",
        "",
        *_table(report["programs"], _memory_rows),
        f"A device has {_size(chip['memory'])}, of which a program can have "
        f"{_size(chip['usable'])}.",
    ]
    told = [program for program in report["programs"] if program["memory"]]
    if told:
        lines += ["", *_table(told, _time_rows), "Bounds, not forecasts: no step is faster."]
        lines += ["", *_collective_lines(told)]
    for program in report["programs"]:
        if program["refusal"]:
            lines += ["", f"{program['name']} is refused: {program['refusal']}"]
    if not report["fits"]:
        lines += ["", _advice(report)]
    return "\n".join(lines)


def _advice(report: dict[str, Any]) -> str:
    tried = len({one["flags"] for one in report["tried"]})
    if report["suggestion"]:
        return f"Does not fit. This does, compiled as well:\n  {report['suggestion']}"
    if not tried:
        return (
            "Does not fit, and no other value of T5.remat, Step.microbatches, Mesh or "
            "Eval.batch_size that was allowed to be tried promises to: take more devices, or fewer "
            "rows or tokens."
        )
    return f"Does not fit, and neither do the {tried} other settings tried: see --search."


def _table(
    programs: list[dict[str, Any]], rows: Callable[[dict[str, Any]], dict[str, str]]
) -> list[str]:
    columns = [rows(program) for program in programs]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    width = max(map(len, labels))
    head = " " * width + "".join(f"{program['name']:>12}" for program in programs)
    return [head] + [
        f"{label:<{width}}" + "".join(f"{column.get(label, '-'):>12}" for column in columns)
        for label in labels
    ]


def _memory_rows(program: dict[str, Any]) -> dict[str, str]:
    memory = program["memory"]
    rows = {}
    if memory:
        # A train step's arguments are the state and a batch.
        rows = {
            "parameters": _size(memory["parameters"]),
            "optimizer state": _size(memory["optimizer"]),
            "arguments of the program": _size(memory["arguments"]),
            "results besides": _size(memory["results"]),
            "temporaries": _size(memory["temporaries"]),
            "  of them activations kept": _size(memory["activations"] or 0)
            if memory["activations"] is not None
            else "-",
            "code": _size(memory["code"]),
            "in use at once, at the peak": _size(memory["peak"]),
            "beside the program": _size(memory["beside"]),
        }
    needed = program["needed"]
    return rows | {
        "needed": "?" if needed is None else _size(needed),
        "fits": "yes" if program["fits"] else "NO",
        "compiled in": f"{program['seconds']:.0f} s",
        "  of processors": f"{program['cpu_seconds']:.0f} s",
    }


def _time_rows(program: dict[str, Any]) -> dict[str, str]:
    bounds = program["bounds"]
    names = {
        "compute": "model FLOPs at the peak",
        "memory": "memory traffic (estimate)",
        "network": "what it sends",
    }
    slowest = max(bounds, key=bounds.__getitem__)
    return {
        "model FLOPs": f"{program['flops']:.3g}",
        **{names[name]: f"{seconds:.3g} s" for name, seconds in bounds.items()},
        "at least": f"{bounds[slowest]:.3g} s",
        "attention kernels": str(program["kernels"]),
    }


def _collective_lines(programs: list[dict[str, Any]]) -> list[str]:
    lines = ["Collectives of one device, loops counted in full:"]
    for program in programs:
        for kind, row in program["collectives"].items():
            lines.append(
                f"  {program['name']:<7}{kind:<26}{row['times']:>9,} times"
                f"{_size(row['bytes']):>12} of results{_size(row['sent_bytes']):>12} sent"
            )
        if program["uncounted"]:
            lines.append(
                f"  {program['name']:<7}of these {program['uncounted']} stand in loops of unknown "
                "length: one round is counted"
            )
        if not program["collectives"]:
            lines.append(f"  {program['name']:<7}none")
    return lines


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
