"""Greedy decoding: mtl_jax against Hugging Face's generate and CTranslate2, the same weights.

    python benchmarks/decode.py            # T5 1.1 small, float32, 2 cores: about 4 minutes
    python benchmarks/decode.py --gpu      # T5 1.1 base, bfloat16, one NVIDIA GPU
    python benchmarks/decode.py --tiny     # a small model, to see that it works; writes no file

All make the same number of tokens from the same inputs, in float32 the same tokens; the end of
sequence is forbidden until then. They take turns, round by round, in one process with as many
threads each, so that a change of the machine's speed meets all. Prints medians and ratios, and the
share of the memory's bandwidth that reading every weight of the decoder once a token comes to.
CTranslate2 takes part on a CPU. Needs the extra `benchmark`.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from mtl_jax import decode, incremental, interop, model
from mtl_jax.generate_config import GenerateConfig

SHAPES = {  # d_model, d_ff, layers, heads
    "tiny": dict(vocab_size=512, d_model=64, d_ff=128, num_layers=2, num_heads=2),
    "small": dict(vocab_size=32128, d_model=512, d_ff=1024, num_layers=8, num_heads=6),
    "base": dict(vocab_size=32128, d_model=768, d_ff=2048, num_layers=12, num_heads=12),
}
# Memory bandwidth by name of the device, GB/s, as published.
BANDWIDTH = {"H200": 4800.0, "H100": 3350.0, "A100": 2039.0}
Run = Callable[[], np.ndarray]


def peer(shape: dict, folder: Path) -> Any:
    """A random T5 1.1 of Hugging Face, saved to `folder`; weights large enough for clear tokens.

    Output and embedding are tied and rescaled, which CTranslate2 takes from the configuration.
    """
    torch.manual_seed(0)
    config = transformers.T5Config(
        **shape, d_kv=64, feed_forward_proj="gated-gelu", decoder_start_token_id=0
    )
    network = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    network.save_pretrained(folder)
    return network


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


def hugging_face(network: Any, inputs_BL: np.ndarray, length: int) -> Run:
    """Hugging Face's generate, with a cache and sdpa attention."""
    tokens = torch.tensor(inputs_BL, dtype=torch.int64, device=network.device)
    options = dict(max_new_tokens=length, min_new_tokens=length, do_sample=False)

    def run() -> np.ndarray:
        with torch.inference_mode():
            return network.generate(tokens, **options)[:, 1 : length + 1].cpu().numpy()

    return run


def ctranslate2_of(
    network: Any, kind: str, folder: Path, inputs_BL: np.ndarray, length: int
) -> Run:
    """CTranslate2 with the same weights, "float32" or "int8"."""
    import ctranslate2
    from ctranslate2.converters.transformers import T5Loader

    words = ["<pad>", "</s>", "<unk>"]
    words += [f"w{number}" for number in range(3, network.config.vocab_size)]
    numbers = {word: number for number, word in enumerate(words)}
    spec = T5Loader().get_model_spec(network)
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.config.bos_token = spec.config.decoder_start_token = "<pad>"
    spec.config.eos_token, spec.config.unk_token = "</s>", "<unk>"
    spec.validate()
    spec.optimize(quantization=None if kind == "float32" else kind)
    folder.mkdir()
    spec.save(str(folder))
    translator = ctranslate2.Translator(
        str(folder), device="cpu", compute_type=kind, inter_threads=1, intra_threads=os.cpu_count()
    )
    rows = [[words[token] for token in row] for row in inputs_BL]

    def run() -> np.ndarray:
        found = translator.translate_batch(
            rows, beam_size=1, min_decoding_length=length, max_decoding_length=length
        )
        return np.array([[numbers[word] for word in row.hypotheses[0][:length]] for row in found])

    return run


def measure(runs: dict[str, Run], exact: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every system.

    Raises:
      ArithmeticError: a system of `exact` makes other tokens than the first one.
    """
    made = {name: run() for name, run in runs.items()}
    first = next(iter(made))
    for name in exact:
        if not np.array_equal(made[first], made[name]):
            same = np.mean(made[first] == made[name])
            raise ArithmeticError(f"{name} and {first} share {same:.1%} of their tokens only")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        names = list(runs)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            before = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - before)
    return times


def decoder_bytes(network: Any, size: int) -> int:
    """Bytes of the weights that one token needs: the decoder and the output."""
    weights = sum(x.numel() for x in network.decoder.block.parameters())
    return (weights + network.lm_head.weight.numel()) * size


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model; writes no file")
    parser.add_argument("--gpu", action="store_true", help="base in bfloat16 on an NVIDIA GPU")
    parser.add_argument("--rounds", type=int, default=9, help="of each system")
    parser.add_argument("--inputs", type=int, default=64, help="tokens of an input")
    parser.add_argument("--length", type=int, default=64, help="tokens made")
    args = parser.parse_args()
    size = "tiny" if args.tiny else "base" if args.gpu else "small"
    dtype = "bfloat16" if args.gpu else "float32"
    torch.set_num_threads(os.cpu_count() or 1)
    if args.gpu:
        device = jax.devices("gpu")[0].device_kind
        bandwidth = next((v for k, v in BANDWIDTH.items() if k in device), float("nan"))
    else:
        device, bandwidth = f"{os.cpu_count()} cores", stream_bandwidth()

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        network = peer(SHAPES[size], folder / "hf")
        if args.gpu:
            network = network.to("cuda", torch.bfloat16)
        weights = decoder_bytes(network, 2 if args.gpu else 4)
        for batch in (1, 128) if args.gpu else (1, 8):
            drawn = np.random.RandomState(batch)
            shape = (batch, args.inputs)
            inputs_BL = drawn.randint(3, SHAPES[size]["vocab_size"], shape).astype(np.int32)
            runs = {
                "mtl_jax": ours(folder / "hf", dtype, inputs_BL, args.length),
                "hf generate": hugging_face(network, inputs_BL, args.length),
            }
            exact = [] if args.gpu else ["hf generate"]
            if not args.gpu:
                for kind in ("float32", "int8"):
                    place = folder / f"ct2_{kind}_{batch}"
                    runs[f"ctranslate2 {kind}"] = ctranslate2_of(
                        network, kind, place, inputs_BL, args.length
                    )
                exact.append("ctranslate2 float32")
            times = measure(runs, exact, args.rounds)
            for name, own in times.items():
                seconds = statistics.median(own)
                pairs = zip(times[name], times["mtl_jax"], strict=True)
                rows.append(
                    {
                        "batch": batch,
                        "system": name,
                        "tokens/s": batch * args.length / seconds,
                        "ms a step": 1e3 * seconds / args.length,
                        "mtl_jax is faster by": statistics.median(a / b for a, b in pairs),
                        "of bandwidth": weights * args.length / seconds / 1e9 / bandwidth,
                    }
                )
    title = f"T5 1.1 {size}, {dtype}, inputs of {args.inputs}, {args.length} tokens, {device}"
    figures.print_table(title, rows)
    if not args.tiny:
        packages = (
            "jax",
            "jaxlib",
            "torch",
            "transformers",
            *(() if args.gpu else ("ctranslate2",)),
        )
        result = figures.machine(*packages) | {
            "device": device,
            "bandwidth_gb_s": bandwidth,
            "weights_read_a_token_mb": weights / 1e6,
            "inputs": args.inputs,
            "length": args.length,
            "rounds": args.rounds,
            "rows": rows,
        }
        figures.save("decode_gpu" if args.gpu else "decode", result)


if __name__ == "__main__":
    main()
