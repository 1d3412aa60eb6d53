"""What a GPU did while JAX's profiler watched: its kernels by total time, and how busy it was.

    python benchmarks/trace_kernels.py FOLDER [--steps 3]

Reads the newest `*.trace.json.gz` below FOLDER (Chrome's trace format, which JAX writes beside its
own), or, if there is none, the newest `*.xplane.pb` by JAX's reader.
"""

import argparse
import collections
import dataclasses
import gzip
import json
import pathlib
import re
from collections.abc import Iterator

# First match decides; the names are those of XLA, cuBLAS, CUTLASS and Triton.
KINDS = {
    "copy": r"memcpy|memset|copy",
    "attention": r"attention|flash|fmha|attend|pallas|_dq|_dkv|dbias",
    "matrix product": r"gemm|nvjet|xmma|cublas|cutlass|wgmma",
    "reduction": r"reduce|softmax|norm",
    "scatter, gather, slice": r"scatter|gather|slice|concatenate",
    "element-wise": r"fusion|loop|elementwise|convert|transpose",
}
# Rows of a device that sum up others.
SUMS = ("XLA Modules", "XLA Ops", "Steps", "Framework", "Source", "Launch Stats", "TraceMe")


@dataclasses.dataclass(frozen=True)
class Event:
    """One event; times in microseconds."""

    process: str
    row: str
    name: str
    start: float
    duration: float
    operation: str


def read(folder: pathlib.Path) -> list[Event]:
    """Returns all events of the newest trace below the folder.

    Raises:
      FileNotFoundError: there is none.
    """
    for pattern, parse in (("*.trace.json.gz", _chrome_events), ("*.xplane.pb", _xplane_events)):
        found = sorted(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)
        if found:
            return list(parse(found[-1]))
    raise FileNotFoundError(f"no *.trace.json.gz and no *.xplane.pb below {folder}")


def _chrome_events(path: pathlib.Path) -> Iterator[Event]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    processes, rows = {}, {}
    for event in events:
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            rows[event["pid"], event["tid"]] = event["args"]["name"]
    for event in events:
        if event.get("ph") == "X":
            yield Event(
                processes.get(event["pid"], ""),
                rows.get((event["pid"], event.get("tid")), ""),
                event["name"],
                float(event["ts"]),
                float(event.get("dur", 0.0)),
                str(event.get("args", {}).get("hlo_op", "")),
            )


def _xplane_events(path: pathlib.Path) -> Iterator[Event]:
    from jax.profiler import ProfileData  # only where the other file is missing

    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                operation = str(dict(event.stats).get("hlo_op", ""))
                start, duration = event.start_ns / 1e3, event.duration_ns / 1e3
                yield Event(plane.name, line.name, event.name, start, duration, operation)


def of_device(events: list[Event]) -> list[Event]:
    """The events of a GPU's streams; of XLA's threads on the host where no GPU took part."""
    device = [event for event in events if event.process.startswith("/device:")]
    streams = [event for event in device if event.row.startswith("Stream")]
    kernels = [event for event in device if not event.row.startswith(SUMS)]
    threads = [event for event in events if event.row.startswith("tf_XLA")]
    return streams or kernels or threads


def kind(name: str) -> str:
    """The sort of work that a kernel's name tells of."""
    for label, pattern in KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return label
    return "other"


def summary(events: list[Event], steps: int) -> dict:
    """Sums up the events of a device.

    Args:
      events: of `of_device`.
      steps: train steps that were traced.

    Returns:
      {"rows", "events", "span ms", "busy share", "kinds": {kind: ms of a step},
       "kernels": [{"kernel", "operation", "calls", "ms", "share"}]}, per step, longest first. A
      kernel's name goes without XLA's numbers; "operation" is that of its longest call, "share" its
      part of the sum over all kernels.
    """
    if not events:
        return {"rows": [], "events": 0, "span ms": 0.0, "busy share": 0.0, "kinds": {}} | {
            "kernels": []
        }
    by_name: dict[str, list[Event]] = collections.defaultdict(list)
    for event in events:
        # XLA numbers its fusions; the layers of an unrolled model have one each.
        by_name[re.sub(r"([._]\d+)+$", "", event.name)].append(event)
    sums = {name: sum(event.duration for event in own) for name, own in by_name.items()}
    whole = sum(sums.values()) or 1.0
    kinds: dict[str, float] = collections.Counter()
    for name, total in sums.items():
        kinds[kind(name)] += total / steps / 1e3
    span = max(e.start + e.duration for e in events) - min(e.start for e in events)
    return {
        "rows": sorted({f"{event.process} {event.row}" for event in events}),
        "events": len(events),
        "span ms": span / steps / 1e3,
        "busy share": _covered(events) / (span or 1.0),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": [
            {
                "kernel": name,
                "operation": max(by_name[name], key=lambda event: event.duration).operation,
                "calls": len(by_name[name]) / steps,
                "ms": total / steps / 1e3,
                "share": total / whole,
            }
            for name, total in sorted(sums.items(), key=lambda item: -item[1])
        ],
    }


def _covered(events: list[Event]) -> float:
    """Microseconds in which at least one event ran."""
    covered, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        last = event.start + event.duration
        covered += max(0.0, last - max(event.start, end))
        end = max(end, last)
    return covered


def print_summary(found: dict, most: int = 30) -> None:
    """Prints the rows that were read, sums by kind and the longest kernels."""
    print(f"\n{found['events']} events on {', '.join(found['rows']) or 'no row'}")
    print(f"{found['span ms']:.2f} ms a step, busy {found['busy share']:.1%} of the time")
    for name, milliseconds in found["kinds"].items():
        print(f"{milliseconds:10.3f} ms  {name}")
    print("   ms a step   share    calls  kernel (operation of its longest call)")
    for row in found["kernels"][:most]:
        print(
            f"{row['ms']:12.3f}  {row['share']:6.1%}  {row['calls']:7.1f}  "
            f"{row['kernel'][:90]} ({row['operation'][:40]})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=1, help="train steps in the trace")
    args = parser.parse_args()
    print_summary(summary(of_device(read(args.folder)), args.steps))


if __name__ == "__main__":
    main()
