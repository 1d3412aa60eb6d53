"""What comes from a stranger runs no code and names no files outside of its own folder."""

import ast
import json
import pathlib
import shutil

import flax.serialization
import hf_folders
import numpy as np
import pytest
import tensorstore

import mtl_jax
from mtl_jax import checksums, interop
from mtl_jax.errors import UserError

# Modules whose reading of a file runs code of it, or that write where it says.
MODULES = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"),
    *("tarfile", "zipimport", "runpy"),
}
# Functions that do so, of modules that are used otherwise.
FUNCTIONS = {
    *("unpack_archive", "ZipFile", "PyZipFile", "extractall", "read_pickle", "torch.load"),
    *("unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "UnsafeLoader", "FullLoader"),
}


def runs_code(text):
    """What a program's text has of it; a pickle or an archive, for example."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names]
            found |= MODULES & {name.split(".")[0] for name in named} | FUNCTIONS & {*named}
        if isinstance(node, ast.Attribute):
            found |= FUNCTIONS & {node.attr, ast.unparse(node)}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= {"eval", "exec", "__import__"} & {node.func.id}
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found |= set() if ast.unparse(node.value) == "False" else {node.arg}
    return found


def test_nothing_that_runs_code_from_files_is_used():
    """No pickle, no archives, no evaluation of texts, in the whole package and the tasks."""
    root = pathlib.Path(mtl_jax.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "tasks").rglob("*.py")]
    assert len(files) > 100
    for path in files:
        assert not runs_code(path.read_text()), path


@pytest.mark.parametrize(
    "text",
    [
        *("import pickle", "from torch import load", "import tarfile as t", "eval('1')"),
        *("shutil.unpack_archive(x)", "from shutil import unpack_archive", "a.extractall()"),
        *("zipfile.ZipFile(x)", "from zipfile import ZipFile", "np.load(x, allow_pickle=yes)"),
        *("torch.load(x)", "yaml.load(x, yaml.UnsafeLoader)"),
    ],
)
def test_what_runs_code_from_files_is_seen(text):
    assert runs_code(text)
    assert not runs_code("try: np.load(x, allow_pickle=False)\nexcept zipfile.BadZipFile: pass")


# ---------------------------------------------------------------------------- paths

OUTSIDE = ("../secret", "../../elsewhere/../secret", "{folder}/secret")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_list_of_checksums_names_no_files_outside(tmp_path, name):
    (tmp_path / "secret").write_text("x")
    item = tmp_path / "meta"
    item.mkdir()
    (item / "inside").write_text("x")
    checksums.write(item)
    assert not checksums.problem([item])
    files = {name.format(folder=tmp_path): [1, "0"]}
    (item / checksums.NAME).write_text(json.dumps({"blake2b": files}))
    assert "leaves its folder" in checksums.problem([item])


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_index_of_hugging_face_names_no_files_outside(tmp_path, name):
    """The file that it names is there and would be read."""
    folder = hf_folders.make(tmp_path / "model", "t5", shards=2)
    interop.open_source(folder)
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    first = min(told["weight_map"].values())
    shutil.copy(folder / first, tmp_path / "secret")
    outside = name.format(folder=tmp_path)
    told["weight_map"] = {
        tensor: outside if file == first else file for tensor, file in told["weight_map"].items()
    }
    index.write_text(json.dumps(told))
    with pytest.raises(UserError, match="weight_map must give a file name for every tensor"):
        interop.open_source(folder)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_checkpoint_of_t5x_names_no_arrays_outside(tmp_path, name):
    """Its arrays are sought beside it, by the last part of their paths."""
    folder = tmp_path / "checkpoint_7"
    folder.mkdir()

    def write(place):
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(place)}}
        metadata = {"dtype": "<f4", "shape": [3, 2], "chunks": [3, 2]}
        array = tensorstore.open(spec | {"metadata": metadata}, create=True).result()
        array.write(np.ones((3, 2), np.float32)).result()

    write(tmp_path / "secret")
    kvstore = {"driver": "file", "path": name.format(folder=tmp_path)}
    embedding = {"driver": "zarr", "kvstore": kvstore, "metadata": {}}
    tree = {"target": {"token_embedder": {"embedding": embedding}}, "state": {"step": 7}}
    content = flax.serialization.msgpack_serialize({"version": 3, "optimizer": tree})
    (folder / "checkpoint").write_bytes(content)
    with pytest.raises(UserError, match=f"{folder}/secret is missing, where tensor token_embedder"):
        interop.open_source(folder)
    write(folder / "secret")
    with pytest.raises(UserError, match=r"tensor encoder/.* is missing"):  # it has only this one
        interop.open_source(folder)


@pytest.mark.parametrize("path", ["", "..", "a/.."])
def test_a_checkpoint_of_t5x_names_folders(tmp_path, path):
    embedding = {"driver": "zarr", "kvstore": {"driver": "file", "path": path}, "metadata": {}}
    tree = {"target": {"token_embedder": {"embedding": embedding}}, "state": {"step": 7}}
    content = flax.serialization.msgpack_serialize({"version": 3, "optimizer": tree})
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(UserError, match="embedding names no folder of its own"):
        interop.open_source(tmp_path)
