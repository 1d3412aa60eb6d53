"""Rank classification: choices packed behind one encoding, against an encoding for every choice.

    python benchmarks/sweep.py                 # 14 minutes on 2 cores; needs torch, transformers
    python benchmarks/sweep.py --tiny          # small, to see that it works

Examples of 256 input tokens and four choices of 2 to 8 tokens are scored by a T5 1.1 small in
float32, in four ways that run in turn, round after round:

  engine         as sweeps do it: each input is encoded once, its choices are segments of one
                 decoder row, a thread lays out the batches
  arrays         the same compiled calls on arrays that are on the device already; what the engine
                 takes beyond this is the device waiting for data
  per_choice     the same engine with a row for every choice, as T5X scores (input encoded again)
  hugging_face   transformers in PyTorch, a row for every choice in one batch, the same parameters

All give the same scores (checked, 1e-3). Prints medians and ratios of examples a second and writes
benchmarks/results/sweep.json (not with --tiny).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import figures
import hugging_face
import jax
import numpy as np
import torch

from mtl_jax import buckets, decode, model, placement
from mtl_jax.evaluate import Engine
from mtl_jax.model_config import T5Config

CHOICES = 4
SMALL = T5Config(
    vocab_size=32128, emb_dim=512, num_heads=6, head_dim=64, mlp_dim=1024, num_encoder_layers=8,
    num_decoder_layers=8, dropout_rate=0.0, dtype="float32", scan_layers=False,
)  # fmt: skip
TINY = T5Config(
    vocab_size=512, emb_dim=32, num_heads=2, head_dim=16, mlp_dim=64, num_encoder_layers=1,
    num_decoder_layers=1, dropout_rate=0.0, dtype="float32", scan_layers=False,
)  # fmt: skip


def requests_of(cfg: T5Config, examples: int, length: int) -> list[buckets.Request]:
    """Random inputs of one length; choices of 2 to 8 tokens and the end of sequence."""
    generator = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return generator.integers(3, cfg.vocab_size - 100, count).tolist()

    return [
        buckets.Request(
            number,
            tokens(length),
            [[*tokens(int(generator.integers(2, 9))), 1] for _ in range(CHOICES)],
        )
        for number in range(examples)
    ]


def alone(requests: list[buckets.Request]) -> list[buckets.Request]:
    """A row for every choice."""
    return [
        buckets.Request((request.key, number), request.inputs, [choice])
        for request in requests
        for number, choice in enumerate(request.choices)
    ]


class Ways:
    """The four ways; each call scores all examples and returns float [examples, choices]."""

    def __init__(self, cfg: T5Config, requests: list[buckets.Request], batch_size: int):
        self._cfg, self._requests = cfg, requests
        self._params = model.init(cfg, jax.random.key(0))
        self._packed = buckets.plan(requests, batch_size)
        self._single = buckets.plan(alone(requests), batch_size * CHOICES)
        self._engines = {name: Engine(cfg, placement.Placement()) for name in ("once", "each")}
        self._program = jax.jit(self._score)
        self._arrays = [jax.device_put(self._laid_out(batch)) for batch in self._packed]
        self._torch = hugging_face.build(cfg, "sdpa").eval()
        hugging_face.load(self._torch, self._params)

    @property
    def batches(self) -> dict[str, list[tuple[int, int, int]]]:
        """Shapes of the batches: rows, input tokens, target tokens."""
        plans = {"once": self._packed, "each": self._single}
        shapes = {
            n: [(b.rows, b.inputs_length, b.targets_length) for b in p] for n, p in plans.items()
        }
        return {name: sorted(set(found)) for name, found in shapes.items()}

    def engine(self) -> np.ndarray:
        """Inputs encoded once, through the engine."""
        found = np.zeros((len(self._requests), CHOICES))
        engine = self._engines["once"]
        for batch, answers in engine.answers(self._params, self._packed, CHOICES):
            for request, answer in zip(batch.requests, answers, strict=True):
                found[request.key] = answer.scores
        return found

    def per_choice(self) -> np.ndarray:
        """Inputs encoded for every choice, through the engine."""
        found = np.zeros((len(self._requests), CHOICES))
        engine = self._engines["each"]
        for batch, answers in engine.answers(self._params, self._single, 1):
            for request, answer in zip(batch.requests, answers, strict=True):
                found[request.key] = answer.scores[0]
        return found

    def arrays(self) -> np.ndarray:
        """Inputs encoded once, with all arrays on the device."""
        found = np.zeros((len(self._requests), CHOICES))
        scores = [self._program(self._params, arrays) for arrays in self._arrays]
        for batch, scores_BC in zip(self._packed, jax.device_get(scores), strict=True):
            for request, scores_C in zip(batch.requests, scores_BC, strict=False):
                found[request.key] = scores_C
        return found

    def hugging_face(self) -> np.ndarray:
        """PyTorch, a row for every choice; batches as large as those of `per_choice`."""
        found = np.zeros((len(self._requests), CHOICES))
        with torch.inference_mode():
            for batch in self._single:
                shape = batch.rows, batch.targets_length
                rows = [request.choices[0] for request in batch.requests]
                labels = torch.tensor(buckets.pad_rows(rows, *shape), dtype=torch.long)
                encoder = {k: torch.tensor(v) for k, v in batch.encoder_arrays().items()}
                logits = self._torch(
                    input_ids=encoder["encoder_inputs"].long(),
                    attention_mask=encoder["encoder_segments"],
                    decoder_input_ids=torch.nn.functional.pad(labels[:, :-1], (1, 0)),
                ).logits
                log_probs = torch.log_softmax(logits.float(), -1)
                of_token = log_probs.gather(-1, labels[..., None])[..., 0] * (labels > 0)
                for request, score in zip(batch.requests, of_token.sum(-1).tolist(), strict=False):
                    found[request.key] = score
        return found

    def _laid_out(self, batch: buckets.Batch) -> dict[str, np.ndarray]:
        choices = [request.choices for request in batch.requests]
        packed = decode.pack_choices(choices, batch.rows, batch.targets_length)
        named = dict(zip(("inputs", "targets", "segments"), packed, strict=True))
        return batch.encoder_arrays() | named

    def _score(self, params: model.Params, arrays: dict) -> jax.Array:
        names = ("encoder_inputs", "encoder_segments", "inputs", "targets", "segments")
        given = (arrays[name] for name in names)
        return decode.score_choices(self._cfg, params, *given, CHOICES)[0]


def measure(ways: Ways, examples: int, rounds: int) -> list[dict]:
    """Runs all ways in turn; round 0 compiles and checks that they agree."""
    functions: dict[str, Callable[[], np.ndarray]] = {
        name: getattr(ways, name) for name in ("engine", "arrays", "per_choice", "hugging_face")
    }
    expected = functions["engine"]()
    for name, function in functions.items():
        np.testing.assert_allclose(function(), expected, rtol=1e-3, err_msg=name)
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(rounds):
        start = number % len(names)  # nobody always follows the same one
        for name in names[start:] + names[:start]:
            before = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - before)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return [
        {
            "way": name,
            "examples/s": examples / seconds[name],
            "least": examples / max(times[name]),
            "most": examples / min(times[name]),
            "engine is faster by": seconds[name] / seconds["engine"],
        }
        for name in functions
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model; writes no file")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each way")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16, help="examples of a batch")
    args = parser.parse_args()
    cfg, length = (TINY, 32) if args.tiny else (SMALL, 256)
    result = figures.machine("jax", "jaxlib", "flax", "numpy", "torch", "transformers")
    result["device"] = jax.devices()[0].device_kind
    print(result["machine"], result["device"], result["versions"])
    ways = Ways(cfg, requests_of(cfg, args.examples, length), args.batch_size)
    found = measure(ways, args.examples, args.rounds)
    figures.print_table(f"{args.examples} examples, {length} tokens, {CHOICES} choices", found)
    result |= {"examples": args.examples, "inputs_length": length, "choices": CHOICES}
    result |= {"batches": ways.batches, "rounds": args.rounds, "ways": found}
    if not args.tiny:
        figures.save("sweep", result)


if __name__ == "__main__":
    main()
