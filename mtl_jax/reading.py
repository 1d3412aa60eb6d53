"""One epoch of one SeqIO task as tokens, cheap to open.

Opening a task the way SeqIO does traces a TensorFlow function for every preprocessor and loads
the vocabulary into every one that tokenizes: 0.2 to 0.4 s a task, a minute and more for a mixture
of 300. Nearly all tasks end with SeqIO's `tokenize` and `append_eos`, so that end is done here in
Python, with the same vocabulary and the same result (tested against SeqIO). What stands before it
runs in TensorFlow as it is; where nothing does and the source holds its rows in memory, no
TensorFlow runs at all.
"""

import functools
import inspect
import itertools
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mtl_jax import caching
from mtl_jax.errors import UserError
from mtl_jax.overlap import fingerprint
from mtl_jax.sources import RowsDataSource
from mtl_jax.vocabulary import TokenizerVocabulary

SIDES = ("inputs", "targets")
_log = logging.getLogger(__name__)
_TEXT = "inputs_pretokenized"
_NOTHING = np.zeros(0, np.int32)
_SEARCH = 60.0  # seconds that naming damaged files may take
_CHUNK = 16  # elements that cross from TensorFlow to Python together
_SHORT_BUFFER = 64  # shuffle buffer where the source already permutes the whole split
_CACHE_BUFFER = 1000  # SeqIO's: of a cache only the files are permuted
_AFTER_TRIM = seqio.preprocessors.append_eos_after_trim
_EOS_STEPS = (seqio.preprocessors.append_eos, _AFTER_TRIM)
_PLAIN_VOCABULARIES = (
    seqio.SentencePieceVocabulary,
    seqio.ByteVocabulary,
    TokenizerVocabulary,
)


@dataclass(frozen=True)
class Epoch:
    """Which pass over a task's split is read, and from where."""

    split: str
    shuffle: bool
    seed: int
    shard_info: seqio.ShardInfo | None = None
    start: int = 0


class TaskReader:
    """Reads tokens of a task, not trimmed (unless a preprocessor of the task trims)."""

    def __init__(
        self,
        task: seqio.Task,
        lengths: Mapping[str, int],
        use_cached: bool = False,
        excluded: Collection[str] = (),
        most_corrupt: int = 0,
    ):
        """Looks at the task's preprocessors; opens nothing.

        Args:
            task: yields 1-D integer `inputs` and `targets`.
            lengths: given to preprocessors that ask for `sequence_length`.
            use_cached: read SeqIO's offline cache; a task that cannot have one is read as ever.
            excluded: fingerprints of inputs (`overlap.fingerprint`) that `tokens` gives no tokens.
            most_corrupt: records that each pass of `tokens` may leave out because TensorFlow or a
                preprocessor fails on them.

        Raises:
            UserError: the task has not the two sides an encoder-decoder needs, or no cache.
        """
        missing = [side for side in SIDES if side not in task.output_features]
        if missing:
            raise UserError(
                f"Task {task.name!r} has no output feature {missing[0]!r} (it has "
                f"{', '.join(task.output_features)}); an encoder-decoder needs inputs and targets."
            )
        self.task = task
        self._excluded = frozenset(excluded)
        self._most_corrupt = most_corrupt
        self._lengths = {side: lengths[side] for side in SIDES}
        self.cached = use_cached and caching.check(task)
        self._as_seqio = type(task) is not seqio.Task
        steps = (
            caching.steps_after(task.preprocessors)
            if self.cached
            else [step for step in task.preprocessors if not caching.is_ours(step)]
        )
        self._after_trim = _AFTER_TRIM in steps
        self._steps: list[Any] = steps
        self._encoders: dict[str, Callable[[Any], np.ndarray]] = {}
        if not self._as_seqio:
            self._steps, self._encoders = self._without_tokenizer(steps)

    @property
    def without_tensorflow(self) -> bool:
        """Whether the task is read in Python alone, which is quick to open."""
        in_python = bool(self._encoders) and not self._steps and not self.cached
        return in_python and hasattr(self.task.source, "examples")

    def first_apart(self, split: str, shards: int) -> seqio.ShardInfo | None:
        """The first of so many shards, where it is read without the rows of others; or None."""
        first = seqio.ShardInfo(0, shards)
        ours = not self.cached and isinstance(self.task.source, RowsDataSource)
        return first if ours and self.task.source.apart(split, first) else None

    def eos_after_trim(self, side: str) -> int | None:
        """Returns the EOS that ends a side even after trimming, None where trimming cuts it off."""
        feature = self.task.output_features[side]
        return int(feature.vocabulary.eos_id) if self._after_trim and feature.add_eos else None

    def _without_tokenizer(
        self, steps: list[Any]
    ) -> tuple[list[Any], dict[str, Callable[[Any], np.ndarray]]]:
        """Splits off a standard end (tokenize, append EOS), as one Python encoder for each side."""
        features = self.task.output_features
        if not all(isinstance(f.vocabulary, _PLAIN_VOCABULARIES) for f in features.values()):
            return steps, {}
        rest, eos = list(steps), False
        if rest and rest[-1] in _EOS_STEPS:
            eos = bool(rest.pop())
        if rest and rest[-1] is seqio.preprocessors.tokenize:
            rest.pop()
        elif rest and not eos and rest[-1] is seqio.preprocessors.tokenize_and_append_eos:
            eos = bool(rest.pop())
        else:
            return steps, {}
        return rest, {
            side: functools.partial(encode, feature=features[side], eos=eos) for side in SIDES
        }

    def tokens(self, epoch: Epoch) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
        """Yields `(inputs, targets)`, int32 of any length, from example `epoch.start` on.

        An excluded example comes with both sides empty, and for a corrupt record that is left out
        comes None, so that they count in positions.

        Raises:
            UserError: what a source or preprocessor of ours found wrong, also inside TensorFlow;
                too many corrupt records.
        """
        inputs_of, targets_of = (self._encoders.get(side, _as_int32) for side in SIDES)
        for example in self._examples(epoch, whole=False, most_corrupt=self._most_corrupt):
            if example is None:
                yield None
                continue
            if self._excluded and _fingerprint(example) in self._excluded:
                yield _NOTHING, _NOTHING
                continue
            yield inputs_of(example["inputs"]), targets_of(example["targets"])

    def examples(self, epoch: Epoch) -> Iterator[dict[str, Any]]:
        """Yields examples with all their fields; texts are str, `*_pretokenized` are kept."""
        return (example for _, example in self.numbered(epoch))

    def numbered(self, epoch: Epoch) -> Iterator[tuple[int | None, dict[str, Any]]]:
        """Yields the number of the row, where a cache has it, and the example with all fields."""
        for example in filter(None, self._examples(epoch, whole=True)):
            example = {name: _python(value) for name, value in example.items()}
            number = example.pop(caching.ROW, None)
            for side, encoder in self._encoders.items():
                example[f"{side}_pretokenized"] = example[side]
                example[side] = encoder(example[side])
            yield number if self.cached else None, example

    def texts(self, epoch: Epoch) -> Iterator[tuple[str, str, str]]:
        """Yields `(inputs, targets, fingerprint of the inputs)` of all examples, as texts."""
        for example in filter(None, self._examples(epoch, whole=False)):
            inputs, targets = (self._text(side, example[side]) for side in SIDES)
            yield inputs, targets, _fingerprint(example)

    def _text(self, side: str, value: Any) -> str:
        if isinstance(value, str | bytes):
            return value.decode() if isinstance(value, bytes) else value
        return self.task.output_features[side].vocabulary.decode([int(token) for token in value])

    def _examples(
        self, epoch: Epoch, whole: bool, most_corrupt: int = 0
    ) -> Iterator[Mapping[str, Any] | None]:
        """The examples from `epoch.start` on, None for a record that is left out."""
        if self.without_tensorflow:
            yield from self.task.source.examples(
                epoch.split, epoch.shuffle, epoch.seed, epoch.shard_info, start=epoch.start
            )
            return
        dataset = self._dataset(epoch)
        for side in SIDES:
            spec = dataset.element_spec.get(side)
            rank = 0 if self._encoders else 1
            if not isinstance(spec, tf.TensorSpec) or spec.shape.rank != rank:
                found = f"are {spec}" if spec is not None else "are missing"
                raise UserError(
                    f"Task {self.task.name!r}: after its preprocessors the {side} {found}, but a "
                    f"tensor of rank {rank} is needed."
                )
        if most_corrupt:
            # From the first on, as records that are left out count in the position.
            tolerant = self._tolerant(dataset, epoch, most_corrupt)
            yield from itertools.islice(tolerant, epoch.start, None)
            return
        dataset = dataset.skip(epoch.start) if epoch.start else dataset
        try:
            yield from (
                dataset.as_numpy_iterator() if whole else _chunks(dataset, self._crossing(dataset))
            )
        except tf.errors.OpError as error:
            raise _understood(error, self.task.name, self._damaged(epoch, error)) from error

    def _tolerant(
        self, dataset: tf.data.Dataset, epoch: Epoch, most: int
    ) -> Iterator[Mapping[str, Any] | None]:
        """One example at a time, as TensorFlow would drop a whole chunk; None for a corrupt one."""
        examples, corrupt = dataset.as_numpy_iterator(), 0
        while True:
            try:
                example = next(examples, None)
            except tf.errors.OpError as error:
                found = _understood(error, self.task.name, self._damaged(epoch, error))
                if not _of_a_record(error):
                    raise found from error
                if corrupt == most:
                    ours = isinstance(found, UserError)  # then it names the task
                    said = found if ours else f"Task {self.task.name!r}: {found}".splitlines()[0]
                    raise UserError(
                        f"{said} {corrupt} records before it are corrupt, too, and were left out "
                        "of this pass: as many as Data.max_corrupt allows. Mend the data, or allow "
                        "more."
                    ) from error
                corrupt += 1
                _log.warning("left out corrupt record %d (at most %d): %s", corrupt, most, found)
                yield None
                continue
            if example is None:
                return
            yield example

    def _damaged(self, epoch: Epoch, error: tf.errors.OpError) -> str:
        """The files read in which TensorFlow finds damage of this kind, as it names none."""
        if not isinstance(error, tf.errors.DataLossError):
            return ""
        source = caching.source(self.task, epoch.split) if self.cached else self.task.source
        files, shard = source.list_shards(split=epoch.split), epoch.shard_info
        if shard is not None and 1 < shard.num_shards <= len(files):
            files = files[shard.index :: shard.num_shards]
        return _damaged_files(tuple(files))

    def _crossing(self, dataset: tf.data.Dataset) -> tuple[str, ...]:
        """The fields that are read for training: the sides and, of cached tokens, their text."""
        return SIDES + (_TEXT,) * (self.cached and _TEXT in dataset.element_spec)

    def _dataset(self, epoch: Epoch) -> tf.data.Dataset:
        """The task's dataset up to the tokenizer: what `seqio.Task.get_dataset` does."""
        task = self.task
        if self._as_seqio:
            dataset = task.get_dataset(
                sequence_length=self._lengths,
                split=epoch.split,
                use_cached=self.cached,
                shuffle=epoch.shuffle,
                seed=epoch.seed,
                shard_info=epoch.shard_info,
                num_epochs=1,
                trim_output_features=False,
                try_in_mem_cache=False,
            )
            return dataset.with_options(_options())
        source = caching.source(task, epoch.split) if self.cached else task.source
        dataset = _source_dataset(source, epoch)
        with seqio.map_seed_manager(epoch.seed):
            for step in self._steps:
                # append_eos_after_trim would trim before anybody could count it.
                lengths = None if step is _AFTER_TRIM else self._lengths
                dataset = seqio.add_kwargs_to_transform(
                    step, sequence_length=lengths, output_features=task.output_features
                )(dataset)
        buffer = task.shuffle_buffer_size or (_CACHE_BUFFER if self.cached else None)
        if epoch.shuffle and buffer:
            if getattr(source, "permutes_whole_split", False):
                buffer = min(buffer, _SHORT_BUFFER)
            dataset = dataset.shuffle(buffer, seed=epoch.seed)
        return dataset.with_options(_options())


def encode(text: str | bytes, feature: seqio.Feature, eos: bool) -> np.ndarray:
    """Tokenizes a text as SeqIO's `tokenize` and `append_eos` do; int32 tokens."""
    vocabulary = feature.vocabulary
    tokens = vocabulary.encode(text.decode() if isinstance(text, bytes) else text)
    if eos and feature.add_eos:
        tokens = [*tokens, vocabulary.eos_id]
    return np.array(tokens, np.int32)


def _fingerprint(example: Mapping[str, Any]) -> str:
    """Of the inputs before they were tokenized, also where a cache has them as tokens."""
    return fingerprint(example.get(_TEXT, example["inputs"]))


def _as_int32(tokens: Any) -> np.ndarray:
    return np.asarray(tokens, np.int32)


def _python(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_python(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


@functools.cache
def _options() -> tf.data.Options:
    """For hundreds of small pipelines: tuning and rewriting them costs more than it wins."""
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return options


def _source_dataset(source: Any, epoch: Epoch) -> tf.data.Dataset:
    """A shard of the source, sharded by the source itself where it can, as SeqIO does."""
    seed: int | None = epoch.seed
    function = getattr(source, "_dataset_fn", None)
    if function is not None and "seed" not in inspect.signature(function).parameters:
        # SeqIO refuses a seed for such a function, and without one its shuffling differs from run
        # to run; the shuffle buffer behind it is seeded.
        epoch, seed = Epoch(epoch.split, False, epoch.seed, epoch.shard_info), None
    arguments = {"split": epoch.split, "shuffle": epoch.shuffle, "seed": seed}
    shard = epoch.shard_info
    if shard is None:
        return source.get_dataset(**arguments)
    if source.supports_arbitrary_sharding:
        return source.get_dataset(**arguments, shard_info=shard)
    if 1 < shard.num_shards <= len(source.list_shards(split=epoch.split)):
        return source.get_dataset(**arguments, shard_info=shard)
    return source.get_dataset(**arguments).shard(shard.num_shards, shard.index)


def _chunks(dataset: tf.data.Dataset, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Yields these fields; several elements cross at once, for one crossing costs 0.2 ms."""
    specs = dataset.element_spec
    if any(not isinstance(s, tf.TensorSpec) or s.shape.rank is None for s in specs.values()):
        dataset = dataset.map(lambda example: {name: example[name] for name in names})
        specs = dataset.element_spec
    numeric = [name for name in names if specs[name].dtype != tf.string]
    # No token is -1, so the padding of the chunk can be told from tokens, 0 included.
    fill = {
        name: ""
        if spec.dtype == tf.string
        else tf.constant(-1 if name in SIDES else 0, spec.dtype)
        if spec.dtype.is_integer or spec.dtype.is_floating
        else tf.zeros([], spec.dtype)
        for name, spec in specs.items()
    }
    for chunk in dataset.padded_batch(_CHUNK, padding_values=fill).with_options(_options()):
        columns = [chunk[name].numpy() for name in names]
        for values in zip(*columns, strict=True):
            example = dict(zip(names, values, strict=True))
            for name in numeric:
                example[name] = example[name][example[name] >= 0]
            yield example


def _of_a_record(error: tf.errors.OpError) -> bool:
    """Whether the next record may be sound: not where storage or a source of ours fails."""
    if "UserError: " in str(error):
        return False
    if isinstance(error, tf.errors.UnknownError):  # also of the system: but not from Python
        return "Traceback (most recent call last)" in str(error)
    return isinstance(error, tf.errors.DataLossError | tf.errors.InvalidArgumentError)


@functools.cache
def _damaged_files(files: Sequence[str]) -> str:
    """Those that are found within a minute: there may be more than one could read through."""
    end = time.monotonic() + _SEARCH
    return ", ".join(path for path in files if time.monotonic() < end and _is_damaged(path))


def _is_damaged(path: str) -> bool:
    try:
        for _ in tf.data.TFRecordDataset(path):
            pass
    except tf.errors.OpError as error:
        return isinstance(error, tf.errors.DataLossError)
    return False


def _understood(error: tf.errors.OpError, task: str, damaged: str) -> Exception:
    """Finds the UserError that a Python function raised inside TensorFlow, else names the task."""
    found = re.search(r"UserError: (.*?)(?:\n|$)", str(error))
    if found:
        return UserError(found.group(1).strip())
    if damaged:
        return UserError(
            f"Task {task!r}: damaged records, and with each what follows in its file, in {damaged} "
            f"({error.message})."
        )
    error.add_note(f"while reading the task {task!r}")
    return error


def tasks_of(provider: seqio.Task | seqio.Mixture) -> Sequence[seqio.Task]:
    """Returns the tasks of a mixture sorted by name, or the task itself."""
    return provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
