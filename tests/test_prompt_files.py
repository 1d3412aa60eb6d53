"""Files of templates: PromptSource's YAML, plain YAML, JSON lines and folders; what is refused."""

import gzip
import json
import pickle

import pytest
import yaml

from mtl_jax.errors import UserError
from mtl_jax.tasks.prompt_files import label, read_entries
from mtl_jax.tasks.prompts import Template, load_templates

PROMPTSOURCE = """\
dataset: super_glue
subset: cb
templates:
  2e76cd0f-68ca-4f03-83ed-11cf15b25a84: !Template
    answer_choices: Yes ||| No ||| Maybe
    id: 2e76cd0f-68ca-4f03-83ed-11cf15b25a84
    jinja: 'Suppose {{premise}} Can we infer that "{{hypothesis}}"? ||| {% if label !=-1
      %}{{ answer_choices[label] }}{% endif %}'
    metadata: &id001 !TemplateMetadata
      choices_in_prompt: true
      languages:
      - en
      metrics:
      - Accuracy
      original_task: true
    name: can we infer
    reference: Webson & Pavlick 2021
  358860fd-61ad-45fd-92a6-a72ca9107ebc: !Template
    answer_choices: null
    id: 358860fd-61ad-45fd-92a6-a72ca9107ebc
    jinja: "{{premise}} Continue: ||| {{hypothesis}}"
    metadata: !TemplateMetadata
      choices_in_prompt: null
      languages: []
      metrics: []
      original_task: false
    name: generate
    reference: ''
"""


def write(folder, text, name="templates.yaml"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_promptsource_yaml(tmp_path):
    first, second = load_templates(write(tmp_path, PROMPTSOURCE), "super_glue", "cb")
    assert first == Template(
        "can we infer",
        'Suppose {{premise}} Can we infer that "{{hypothesis}}"? '
        "||| {% if label !=-1 %}{{ answer_choices[label] }}{% endif %}",
        "Yes ||| No ||| Maybe",
        original_task=True,
        choices_in_prompt=True,
        metrics=("Accuracy",),
        languages=("en",),
        reference="Webson & Pavlick 2021",
    )
    assert (second.answer_choices, second.original_task, second.languages) == ("", False, ())


@pytest.mark.parametrize(
    "text",
    [
        "- name: one\n  jinja: '{{a}} ||| {{b}}'\n- name: two\n  jinja: x ||| y\n"
        "  answer_choices: No\n",
        "templates:\n- name: one\n  jinja: '{{a}} ||| {{b}}'\n- name: two\n  jinja: x ||| y\n"
        "  answer_choices: No\n",
        "one:\n  jinja: '{{a}} ||| {{b}}'\ntwo:\n  jinja: x ||| y\n  answer_choices: No\n",
    ],
)
def test_plain_yaml(tmp_path, text):
    """Name, jinja and answer_choices are enough; `No` is a text, not YAML 1.1's false."""
    expected = [Template("one", "{{a}} ||| {{b}}"), Template("two", "x ||| y", "No")]
    path = write(tmp_path, text)
    assert load_templates(path) == expected
    assert load_templates(path, "any", "thing", ["two"]) == expected[1:]


def test_metadata_stands_where_you_like(tmp_path):
    flat = "- {name: 1, jinja: a ||| b, original_task: false, languages: [no]}"
    below = "- {name: 1, jinja: a ||| b, metadata: {original_task: false, languages: [no]}}"
    [template] = load_templates(write(tmp_path, flat))
    assert load_templates(write(tmp_path, below)) == [template]
    expected = Template("1", "a ||| b", original_task=False, languages=("no",))
    assert template == expected


def test_several_datasets_in_one_file(tmp_path):
    text = "dataset: d\ntemplates:\n- {name: n, jinja: a ||| b}\n---\n"
    path = write(
        tmp_path,
        text + text.replace("dataset: d", "dataset: d\nsubset: s").replace("||| b", "||| c"),
    )
    assert load_templates(path, "d")[0].jinja == "a ||| b"
    assert load_templates(path, "d", "s") == load_templates(path, "d/s")
    assert load_templates(path, "d/s")[0].jinja == "a ||| c"
    with pytest.raises(UserError, match="templates of 2 datasets; say which: d, d/s"):
        load_templates(path)
    with pytest.raises(UserError, match=r"no templates for 'd/t'.*Did you mean 'd/s'"):
        load_templates(path, "d", "t")


def test_names(tmp_path):
    path = write(tmp_path, "- {name: GPT-3 style, jinja: a ||| b}\n- {name: two, jinja: a ||| c}\n")
    assert [t.name for t in load_templates(path)] == ["GPT-3 style", "two"]
    assert [t.name for t in load_templates(path, names=["two", "gpt_3_style"])] == [
        "two",
        "GPT-3 style",
    ]
    assert load_templates(path, names=[]) == []
    with pytest.raises(UserError, match=r"no template 'tow'.*Did you mean 'two'"):
        load_templates(path, names=["tow"])
    twice = write(tmp_path, "- {name: n, jinja: a ||| b}\n- {name: n, jinja: a ||| c}\n")
    with pytest.raises(UserError, match="two templates of the name 'n'"):
        load_templates(twice)


def test_a_folder_names_datasets_by_place(tmp_path):
    plain = "- {name: n, jinja: a ||| b}\n"
    write(tmp_path, PROMPTSOURCE, "super_glue/cb/templates.yaml")
    write(tmp_path, plain, "Zaid/quac/templates.yaml")
    write(tmp_path, plain.replace("b", "c"), "mine.yaml")
    assert len(load_templates(tmp_path, "super_glue", "cb")) == 2
    assert load_templates(tmp_path, "Zaid/quac")[0].jinja == "a ||| b"
    assert load_templates(tmp_path, "mine")[0].jinja == "a ||| c"
    with pytest.raises(UserError, match=r"no templates for 'super_glue/bc'.*'super_glue/cb'"):
        load_templates(tmp_path, "super_glue", "bc")
    # Only the file of the dataset is read where there is one.
    write(tmp_path, "[", "broken/templates.yaml")
    assert load_templates(tmp_path, "super_glue", "cb")
    with pytest.raises(UserError, match=r"broken.templates\.yaml, line"):
        load_templates(tmp_path, "mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"it has no \.yaml file"):
        load_templates(tmp_path / "empty")


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        (yaml.dump([{"name": "n", "jinja": Code()}]), "!!python/object/apply:builtins.exec"),
        ("- name: n\n  jinja: !!python/object/apply:os.system ['true']\n",
         "!!python/object/apply:os.system"),
        ("- name: n\n  jinja: !!python/name:os.system\n", "!!python/name:os.system"),
        ("- name: n\n  jinja: !Other x\n", "!Other"),
    ],
)  # fmt: skip
def test_foreign_tags_are_refused(tmp_path, text, tag):
    with pytest.raises(UserError, match=rf"templates\.yaml, line [12]: the tag '{tag}' is refused"):
        load_templates(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- name: n\n  jinja: {{a}} ||| b\n", "line 2: not valid YAML"),
        ("- name: n\n  jinja: is it: {{a}} ||| b\n", "line 2: not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        ("- {jinja: a ||| b}", "template 1: it has no name"),
        ("one: {answer_choices: a}", "template 'one': it has no jinja"),
        ("- {name: n, jinja: a ||| b, answer_choises: x}",
         "unknown. Did you mean 'answer_choices'"),
        ("- {name: n, jinja: a ||| b, answer_choices: [x, y]}", "answer_choices is .* be text"),
        ("- {name: n, jinja: a ||| b, answer_choices: true}", "put it in quotes"),
        ("- {name: n, jinja: a ||| b, original_task: Yes}", "original_task is 'Yes', .* true or f"),
        ("- {name: n, jinja: a ||| b, metrics: Accuracy}", "metrics is .* a list of texts"),
        ("- {name: n, jinja: a ||| b, metadata: [x]}", "metadata is .* not a mapping"),
        ("- a ||| b", "template 1: not a template, but 'a ||| b'"),
        ("a ||| b", "not a list or mapping of templates"),
        ("datset: d\ntemplates: []", "'datset' is unknown .*Did you mean 'dataset'"),
        ("- {name: n, jinja: '{% if %} ||| b'}", "'n': jinja is no valid Jinja, line 1"),
        ("[]", "has no templates"),
    ],
)  # fmt: skip
def test_malformed_yaml_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        load_templates(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_many_aliases_cost_nothing(tmp_path):
    """The billion laughs: nine lists of nine, each of the one before."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(UserError, match="template 'a0': not a template"):
        load_templates(write(tmp_path, "\n".join(lines)))


def test_json_lines(tmp_path):
    entries = [
        {"dataset": "d", "subset": s, "name": n, "jinja": "{{a}} ||| b", "answer_choices": c}
        for s, n, c in [("s", "one", None), ("s", "two", "b ||| c"), (None, "three", None)]
    ]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    path = write(tmp_path, text, "t.jsonl")
    assert [t.answer_choices for t in load_templates(path, "d", "s")] == ["", "b ||| c"]
    assert [t.name for t in load_templates(path, "d")] == ["three"]
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert load_templates(tmp_path / "t.jsonl.gz", "d", "s") == load_templates(path, "d", "s")


def test_unreadable_files_are_named(tmp_path):
    path = write(tmp_path, '{"name": "n", "jinja": "a ||| b"}\n{"name":\n', "bad.jsonl")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: not a template"):
        load_templates(path)
    with pytest.raises(UserError, match=r"line 1: not a template, but 3"):
        load_templates(write(tmp_path, "3\n", "bad.jsonl"))
    with pytest.raises(UserError, match=r"nested without end"):
        load_templates(write(tmp_path, "[" * 200_000, "bad.jsonl"))
    with pytest.raises(UserError, match=r"No such file or directory\. Did you mean 'bad\.jsonl'"):
        load_templates(tmp_path / "bat.jsonl")
    with pytest.raises(UserError, match="its name does not end with"):
        load_templates(write(tmp_path, "", "templates.json"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(pickle.dumps(list(range(999))))[:-20])
    with pytest.raises(UserError, match=r"Cannot read the templates in .*cut\.jsonl\.gz"):
        load_templates(tmp_path / "cut.jsonl.gz")


@pytest.mark.data
def test_promptsource_as_a_tree_of_yaml_is_the_jsonl(data_folder, tmp_path):
    """All 2,085 templates, written as PromptSource writes them."""
    path = data_folder / "promptsource" / "templates.jsonl.gz"
    entries = list(read_entries(path))
    assert len(entries) == 2085

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
        pass

    for kind, tag in ((Tagged, "!Template"), (TaggedMetadata, "!TemplateMetadata")):
        Dumper.add_representer(kind, lambda d, value, tag=tag: d.represent_mapping(tag, {**value}))
    files = {}
    for number, entry in enumerate(entries):
        metadata = ("original_task", "choices_in_prompt", "metrics", "languages")
        template = {name: entry[name] for name in ("name", "jinja", "answer_choices")}
        template["metadata"] = TaggedMetadata((name, entry[name]) for name in metadata)
        about = entry["dataset"], entry["subset"]
        files.setdefault(about, {})[f"{number:05}"] = Tagged(template)
    for (dataset, subset), templates in files.items():
        about = {"dataset": dataset} | ({"subset": subset} if subset else {})
        text = yaml.dump(about | {"templates": templates}, Dumper=Dumper, allow_unicode=True)
        write(tmp_path, text, f"{dataset}/{subset or '.'}/templates.yaml")
    found = {(label(entry), entry["name"]): entry for entry in read_entries(tmp_path)}
    assert len(found) == 2085
    for entry in entries:
        same = found[label(entry), entry["name"]]
        assert all(same.get(name) == entry[name] for name in entry), entry["name"]
    cb = load_templates(tmp_path, "super_glue", "cb")
    assert cb == load_templates(path, "super_glue", "cb")
    assert len(cb) == 15


class Tagged(dict):
    """A template, to be written with its tag."""


class TaggedMetadata(dict):
    """Metadata, to be written with its tag."""
