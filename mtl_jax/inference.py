"""A trained T5 in a notebook: `mtl_jax.load(DIR)` generates, scores and embeds texts.

`mtl-jax infer` does the same for files (`infer.py`).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import (
    buckets,
    decode,
    incremental,
    interop,
    model,
    placement,
    sharding,
    stop_strings,
    tokenizer,
)
from mtl_jax.errors import UserError, suggest
from mtl_jax.generate_config import GenerateConfig
from mtl_jax.model_config import T5Config

# Below so many parameters layers are unrolled: faster to run, and compiled in seconds.
_UNROLLED = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One generated text.

    Attributes:
      text: up to the first stop string or the end of sequence.
      tokens: what was generated, the end of sequence included where it was reached.
      score: what hypotheses are ranked by; for greedy decoding and samples the log-probability.
      log_probs: of each token, under the model itself (temperature and filters left out).
    """

    text: str
    tokens: list[int]
    score: float
    log_probs: list[float]


class LoadedModel:
    """A T5 with its tokenizer on the devices.

    Attributes:
      config: shape of the model, with the dtype it computes in.
      params: tree of `model.init`; the encoder's layers may be apart (`model.unstack_encoder`).
      tokenizer: texts to tokens and back.
      step: of training; 0 for a model from elsewhere.
      notes: what to know of how the checkpoint was understood.
      truncated: how many inputs were cut to `inputs_length` so far.
    """

    def __init__(
        self,
        config: T5Config,
        params: model.Params,
        words: tokenizer.Tokenizer,
        *,
        where: placement.Placement | None = None,
        step: int = 0,
        notes: Sequence[str] = (),
        inputs_length: int = 512,
        prompt: Sequence[int] = (),
    ):
        """Nothing is compiled yet.

        Args:
          config: shape of the model.
          params: its parameters, on the devices.
          words: its tokenizer.
          where: how batches are placed; None: on the default device.
          step: of training.
          notes: what to know of how the checkpoint was understood.
          inputs_length: longer inputs are cut, and counted in `truncated`.
          prompt: token ids in front of every input, beyond `inputs_length` (`Prompt`).

        Raises:
          UserError: the tokenizer has more ids than the model's embedding has rows.
        """
        if words.vocab_size > config.vocab_size:
            raise UserError(
                f"The tokenizer has {words.vocab_size} ids but the model only {config.vocab_size}: "
                "it is not this model's tokenizer."
            )
        self.config, self.params, self.tokenizer, self.step = config, params, words, step
        self.notes, self.inputs_length, self.truncated = tuple(notes), inputs_length, 0
        self._prompt = list(prompt)
        self._place = where or placement.Placement()
        self._weights: incremental.Weights | None = None  # made when something is generated
        self._prepare = jax.jit(functools.partial(incremental.prepare, config))
        self._generate = jax.jit(self._generate_batch, static_argnames="generate_config")
        self._score = jax.jit(self._score_batch, static_argnames="num_choices")
        self._embed = jax.jit(self._embed_batch)
        self._stop_table = functools.lru_cache(maxsize=8)(self._make_stop_table)

    # ------------------------------------------------------------------------------- texts

    def generate(
        self,
        texts: Sequence[str],
        config: GenerateConfig | None = None,
        *,
        prefixes: Sequence[str] | None = None,
        batch_size: int = 32,
        **options: Any,
    ) -> list[str] | list[list[str]]:
        """Generates a text for each input.

        Args:
          texts: inputs.
          config: how; or give its fields as keywords, such as `method="beam", num_beams=4`.
          prefixes: beginnings that the outputs are made to continue, one for each input; they are
            not part of what is returned.
          batch_size: inputs at a time.
          **options: fields of `GenerateConfig`.

        Returns:
          A text for each input; with `num_return` above 1 a list of texts, best first.

        Raises:
          UserError: options that do not fit each other.
        """
        config = _options(config, options)
        found = self.predict(texts, config, prefixes=prefixes, batch_size=batch_size)
        if config.num_return == 1:
            return [row[0].text for row in found]
        return [[prediction.text for prediction in row] for row in found]

    def score(
        self,
        texts: Sequence[str],
        targets: Sequence[str] | Sequence[Sequence[str]],
        *,
        batch_size: int = 32,
    ) -> np.ndarray | list[np.ndarray]:
        """Log-likelihoods of targets, the end of sequence included.

        Args:
          texts: inputs.
          targets: for each input a text, or a list of texts; the input is then read once for all.
          batch_size: inputs at a time.

        Returns:
          float32 [inputs], or for lists of targets a list of float32 [targets of the input].

        Raises:
          UserError: there are not as many targets as inputs, or an input has none.
        """
        _check_list(texts)
        _same_length(texts, targets, "targets")
        single = [isinstance(target, str) for target in targets]
        lists = [[target] if isinstance(target, str) else list(target) for target in targets]
        if empty := [i for i, choices in enumerate(lists) if not choices]:
            raise UserError(f"Input {empty[0]} has no targets to score.")
        requests = [
            buckets.Request(i, self._tokens(text), [self.tokenizer.encode(t) for t in choices])
            for i, (text, choices) in enumerate(zip(texts, lists, strict=True))
        ]
        widest = buckets.bucket(max((len(choices) for choices in lists), default=1))

        def dispatch(batch: buckets.Batch) -> Any:
            choices = [request.choices for request in batch.requests]
            packed = decode.pack_choices(choices, batch.rows, batch.targets_length)
            arrays = dict(zip(("inputs", "targets", "segments"), packed, strict=True))
            arrays |= batch.encoder_arrays()
            return self._score(self.params, self._place.put(arrays), num_choices=widest)

        scores: list[Any] = [None] * len(requests)
        for request, row in self._rows(requests, batch_size, dispatch):
            scores[request.key] = row[: len(request.choices)]
        return np.array([s[0] for s in scores], np.float32) if all(single) else scores

    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """Mean of the encoder's outputs over the tokens of each input, end of sequence included.

        Args:
          texts: inputs.
          batch_size: inputs at a time.

        Returns:
          float32 [inputs, D].
        """
        _check_list(texts)
        requests = [buckets.Request(i, self._tokens(text)) for i, text in enumerate(texts)]

        def dispatch(batch: buckets.Batch) -> Any:
            return self._embed(self.params, self._place.put(batch.encoder_arrays()))

        vectors: np.ndarray = np.zeros((len(requests), self.config.emb_dim), np.float32)
        for request, row in self._rows(requests, batch_size, dispatch):
            vectors[request.key] = row
        return vectors

    def predict(
        self,
        texts: Sequence[str],
        config: GenerateConfig | None = None,
        *,
        prefixes: Sequence[str] | None = None,
        batch_size: int = 32,
        first_row: int = 0,
    ) -> list[list[Prediction]]:
        """As `generate`, with tokens and scores.

        Args:
          texts: inputs.
          config: how to generate.
          prefixes: as in `generate`.
          batch_size: inputs at a time.
          first_row: number of the first input; a sample depends on seed, number and input alone.

        Returns:
          For each input its `num_return` predictions, best first; fewer where a beam search has
          finished fewer.
        """
        _check_list(texts)
        config = config or GenerateConfig()
        prefix_tokens: list[list[int]] = [[] for _ in texts]
        if prefixes is not None:
            _same_length(texts, prefixes, "prefixes")
            prefix_tokens = [self.tokenizer.encode(text, add_eos=False) for text in prefixes]
        longest = buckets.bucket(max(map(len, prefix_tokens), default=0))
        requests = [buckets.Request(i, self._tokens(text)) for i, text in enumerate(texts)]
        table = self._stop_table(tuple(config.stop)) if config.stop else None
        if self._weights is None:
            with self._place.context():
                self._weights = self._prepare(self.params)
        # The seed is an argument of the compiled program, not a part of it.
        static = dataclasses.replace(config, seed=0)
        context = {
            "eos": np.int32(self.tokenizer.eos_id),
            "seed": np.uint32(config.seed),
            "stop_table": table,
            "weights": self._weights,
        }

        def dispatch(batch: buckets.Batch) -> Any:
            of_batch = [request.key for request in batch.requests]
            arrays = batch.encoder_arrays()
            numbers: np.ndarray = np.zeros((batch.rows, 1), np.int32)
            numbers[: len(of_batch), 0] = np.array(of_batch) + first_row
            arrays["numbers"] = numbers
            if any(map(len, prefix_tokens)):
                given = [prefix_tokens[i] for i in of_batch]
                arrays["prefix"] = buckets.pad_rows(given, batch.rows, longest)
            return self._generate(
                self.params, self._place.put(arrays), context, generate_config=static
            )

        found: list[Any] = [None] * len(requests)
        for request, row in self._rows(requests, batch_size, dispatch):
            found[request.key] = self._predictions(row, config)
        return found

    # ------------------------------------------------------------------------------- batches

    def _tokens(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text)
        if len(tokens) > self.inputs_length:
            self.truncated += 1
            tokens = [*tokens[: self.inputs_length - 1], self.tokenizer.eos_id]
        return self._prompt + tokens

    def _rows(self, requests: list[buckets.Request], batch_size: int, dispatch: Any) -> Iterator:
        """Yields each request with its row of the result, in the order of the batches."""
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        multiple = self._place.row_multiple
        batches = buckets.plan_window(requests, batch_size, multiple)
        for batch, result in self._place.pipelined(batches, dispatch):
            for i, request in enumerate(batch.requests):
                yield request, jax.tree.map(lambda x: x[i], result)  # noqa: B023

    def _predictions(self, row: decode.Generated, config: GenerateConfig) -> list[Prediction]:
        predictions = []
        for tokens, length, score, log_probs in zip(
            row.tokens, row.lengths, row.scores, row.log_probs, strict=True
        ):
            if not math.isfinite(score):
                continue  # a beam search that has finished fewer hypotheses
            made = tokens[:length].tolist()
            text = self.tokenizer.decode(made)
            ends = [end for stop in config.stop if (end := text.find(stop)) >= 0]
            predictions.append(
                Prediction(
                    text[: min(ends, default=None)], made, float(score), log_probs[:length].tolist()
                )
            )
        if not predictions and config.num_return == 1:
            # All beams of a row can die of stop strings at once.
            predictions.append(Prediction("", [], -math.inf, []))
        return predictions

    def _make_stop_table(self, stop: tuple[str, ...]) -> np.ndarray:
        # Both sides as bytes of UTF-8, so that characters cut in two by a token are found, too.
        return stop_strings.table(
            self.tokenizer.pieces,
            [text.encode("utf-8").decode("latin-1") for text in stop],
            strip_first_space=self.tokenizer.strips_first_space,
        )

    def _generate_batch(
        self, params: model.Params, batch: dict, context: dict, *, generate_config: GenerateConfig
    ) -> decode.Generated:
        return self._place.replicate(
            decode.generate(
                self.config,
                generate_config,
                params,
                batch["encoder_inputs"],
                batch["encoder_segments"],
                rows_B=batch["numbers"][:, 0],
                seed=context["seed"],
                eos_id=context["eos"],
                prefix_BP=batch.get("prefix"),
                stop_table=context["stop_table"],
                weights=context["weights"],
            )
        )

    def _score_batch(self, params: model.Params, batch: dict, *, num_choices: int) -> jax.Array:
        scores_BC, *_ = decode.score_choices(
            self.config,
            params,
            batch["encoder_inputs"],
            batch["encoder_segments"],
            batch["inputs"],
            batch["targets"],
            batch["segments"],
            num_choices,
        )
        return self._place.replicate(scores_BC)

    def _embed_batch(self, params: model.Params, batch: dict) -> jax.Array:
        segments_BL = batch["encoder_segments"]
        encoded_BLD = model.encode(self.config, params, batch["encoder_inputs"], segments_BL)
        weights_BL = (segments_BL > 0).astype(jnp.float32)
        sums_BD = jnp.einsum("BLD,BL->BD", encoded_BLD.astype(jnp.float32), weights_BL)
        counts_B1 = jnp.maximum(jnp.sum(weights_BL, axis=1, keepdims=True), 1.0)
        return self._place.replicate(sums_BD / counts_B1)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    mesh: sharding.MeshConfig | None = None,
    tokenizer_folder: str | Path | None = None,
    inputs_length: int = 512,
    attention: str = "auto",
    scan_layers: bool | None = None,
    task: str | None = None,
) -> LoadedModel:
    """Loads a model onto the devices, tensor by tensor.

    Args:
      path: a run directory, one of its checkpoints, a converted checkpoint, a Hugging Face
        directory or a T5X checkpoint.
      step: which checkpoint of a run; None: the newest, or the one that the path names.
      dtype: "float32" or "bfloat16", of the parameters and the computation.
      mesh: how to share the devices; None: every device has the whole model and its own rows.
      tokenizer_folder: where its files are; None: those that the checkpoint carries along.
      inputs_length: longer inputs are cut.
      attention: as `T5.attention`.
      scan_layers: as `T5.scan_layers`; None: False for models below a billion parameters.
      task: of a run whose tasks have parameters of their own: whose; for a task that the model was
        not trained on its cluster, or "*" for the mean of all.

    Returns:
      The model, ready to `generate`, `score` and `embed`.

    Raises:
      UserError: no checkpoint there, a damaged one, no tokenizer, or a mesh that does not fit.
    """
    sharding.configure_jax()
    source = interop.open_source(path, step, task=task)
    words = tokenizer.load(tokenizer_folder or source.tokenizer_folder)
    config = dataclasses.replace(
        source.config,
        dtype=dtype,
        logits_dtype=dtype,
        dropout_rate=0.0,
        remat="none",
        attention=attention,
    )
    shapes = model.abstract_params(config)
    if scan_layers is None:
        scan_layers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) >= _UNROLLED
    config = dataclasses.replace(config, scan_layers=scan_layers)
    over = sharding.make_mesh(mesh or sharding.MeshConfig())
    where = placement.on_mesh(over)
    sharding.validate(over, config, where.row_multiple)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=place),
        shapes,
        sharding.params_shardings(over, model.param_axes(config)),
    )
    params = interop.load_params(source, abstract)
    if not config.scan_layers:
        params = model.unstack_encoder(config, params)
    return LoadedModel(
        config,
        params,
        words,
        where=where,
        step=source.step,
        notes=source.notes,
        inputs_length=inputs_length,
        prompt=source.prompt,
    )


def _options(config: GenerateConfig | None, options: dict[str, Any]) -> GenerateConfig:
    known = [field.name for field in dataclasses.fields(GenerateConfig)]
    for name in options:
        if name not in known:
            near = suggest(name, known)
            raise UserError(f"Generate has no field {name!r}.{near} Fields: {', '.join(known)}.")
    return dataclasses.replace(config or GenerateConfig(), **options)


def _check_list(texts: Sequence[Any]) -> None:
    if isinstance(texts, str):
        raise UserError("texts must be a list of texts, not one text.")


def _same_length(texts: Sequence[Any], others: Sequence[Any], name: str) -> None:
    if len(texts) != len(others):
        raise UserError(f"There are {len(texts)} texts but {len(others)} {name}.")
