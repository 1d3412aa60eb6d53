"""The library of benchmarks: prompts render on rows of the declared fields; names, metrics."""

import json
import uuid

import pytest
import seqio
from test_docs import DOCS, play

from mtl_jax.data import load_eval_task
from mtl_jax.errors import UserError
from mtl_jax.results import Outcome, rows_of_task
from mtl_jax.task_info import info
from mtl_jax.tasks.benchmarks import catalogue, features, tables
from mtl_jax.tasks.benchmarks.mathematics import number_in
from mtl_jax.tasks.benchmarks.registering import add_tasks, register
from mtl_jax.tasks.prompts import Template, prompt_slug

PAGE = DOCS / "tasks.md"
DATASETS = (*catalogue.DATASETS, *catalogue.MULTILINGUAL)
# Fields with values that a sample of their type would not be.
_LETTERED = {"input": "Which one?\nOptions:\n(A) a cat\n(B) a dog", "target": "(B)"}
_WORDS = {"boolean_expressions": "True", "formal_fallacies": "valid", "sports_understanding": "yes"}
VALUES = {
    "hellaswag": {"label": "2"},
    "winogrande_winogrande_xl": {"answer": "2"},
    "story_cloze_2016": {"answer_right_ending": 2},
    "gsm8k": {"answer": "It is <<1+1=2>>2.\n#### 2"},
    "dream": {"answer": "choice 1"},
    "mmlu": {"answer": 3},
    "super_glue_copa": {"question": "cause"},
    "super_glue_record": {"answers": ["entities 1"]},
    "squad_v2": {"answers": {"text": []}},
}


def byte_features():
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    return {"inputs": feature, "targets": feature}


def sample(kind, name):
    if isinstance(kind, list):
        return [sample(kind[0], f"{name} {number}") for number in range(4)]
    if isinstance(kind, dict):
        return {part: sample(inner, part) for part, inner in kind.items()}
    return {str: name, int: 0, float: 2.5, bool: True}[kind]


def samples(dataset):
    """One row for each label, or one."""
    row = sample(dict(dataset.origin.fields), "") | VALUES.get(dataset.origin.name, {})
    if dataset.prompts == "bbh_letters":
        row |= _LETTERED
    if dataset.prompts == "bbh_words":
        row["target"] = _WORDS.get(dataset.name.removeprefix("bbh_"), "Yes")
    if dataset.only:
        row[dataset.only[0]] = dataset.only[1]
    return [row | {"label": label} for label in range(dataset.origin.labels)] or [row]


@pytest.fixture(scope="module")
def registered():
    prefix = f"lib{uuid.uuid4().hex[:6]}_"
    return prefix, register(DATASETS, byte_features(), prefix)


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda dataset: dataset.name)
def test_prompts_render_on_rows_of_the_declared_fields(dataset):
    rows = dataset.made(samples(dataset))
    assert len(rows) == max(dataset.origin.labels, 1)
    templates = dataset.templates()
    assert 1 <= len(templates) <= 4
    for template in templates:
        rendered = [template.render(row) for row in rows]
        assert all(rendered)
        assert len({one.targets for one in rendered}) == len(rows), "a target for every label"
        for one in rendered:
            assert bool(one.choices) == bool(template.answer_choices)
            assert not one.choices or one.targets in one.choices
            assert "{" not in one.inputs + one.targets
            if template.choices_in_prompt and all(len(choice) > 1 for choice in one.choices):
                shown = one.inputs.lower()
                assert all(choice.lower() in shown for choice in one.choices), template.name
    if dataset.fields:
        assert all(dataset.fields(row) for row in rows)
    assert dataset.citation


def test_every_data_set_has_its_tasks_and_benchmarks_are_mixtures(registered):
    prefix, mixtures = registered
    names = [name for tasks in mixtures.values() for name in tasks]
    assert len(names) == len(set(names)) == sum(len(d.templates()) for d in DATASETS)
    assert {len(seqio.MixtureRegistry.get(m).tasks) for m in mixtures} == {
        len(tasks) for tasks in mixtures.values()
    }
    swahili = info(f"{prefix}xnli_sw_relation_name")
    assert (swahili.dataset, swahili.language, swahili.family) == ("xnli", "sw", "nli")
    assert len({info(name).language for name in mixtures[f"{prefix}xnli"]}) == 15
    physics = info(f"{prefix}mmlu_college_physics_letters")
    assert (physics.dataset, physics.family, physics.trained) == ("mmlu", "mmlu_stem", False)
    assert {info(name).dataset for name in mixtures[f"{prefix}mmlu"]} == {"mmlu"}
    assert len(mixtures[f"{prefix}mmlu"]) == 57 * 2
    assert len({info(name).dataset for name in mixtures[f"{prefix}bbh"]}) == 27
    # As published.
    assert seqio.TaskRegistry.get(f"{prefix}glue_cola_linguist").num_input_examples("train") == 8551


def put(folder, name, split, rows):
    path = folder / name / f"{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path))
    monkeypatch.setenv("MTL_JAX_SOURCES", "local")
    return tmp_path


def values(task, predictions):
    return {
        row["metric"]: row["value"]
        for row in rows_of_task(task, [Outcome() for _ in predictions], predictions, 0)
    }


def evaluated(name, split="validation"):
    return load_eval_task(name, split, 4000, 4000)


def test_all_right_answers_count_and_no_answer_is_one(local, registered):
    prefix, _ = registered
    texts = [["the Nile", "Nile", "the Nile"], []]
    rows = [
        {"context": "c", "question": f"q{number}", "answers": {"text": found}}
        for number, found in enumerate(texts)
    ]
    put(local, "squad_v2", "validation", rows)
    task = evaluated(f"{prefix}squad_v2_text_then_question")
    assert [example.targets_text for example in task.examples] == ["the Nile", "unanswerable"]
    assert values(task, ["Nile", "Unanswerable."]) == {"em": 100.0, "f1": 100.0}
    assert values(task, ["unanswerable", "Nile"]) == {"em": 0.0, "f1": 0.0}


def test_answers_to_one_question_are_one_group(local, registered):
    prefix, _ = registered
    rows = [
        {"paragraph": "p", "question": question, "answer": answer, "label": label}
        for question, answer, label in [("q", "a", 1), ("q", "b", 0), ("r", "a", 1)]
    ]
    put(local, "super_glue_multirc", "validation", rows)
    task = evaluated(f"{prefix}super_glue_multirc_is_it_a_right_answer")
    # One true and one false positive, one false negative: F1a is 1/2; one question of two right.
    measured = values(task, ["yes", "yes", "no"])
    assert measured["f1a"] == pytest.approx(50.0)
    assert measured["em"] == 0.0
    assert values(task, ["yes", "no", "no"])["em"] == 50.0


def test_record_counts_any_right_entity(local, registered):
    prefix, _ = registered
    row = {"passage": "p", "query": "@placeholder", "entities": ["Ann", "Bo", "Cy"]}
    put(local, "super_glue_record", "validation", [row | {"answers": ["Ann", "Bo"]}])
    task = evaluated(f"{prefix}super_glue_record_fill_the_gap")
    assert values(task, ["Bo"])["em"] == 100.0
    assert values(task, ["Cy"])["em"] == 0.0


def test_labels_are_those_of_the_benchmark(local, registered):
    prefix, _ = registered
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (1, 1, 0, 0)]
    put(local, "glue_mrpc", "validation", rows)
    task = evaluated(f"{prefix}glue_mrpc_pair_verdict")
    # Class 1, "equivalent", is the positive one: precision 1, recall 1/2.
    measured = values(task, ["equivalent", "different", "different", "different"])
    assert measured["f1"] == pytest.approx(200 / 3)
    assert measured["accuracy"] == 75.0


def test_numbers_are_compared_as_numbers(local, registered):
    prefix, _ = registered
    rows = [{"question": "q", "answer": "<<2*525=1050>>1050\n#### 1,050"}]
    put(local, "gsm8k", "test", rows)
    task = evaluated(f"{prefix}gsm8k_steps_and_answer", "test")
    assert task.examples[0].targets_text == "1050 The answer is 1050."
    assert values(task, ["2 * 525 = $1,050.00."]) == {"exact_match": 100.0}
    assert values(task, ["1049"]) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 18.", "18"),
        ("3 + 4 = 7\n#### 7 apples", "7"),
        ("$1,234,000", "1234000"),
        ("-$2.50", "-2.5"),
        ("from 5 to -3", "-3"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("-0", "0"),
        ("007", "7"),
        ("10-4", "4"),
        ("no number", ""),
    ],
)
def test_number_in_a_text(text, number):
    assert number_in(text) == number


def test_other_prompts_for_a_data_set(local):
    put(local, "glue_cola", "validation", [{"sentence": "So it is.", "label": 1}])
    own = Template("mine", "{{sentence}} ||| {{answer_choices[label]}}", "bad ||| good")
    prefix = f"own{uuid.uuid4().hex[:6]}_"
    (name,) = add_tasks(catalogue.find("glue_cola"), byte_features(), [own], prefix)
    assert name == f"{prefix}glue_cola_mine"
    (example,) = evaluated(name).examples
    assert (example.inputs_text, example.targets_text) == ("So it is.", "good")
    with pytest.raises(UserError, match=r"no data set 'glue_colla'\. Did you mean 'glue_cola'"):
        catalogue.find("glue_colla")


def test_vocabulary_by_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"vocab/mt5\.model.*MTL_JAX_VOCABULARY name it"):
        features.chosen_features("mt5")
    monkeypatch.setenv(features.VARIABLE, "bytes")
    found = features.chosen_features("mt5")
    assert found["inputs"].vocabulary.vocab_size == 384
    assert found["inputs"].add_eos
    monkeypatch.setenv(features.EOS_VARIABLE, "0")
    assert not features.chosen_features()["inputs"].add_eos
    monkeypatch.setenv(features.EOS_VARIABLE, "no")
    with pytest.raises(UserError, match="MTL_JAX_INPUTS_EOS must be 0 or 1, not 'no'"):
        features.chosen_features()
    monkeypatch.delenv(features.EOS_VARIABLE)
    monkeypatch.setenv(features.VARIABLE, "byts")
    with pytest.raises(UserError, match=r"is 'byts', which is no file.*Did you mean 'bytes'"):
        features.chosen_features()


def test_a_vocabulary_file_with_extra_ids_gets_no_more(monkeypatch, tmp_path):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    sizes = []
    for name, symbols in (("plain", []), ("mt5", ["<extra_id_1>", "<extra_id_0>"])):
        trainer.train(
            sentence_iterator=iter(["the quick brown fox jumps over"] * 20),
            vocab_size=40,
            hard_vocab_limit=False,
            model_prefix=str(tmp_path / name),
            user_defined_symbols=symbols,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        monkeypatch.setenv(features.VARIABLE, str(tmp_path / f"{name}.model"))
        vocabulary = features.chosen_features()["inputs"].vocabulary
        sizes.append((vocabulary.extra_ids, vocabulary.eos_id))
    assert sizes == [(100, 1), (0, 1)]


def test_prompt_names_are_unlike_those_of_other_modules():
    """Tasks of the same data sets: T0's prompts in mtl_jax.tasks.super_glue."""
    names = [
        f"{dataset.name}_{prompt_slug(template.name)}"
        for dataset in DATASETS
        for template in dataset.templates()
    ]
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith(("p3_", "sni_", "embedded_"))]


def test_fields_of_the_declaration_have_one_form():
    for dataset in DATASETS:
        assert bool(dataset.origin.labels) <= (dataset.origin.fields.get("label") is int)
        assert dataset.origin.splits
        assert not dataset.trained or "train" in dataset.origin.splits


@pytest.mark.parametrize("table", [tables.task_table, tables.source_table])
def test_the_page_has_the_tables(table):
    assert table().strip() in PAGE.read_text(encoding="utf-8"), (
        "write the output of python -m mtl_jax.tasks.benchmarks.tables into docs/tasks.md"
    )


@pytest.mark.slow
def test_the_page_runs_as_it_stands(tmp_path):
    output = play(PAGE, tmp_path)
    assert "A linguist marks every sentence as acceptable or unacceptable." in output
    assert "choices  unacceptable ||| acceptable" in output
    assert "dataset  glue_cola" in output
