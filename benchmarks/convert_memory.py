"""Peak memory of `mtl-jax convert`, both ways, against its bound: 3 x the largest tensor + 1 GiB.

    python benchmarks/convert_memory.py [--gib 4] [--no_save]

A Hugging Face checkpoint of about that size is made of random numbers, in shards, and converted to
mtl_jax and back, each in a process of its own, whose peak resident memory is taken. The largest
tensor is that of the Hugging Face checkpoint, although ours stores the layers of a stack as one.
The way back must give the very files that were made.
"""

import argparse
import filecmp
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from figures import machine, print_table, save

GIB = 2**30
# T5 1.1 large but for its number of layers.
SHAPE = dict(vocab_size=32128, emb_dim=1024, num_heads=16, head_dim=64, mlp_dim=2816)
LAYER_PAIR = 4 * (12 * 1024**2 + 6 * 1024 * 2816)  # bytes of an encoder and a decoder layer
EMBEDDINGS = 2 * 4 * 32128 * 1024
SHARD = "1GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--no_save", action="store_true", help="leave the results file as it is")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    with tempfile.TemporaryDirectory(prefix="convert_memory") as folder:
        result = measure(pathlib.Path(folder), args.gib)
    print_table("mtl-jax convert, peak resident memory", result["rows"])
    if not args.no_save:
        save("convert_memory", machine("numpy", "jax", "orbax-checkpoint", "tensorstore") | result)
    if any(row["peak MiB"] > row["bound MiB"] for row in result["rows"]):
        sys.exit("above the bound")


def measure(folder: pathlib.Path, gib: float) -> dict:
    """Makes the checkpoint, converts it both ways and compares the files."""
    layers = max(1, round((gib * GIB - EMBEDDINGS) / LAYER_PAIR))
    made, ours, back = (str(folder / name) for name in ("made", "ours", "back"))
    shape = SHAPE | dict(num_encoder_layers=layers, num_decoder_layers=layers)
    run("make", json.dumps(shape), made)
    files = sorted(pathlib.Path(made).glob("*.safetensors"))
    largest = EMBEDDINGS / 2
    bound = 3 * largest + GIB
    rows = []
    for title, command in {
        "nothing (imports alone)": ["idle"],
        "Hugging Face to mtl_jax": ["convert", made, ours, "--to", "mtl_jax"],
        "mtl_jax to Hugging Face": ["convert", ours, back, "--to", "hf", "--max_shard_size", SHARD],
    }.items():
        seconds, peak = run(*command)
        rows.append(
            {
                "conversion": title,
                "seconds": round(seconds, 1),
                "peak MiB": round(peak / 2**20),
                "bound MiB": round(bound / 2**20),
            }
        )
    for file in files:
        if not filecmp.cmp(file, pathlib.Path(back) / file.name, shallow=False):
            sys.exit(f"{file.name} came back different")
    return {
        "checkpoint GiB": round(sum(file.stat().st_size for file in files) / GIB, 2),
        "shards": len(files),
        "layers": layers,
        "largest tensor MiB": round(largest / 2**20),
        "round trip": "the same files, byte by byte",
        "rows": rows,
    }


def run(*words: str) -> tuple[float, int]:
    """Runs a child; returns its seconds and its peak resident memory in bytes."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--child", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, json.loads(done.stdout.splitlines()[-1])["peak"]


def child(words: list[str]) -> None:
    """One conversion, or making the checkpoint, or the imports alone; prints the peak."""
    import mtl_jax.cli
    import mtl_jax.interop.convert

    if words[0] == "make":
        make(json.loads(words[1]), pathlib.Path(words[2]))
    elif words[0] == "convert" and (status := mtl_jax.cli.main(words)):
        sys.exit(status)
    print(json.dumps({"peak": peak()}))


def peak() -> int:
    """The peak resident memory of this process in bytes."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # Linux's ru_maxrss counts what the parent had when it started this process, too.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make(shape: dict, folder: pathlib.Path) -> None:
    """Writes a checkpoint of random numbers, tensor by tensor."""
    import numpy as np

    from mtl_jax.interop import convert
    from mtl_jax.interop.source import Source, tensors
    from mtl_jax.model_config import T5Config

    rng = np.random.default_rng(0)

    class Random(Source):
        config = T5Config(**shape)
        description = "random"
        tokenizer_folder = folder

        def read(self, path, layer):
            wanted = shapes[path]
            return rng.standard_normal(wanted if layer is None else wanted[1:], np.float32)

    shapes = tensors(Random.config)
    convert.convert(Random(), folder, "hf", max_shard_bytes=convert.parse_size(SHARD))


if __name__ == "__main__":
    main()
