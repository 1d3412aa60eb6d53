"""`mtl-jax convert`: a checkpoint of any format to Hugging Face's or ours."""

import argparse
import math
import os
import re
import shutil
import sys
from pathlib import Path

from mtl_jax import tokenizer as tokenizers
from mtl_jax.errors import UserError
from mtl_jax.interop import adafactor, hf, native
from mtl_jax.interop.opening import detect, open_source
from mtl_jax.interop.source import Source, tensors
from mtl_jax.interop.t5x import T5xSource
from mtl_jax.storage import storage_errors

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
      UserError: nothing was converted, and nothing is left behind.
    """
    # Arrays stay with numpy; a GPU is not to be taken for this.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    source = open_source(args.source, args.step, t5x_options(args), args.task)
    for note in source.notes:
        print(f"mtl-jax convert: note: {note}.", file=sys.stderr)
    target = Path(args.target).expanduser()
    notes = convert(
        source,
        target,
        args.to,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        max_shard_bytes=parse_size(args.max_shard_size),
        keep_optimizer=args.optimizer == "keep",
    )
    if source.prompt and args.to == "hf":
        first, last = source.prompt[0], source.prompt[-1]
        notes.append(
            f"the model was trained with a prompt: put the token ids {first} to {last} in front of "
            "every input"
        )
    for note in notes:
        print(f"mtl-jax convert: note: {note}.", file=sys.stderr)
    count = sum(math.prod(shape) for shape in tensors(source.config).values())
    what = f"{count:,} parameters"
    if args.optimizer == "keep":
        what += f" and the optimizer's state of step {source.step:,}"
    print(f"{args.source} ({source.description}): {what} to {target} ({args.to})")


def t5x_options(args: argparse.Namespace) -> dict:
    """The options that only T5X checkpoints need, checked against the source."""
    options = {}
    if args.relpos_max_distance is not None:
        options["relpos_max_distance"] = args.relpos_max_distance
    if args.mlp_activations:
        options["mlp_activations"] = tuple(args.mlp_activations.split(","))
    if options and (kind := detect(args.source)) != "t5x":
        raise UserError(
            f"--{next(iter(options))} is for T5X checkpoints, which do not tell it; "
            f"{args.source} is of format {kind} and does."
        )
    return options


def convert(
    source: Source,
    target: Path,
    to: str,
    *,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    keep_optimizer: bool = False,
) -> list[str]:
    """Writes a checkpoint, one layer's tensor at a time; the target appears when it is complete.

    Args:
      source: from `open_source`.
      target: a directory that is not there yet, or is empty.
      to: "hf" or "mtl_jax".
      tokenizer: a vocabulary file or a folder of tokenizer files to carry along; None: those of the
        source.
      dtype: "float32" or "bfloat16", of the tensors of `to="hf"`.
      max_shard_bytes: of the files of `to="hf"`.
      keep_optimizer: convert the optimizer's state, too; from T5X's Adafactor to `to="mtl_jax"`.

    Returns:
      Notes for the user.

    Raises:
      UserError: the target is taken, something cannot be read or written, or there is no state of
        an optimizer that could be kept; nothing is left of the target.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already: name a new folder, or remove it first.")
    files = source.tokenizer_files if tokenizer is None else _given_files(Path(tokenizer))
    if to == "mtl_jax" and dtype != "float32":
        raise UserError(f"--dtype={dtype} is for --to hf; our own checkpoints are float32.")
    kept = _kept(source, to) if keep_optimizer else None
    # Beside the target, so that the last step is a rename within one file system.
    partial = target.absolute().with_name(f"{target.absolute().name}.partial-{os.getpid()}")
    try:
        with storage_errors("write the checkpoint", target):
            partial.mkdir(parents=True)
            notes = _optimizer_notes(source, to, kept)
            if to == "hf":
                notes += hf.write(source, partial, dtype, max_shard_bytes)
                folder = partial
            else:
                native.write(source, partial, kept)
                folder = partial / tokenizers.FOLDER
                folder.mkdir()
            for file in files:
                # A SentencePiece model goes by many names, but is sought by one.
                name = tokenizers.MODEL if file.suffix == ".model" else file.name
                shutil.copyfile(file, folder / name)
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return notes


def _kept(source: Source, to: str) -> native.KeptOptimizer:
    """The optimizer's state that `--optimizer keep` asks for."""
    if to != "mtl_jax":
        raise UserError(
            "--optimizer=keep: a Hugging Face directory has no place for an optimizer's state. Use "
            "--to mtl_jax, or --optimizer drop."
        )
    if isinstance(source, native.NativeSource):
        raise UserError(
            "--optimizer=keep is for T5X checkpoints. A run's state needs no conversion: start "
            "from the run itself (Run.restore_from) with Run.restore_optimizer = 'keep', or use "
            "--optimizer drop."
        )
    if not isinstance(source, T5xSource):
        raise UserError(
            f"--optimizer=keep: a {source.description} has no state of an optimizer. Use "
            "--optimizer drop."
        )
    return adafactor.kept_optimizer(source)


def _optimizer_notes(source: Source, to: str, kept: native.KeptOptimizer | None) -> list[str]:
    """What the user should know of the optimizer's state."""
    if kept is None:
        if to == "mtl_jax" and isinstance(source, T5xSource) and adafactor.has_state(source):
            return ["the optimizer's state is left out; --optimizer keep takes it along"]
        return []
    notes = [
        "a T5X checkpoint does not say how its optimizer made steps: give the fields of Optimizer, "
        f"the schedule's among them, T5X's values ({native.OPTIMIZER_GIN_FILE} has those that can "
        "be told)"
    ]
    if kept.momentum:
        notes.append("its state has momentum: set Optimizer.momentum to T5X's Adafactor.beta1")
    return notes


def _given_files(path: Path) -> list[Path]:
    """The tokenizer files that `--tokenizer` means."""
    path = path.expanduser()
    files = tokenizers.files(path) if path.is_dir() else [path] * path.is_file()
    if not files:
        what = "has no tokenizer files" if path.is_dir() else "does not exist"
        raise UserError(f"--tokenizer: {path} {what}.")
    return files


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" or "500MiB".

    Raises:
      UserError: another text.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text, re.IGNORECASE)
    if not found or (size := int(float(found[1]) * _UNITS[found[2].upper()])) < 1:
        raise UserError(f"--max_shard_size must be a size such as 5GB or 500MiB, got {text!r}.")
    return size
