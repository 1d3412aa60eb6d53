"""SeqIO's Beam job writes caches that are read as the tasks themselves; wrong ones are told."""

import collections
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import cached_tasks
import numpy as np
import pytest
import seqio
import tensorflow as tf

from mtl_jax import caching
from mtl_jax.data import DataConfig, TrainStream, load_eval_task, load_modules
from mtl_jax.errors import UserError
from mtl_jax.reading import Epoch, TaskReader

LENGTHS = {"inputs": 200, "targets": 20}
# `make test-all` puts Beam there, as it does not fit the lock file.
BEAM = Path(sys.prefix) / "beam"
# DirectRunner would first look for a program of Beam's in the network.
RUNNER = "apache_beam.runners.portability.fn_api_runner.fn_runner.FnApiRunner"


@pytest.fixture(autouse=True)
def no_folders():
    """SeqIO keeps the folders of caches for the whole process, and so do tasks."""
    yield
    seqio.set_global_cache_dirs([])
    for name in cached_tasks.CACHED:
        seqio.TaskRegistry.get(name)._cache_dir = None


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """The folder that the job has written in a process of its own."""
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    if importlib.util.find_spec("apache_beam") is None:
        if not (BEAM / "apache_beam").is_dir():
            pytest.skip("needs Apache Beam: make .venv/beam/ready")
        path.insert(0, str(BEAM))
    folder = tmp_path_factory.mktemp("caches")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "seqio.scripts.cache_tasks_main"),
            f"--tasks={','.join(cached_tasks.CACHED)}",
            f"--output_cache_dir={folder}",
            "--module_import=cached_tasks",
            f"--pipeline_options=--runner={RUNNER}",
            "--min_shards=4",
            "--verbosity=-1",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return folder


def reader(name, use_cached, **options):
    return TaskReader(seqio.TaskRegistry.get(name), LENGTHS, use_cached, **options)


def pairs(reader, *, split="train", shuffle=True, seed=0, shard=None, start=0):
    epoch = Epoch(split, shuffle, seed, shard, start)
    return [tuple(map(tuple, sides)) for sides in reader.tokens(epoch)]


@pytest.mark.slow
def test_what_the_job_caches_is_read_as_the_task_itself(caches):
    load_modules(DataConfig(cache_dirs=[str(caches)]))
    for name in cached_tasks.CACHED:
        plain, cached = reader(name, False), reader(name, True)
        expected = collections.Counter(pairs(plain))
        first = pairs(cached)
        assert collections.Counter(first) == expected
        # An order for every seed, the same one each time, and from any place in it.
        assert pairs(cached) == first != pairs(cached, seed=1)
        assert pairs(cached, start=7) == first[7:]
        shards = [pairs(cached, shard=seqio.ShardInfo(number, 2)) for number in range(2)]
        assert all(shards)
        assert collections.Counter(shards[0] + shards[1]) == expected
        texts = [sorted(side.texts(Epoch("train", False, 0))) for side in (plain, cached)]
        assert texts[0] == texts[1]
        excluded = {fingerprint for _, _, fingerprint in texts[0][::3]}
        left = [pairs(reader(name, use, excluded=excluded)) for use in (False, True)]
        assert collections.Counter(left[0]) == collections.Counter(left[1]) != expected
    _evaluated()
    _trained_on(caches)


def _evaluated():
    """Evaluation gives the same examples in the same order, with all of their fields."""
    for name in (cached_tasks.GENERATE, cached_tasks.RANK):
        for limit in (None, 9):
            task, cached = (
                load_eval_task(name, "validation", 200, 20, limit, use_cached=use)
                for use in (False, True)
            )
            assert cached.examples == task.examples
            assert bool(task.examples[0].choices) == (name == cached_tasks.RANK)
    ranked = load_eval_task(cached_tasks.RANK, "validation", 200, 20, use_cached=True).examples
    assert 0 < len(ranked) < cached_tasks.SIZES["validation"]  # the template leaves rows out
    assert any(example.index != number for number, example in enumerate(ranked))
    # `==` would take 1 for True.
    assert {repr(example.fields["is_correct"]) for example in ranked} == {"True", "False"}
    assert {example.fields["weight"] for example in ranked} == {1.1, 2.1}
    # SeqIO's job keeps no order of sources that are not ours.
    task, cached = (
        load_eval_task("cached_tokens", "train", 200, 20, use_cached=use) for use in (False, True)
    )
    assert [example.index for example in cached.examples] == list(range(40))
    found = [
        sorted(
            (e.inputs_text, e.targets, e.inputs, repr(e.fields["is_correct"]), [*e.fields["idx"]])
            for e in read.examples
        )
        for read in (task, cached)
    ]
    assert found[0] == found[1]
    assert sum(example[3] == "True" for example in found[1]) == 20


def _trained_on(caches):
    """One epoch of the stream has the rows that it has without the cache."""
    epochs = []
    for use in (False, True):
        config = DataConfig(
            mixture=cached_tasks.TRAIN,
            **{f"{side}_length": length for side, length in LENGTHS.items()},
            batch_size=10,
            pack=False,
            prefetch=0,
            use_cached=use,
            cache_dirs=[str(caches)],
        )
        with TrainStream(config, {cached_tasks.TRAIN: 1}) as stream:
            rows = np.concatenate(
                [next(stream).arrays["encoder_input_tokens"] for _ in range(15)]
            ).tolist()
        epochs.append(sorted(rows))
    assert epochs[0] == epochs[1]


@pytest.mark.slow
def test_a_cache_that_lacks_something_is_told(caches):
    load_modules(DataConfig(cache_dirs=[str(caches)]))
    with pytest.raises(UserError, match="has no readable split 'test'"):
        pairs(reader("cached_tokens", True), split="test")
    [*files] = sorted((caches / "cached_tokens").glob("train.tfrecord-*"))
    hidden = files[0].rename(files[0].with_name("hidden"))
    try:
        with pytest.raises(UserError, match="has 3 of the 4 files of its split 'train'"):
            pairs(reader("cached_tokens", True))
    finally:
        hidden.rename(files[0])


def test_a_missing_cache_is_told(tmp_path, caplog):
    with pytest.raises(UserError, match=r"Data\.cache_dirs: .*nowhere is not a folder"):
        load_modules(DataConfig(cache_dirs=[str(tmp_path / "nowhere")]))
    with pytest.raises(UserError, match=r"no finished cache, as Data\.cache_dirs names no folder"):
        reader("cached_nowhere", True)
    load_modules(DataConfig(cache_dirs=[str(tmp_path)]))
    with pytest.raises(UserError, match=f"'cached_nowhere' has no finished cache, in {tmp_path}"):
        load_eval_task("cached_nowhere", "train", 200, 20, use_cached=True)
    caching._tell.cache_clear()
    with caplog.at_level(logging.WARNING, caching.__name__):
        read = [pairs(reader("cached_never", use)) for use in (True, True, False)]
    assert read[0] == read[1] == read[2]
    assert caplog.text.count("'cached_never' cannot be cached") == 1


def test_what_the_job_cannot_write_is_packed_into_whole_numbers():
    values = {"yes": [True, False], "half": [0.1, -3.5], "text": ["a", "b"], "number": [1, 2]}
    ragged = tf.ragged.constant([[True], [False, True]])
    dtypes = {"half": tf.float64, "number": tf.int64}
    columns = {name: tf.constant(v, dtypes.get(name)) for name, v in values.items()}
    dataset = tf.data.Dataset.from_tensor_slices(columns | {"truths": ragged})
    packed = caching.pack(dataset)
    assert {spec.dtype for spec in packed.element_spec.values()} == {tf.int64, tf.string}
    for example in packed:
        seqio.dict_to_tfexample(example)  # refuses booleans
    back = caching.unpack(packed)
    assert [spec.dtype for spec in back.element_spec.values()] == [
        spec.dtype for spec in dataset.element_spec.values()
    ]
    for before, after in zip(dataset, back, strict=True):
        for name, value in before.items():
            assert np.array_equal(value.numpy(), after[name].numpy())
