"""SeqIO's offline cache: where it stands in a task, and its examples read back as they were.

    preprocessors=[*caching.HERE, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]

SeqIO's Apache Beam job writes what the steps before SeqIO's placeholder give (docs/pods.md). Texts
are cached rather than tokens: a cache serves every vocabulary, and `Data.exclude` knows an example
by its text.
"""

import functools
import json
import logging
from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow as tf

from mtl_jax.errors import UserError

# The number of an example's row, which sources add to their examples: the job shuffles them, and
# evaluation wants the order of the split again.
ROW = "row:number"
_BOOLEAN, _DOUBLE = ":boolean", ":double"
_JOB = "python -m seqio.scripts.cache_tasks_main"
_log = logging.getLogger(__name__)


def pack(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Makes whole numbers, under a name of their own, of what the job cannot write.

    SeqIO hands booleans to `tf.train.Int64List`, which protobuf 7 refuses ("Expected an int, got a
    boolean"); and it writes float64 as float32, but asks for float64 on reading.
    """

    def packed(example: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for name, value in example.items():
            if value.dtype == tf.bool:
                out[name + _BOOLEAN] = tf.cast(value, tf.int64)
            elif value.dtype == tf.float64:
                out[name + _DOUBLE] = _bits(value, tf.int64)
            else:
                out[name] = value
        return out

    dtypes = [getattr(spec, "dtype", None) for spec in dataset.element_spec.values()]
    changed = tf.bool in dtypes or tf.float64 in dtypes
    return dataset.map(packed) if changed else dataset


def unpack(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Undoes `pack`."""

    def unpacked(example: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for name, value in example.items():
            if name.endswith(_BOOLEAN):
                out[name.removesuffix(_BOOLEAN)] = tf.cast(value, tf.bool)
            elif name.endswith(_DOUBLE):
                out[name.removesuffix(_DOUBLE)] = _bits(value, tf.float64)
            else:
                out[name] = value
        return out

    changed = any(name.endswith((_BOOLEAN, _DOUBLE)) for name in dataset.element_spec)
    return dataset.map(unpacked) if changed else dataset


def _bits(value: Any, dtype: tf.DType) -> Any:
    return tf.ragged.map_flat_values(functools.partial(tf.bitcast, type=dtype), value)


# What a task's preprocessors have where its cache stands. Readers without a cache leave them out.
HERE: tuple[Any, ...] = (pack, seqio.CacheDatasetPlaceholder(), unpack)


def is_ours(step: Any) -> bool:
    """Whether a preprocessor does nothing where no cache is read or written."""
    return step in (pack, unpack) or isinstance(step, seqio.CacheDatasetPlaceholder)


def steps_after(preprocessors: Sequence[Any]) -> list[Any]:
    """Returns the preprocessors that a cached example still goes through."""
    places = [isinstance(step, seqio.CacheDatasetPlaceholder) for step in preprocessors]
    return list(preprocessors[places.index(True) + 1 :])


def add_folders(folders: Sequence[str]) -> None:
    """Makes SeqIO look for caches in these folders, too.

    Raises:
        UserError: one is no folder.
    """
    for folder in folders:
        if not tf.io.gfile.isdir(folder):
            raise UserError(f"Data.cache_dirs: {folder} is not a folder.")
    seqio.add_global_cache_dirs(folders)


def check(task: seqio.Task) -> bool:
    """Whether the task is to be read from its cache; False where it cannot have one.

    Raises:
        UserError: it can, but there is none.
    """
    if not task.supports_caching:
        _tell(task.name)
        return False
    if not task.cache_dir:
        folders = seqio.get_global_cache_dirs()
        where = f"in {', '.join(folders)}" if folders else "as Data.cache_dirs names no folder"
        raise UserError(
            f"use_cached: task {task.name!r} has no finished cache, {where}. Make it with "
            f"`{_JOB} --tasks={task.name} --output_cache_dir=FOLDER --module_import=MODULE` and "
            "name FOLDER in Data.cache_dirs, or leave use_cached off."
        )
    return True


@functools.cache
def _tell(name: str) -> None:
    """Once a task: it is opened several times."""
    _log.warning("use_cached: task %r cannot be cached, so it is read from its source", name)


def source(task: seqio.Task, split: str) -> seqio.DataSource:
    """Returns SeqIO's source of the cached examples of a task that `check` has found cached.

    Raises:
        UserError: the cache lacks the split, or files of it are missing.
    """
    try:
        found = task._get_cached_source(split)
        stated = json.loads(_text(seqio.get_cached_info_path(task.cache_dir, split)))["num_shards"]
        # Not `found.list_shards`: SeqIO remembers which files it has seen.
        files = len(
            tf.io.gfile.glob(f"{seqio.get_cached_tfrecord_prefix(task.cache_dir, split)}-*")
        )
    except (tf.errors.NotFoundError, json.JSONDecodeError, KeyError) as error:
        raise UserError(
            f"The cache {task.cache_dir} of task {task.name!r} has no readable split {split!r} "
            f"({type(error).__name__}). Make it again with the job's flag --overwrite."
        ) from error
    if files != stated:
        raise UserError(
            f"The cache {task.cache_dir} of task {task.name!r} has {files} of the {stated} files "
            f"of its split {split!r}: copy the missing ones, or make it again with the job's flag "
            "--overwrite."
        )
    return found


def _text(path: str) -> str:
    with tf.io.gfile.GFile(path) as file:
        return file.read()
