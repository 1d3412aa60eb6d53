"""Speed of the input pipeline: tokens/s, start-up of 300 tasks, packing of the real mixture.

    python benchmarks/input_pipeline.py             # the last part needs MTL_JAX_DATA
    python benchmarks/input_pipeline.py --only packing

Prints a table and writes benchmarks/results/input_pipeline.json.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
WARM_UP = 8  # batches until the examples that wait are as in the long run


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(count))


def write_tasks(folder: pathlib.Path, tasks: int, rows: int) -> None:
    rng = random.Random(0)
    for number in range(tasks):
        lines = (
            json.dumps({"question": words(rng, rng.randint(5, 60)), "answer": words(rng, 3)})
            for _ in range(rows)
        )
        (folder / f"{number}.jsonl").write_text("\n".join(lines))


def register(folder: pathlib.Path, kind: str) -> dict[str, int]:
    """Tasks of the JSONL files: all in Python, or with a preprocessor in TensorFlow as well."""
    import seqio

    from mtl_jax.sources import JsonlDataSource

    vocabulary_file = pathlib.Path(os.environ.get("MTL_JAX_DATA", "-")) / "vocab" / "spiece.model"
    vocabulary = (
        seqio.SentencePieceVocabulary(str(vocabulary_file))
        if vocabulary_file.exists()
        else seqio.ByteVocabulary()
    )
    feature = seqio.Feature(vocabulary, add_eos=True)

    def named(row):
        return {"inputs": row["question"], "targets": row["answer"]}

    def rekey(dataset):
        return dataset.map(lambda x: {"inputs": x["question"], "targets": x["answer"]})

    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    ids = {}
    for path in sorted(folder.glob("*.jsonl")):
        name = f"{kind}_{path.stem}"
        seqio.TaskRegistry.add(
            name,
            source=JsonlDataSource({"train": path}, named if kind == "python" else None),
            preprocessors=steps if kind == "python" else [rekey, *steps],
            output_features={"inputs": feature, "targets": feature},
            metric_fns=[],
        )
        ids[name] = len(ids) + 1
    seqio.MixtureRegistry.add(kind, list(ids), default_rate=1.0)
    return ids


def drain(stream, batches: int) -> dict[str, float]:
    """Reads batches and returns real tokens/s and the shares of real tokens."""
    for _ in range(WARM_UP):
        next(stream)
    started, real, shares = time.perf_counter(), 0, [0.0, 0.0]
    for _ in range(batches):
        batch = next(stream)
        for side, (name, padding) in enumerate(
            zip(("encoder", "decoder"), batch.padding, strict=True)
        ):
            shares[side] += (1 - padding) / batches
            real += int((batch.arrays[f"{name}_segment_ids"] > 0).sum())
    seconds = time.perf_counter() - started
    return {"tokens_per_s": real / seconds, "encoder_real": shares[0], "decoder_real": shares[1]}


def start_up(folder: str, kind: str) -> None:
    """Runs in a fresh process: from the interpreter's start to the first batch of 300 tasks."""
    started = time.perf_counter()
    from mtl_jax.data import DataConfig, TrainStream

    imported = time.perf_counter()
    ids = register(pathlib.Path(folder), kind)
    # So large that the first batch draws nearly all tasks and opens them.
    config = DataConfig(mixture=kind, batch_size=256, prefetch=0)
    stream = TrainStream(config, ids)
    batch = next(stream)
    found = {
        "seconds_import": imported - started,
        "seconds_to_first_batch": time.perf_counter() - started,
        "tasks_opened": int((batch.counters[:, 0] > 0).sum()),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(found))


def measure_speed(folder: pathlib.Path) -> list[dict]:
    from mtl_jax.data import DataConfig, TrainStream

    found = []
    for kind in ("python", "tensorflow"):
        ids = register(folder, kind)
        config = DataConfig(mixture=kind, batch_size=64, prefetch=0)
        found.append({"tasks": len(ids), "reading": kind, **drain(TrainStream(config, ids), 40)})
    return found


def measure_start_up(folder: pathlib.Path) -> list[dict]:
    found = []
    for kind in ("python", "tensorflow"):
        command = [sys.executable, __file__, "--start_up", str(folder), kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append({"reading": kind, **json.loads(done.stdout.splitlines()[-1])})
    return found


def measure_packing() -> list[dict]:
    from mtl_jax.data import DataConfig, TrainStream, load_modules, task_names

    config = DataConfig(
        mixture="p3_t0_train", task_modules=["mtl_jax.tasks.p3"], batch_size=32, prefetch=0
    )
    load_modules(config)
    ids = {name: number for number, name in enumerate(task_names(config.mixture), 1)}
    found = []
    for inputs, targets in (
        (256, 96), (256, 128), (256, 256), (512, 128), (512, 256), (512, 384), (512, 512),
    ):  # fmt: skip
        shape = {"inputs_length": inputs, "targets_length": targets}
        stream = TrainStream(dataclasses.replace(config, **shape), ids)
        found.append({**shape, **drain(stream, 60)})
    return found


def print_table(title: str, rows: list[dict]) -> None:
    print(f"\n{title}")
    cells = [list(rows[0])] + [
        [f"{v:,.0f}" if k == "tokens_per_s" else f"{v:.3f}" if isinstance(v, float) else str(v)
         for k, v in row.items()]
        for row in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["speed", "start_up", "packing"])
    parser.add_argument("--start_up", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start_up:
        start_up(*args.start_up)
        return
    versions = ("numpy", "seqio", "tensorflow", "sentencepiece")
    result: dict = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in versions},
    }
    result["versions"]["python"] = platform.python_version()
    print(result["machine"], result["versions"])
    wanted = [args.only] if args.only else ["start_up", "speed", "packing"]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        write_tasks(path, 300, 200)
        if "start_up" in wanted:
            result["start_up_300_tasks"] = measure_start_up(path)
            print_table("300 tasks to the first batch of 256 rows", result["start_up_300_tasks"])
        if "speed" in wanted:
            for extra in list(path.glob("*.jsonl"))[20:]:
                extra.unlink()
            result["speed"] = measure_speed(path)
            print_table("20 tasks of 200 rows, 64 rows of 512 + 128", result["speed"])
    if "packing" in wanted:
        if os.environ.get("MTL_JAX_DATA"):
            result["packing_p3"] = measure_packing()
            print_table("T0's training mixture, share of real tokens", result["packing_p3"])
        else:
            print("\nT0's training mixture: left out, MTL_JAX_DATA is not set")
    if not args.only:
        target = HERE / "results" / "input_pipeline.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(f"\nwritten to {target.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
