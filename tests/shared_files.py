"""Tasks over four files each in the folder SHARED_FILES: `Data.task_modules = ('shared_files',)`.

A process whose folder has its own share of the files can read no other.
"""

import json
import os
from pathlib import Path

import seqio

from mtl_jax.sources import JsonlDataSource
from mtl_jax.task_info import describe
from mtl_jax.tasks.span_corruption import add_span_corruption_task

FILES = 4
ROWS = 10  # of each file
VOCABULARY = seqio.ByteVocabulary(extra_ids=100)


def write(folder, numbers):
    """Writes these files of the four; what is in one depends on its number alone."""
    folder.mkdir()
    for n in numbers:
        rows = [{"inputs": f"{n}{row}" * 3, "targets": f"{n}{row}"} for row in range(ROWS)]
        (folder / f"{n}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{n}.txt").write_text(f"text of file {n}: " + f"{n} and {n}\n" * ROWS)


def paths(ending):
    return [Path(os.environ["SHARED_FILES"]) / f"{number}.{ending}" for number in range(FILES)]


def register():
    """Registers `shared_rows`, `shared_text` and the mixture `shared` of both."""
    describe("shared_rows", dataset="rows")
    seqio.TaskRegistry.add(
        "shared_rows",
        source=JsonlDataSource(
            {"train": paths("jsonl")}, num_input_examples={"train": FILES * ROWS}
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={side: seqio.Feature(VOCABULARY) for side in ("inputs", "targets")},
    )
    add_span_corruption_task("shared_text", {"train": paths("txt")}, VOCABULARY, 12)
    seqio.MixtureRegistry.add("shared", ["shared_rows", "shared_text"], default_rate=1.0)


if "SHARED_FILES" in os.environ:
    register()
