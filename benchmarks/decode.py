"""Greedy decoding: mtl_jax against Hugging Face's generate and CTranslate2, the same weights.

    python benchmarks/decode.py            # T5 1.1 small, float32, 2 cores: about 4 minutes
    python benchmarks/decode.py --gpu      # T5 1.1 base, bfloat16, one NVIDIA GPU
    python benchmarks/decode.py --tiny     # a small model, to see that it works; writes no file

All make the same number of tokens from the same inputs, in float32 the same tokens; the end of
sequence is forbidden until then. They take turns, round by round, each in a process of its own
with as many threads, so that a change of the machine's speed meets all. Prints medians and ratios,
and the share of the memory's bandwidth that reading every weight of the decoder once a token comes
to. CTranslate2 takes part on a CPU. Needs the extra `benchmark`.
"""

import argparse
import copy
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before JAX is imported: the systems share a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import figures
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import decode, incremental, interop, model
from mtl_jax.generate_config import GenerateConfig

SHAPES = {  # d_model, d_ff, layers, heads
    "tiny": dict(vocab_size=512, d_model=64, d_ff=128, num_layers=2, num_heads=2),
    "small": dict(vocab_size=32128, d_model=512, d_ff=1024, num_layers=8, num_heads=6),
    "base": dict(vocab_size=32128, d_model=768, d_ff=2048, num_layers=12, num_heads=12),
}
# Memory bandwidth by name of the device, GB/s, as published.
BANDWIDTH = {"H200": 4800.0, "H100": 3350.0, "A100": 2039.0}
# Seconds before each turn: OpenMP's threads spin for a fifth of one after their work, on the cores
# that the next one needs.
PAUSE = 0.5
SECONDS = "seconds "
Run = Callable[[], np.ndarray]


def make(args: argparse.Namespace) -> int:
    """Saves a random T5 1.1 of Hugging Face; returns the weights that one token needs.

    They are the decoder's and the output's. Larger than at the start of training, for clear tokens;
    output and embedding are tied and rescaled, which CTranslate2 takes from the configuration.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        **SHAPES[args.size], d_kv=64, feed_forward_proj="gated-gelu", decoder_start_token_id=0
    )
    network = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    network.save_pretrained(args.folder / "hf")
    if not args.gpu:
        convert_for_ctranslate2(network, args.folder)
    weights = sum(x.numel() for x in network.decoder.block.parameters())
    return weights + network.lm_head.weight.numel()


def ours(folder: Path, dtype: str, inputs_BL: np.ndarray, length: int) -> Run:
    """mtl_jax, compiled; its weights are laid out for decoding once, as `mtl_jax.load` does."""
    source = interop.open_source(folder)
    cfg = model.T5Config(
        **{
            **{f: getattr(source.config, f) for f in source.config.__dataclass_fields__},
            **dict(scan_layers=False, dtype=dtype, logits_dtype=dtype, dropout_rate=0.0),
        }
    )
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), model.abstract_params(cfg)
    )
    params = interop.load_params(source, shapes)
    weights = jax.jit(functools.partial(incremental.prepare, cfg))(params)
    params = jax.jit(functools.partial(model.unstack_encoder, cfg))(params)
    how = GenerateConfig(max_length=length, min_length=length)
    run = jax.jit(functools.partial(decode.generate, cfg, how))
    segments_BL = np.ones_like(inputs_BL)
    call = functools.partial(run, params, inputs_BL, segments_BL, weights=weights)
    return lambda: np.asarray(call().tokens[:, 0])


def hugging_face(args: argparse.Namespace, inputs_BL: np.ndarray) -> Run:
    """Hugging Face's generate, with a cache and sdpa attention."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    network = transformers.T5ForConditionalGeneration.from_pretrained(args.folder / "hf").eval()
    if args.gpu:
        network = network.to("cuda", torch.bfloat16)
    tokens = torch.tensor(inputs_BL, dtype=torch.int64, device=network.device)
    length = args.length
    options = dict(max_new_tokens=length, min_new_tokens=length, do_sample=False)

    def run() -> np.ndarray:
        with torch.inference_mode():
            return network.generate(tokens, **options)[:, 1 : length + 1].cpu().numpy()

    return run


def convert_for_ctranslate2(network: Any, folder: Path) -> None:
    """Saves the weights for CTranslate2, as float32 and as int8.

    The loader folds the output's scale into the weights that it is given, so they get a copy each.
    """
    from ctranslate2.converters.transformers import T5Loader

    words = _words(network.config.vocab_size)
    for kind in ("float32", "int8"):
        spec = T5Loader().get_model_spec(copy.deepcopy(network))
        spec.register_source_vocabulary(words)
        spec.register_target_vocabulary(words)
        spec.config.bos_token = spec.config.decoder_start_token = "<pad>"
        spec.config.eos_token, spec.config.unk_token = "</s>", "<unk>"
        spec.validate()
        spec.optimize(quantization=None if kind == "float32" else kind)
        (folder / kind).mkdir()
        spec.save(str(folder / kind))


def _words(count: int) -> list[str]:
    return ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(3, count))]


def ctranslate2_of(args: argparse.Namespace, kind: str, inputs_BL: np.ndarray) -> Run:
    """CTranslate2 with the same weights, "float32" or "int8"."""
    import ctranslate2

    words = _words(SHAPES[args.size]["vocab_size"])
    numbers = {word: number for number, word in enumerate(words)}
    translator = ctranslate2.Translator(
        str(args.folder / kind),
        device="cpu",
        compute_type=kind,
        inter_threads=1,
        intra_threads=os.cpu_count(),
    )
    rows = [[words[token] for token in row] for row in inputs_BL]
    length = args.length

    def run() -> np.ndarray:
        found = translator.translate_batch(
            rows, beam_size=1, min_decoding_length=length, max_decoding_length=length
        )
        return np.array([[numbers[word] for word in row.hypotheses[0][:length]] for row in found])

    return run


class Child:
    """One system in a process of its own, which works when it is told to.

    In one process the thread pools of two frameworks slow each other down, even while they wait.
    """

    def __init__(self, system: str, folder: Path, args: argparse.Namespace, batch: int):
        self._made = folder / f"{system.replace(' ', '_')}_{batch}.npy"
        command = [sys.executable, __file__, *sys.argv[1:], "--child", system]
        self._process = subprocess.Popen(
            [*command, "--folder", str(folder), "--batch", str(batch), "--made", str(self._made)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.run()  # the first one compiles

    def run(self) -> float:
        """One round; returns its seconds."""
        print("go", file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(SECONDS):
                return float(line.removeprefix(SECONDS))
        raise ChildProcessError(f"{self._process.args} ended with {self._process.wait()}")

    def tokens(self) -> np.ndarray:
        """What it made, int [B, T]."""
        return np.load(self._made)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def serve(args: argparse.Namespace) -> None:
    """The child's side: a round for every line of standard input."""
    shape = (args.batch, args.inputs)
    drawn = np.random.RandomState(args.batch)
    inputs_BL = drawn.randint(3, SHAPES[args.size]["vocab_size"], shape).astype(np.int32)
    if args.child == "mtl_jax":
        run = ours(args.folder / "hf", args.dtype, inputs_BL, args.length)
    elif args.child == "hf generate":
        run = hugging_face(args, inputs_BL)
    else:
        run = ctranslate2_of(args, args.child.split()[1], inputs_BL)
    for _ in sys.stdin:
        before = time.perf_counter()
        made = run()
        seconds = time.perf_counter() - before
        np.save(args.made, made)
        print(f"{SECONDS}{seconds}", flush=True)


def measure(children: dict[str, Child], exact: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every system.

    Raises:
      ArithmeticError: a system of `exact` makes other tokens than the first one.
    """
    first = next(iter(children))
    for name in exact:
        same = np.mean(children[first].tokens() == children[name].tokens())
        if same < 1:
            raise ArithmeticError(f"{name} and {first} share {same:.1%} of their tokens only")
    times: dict[str, list[float]] = {name: [] for name in children}
    for number in range(rounds):
        names = list(children)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(PAUSE)
            times[name].append(children[name].run())
    return times


def stream_bandwidth() -> float:
    """GB/s at which this machine reads an array in its memory, by a sum; best of five."""
    array = jnp.ones((2**27,), jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    best = 1e9
    for _ in range(5):
        before = time.perf_counter()
        total(array).block_until_ready()
        best = min(best, time.perf_counter() - before)
    return array.nbytes / best / 1e9


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model; writes no file")
    parser.add_argument("--gpu", action="store_true", help="base in bfloat16 on an NVIDIA GPU")
    parser.add_argument("--rounds", type=int, default=11, help="of each system")
    parser.add_argument("--inputs", type=int, default=64, help="tokens of an input")
    parser.add_argument("--length", type=int, default=64, help="tokens made")
    for name, kind in (("child", str), ("folder", Path), ("batch", int), ("made", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = "tiny" if args.tiny else "base" if args.gpu else "small"
    args.dtype = "bfloat16" if args.gpu else "float32"
    return args


def rows_of(args: argparse.Namespace, batch: int, moved_gb: float, bandwidth: float) -> list[dict]:
    """Measures all systems at one batch size."""
    systems = ["mtl_jax", "hf generate"]
    systems += [] if args.gpu else ["ctranslate2 float32", "ctranslate2 int8"]
    exact = [name for name in systems[1:] if not args.gpu and "int8" not in name]
    children = {name: Child(name, args.folder, args, batch) for name in systems}
    times = measure(children, exact, args.rounds)
    for child in children.values():
        child.close()
    rows = []
    for name, own in times.items():
        seconds = statistics.median(own)
        pairs = zip(own, times["mtl_jax"], strict=True)
        rows.append(
            {
                "batch": batch,
                "system": name,
                "tokens/s": batch * args.length / seconds,
                "ms a step": 1e3 * seconds / args.length,
                "mtl_jax is faster by": statistics.median(a / b for a, b in pairs),
                "of bandwidth": moved_gb * args.length / seconds / bandwidth,
            }
        )
    return rows


def main() -> None:
    args = arguments()
    if args.child:
        serve(args)
        return
    if args.gpu:
        device = jax.devices("gpu")[0].device_kind
        bandwidth = next((v for k, v in BANDWIDTH.items() if k in device), float("nan"))
    else:
        device, bandwidth = f"{os.cpu_count()} cores", stream_bandwidth()
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = Path(temporary)
        moved_gb = make(args) * (2 if args.gpu else 4) / 1e9
        batches = (1, 128) if args.gpu else (1, 8)
        rows = [row for batch in batches for row in rows_of(args, batch, moved_gb, bandwidth)]
    title = (
        f"T5 1.1 {args.size}, {args.dtype}, {args.inputs} inputs, {args.length} tokens, {device}"
    )
    figures.print_table(title, rows)
    if not args.tiny:
        packages = ["jax", "jaxlib", "torch", "transformers"]
        packages += [] if args.gpu else ["ctranslate2"]
        result = figures.machine(*packages) | {
            "device": device,
            "bandwidth_gb_s": bandwidth,
            "weights_read_a_token_mb": moved_gb * 1e3,
            "inputs": args.inputs,
            "length": args.length,
            "rounds": args.rounds,
            "rows": rows,
        }
        figures.save("decode_gpu" if args.gpu else "decode", result)


if __name__ == "__main__":
    main()
