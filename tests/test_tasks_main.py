"""`mtl-jax tasks`: the list and the examples, from a module of a user in the working directory."""

import argparse
import os
import re
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


@pytest.mark.slow
def test_without_a_module_what_ships_and_can_be_loaded_is_listed(tmp_path):
    """With a data folder of one's own, and a vocabulary that needs no file."""
    # A process of its own: in this one other tests may have imported those modules already, and an
    # import registers once.
    environment = os.environ | {"MTL_JAX_DATA": str(tmp_path), "MTL_JAX_VOCABULARY": "bytes"}
    command = [sys.executable, "-m", "mtl_jax", "tasks", "list"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for name in ("embedded_sentiment_good_or_bad", "embedded_train", "glue_rte_", "xnli_sw_"):
        assert name in done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("not listed: ")]
    assert len(told) == 6
    assert told[0].startswith("not listed: mtl_jax.tasks.p3 (The data folder")


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


PROMPTED = """
import seqio
from mtl_jax.tasks.prompted import add_prompted_tasks
from mtl_jax.tasks.prompts import Template

ROWS = [{"word": w, "label": n % 2} for n, w in enumerate(("cat", "bee", "dog"))]
FEATURE = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
add_prompted_tasks(
    "my/pets",
    lambda split: ROWS,
    [
        Template("is it?", "{{word}}? ||| {{ answer_choices[label] }}", "pet ||| wild"),
        Template("pets only", "{% if label == 0 %}{{word}} ||| pet{% endif %}"),
    ],
    {"inputs": FEATURE, "targets": FEATURE},
    {"test": 3},
    [],
)
"""


@pytest.fixture
def prompted(tmp_path):
    (tmp_path / "listed_module.py").write_text(PROMPTED)


@pytest.mark.parametrize(
    "which",
    [
        ["my/pets", "--prompt", "pets only"],
        ["my_pets", "--prompt", "pets_only"],
        ["my_pets_is_it", "--prompt", "my_pets_pets_only"],
        ["my_pets_pets_only"],
    ],
)
def test_show_a_prompt_of_a_dataset(which, prompted, capsys):
    run("show", *which, "--module", "listed_module", "--counts", "-n", "0")
    assert (
        capsys.readouterr().out
        == """\
my_pets_pets_only
  dataset  my/pets
  prompt   pets only
  split    test (of test)
  rows     3, of which 1 skipped
"""
    )


def test_show_all_prompts_of_a_dataset(prompted, capsys):
    run("show", "my/pets", "--module", "listed_module")
    out = capsys.readouterr().out
    assert out.count("example 0") == 2
    assert "example 1" not in out
    assert "rows" not in out


def test_unknown_prompts(prompted):
    module = ["--module", "listed_module"]
    with pytest.raises(UserError, match=r"no prompt 'pets olny'.*'pets only'.*has: is it\?, pets"):
        run("show", "my/pets", "--prompt", "pets olny", *module)
    with pytest.raises(UserError, match=r"No task or dataset 'my/pet' is.*Did you mean 'my/pets'"):
        run("show", "my/pet", *module)
    with pytest.raises(UserError, match="Name a task or a dataset"):
        run("show", *module)


TEMPLATES = """\
- name: is it?
  jinja: "{{word}}? ||| {{ answer_choices[label] }}"
  answer_choices: pet ||| wild
- name: pets only
  jinja: "{% if label == 0 %}{{word}} ||| cat{% endif %}"
  answer_choices: pet ||| wild
  reference: made up
"""


@pytest.fixture
def template_files(tmp_path):
    (tmp_path / "mine.yaml").write_text(TEMPLATES)
    rows = ['{"word": "cat", "label": 0}', '{"word": "bee", "label": 1}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))


def test_show_templates_that_are_not_registered(template_files, capsys):
    run("show", "--template", "mine.yaml", "--rows", "rows.jsonl")
    assert (
        capsys.readouterr().out
        == """\
is it?
  metadata original_task, en
  rows     2, of which 0 skipped

rows.jsonl, line 1
  inputs   cat?
  targets  pet
  choices  pet ||| wild

pets only
  metadata original_task, en
  source   made up
  rows     2, of which 1 skipped
  warning  the target is none of the choices: rows.jsonl, line 1

rows.jsonl, line 1
  inputs   cat
  targets  cat
  choices  pet ||| wild
"""
    )
    run("show", "--template", "mine.yaml", "--rows", "rows.jsonl", "--prompt", "is it?")
    out = capsys.readouterr().out
    assert "rows.jsonl, line 2" in out
    assert "pets only" not in out


def test_broken_templates_are_named(template_files, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(TEMPLATES.replace("{{word}} |||", "{{wrod}} |||"))
    message = r"Template 'pets only', rows\.jsonl, line 1: jinja uses the variable 'wrod'"
    flags = ["show", "--template", "mine.yaml", "--rows", "rows.jsonl"]
    with pytest.raises(UserError, match=rf"{message}.*Did you mean 'word'"):
        run(*flags, "--prompt", "pets only")
    with pytest.raises(UserError, match="1 of 2 templates are broken: 'pets only'"):
        run(*flags)
    assert re.search(f"broken   {message}", capsys.readouterr().out)


def test_flags_of_templates(template_files):
    with pytest.raises(UserError, match="--template needs --rows FILE too"):
        run("show", "--template", "mine.yaml")
    with pytest.raises(UserError, match="--rows needs --template FILE too"):
        run("show", "listed_first", "--rows", "rows.jsonl")
    flags = ["show", "--template", "mine.yaml", "--rows", "rows.jsonl"]
    with pytest.raises(UserError, match="--split is for registered tasks"):
        run(*flags, "--split", "test")
    with pytest.raises(UserError, match=r"no template 'is ti'.*Did you mean"):
        run(*flags, "--prompt", "is ti")
    with pytest.raises(UserError, match=r"row\.jsonl: No such file.*Did you mean 'rows\.j"):
        run("show", "--template", "mine.yaml", "--rows", "row.jsonl")
