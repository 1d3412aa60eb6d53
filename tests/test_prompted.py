"""The builder: rows x templates -> SeqIO tasks; the stream's short way agrees with SeqIO's own."""

import itertools
import uuid

import pytest
import seqio

from mtl_jax import metrics, task_info
from mtl_jax.errors import UserError
from mtl_jax.eval_reading import load_eval_task
from mtl_jax.tasks.prompted import PromptedTask, add_prompted_tasks, skipped_rows
from mtl_jax.tasks.prompts import Template, prompt_slug

ROWS = {
    "train": [{"text": f"row {number}", "label": number % 3} for number in range(23)],
    "test": [{"text": "only", "label": 0}],
}
CHOICES = Template("Yes, or No?", "{{text}}? ||| {{ answer_choices[label] }}", "yes ||| no ||| so")
SOME = Template("some", "{% if label %}{{text}} ||| {{label}}{% endif %}")


def features(add_eos=True):
    vocabulary = seqio.ByteVocabulary()
    return {
        "inputs": seqio.Feature(vocabulary, add_eos=add_eos),
        "targets": seqio.Feature(vocabulary),
    }


def add(templates, rows=ROWS, **options):
    """Registers under a name of its own: SeqIO's registry is global."""
    options = {"output_features": features(), "splits": {"train": 23, "test": 1}} | options
    dataset = f"data_{uuid.uuid4().hex[:8]}"
    return dataset, add_prompted_tasks(
        dataset, rows.__getitem__, templates, metric_fns=[], **options
    )


def read(name, split="train", **options):
    options = {"shuffle": False} | options
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, split=split, **options)
    return list(dataset.as_numpy_iterator())


def test_names_and_descriptions():
    dataset, names = add([CHOICES, SOME], family="nli", held_out_prompts=["some"], citation="us")
    assert names == [f"{dataset}_yes_or_no", f"{dataset}_some"]
    assert task_info.info(names[0]) == task_info.TaskInfo(
        names[0], dataset, "Yes, or No?", "nli", citation="us", language="en"
    )
    assert not task_info.info(names[1]).trained
    _, [name] = add([CHOICES], trained=False)
    assert not task_info.info(name).trained


def test_equal_slugs_are_told_apart():
    templates = [Template(name, "a ||| b") for name in ("a b", "A-B", "…a b!")]
    dataset, names = add(templates)
    assert names == [f"{dataset}_a_b", f"{dataset}_a_b_2", f"{dataset}_a_b_3"]
    assert prompt_slug("…As a result, C1 or C2?") == "as_a_result_c1_or_c2"
    assert prompt_slug("???") == "prompt"


def test_features_of_a_task():
    _, [with_eos] = add([CHOICES])
    _, [without] = add([CHOICES], output_features=features(add_eos=False))
    vocabulary = seqio.ByteVocabulary()
    for name, eos in ((with_eos, [1]), (without, [])):
        [example] = read(name, "test")
        assert example["inputs"].tolist() == [*vocabulary.encode("only?"), *eos]
        assert example["targets"].tolist() == [*vocabulary.encode("yes"), 1]
        assert example["inputs_pretokenized"] == b"only?"
        assert example["targets_pretokenized"] == b"yes"
        assert example["answer_choices"] == b"yes ||| no ||| so"


def test_numbers_of_examples_feed_the_mixing_rate():
    _, [name] = add([CHOICES])
    task = seqio.get_mixture_or_task(name)
    assert seqio.mixing_rate_num_examples(task) == 23
    _, [counted] = add([CHOICES], splits=["train", "test"])
    assert seqio.get_mixture_or_task(counted).num_input_examples("train") == 23


def test_empty_renderings_are_skipped_and_counted():
    _, [name] = add([SOME])
    assert skipped_rows(name, "train") is None
    examples = read(name)
    assert len(examples) == sum(row["label"] != 0 for row in ROWS["train"])
    assert skipped_rows(name, "train") == 23 - len(examples)
    assert {example["answer_choices"] for example in examples} == {b""}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_short_way_gives_the_examples_of_seqio(shards, shuffle):
    _, [name] = add([SOME])
    source = seqio.get_mixture_or_task(name).source
    seen = []
    for index in range(shards):
        info = seqio.ShardInfo(index, shards)
        direct = [e["inputs"] for e in source.examples("train", shuffle, 5, info)]
        usual = read(name, shuffle=shuffle, seed=5, shard_info=info, num_epochs=1)
        assert [e["inputs_pretokenized"].decode() for e in usual] == direct
        assert list(source.examples("train", shuffle, 5, info, start=2)) == list(
            itertools.islice(source.examples("train", shuffle, 5, info), 2, None)
        )
        seen += direct
    assert sorted(seen) == sorted(row["text"] for row in ROWS["train"] if row["label"])


def test_seed_sets_the_order():
    _, [name] = add([CHOICES])
    source = seqio.get_mixture_or_task(name).source

    def order(seed):
        return [example["inputs"] for example in source.examples("train", True, seed)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != [example["inputs"] for example in source.examples("train", False)]


def test_rows_are_rendered_only_when_read():
    rows = {"train": [{"text": "fine", "label": 0}] * 3 + [{"label": 0}]}
    _, [name] = add([CHOICES], rows, splits={"train": 4})
    examples = seqio.get_mixture_or_task(name).source.examples("train", shuffle=False)
    assert next(examples)["inputs"] == "fine?"
    with pytest.raises(UserError, match=r"train row 3: jinja uses the variable 'text'"):
        list(examples)


@pytest.mark.parametrize(
    ("templates", "options", "message"),
    [
        ([], {}, "no templates"),
        ([CHOICES, SOME], {"held_out_prompts": ["sone"]}, "'sone'.*Did you mean 'some'"),
    ],
)
def test_mistakes_in_the_call(templates, options, message):
    with pytest.raises(UserError, match=message):
        add(templates, **options)


def test_mistakes_in_the_reading():
    _, [name] = add([Template("t", "a ||| {{text}}", "{{text}}")], {"train": [{"text": "a ||| b"}]})
    source = seqio.get_mixture_or_task(name).source
    with pytest.raises(UserError, match="separates choices"):
        list(source.examples("train"))
    with pytest.raises(UserError, match=r"no split 'tran'. Did you mean 'train'"):
        list(source.examples("tran"))


# ---------------------------------------------------------------------------------------------
# Variants
# ---------------------------------------------------------------------------------------------


def prompted(templates, **options):
    dataset = f"data_{uuid.uuid4().hex[:8]}"
    given = {"metric_fns": [metrics.accuracy], "splits": {"train": 23, "test": 1}} | options
    return dataset, PromptedTask(dataset, ROWS.__getitem__, templates, features(), **given)


def test_variants_differ_in_choices_metrics_and_splits():
    dataset, task = prompted([CHOICES])
    names = task.register(("plain", "train", "generate", "rank"))
    base = f"{dataset}_yes_or_no"
    assert names == [base, f"{base}_train", f"{base}_generate", f"{base}_rank"]
    tasks = [seqio.get_mixture_or_task(name) for name in names]
    choices = [next(t.source.examples("train", False))["answer_choices"] for t in tasks]
    assert choices == ["yes ||| no ||| so", "", "", "yes ||| no ||| so"]
    assert [list(t.splits) for t in tasks] == [["train", "test"], ["train"]] + [
        ["train", "test"]
    ] * 2
    assert [len(t.metric_fns) for t in tasks] == [1, 0, 1, 1]
    assert {task_info.info(name).prompt for name in names} == {CHOICES.name}


def test_a_task_says_of_itself_what_its_prompt_says():
    templates = [
        Template("odd", "a ||| b", original_task=False, languages=("sw",)),
        Template("two", "a ||| b", languages=("en", "de")),
    ]
    _, task = prompted(templates, group="whole")
    facts = [task_info.info(name) for name in task.register()]
    assert [(f.original, f.language, f.dataset) for f in facts] == [
        (False, "sw", "whole"),
        (True, "", "whole"),
    ]


def test_fields_of_the_row_reach_the_postprocessor():
    def judged(text, *, example, is_target):
        return (text, example["number"], list(example["answers"])) if is_target else text

    _, task = prompted(
        [CHOICES],
        postprocess=judged,
        fields=lambda row: {"number": row["label"], "answers": [row["text"], "x"][: row["label"]]},
    )
    [name] = task.register()
    # Lists of all lengths, with SeqIO's own reading and with ours.
    usual = read(name, num_epochs=1)
    direct = list(seqio.get_mixture_or_task(name).source.examples("train", False))
    for row, of_seqio, ours in zip(ROWS["train"], usual, direct, strict=True):
        expected = [row["text"], "x"][: row["label"]]
        assert ours["answers"] == expected
        assert [answer.decode() for answer in of_seqio["answers"]] == expected
        assert of_seqio["number"] == ours["number"] == row["label"]
    loaded = load_eval_task(name, "test", 64, 64)
    [example] = loaded.examples
    assert loaded.postprocess("t", example=example.fields, is_target=True) == ("t", 0, [])


@pytest.mark.parametrize(
    ("options", "variants", "message"),
    [
        ({}, ["rank"], "template 'some' has no answer_choices"),
        ({}, ["tain"], "no variant 'tain'. Did you mean 'train'"),
        ({"splits": {"test": 1}}, ["train"], "'train' needs a split of this name; there is test"),
        ({"options": "flan"}, ["plain"], "Template 'some' has no answer_choices"),
        ({"options": "flam"}, ["plain"], "'flam'. Did you mean 'flan'"),
    ],
)
def test_mistakes_in_variants(options, variants, message):
    before = set(seqio.TaskRegistry.names())
    _, task = prompted([CHOICES, SOME], **options)
    with pytest.raises(UserError, match=message):
        task.register(variants)
    assert set(seqio.TaskRegistry.names()) == before


def test_a_row_without_choices_cannot_be_ranked():
    _, task = prompted([Template("t", "{{text}} ||| a", "{% if label %}a ||| b{% endif %}")])
    plain, ranked = task.register(["plain", "rank"])
    assert len(read(plain, num_epochs=1)) == 23
    with pytest.raises(
        UserError, match=r"Template 't', data_\w+ train row 0: .* no answer choices"
    ):
        list(seqio.get_mixture_or_task(ranked).source.examples("train", False))


def test_a_field_may_not_hide_what_the_prompt_gives():
    _, task = prompted([CHOICES], fields=lambda row: {"targets": "mine"})
    [name] = task.register()
    with pytest.raises(UserError, match="fields gives 'targets'"):
        seqio.get_mixture_or_task(name).source.rows("train")
