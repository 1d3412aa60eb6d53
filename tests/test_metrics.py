"""Metrics against figures of the reference libraries and cases worked out by hand."""

import collections
import gzip
import json
import math

import numpy as np
import pytest

from mtl_jax import metrics
from mtl_jax.errors import UserError
from mtl_jax.metrics import Grouped


def test_accuracy_is_a_percentage_and_strict():
    assert metrics.accuracy(["yes", "no", "no", "a"], ["yes", "no", "No", "a "]) == {"accuracy": 50}


def test_exact_match_ignores_white_space_around_and_takes_any_reference():
    assert metrics.exact_match(["a b", ["x", "y"]], [" a b\n", "y"]) == {"exact_match": 100}
    assert metrics.exact_match(["a b", ["x", "y"]], ["a  b", "z"]) == {"exact_match": 0}


def test_exact_match_of_sni_drops_punctuation_and_case_but_keeps_articles():
    targets = ["The cat.", ["no", "Yes!"], "the cat", "co-op"]
    said = ["the  CAT", "yes", "cat", "co op"]
    assert metrics.exact_match_sni(targets, said) == {"exact_match_sni": 50}


@pytest.mark.parametrize(
    ("target", "prediction", "em", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 100, 100),
        # normal forms "red house on hill" (4) and "house" (1): P = 1, R = 1/4, F1 = 2/5
        ("the red house on a hill", "house", 0, 40),
        # "cat cat dog" and "cat dog dog": two tokens in common of three on both sides
        ("cat cat dog", "cat dog dog", 0, 200 / 3),
        (["1990", "the year 1990"], "year 1990", 100, 100),
        ("theatre", "atre", 0, 0),  # articles are whole words
        ("", "", 100, 0),  # SQuAD 1.1 and T5: nothing in common
    ],
)
def test_squad_worked_by_hand(target, prediction, em, f1):
    result = metrics.squad([target], [prediction])
    assert result == pytest.approx({"em": em, "f1": f1})


def test_squad_is_the_mean_over_examples():
    result = metrics.squad(["a cat", "a dog", "x y"], ["cat", "cow", "x z"])
    assert result == pytest.approx({"em": 100 / 3, "f1": 50})


@pytest.mark.parametrize(
    ("target", "prediction", "em", "f1"),
    [
        # The official script of SQuAD 2.0: without an answer, only nothing is right.
        ([], "", 100, 100),
        ("", "the", 100, 100),
        ([], "Paris", 0, 0),
        (["Paris"], "", 0, 0),
        # A reference of articles and punctuation alone is left out beside others.
        (["The.", "Paris"], "", 0, 0),
        (["Paris", "city of Paris"], "paris city", 0, 80),
    ],
)
def test_squad_2_knows_questions_without_answers(target, prediction, em, f1):
    assert metrics.squad_v2([target], [prediction]) == pytest.approx({"em": em, "f1": f1})


def test_trivia_qa_puts_spaces_for_punctuation_where_squad_puts_nothing():
    target, said = ["New-York", "the x_y"], "new york"
    assert metrics.trivia_qa([target], [said]) == {"em": 100, "f1": 100}
    assert metrics.squad([target], [said]) == {"em": 0, "f1": 0}
    assert metrics.trivia_qa(["x\u2019y z"], ["\u2018x y\u00b4"])["f1"] == pytest.approx(80)


# ---------------------------------------------------------------------------------------------
# ROUGE and BLEU
# ---------------------------------------------------------------------------------------------


def test_rougeL_worked_by_hand():
    # longest common subsequence "the cat mat" of 5 and 4 tokens: P = 3/4, R = 3/5
    result = metrics.rougeL(["the cat on the mat"], ["the big cat mat"])
    assert result["rougeL"] == pytest.approx(100 * 2 * 0.75 * 0.6 / 1.35)
    # no stemming: "cats" is not "cat"
    assert metrics.rougeL([["dogs", "cats"]], ["cat"])["rougeL"] == 0
    assert metrics.rougeL_stemmed([["dogs", "running"]], ["runs"]) == {"rougeL_stemmed": 100}


def test_rouge_of_t5_splits_sentences_and_takes_the_best_reference_by_type():
    # Two sentences in another order: as one text the longest common subsequence is "c d ." (2 of
    # 4 words); rougeLsum takes the union over sentences, so all 4 words are found.
    result = metrics.rouge(["a b . c d"], ["c d . a b"])
    assert result == pytest.approx({"rouge1": 100, "rouge2": 200 / 3, "rougeLsum": 100})
    assert metrics.rougeL(["a b . c d"], ["c d . a b"])["rougeL"] == pytest.approx(50)
    # "x b a" has all words (rouge1 of "a b": P = 1, R = 2/3), "a b y z" the bigram (P = 1, R = 1/3)
    result = metrics.rouge([["x b a", "a b y z"]], ["a b"])
    assert result == pytest.approx({"rouge1": 80, "rouge2": 50, "rougeLsum": 200 / 3})


def _ngrams(words, n):
    return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _plain_bleu(references, prediction):
    """BLEU of one text by its definition (Papineni et al. 2002), where every order has matches."""
    words = prediction.split()
    log_precision = 0.0
    for n in range(1, 5):
        most = collections.Counter()
        for reference in references:
            most |= _ngrams(reference.split(), n)
        found = _ngrams(words, n)
        log_precision += math.log((found & most).total() / found.total()) / 4
    lengths = [len(reference.split()) for reference in references]
    closest = min(lengths, key=lambda length: (abs(length - len(words)), length))
    return 100 * math.exp(min(0.0, 1 - closest / len(words)) + log_precision)


def test_bleu_by_its_definition_and_any_number_of_references():
    said = "the cat sat on the red mat today"
    references = ["the cat sat on the mat", "a cat sat on the red mat this very day"]
    expected = _plain_bleu(references, said)
    assert 40 < expected < 90
    for fn in (metrics.bleu, metrics.bleu_13a):
        (value,) = fn([references], [said]).values()
        assert value == pytest.approx(expected, abs=1e-9)
    # The same example twice, once with a reference less: matches and lengths are summed.
    (mixed,) = metrics.bleu([references, references[0]], [said, said]).values()
    (one,) = metrics.bleu([references[0]], [said]).values()
    assert one < mixed < expected


def test_bleu_figure_of_sacrebleu():
    # README of sacrebleu: "BLEU = 48.53 82.4/50.0/45.5/37.5 (BP = 0.943 ...)".
    said = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    assert metrics.bleu_13a(references, said)["bleu_13a"] == pytest.approx(48.53, abs=0.005)


def test_the_tokenizers_of_bleu_differ():
    # 13a leaves typographic quotes at their word, intl splits every punctuation mark off.
    target, said = "he said \u201cyes\u201d to all of it", "he said \u201cno\u201d to all of it"
    (intl,), (plain,) = (fn([target], [said]).values() for fn in (metrics.bleu, metrics.bleu_13a))
    assert plain == pytest.approx(_plain_bleu([target], said), abs=1e-9)
    split = [
        text.replace("\u201c", "\u201c ").replace("\u201d", " \u201d") for text in (target, said)
    ]
    assert intl == pytest.approx(_plain_bleu(split[:1], split[1]), abs=1e-9)


@pytest.mark.data
def test_rouge_on_the_thousand_pairs_of_t5(data_folder):
    def lines(name):
        return (data_folder / "metrics" / name).read_text().splitlines()

    targets, predictions = lines("target_large.txt"), lines("prediction_large.txt")
    assert len(targets) == len(predictions) == 1000
    # Plain mean, computed with rouge_score directly.
    assert metrics.rougeL(targets, predictions)["rougeL"] == pytest.approx(38.32, abs=0.005)
    result = metrics.rouge(targets, predictions)
    assert result["rouge1"] == pytest.approx(38.55, abs=0.005)
    assert result["rouge2"] == pytest.approx(22.14, abs=0.005)
    # T5's own figures are mids of a bootstrap: means up to its noise.
    text = (data_folder / "metrics" / "expected_bootstrap_results.json").read_text()
    for kind, value in json.loads(text).items():
        assert result[kind] == pytest.approx(value, abs=0.06), kind


@pytest.mark.slow
@pytest.mark.data
def test_rouge_of_sni_gives_the_figures_of_the_copy_baselines(data_folder):
    with gzip.open(data_folder / "sni" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    targets = [row["outputs"] for row in rows]
    inputs = metrics.rougeL_stemmed(targets, [row["input"] for row in rows])
    assert inputs["rougeL_stemmed"] == pytest.approx(23.57, abs=0.005)


# ---------------------------------------------------------------------------------------------
# Labels and numbers
# ---------------------------------------------------------------------------------------------

_TRUE = [1, 0, 1, 1, 0, 0, 1, 0]
_SAID = [1, 0, 0, 1, 1, -1, 1, -1]  # the last two are no labels: both the opposite of 0


def test_f1_counts_what_is_no_label_as_wrong():
    # TP 3, FP 3 (one said, two invalid), FN 1: 6 / (6 + 3 + 1)
    assert metrics.f1(_TRUE, _SAID) == pytest.approx({"f1": 60})
    assert metrics.f1([True, False], [False, False]) == {"f1": 0}
    with pytest.raises(
        UserError, match=r"metric f1 needs targets 0 and 1, got 'yes'.*choice_index"
    ):
        metrics.f1(["yes", "no"], ["yes", "no"])


def test_macro_f1_and_mcc_worked_by_hand():
    true, said = ["a", "b", "b", "c", "c", "c"], ["a", "b", "a", "c", "x", "c"]
    # a: P 1/2, R 1; b: P 1, R 1/2; c: P 1, R 2/3
    assert metrics.macro_f1(true, said) == pytest.approx(
        {"macro_f1": 100 * np.mean([2 / 3, 2 / 3, 4 / 5])}
    )
    # Two classes: (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)), TP 3, TN 2, FP 1, FN 2
    true, said = [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 1]
    assert metrics.mcc(true, said)["mcc"] == pytest.approx(100 * 4 / math.sqrt(4 * 5 * 3 * 4))
    # Gorodkin's R_K of three classes and one for "no label": c = 4, s = 6, p = (2, 1, 2, 1),
    # t = (1, 2, 3, 0): (c s - p.t) / sqrt((s^2 - p.p)(s^2 - t.t))
    true, said = ["a", "b", "b", "c", "c", "c"], ["a", "b", "a", "c", "x", "c"]
    expected = (4 * 6 - (2 + 2 + 6)) / math.sqrt((36 - 10) * (36 - 14))
    assert metrics.mcc(true, said)["mcc"] == pytest.approx(100 * expected)


def test_coefficients_that_are_not_defined_are_0():
    assert metrics.mcc(["a", "a"], ["a", "a"]) == {"mcc": 0}
    assert metrics.mcc(["a", "b"], ["a", "a"]) == {"mcc": 0}
    assert metrics.pearson_spearman([1, 2, 3], ["2", "2", "2"]) == {
        "pearson_corrcoef": 0,
        "spearman_corrcoef": 0,
    }
    with pytest.raises(UserError, match=r"macro_f1 needs one label for each target, got \['a'\]"):
        metrics.macro_f1([["a"]], ["a"])


def test_labels_and_correlations_equal_sklearn_and_scipy():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    true, said = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    names = np.array(["no", "maybe", "yes"])
    expected = sklearn_metrics.f1_score(true, said, average="macro")
    assert metrics.macro_f1(names[true], names[said])["macro_f1"] == pytest.approx(100 * expected)
    expected = sklearn_metrics.matthews_corrcoef(true, said)
    assert metrics.mcc(names[true], names[said])["mcc"] == pytest.approx(100 * expected)
    # Numbers with many ties, some predictions as texts, some that are no numbers.
    x = rng.integers(0, 26, 100) / 5
    texts = [f"{value:.1f}" for value in x + rng.integers(-3, 4, 100)]
    texts[3], texts[50], texts[7] = "nan", "five", "inf"
    y = [-1.0 if text in ("nan", "five", "inf") else float(text) for text in texts]
    result = metrics.pearson_spearman(x, texts)
    assert result["pearson_corrcoef"] == pytest.approx(100 * stats.pearsonr(x, y)[0])
    assert result["spearman_corrcoef"] == pytest.approx(100 * stats.spearmanr(x, y)[0])


# ---------------------------------------------------------------------------------------------
# Groups, postprocessors, single examples
# ---------------------------------------------------------------------------------------------


def _run(postprocess, rows, predictions):
    """Targets and predictions as SeqIO's and our evaluation make them."""
    targets = [postprocess(row["target"], example=row, is_target=True) for row in rows]
    said = zip(predictions, rows, strict=True)
    return targets, [postprocess(text, example=row, is_target=False) for text, row in said]


def test_multirc_by_the_definition_of_superglue():
    rows = [
        {"idx": np.array(i), "answer_choices": "no ||| yes", "target": target}
        for i, target in [(0, "yes"), (0, "no"), (1, "yes"), (1, "yes"), (1, "no"), (2, "no")]
    ]
    said = ["yes", "no", "yes", "no", "yes", "perhaps"]
    postprocess = metrics.grouped("idx", value=metrics.choice_index)
    targets, predictions = _run(postprocess, rows, said)
    # Question 0 is all right, 1 is not, nor is 2. Answers: TP 2, FP 1 and the invalid one, FN 1.
    assert metrics.multirc(targets, predictions) == pytest.approx({"f1a": 400 / 7, "em": 100 / 3})
    assert metrics.accuracy(targets, predictions) == {"accuracy": 50}
    with pytest.raises(UserError, match=r"multirc needs to know.*'yes'.*metrics\.grouped"):
        metrics.multirc(["yes"], ["yes"])


def test_record_takes_every_query_once_and_the_best_entity():
    rows = [
        {"passage": b"p", "query": "q1", "target": "Ann Lee", "answers": ["Ann Lee", "Lee"]},
        {"passage": b"p", "query": "q1", "target": "Lee", "answers": ["Ann Lee", "Lee"]},
        {"passage": b"p", "query": "q2", "target": "Bob", "answers": np.array([b"Bob Ray"])},
    ]
    postprocess = metrics.grouped("passage", "query", value=metrics.references_in("answers"))
    targets, predictions = _run(postprocess, rows, ["lee", "wrong", "Ray"])
    # q1: right; q2: P = 1, R = 1/2
    assert metrics.record(targets, predictions) == pytest.approx({"em": 50, "f1": 250 / 3})
    assert metrics.exact_match(targets, predictions) == {"exact_match": 0}


def test_choice_index_and_a_missing_field():
    example = {"answer_choices": "no ||| yes "}
    assert metrics.choice_index(" yes", example=example) == 1
    nothing = [metrics.choice_index("x", example=example, is_target=t) for t in (True, False)]
    assert metrics.accuracy(nothing[:1], nothing[1:]) == {"accuracy": 0}
    with pytest.raises(UserError, match=r"'answers' of an example, which has: answer\. Did you"):
        metrics.references_in("answers")("x", example={"answer": "y"}, is_target=True)


_MEANS = (
    *(metrics.accuracy, metrics.exact_match, metrics.exact_match_sni, metrics.squad),
    *(metrics.squad_v2, metrics.trivia_qa, metrics.rouge, metrics.rougeL, metrics.rougeL_stemmed),
)


@pytest.mark.parametrize("fn", _MEANS, ids=lambda fn: fn.__name__)
def test_means_over_examples_are_means_of_single_examples(fn):
    targets = ["the cat sat", ["a dog", "dogs . run"], "x y z", ["same"]]
    said = ["cat sat down", "the dogs . run far", "x", "same"]
    assert metrics.per_example(fn)
    whole = fn(targets, said)
    single = [fn([target], [text]) for target, text in zip(targets, said, strict=True)]
    for name, value in whole.items():
        assert value == pytest.approx(np.mean([scores[name] for scores in single]))
    grouped = [Grouped(target, i) for i, target in enumerate(targets)]
    assert fn(grouped, [Grouped(text, i) for i, text in enumerate(said)]) == whole


def test_metrics_of_a_whole_corpus_are_not_means_over_examples():
    corpus = {getattr(metrics, name) for name in ("bleu", "bleu_13a", "f1", "macro_f1", "mcc")}
    corpus |= {metrics.pearson_spearman, metrics.multirc, metrics.record, lambda t, p: {}}
    assert not any(metrics.per_example(fn) for fn in corpus)
