"""`mtl-jax tasks`: the list and the examples, from a module of a user in the working directory."""

import argparse
import os
import subprocess
import sys

import pytest
import seqio

from mtl_jax import task_info, tasks_main
from mtl_jax.errors import UserError

MODULE = """
import seqio
from mtl_jax.sources import JsonlDataSource
from mtl_jax.task_info import describe

FEATURE = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
for name in ("listed_first", "listed_second"):
    seqio.TaskRegistry.add(
        name,
        source=JsonlDataSource({"train": "train.jsonl", "test": "absent.jsonl"}),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": FEATURE, "targets": FEATURE},
        metric_fns=[],
    )
describe("listed_second", dataset="letters", prompt="plain", family="spelling", citation="made up")
seqio.MixtureRegistry.add("listed_both", ["listed_first", "listed_second"], default_rate=1)
"""


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    (tmp_path / "listed_module.py").write_text(MODULE)
    lines = [f'{{"inputs": "spell {w}", "targets": "{"-".join(w)}"}}' for w in ("cat", "horse")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(task_info, "_INFOS", dict(task_info._INFOS))
    monkeypatch.setattr(seqio.TaskRegistry, "_REGISTRY", {})
    monkeypatch.setattr(seqio.MixtureRegistry, "_REGISTRY", {})
    yield
    sys.modules.pop("listed_module", None)


def run(*flags):
    parser = argparse.ArgumentParser()
    tasks_main.add_arguments(parser)
    return tasks_main.main(parser.parse_args(list(flags)))


LISTED = """\
task           dataset       prompt  family    splits
-------------  ------------  ------  --------  ----------
listed_first   listed_first  -       -         train,test
listed_second  letters       plain   spelling  train,test
2 tasks

mixture      tasks
-----------  -----
listed_both  2
"""


@pytest.mark.parametrize(
    "flags",
    [
        ["--module", "listed_module"],
        ["--module", "listed_module", "list"],
        ["list", "--module=listed_module", "listed"],
    ],
)
def test_list(flags, capsys):
    assert run(*flags) == 0
    assert capsys.readouterr().out == LISTED


def test_filter_and_nothing_found(capsys):
    run("--module", "listed_module", "list", "second")
    out = capsys.readouterr().out
    assert "listed_second" in out
    assert "listed_first " not in out
    run("--module", "listed_module", "list", "listed_frist")
    assert "Did you mean 'listed_first'" in capsys.readouterr().out


def test_without_a_module_what_ships_is_listed():
    # A process of its own: in this one other tests may have imported those modules already, and an
    # import registers once.
    environment = {name: value for name, value in os.environ.items() if name != "MTL_JAX_DATA"}
    command = [sys.executable, "-m", "mtl_jax", "tasks", "list"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "embedded_sentiment_good_or_bad" in done.stdout
    assert "embedded_train" in done.stdout


def test_counts_read_the_files(tmp_path, capsys):
    with pytest.raises(UserError, match=r"absent\.jsonl: No such file"):
        run("--module", "listed_module", "--counts")
    (tmp_path / "absent.jsonl").write_text('{"inputs": "a", "targets": "b"}\n')
    sys.modules.pop("listed_module")
    seqio.TaskRegistry.reset()
    seqio.MixtureRegistry.reset()
    run("--module", "listed_module", "--counts")
    assert "train,test  2,1" in capsys.readouterr().out


def test_show(capsys):
    run("show", "listed_second", "--module", "listed_module", "-n", "1", "--targets_length", "5")
    assert (
        capsys.readouterr().out
        == """\
listed_second
  dataset  letters
  prompt   plain
  family   spelling
  split    train (of train, test)
  source   made up

example 0
  inputs   spell cat
           118 115 104 111 111 35 102 100 119 1
           10 tokens, 9 characters
  targets  c-a-t
           102 48 100 48 119 1
           6 tokens, 5 characters, longer than 5: will be cut
"""
    )


def test_unknown_names():
    with pytest.raises(UserError, match=r"'listed_frist'.*Did you mean 'listed_first'"):
        run("show", "listed_frist", "--module", "listed_module")
    with pytest.raises(UserError, match="'listed_both' is a mixture of 2 tasks"):
        run("show", "listed_both", "--module", "listed_module")
    with pytest.raises(UserError, match=r"no split 'tst'.*'test'"):
        run("show", "listed_first", "--module", "listed_module", "--split", "tst")
    with pytest.raises(UserError, match="-n must be at least 0"):
        run("show", "listed_first", "--module", "listed_module", "-n", "-1")
    with pytest.raises(UserError, match=r"'listed_modul'.*'listed_module'"):
        run("--module", "listed_modul")
