"""The embedded suite: deterministic, splits apart, balanced, short, covered by its vocabulary."""

import collections
import hashlib
import json
import statistics
import string

import pytest
import sentencepiece
import seqio

from mtl_jax import task_info
from mtl_jax.tasks import embedded
from mtl_jax.tasks.embedded import build_vocab, comparing, judging, reading, symbols
from mtl_jax.tasks.embedded.families import FAMILIES
from mtl_jax.tasks.embedded.suite import SPLIT_SIZES, Family, make_rows, split_of

TRAINED = [family for family in FAMILIES if family.trained]
FEW = 300  # training rows where looking at all of them would take long


def by_name(families):
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


@pytest.fixture(scope="module")
def vocabulary():
    return sentencepiece.SentencePieceProcessor(model_file=str(embedded.VOCABULARY_FILE))


def rendered(template, rows):
    return [template.render(row) for row in rows]


# Of the first 50 rows of train, validation and test, as JSON.
FIRST_ROWS = {
    "sentiment": "4dcfa3732ca9bae0",
    "nli": "feadbb0a1698887d",
    "qa": "cb7d9e86b09a20af",
    "summarisation": "ed66791137ff73c1",
    "translation": "4561b0cda7be78eb",
    "dialogue": "15a81dbf04fa7c36",
    "arithmetic": "161412280518fc57",
    "topic": "2d93f951d1af7d3e",
    "data_to_text": "fe212235be76826b",
    "paraphrase": "5a8cb62105615af2",
    "word_sense": "7216acd1d53354b3",
}


@by_name(FAMILIES)
def test_rows_are_the_same_everywhere(family):
    rows = [make_rows(family, split, 200)[:50] for split in SPLIT_SIZES]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest[:16] == FIRST_ROWS[family.name]


# Inputs, targets and choices of all prompts over the first 50 test rows, as JSON. Published numbers
# depend on these texts.
FIRST_EXAMPLES = {
    "sentiment": "b169e2e2618d40cf",
    "nli": "8b2ad3a657c66c36",
    "qa": "677e92392a416e12",
    "summarisation": "a097e87882de7afc",
    "translation": "c7e497ff1833eec1",
    "dialogue": "5c864a90fff52e65",
    "arithmetic": "f99612f4387fd0b4",
    "topic": "f254614ba8ae001f",
    "data_to_text": "cbcb9fe35eee0bb0",
    "paraphrase": "b85b7cf6f3169f13",
    "word_sense": "0ecbd5df3b229b62",
}


@by_name(FAMILIES)
def test_examples_are_the_same_everywhere(family):
    rows = make_rows(family, "test")[:50]
    examples = [example for template in family.templates for example in rendered(template, rows)]
    texts = [[example.inputs, example.targets, example.choices] for example in examples]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    assert digest[:16] == FIRST_EXAMPLES[family.name]


@by_name(FAMILIES)
def test_a_longer_split_begins_with_the_shorter_one(family):
    assert make_rows(family, "test", 60)[:40] == make_rows(family, "test", 40)


@by_name(FAMILIES)
def test_splits_do_not_overlap(family):
    template = family.templates[0]
    texts = {}
    for split, size in SPLIT_SIZES.items():
        rows = make_rows(family, split)
        assert len(rows) == size
        assert {split_of(family.name, family.identity(row)) for row in rows} == {split}
        texts[split] = {example.inputs for example in rendered(template, rows)}
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]


@by_name(FAMILIES)
def test_every_prompt_shows_what_tells_rows_apart(family):
    """Then rows of two splits cannot look the same under any prompt."""
    rows = [*make_rows(family, "train")[:FEW], *make_rows(family, "test")]
    for template in family.templates:
        texts = {example.inputs for example in rendered(template, rows)}
        assert len(texts) == len(rows), template.name


@by_name(FAMILIES)
def test_labels_are_balanced(family):
    for split, size in SPLIT_SIZES.items():
        labels = collections.Counter(row.get("label", 0) for row in make_rows(family, split))
        assert set(labels) == set(range(family.num_labels))
        assert all(abs(count - size / family.num_labels) < 1 for count in labels.values())


@by_name([family for family in FAMILIES if family.generated])
def test_no_single_answer_is_common(family):
    answers = collections.Counter(row["answer"] for row in make_rows(family, "train"))
    assert max(answers.values()) < 0.2 * SPLIT_SIZES["train"]


def best_guess(clues, labels, test_clues, test_labels):
    """Accuracy of the most frequent training label of each clue."""
    seen = collections.defaultdict(collections.Counter)
    for clue, label in zip(clues, labels, strict=True):
        seen[clue][label] += 1
    guesses = [seen[clue].most_common(1)[0][0] if seen[clue] else 0 for clue in test_clues]
    hits = [guess == label for guess, label in zip(guesses, test_labels, strict=True)]
    return sum(hits) / len(hits)


CLUES = {
    "sentiment": [lambda row: len(row["text"].split()), lambda row: "not" in row["text"]],
    "nli": [
        lambda row: row["hypothesis"],
        lambda row: row["hypothesis"].split()[-1],
        lambda row: row["premise"].split()[-1],
        lambda row: len(row["premise"] + row["hypothesis"]) // 4,
    ],
    "dialogue": [
        lambda row: row["question"].split()[0],
        lambda row: tuple(len(reply.split()) for reply in row["replies"]),
    ],
    "topic": [lambda row: len(row["text"].split()), lambda row: row["text"].split()[0]],
    "paraphrase": [lambda row: row["first"], lambda row: row["second"].split()[-1]],
    "word_sense": [lambda row: row["word"], lambda row: len(row["text"].split())],
}


@by_name([family for family in FAMILIES if family.num_labels > 1])
def test_labels_do_not_leak(family):
    """Half of the text, a position or a length tells (nearly) nothing of the label."""
    train, test = make_rows(family, "train"), make_rows(family, "test")
    for clue in CLUES[family.name]:
        accuracy = best_guess(
            map(clue, train),
            [row["label"] for row in train],
            list(map(clue, test)),
            [row["label"] for row in test],
        )
        # Three standard deviations of 200 coin tosses are 0.11.
        assert accuracy < 1 / family.num_labels + 0.12


def test_the_clues_of_the_leak_test_can_find_a_leak():
    train = make_rows(judging.TOPIC, "train")
    words, labels = [row["text"].split() for row in train], [row["label"] for row in train]
    leak = [tuple(w for w in text if w in judging.TOPICS["sport"]) != () for text in words]
    assert best_guess(leak, labels, leak, labels) > 0.35


def test_the_event_of_a_summary_stands_anywhere():
    places = collections.Counter()
    for row in make_rows(reading.SUMMARY, "train")[:1200]:
        who, deed, what = row["answer"].split()
        sentences = row["text"].split(" . ")
        [place] = [n for n, text in enumerate(sentences) if {who, deed, what} <= {*text.split()}]
        places[place] += 1
    assert min(places.values()) > 340


def test_arithmetic_agrees_with_python():
    for row in make_rows(symbols.ARITHMETIC, "train")[:2000]:
        *statements, expression = row["text"].split(";")
        names = {}
        exec("; ".join(statement.strip() for statement in statements), {}, names)
        assert str(eval(expression.strip(), {}, names)) == row["answer"]


def test_translation_follows_the_rules():
    """An independent translator: dictionary, adjectives behind, verb last, then the negation."""
    nouns = symbols.LUMI_PEOPLE | symbols.LUMI_THINGS
    lumi = nouns | symbols.LUMI_MOODS | symbols.LUMI_COLORS | symbols.LUMI_VERBS
    assert len(set(lumi.values())) == len(lumi)
    for row in make_rows(symbols.TRANSLATION, "train")[:500]:
        words = [word for word in row["text"].split() if word != "the"]
        never = "never" in words
        [verb] = [word for word in words if word in symbols.LUMI_VERBS]
        position = words.index(verb)
        phrases = [words[: position - never], words[position + 1 :]]
        order = [word for phrase in phrases for word in reversed(phrase)] + [verb]
        assert row["answer"] == " ".join([lumi[word] for word in order] + ["na"] * never)


def test_inference_follows_from_the_states():
    for row in make_rows(comparing.NLI, "train")[:600]:
        given, state = row["premise"].split()[-1], row["hypothesis"].split()[-1]
        assert (state == given) == (row["label"] == comparing.YES)
        assert (comparing.OPPOSITE_OF[state] == given) == (row["label"] == comparing.NO)


def test_answers_of_questions_stand_in_the_text():
    for row in make_rows(reading.QA, "train")[:600]:
        assert row["answer"] in row["context"].split()
        assert row["answer"] not in row["question"].split()


def test_ambiguous_words_occur_in_no_other_family():
    for family in FAMILIES:
        if family is not judging.WORD_SENSE:
            for row in make_rows(family, "train")[:FEW]:
                assert not set(judging.SENSES) & set(json.dumps(row).split())


@by_name(FAMILIES)
def test_choices_contain_the_target(family):
    for template in family.templates:
        for example in rendered(template, make_rows(family, "test")):
            assert bool(example.choices) == (not family.generated)
            assert family.generated or example.targets in example.choices
            assert len(set(example.choices)) == len(example.choices)


@by_name(FAMILIES)
def test_numbers_and_names_of_prompts(family):
    if family.trained:
        assert len(family.prompts) >= 5
        assert len(family.held_out_prompts) >= 2
    else:
        assert not family.prompts
        assert len(family.held_out_prompts) >= 5
    texts = [" ".join(template.jinja.lower().split()) for template in family.templates]
    assert len(set(texts)) == len(texts)


@by_name(TRAINED)
def test_held_out_prompts_ask_for_answers_that_were_trained(family):
    trained = {template.answer_choices for template in family.prompts}
    assert {template.answer_choices for template in family.held_out_prompts} <= trained


@by_name(FAMILIES)
def test_lengths(family, vocabulary):
    lengths = {"inputs": [], "targets": []}
    for template in family.templates:
        for example in rendered(template, make_rows(family, "train")[:FEW]):
            for side, found in lengths.items():
                found.append(len(vocabulary.encode(getattr(example, side))) + 1)
    assert statistics.median(lengths["inputs"]) <= 30
    assert max(lengths["inputs"]) <= 64
    assert max(lengths["targets"]) <= 16


def test_mixtures():
    tasks = {
        name: {task.name for task in seqio.MixtureRegistry.get(f"embedded_{name}").tasks}
        for name in ("train", "eval_trained_prompts", "eval_unseen_prompts", "eval_unseen_families")
    }
    train = tasks["train"]
    assert tasks["eval_trained_prompts"] == train
    assert not train & tasks["eval_unseen_prompts"]
    assert not train & tasks["eval_unseen_families"]
    assert all(task_info.info(name).trained for name in train)
    unseen = tasks["eval_unseen_prompts"] | tasks["eval_unseen_families"]
    assert not any(task_info.info(name).trained for name in unseen)
    families = {
        name: {task_info.info(task).family for task in group} for name, group in tasks.items()
    }
    assert len(families["train"] | families["eval_unseen_families"]) >= 10
    assert families["eval_unseen_prompts"] == families["train"]
    assert len(families["eval_unseen_families"]) >= 2
    assert not families["eval_unseen_families"] & families["train"]
    assert "embedded_sentiment_positive_or_negative" in train


def test_a_task_through_seqio(vocabulary):
    task = seqio.get_mixture_or_task("embedded_nli_does_it_follow")
    assert task.num_input_examples("train") == SPLIT_SIZES["train"]
    examples = list(task.get_dataset(None, split="test", shuffle=False).as_numpy_iterator())
    assert len(examples) == SPLIT_SIZES["test"]
    for example in examples:
        text = example["inputs_pretokenized"].decode()
        assert "does it follow that" in text
        assert example["inputs"].tolist() == [*vocabulary.encode(text), 1]
        assert example["answer_choices"] == b"yes ||| no ||| maybe"


def test_metrics_of_generated_families():
    metrics = seqio.get_mixture_or_task("embedded_summarisation_summarize").metric_fns
    scores = {}
    for metric in metrics:
        scores |= metric(["king sold boat"], ["king sold house"])
    # ROUGE-L: two of three words in order.
    assert scores == pytest.approx({"exact_match": 0.0, "rougeL": 100 * 2 / 3})
    [squad] = seqio.get_mixture_or_task("embedded_qa_text_and_question").metric_fns
    # Normal forms: an article does not count; "red" is one of the two words said.
    assert squad(["the king", "red"], ["king", "red boat"]) == pytest.approx(
        {"em": 50.0, "f1": 100 * (1 + 2 / 3) / 2}
    )


def test_vocabulary_is_what_its_program_builds():
    assert embedded.VOCABULARY_FILE.read_bytes() == build_vocab.build()


def test_vocabulary_covers_the_suite_and_ascii(vocabulary):
    assert (vocabulary.pad_id(), vocabulary.eos_id(), vocabulary.unk_id()) == (0, 1, 2)
    assert vocabulary.vocab_size() <= 1024
    words = build_vocab.suite_words()
    assert len(words) > 400
    assert [word for word in words if len(vocabulary.encode(word)) != 1] == []
    text = string.printable.strip() + "\n" + string.ascii_letters
    assert 2 not in vocabulary.encode(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text


@by_name(FAMILIES)
def test_texts_come_back_from_their_tokens(family, vocabulary):
    for template in family.templates:
        for example in rendered(template, make_rows(family, "test")[:50]):
            for text in (example.inputs, example.targets, *example.choices):
                tokens = vocabulary.encode(text)
                assert 2 not in tokens
                assert vocabulary.decode(tokens) == text


def test_a_grammar_too_small_for_its_split_is_an_error():
    tiny = Family("tiny", lambda rng, label: {"text": rng.choice("ab")}, lambda row: [row["text"]])
    with pytest.raises(RuntimeError, match="'tiny' has only"):
        make_rows(tiny, "train", 10)
