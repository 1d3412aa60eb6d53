"""The library over the data folder: every file reads, every prompt renders, answers are choices."""

import json
from collections import Counter

import pytest

from mtl_jax.row_files import read_rows
from mtl_jax.tasks.benchmarks.catalogue import DATASETS, find
from mtl_jax.tasks.prompts import prompt_slug

pytestmark = pytest.mark.data

# What the names in label_names.json are called in our prompts.
MEANINGS = {
    "entailment": {"true", "yes", "entailment", "certain"},
    "not_entailment": {"no", "uncertain"},
    "contradiction": {"false", "no", "contradiction"},
    "neutral": {"impossible to tell", "maybe", "neutral", "undecided"},
    "False": {"no", "false", "wrong", "another entry"},
    "True": {"yes", "true", "right", "the same entry"},
    "negative": {"negative", "no"},
    "positive": {"positive", "yes"},
    "not_duplicate": {"no", "kept"},
    "duplicate": {"yes", "merged"},
    "1 star": {"1", "terrible"},
    "2 star": {"2", "poor"},
    "3 stars": {"3", "okay"},
    "4 stars": {"4", "good"},
    "5 stars": {"5", "excellent"},
    "World": {"World", "world politics"},
    "Sports": {"Sports", "sports"},
    "Business": {"Business", "business"},
    "Science or Technology": {"Science and Technology", "science and technology"},
    "Company": {"company"},
    "Educational Institution": {"school or university"},
    "Artist": {"artist"},
    "Athlete": {"athlete"},
    "Office Holder": {"politician"},
    "Mean of Transportation": {"vehicle"},
    "Building": {"building"},
    "Natural Place": {"natural place"},
    "Village": {"village"},
    "Animal": {"animal"},
    "Plant": {"plant"},
    "Album": {"album"},
    "Film": {"film"},
    "Written Work": {"written work"},
}
FOUND = {
    "super_glue_cb": {"train": 250, "validation": 56},
    "super_glue_copa": {"train": 400, "validation": 100},
    "super_glue_rte": {"train": 2000, "validation": 277},
    "super_glue_wic": {"train": 2000, "validation": 638},
    "super_glue_boolq": {"train": 2000, "validation": 3270},
    "super_glue_multirc": {"train": 1970},
    "glue_sst2": {"train": 2000, "validation": 872},
    "glue_mnli": {"train": 2000, "validation": 2000},
    "glue_qqp": {"train": 1999, "validation": 1999},
    "ag_news": {"train": 2000, "validation": 2000},
    "dbpedia_14": {"validation": 2000},
    "imdb": {"train": 2000},
    "yelp_review_full": {"train": 2000},
    "gsm8k": {"test": 1319},
}
# Rows whose published target is none of their options.
ODD = {"bbh_movie_recommendation": 1, "bbh_ruin_names": 2}


@pytest.fixture(autouse=True)
def only_the_folder(data_folder, monkeypatch):
    monkeypatch.setenv("MTL_JAX_DATA", str(data_folder))
    monkeypatch.setenv("MTL_JAX_SOURCES", "local")


def rendered(dataset, template, split):
    rows = dataset.rows(split)
    found = [template.render(row, f"row {number}") for number, row in enumerate(rows)]
    return [one for one in found if one]


def local_splits(dataset):
    return [split for split in dataset.split_names() if dataset.origin.local_file(split)]


@pytest.mark.parametrize("name", FOUND)
def test_published_sets_render_whole(name):
    dataset = find(name)
    assert {split: dataset.count(split) for split in local_splits(dataset)} == FOUND[name]
    for split, count in FOUND[name].items():
        for template in dataset.templates():
            examples = rendered(dataset, template, split)
            assert len(examples) == len(dataset.rows(split)) == count
            assert all(not one.choices or one.targets in one.choices for one in examples)
            if dataset.origin.labels and name != "super_glue_copa":
                assert {one.targets for one in examples} == set(examples[0].choices)


def test_labels_mean_what_the_data_says(data_folder):
    names = json.loads((data_folder / "glue_superglue" / "label_names.json").read_text())
    checked = 0
    for published, labels in names.items():
        dataset = find(published.replace(".", "_"))
        assert dataset.origin.labels == len(labels)
        for template in dataset.templates():
            choices = [choice.strip() for choice in template.answer_choices.split("|||")]
            if "{{" in template.answer_choices or choices == ["first", "second"]:
                continue
            for choice, label in zip(choices, labels, strict=True):
                assert choice in MEANINGS[label], f"{published}, {template.name}"
                checked += 1
    assert checked > 60


def test_headings_of_the_data_folder_are_taken_off():
    assert find("glue_sst2").rows("train")[0]["sentence"].startswith("does n't deserve")
    news = find("ag_news").rows("train")[0]["text"]
    assert news.startswith("Brooks, Stallworth get it done late NEW ORLEANS - The New")
    entry = find("dbpedia_14").rows("validation")[0]
    assert entry["title"] == "Government House (Newfoundland and Labrador)"
    assert entry["content"].startswith("Government House is the official residence")


def test_bbh_is_ranked_where_there_is_a_choice():
    tasks = {d.name: d for d in DATASETS if d.benchmark == "bbh" and local_splits(d)}
    assert len(tasks) == 19
    assert sum(dataset.count("test") for dataset in tasks.values()) == 4511
    for name, dataset in tasks.items():
        for template in dataset.templates():
            examples = rendered(dataset, template, "test")
            odd = ODD.get(name, 0)
            lost = sum(bool(one.choices) and one.targets not in one.choices for one in examples)
            left_out = len(dataset.rows("test")) - len(examples)
            # The published form keeps them, ours leave them out.
            expected = (odd, 0) if template.name == "as published" else (0, odd)
            assert (lost, left_out) == expected, f"{name}, {template.name}"
            ranked = {bool(one.choices) for one in examples}
            assert ranked == {dataset.prompts != "bbh_free"}


def test_mmlu_subjects_are_all_there_and_divide_the_rows():
    subjects = [d for d in DATASETS if d.benchmark == "mmlu"]
    assert len(subjects) == 57
    assert sum(dataset.count("test") for dataset in subjects) == 14042
    assert all(len(dataset.rows("test")) == dataset.count("test") for dataset in subjects)
    # As the authors' categories.py has them.
    areas = Counter(dataset.family for dataset in subjects)
    assert areas == {
        "mmlu_stem": 18,
        "mmlu_humanities": 13,
        "mmlu_social_sciences": 12,
        "mmlu_other": 14,
    }
    for dataset in subjects[::7]:
        for template in dataset.templates():
            examples = rendered(dataset, template, "test")
            assert len(examples) == dataset.count("test")
            assert all(one.targets in one.choices for one in examples)


def test_gsm8k_targets_are_the_published_numbers():
    dataset = find("gsm8k")
    short, steps = dataset.templates()
    for row, one, long in zip(
        dataset.rows("test"),
        rendered(dataset, short, "test"),
        rendered(dataset, steps, "test"),
        strict=True,
    ):
        published = row["answer"].rpartition("#### ")[2].replace(",", "")
        number = dataset.postprocess(one.targets, example={}, is_target=True)
        assert float(number) == float(published)
        assert dataset.postprocess(long.targets, example={}, is_target=True) == number
        assert "<<" not in long.targets


def test_names_are_none_of_promptsource(data_folder):
    """So a data set may have its own prompts and PromptSource's side by side."""
    ours = {
        (dataset.name, prompt_slug(template.name))
        for dataset in DATASETS
        for template in dataset.templates()
    }
    theirs = set()
    for _, entry in read_rows(data_folder / "promptsource" / "templates.jsonl.gz"):
        name = "_".join(filter(None, (entry["dataset"], entry["subset"])))
        theirs.add((prompt_slug(name), prompt_slug(entry["name"])))
    assert len(theirs) > 1500
    assert not ours & theirs


def test_prompts_of_promptsource_fit_the_rows(data_folder):
    """Field names and label ids follow Hugging Face datasets, as PromptSource expects."""
    from mtl_jax.tasks.prompts import load_templates

    path = data_folder / "promptsource" / "templates.jsonl.gz"
    for name, dataset, subset in [
        ("glue_qqp", "glue", "qqp"),
        ("glue_sst2", "glue", "sst2"),
        ("super_glue_boolq", "super_glue", "boolq"),
        ("super_glue_multirc", "super_glue", "multirc"),
        ("ag_news", "ag_news", None),
        ("dbpedia_14", "dbpedia_14", None),
        ("yelp_review_full", "yelp_review_full", None),
    ]:
        split = local_splits(find(name))[-1]
        for template in load_templates(path, dataset, subset):
            for row in find(name).rows(split)[:20]:
                one = template.render(row)
                assert one is None or not one.choices or one.targets in one.choices, template.name
