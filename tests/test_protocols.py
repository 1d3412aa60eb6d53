"""Protocols: their arithmetic by hand, and their answers against an independent PyTorch scorer."""

import functools
import gzip
import inspect
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mtl_jax import decode, metrics, protocols
from mtl_jax.errors import UserError
from mtl_jax.eval_task import EvalTask
from mtl_jax.protocols import PASSES, PROTOCOLS, ChoiceScores
from mtl_jax.task_info import TaskInfo
from mtl_jax.tokenizer import SentencePieceTokenizer


def scores(sums, eos, n_tokens):
    return ChoiceScores(np.array(sums, np.float32), np.array(eos, np.float32), np.array(n_tokens))


# "no" 1 token, "peut-être" 3 tokens, 9 characters, 10 bytes.
CHOICES = ["no", "peut-être"]
GIVEN = scores([-2.0, -4.5], [-1.0, -0.5], [1, 3])
NULL = scores([-1.5, -6.0], [-0.5, -2.0], [1, 3])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("t0", [-3, -5]),
        ("flan", [-3, -5]),
        ("mean_token", [-3 / 2, -5 / 4]),
        ("mean_byte", [-3 / 2, -5 / 10]),
        ("pmi", [-3 + 2, -5 + 8]),
        ("lm_eval", [-2, -4.5]),
        ("lm_eval_norm", [-2 / 2, -4.5 / 9]),
        ("lm_eval_bytes", [-2 / 2, -4.5 / 10]),
        ("lm_eval_pmi", [-2 + 1.5, -4.5 + 6]),
        ("metaicl", [-2 / 1, -4.5 / 3]),
    ],
)
def test_values_by_hand(name, expected):
    protocol = protocols.get(name)
    passes = {of: NULL if PASSES[of].null else GIVEN for of in protocol.passes_for(True)}
    values_C = protocol.values(passes, CHOICES)
    assert values_C.dtype == np.float64
    np.testing.assert_allclose(values_C, expected, rtol=1e-12)


def test_presets_ask_for_the_passes_of_their_originals():
    ranking = {name: protocol.passes_for(True) for name, protocol in PROTOCOLS.items()}
    assert ranking == {
        "t0": ("rank",),
        "mean_token": ("rank",),
        "mean_byte": ("rank",),
        "pmi": ("rank", "rank_null"),
        "lm_eval": ("rank_eos_left",),
        "lm_eval_norm": ("rank_eos_left",),
        "lm_eval_bytes": ("rank_eos_left",),
        "lm_eval_pmi": ("rank_eos_left", "rank_null"),
        "metaicl": ("rank",),
        "flan": ("rank_eos",),
        "tk_instruct": ("generate_eos_127",),
        "generate": (),
    }
    generating = {n: p.passes_for(False) for n, p in PROTOCOLS.items() if p.passes_for(False)}
    assert generating == {
        "flan": ("generate_eos",),
        "tk_instruct": ("generate_eos_127",),
        "generate": ("generate",),
    }
    for name, protocol in PROTOCOLS.items():
        mode = {"flan": "both", "tk_instruct": "generate", "generate": "generate"}.get(name, "rank")
        assert protocol.mode == mode
        assert protocol.ranks(True) is (mode != "generate")
        assert not protocol.ranks(False)
        assert protocol.max_decode_length == (127 if name == "tk_instruct" else None)
        # A pass over the example first, the null pass second: `values` relies on it.
        nulls = [PASSES[of].null for of in protocol.passes_for(True)]
        assert nulls in ([], [False], [False, True])


def test_metrics_are_the_tasks_own_or_the_protocols():
    own = [metrics.macro_f1, metrics.mcc]
    assert PROTOCOLS["t0"].metric_fns(own, True) == (*own, metrics.accuracy)
    assert PROTOCOLS["t0"].metric_fns([], True) == (metrics.accuracy,)
    assert PROTOCOLS["lm_eval"].metric_fns([metrics.accuracy, *own], True)[0] is metrics.accuracy
    assert len(PROTOCOLS["lm_eval"].metric_fns([metrics.accuracy, *own], True)) == 3
    assert PROTOCOLS["flan"].metric_fns([metrics.rouge], False) == (metrics.rouge,)
    assert PROTOCOLS["generate"].metric_fns([metrics.bleu], False) == (metrics.bleu,)
    for ranked in (True, False):
        fixed = PROTOCOLS["tk_instruct"].metric_fns(own, ranked)
        assert fixed == (metrics.exact_match_sni, metrics.rougeL_stemmed)


def test_fixed_metrics_compare_texts_whatever_the_tasks_own_compare():
    targets, texts = [1, metrics.Grouped(0, "a"), ["x", "the x"]], ["yes", "no", "x"]
    said, said_texts = [-1, metrics.Grouped(0, "a"), "X"], ["-yes-", "no", "The x."]
    arguments = targets, said, texts, said_texts
    assert PROTOCOLS["t0"].compared(*arguments) == (targets, said)
    compared = PROTOCOLS["tk_instruct"].compared(*arguments)
    assert compared == (["yes", "no", ["x", "the x"]], said_texts)
    assert metrics.exact_match_sni(*compared) == {"exact_match_sni": 100}


def test_names_and_empty_choices_are_checked():
    with pytest.raises(UserError, match=r"Unknown protocol 'lm_evel'. Did you mean 'lm_eval'"):
        protocols.get("lm_evel")
    empty = scores([0.0, -4.5], [-1.0, -0.5], [0, 3])
    for name in ("lm_eval", "metaicl", "mean_byte", "lm_eval_norm"):
        protocol = protocols.get(name)
        with pytest.raises(UserError, match=rf"'{name}' cannot rank answer choice 1 of \['', 'x'"):
            protocol.values({protocol.ranked[0]: empty}, ["", "x"])
    # With EOS there is something to score.
    assert protocols.get("mean_token").values({"rank": empty}, ["", "x"]).tolist() == [-1, -1.25]


# ---------------------------------------------------------------------------------------------
# The independent scorer
# ---------------------------------------------------------------------------------------------

# Shorter than the inputs of CB, so that it matters where they are cut.
INPUTS_LENGTH, ROWS, DECODE_LENGTH = 48, 20, 24
PROMPTS = {"cb": "should assume", "copa": "more likely"}


@functools.cache
def _models():
    """A random T5 with T5's vocabulary in PyTorch, and the same as ours."""
    import hf_models
    import torch

    hf_model = hf_models.tiny("t5_1_1", vocab_size=32128)
    with torch.no_grad():
        hf_model.lm_head.weight.mul_(0.3)  # a token has some ten nats, as in a young model
    return hf_model, *hf_models.ours(hf_model)


@functools.cache
def _examples(subset, data_folder):
    """(text, choices) of the first rows of a validation set with a prompt of T0."""
    from mtl_jax.tasks.prompts import load_templates

    path = data_folder / "promptsource" / "templates.jsonl.gz"
    (template,) = load_templates(path, "super_glue", subset, [PROMPTS[subset]])
    examples = []
    rows = data_folder / "glue_superglue" / f"super_glue.{subset}" / "validation.jsonl.gz"
    with gzip.open(rows, "rt", encoding="utf-8") as file:
        for line in file:
            rendered = template.render(json.loads(line), subset)
            if rendered is not None and len(examples) < ROWS:
                examples.append((rendered.inputs, list(rendered.choices)))
    return examples


def _encoder_tokens(form, text, tokenizer):
    """What the encoder gets in a pass; the task's own features have no EOS on inputs."""
    task = EvalTask("a", TaskInfo("a", "a"), "validation", [], [], [], None, tokenizer.decode)
    whole = tokenizer.encode(text, add_eos=False)
    return task.asked(whole, INPUTS_LENGTH, eos=form.eos, truncate=form.truncate, null=form.null)[
        0
    ].tolist()


def _padded(rows, length):
    tokens = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens


_score = jax.jit(decode.score_choices, static_argnums=(0, 7))


def _ranking_pass(name, examples, tokenizer):
    """`ChoiceScores` of each example in a pass, all in one batch."""
    _, config, params = _models()
    inputs = _padded([_encoder_tokens(PASSES[name], t, tokenizer) for t, _ in examples], 48)
    choices = [[tokenizer.encode(choice) for choice in of] for _, of in examples]
    most = max(sum(map(len, row)) for row in choices)
    packed = decode.pack_choices(choices, len(examples), most)
    widest = max(map(len, choices))
    with jax.default_matmul_precision("highest"):
        found = _score(config, params, inputs, (inputs > 0).astype(np.int32), *packed, widest)
    sums_BC, lengths_BC, eos_BC = map(np.asarray, found)
    return [
        ChoiceScores(sums_BC[i, :n] - eos_BC[i, :n], eos_BC[i, :n], lengths_BC[i, :n] - 1)
        for i, n in enumerate(map(len, choices))
    ]


def _values(protocol, passes, examples):
    return [
        protocol.values({name: passes[name][i] for name in protocol.passes_for(True)}, choices)
        for i, (_, choices) in enumerate(examples)
    ]


@pytest.mark.torch
@pytest.mark.data
@pytest.mark.parametrize("subset", PROMPTS)
def test_rankings_equal_those_of_an_independent_scorer(subset, data_folder):
    import protocol_witness

    vocabulary = data_folder / "vocab" / "spiece.model"
    witness = protocol_witness.Witness(_models()[0], vocabulary, INPUTS_LENGTH, inputs_eos=False)
    examples, tokenizer = _examples(subset, data_folder), SentencePieceTokenizer(vocabulary)
    assert len(examples) == ROWS
    # For the rows of these sets characters and bytes are the same.
    examples = [*examples, ("Est-ce vrai ?", ["oui", "peut-être", "non"])]
    cut = [len(witness.pieces(text)) > INPUTS_LENGTH for text, _ in examples]
    assert any(cut)
    assert not all(cut)
    passes = {
        name: _ranking_pass(name, examples, tokenizer)
        for name, form in PASSES.items()
        if form.kind == "rank"
    }
    names = [name for name, protocol in PROTOCOLS.items() if protocol.ranks(True)]
    assert sorted(names) == sorted(protocol_witness.RANKING)
    found = {}
    for name in names:
        values = _values(protocols.get(name), passes, examples)
        protocol_witness.assert_agrees(witness, name, examples, values, tolerance=1e-4)
        found[name] = np.array([of_example[:2] for of_example in values])
    # The input matters, and every protocol is another: a mistake would have been seen.
    for name, values_N2 in found.items():
        assert np.ptp(values_N2[:, 1] - values_N2[:, 0]) > 0.1, name
    for one, other in itertools.combinations(found, 2):
        assert np.abs(found[one] - found[other]).max() > 0.01, (one, other)


@pytest.mark.torch
@pytest.mark.data
@pytest.mark.parametrize(
    "name", ["generate", "flan", pytest.param("tk_instruct", marks=pytest.mark.slow)]
)
def test_greedy_tokens_equal_those_of_hugging_face(name, data_folder):
    import protocol_witness

    hf_model, config, params = _models()
    vocabulary = data_folder / "vocab" / "spiece.model"
    witness = protocol_witness.Witness(hf_model, vocabulary, INPUTS_LENGTH, inputs_eos=False)
    tokenizer = SentencePieceTokenizer(vocabulary)
    form = PASSES[protocols.get(name).passes_for(False)[0]]
    length = form.max_decode_length or DECODE_LENGTH
    texts = [text for text, _ in _examples("cb", data_folder)[:4]]
    inputs = _padded([_encoder_tokens(form, text, tokenizer) for text in texts], INPUTS_LENGTH)
    greedy = jax.jit(decode.greedy, static_argnums=(0, 4))
    with jax.default_matmul_precision("highest"):
        tokens_BT = greedy(config, params, inputs, (inputs > 0).astype(np.int32), length, 1)
    for text, row in zip(texts, np.asarray(tokens_BT).tolist(), strict=True):
        ours = row[: row.index(1)] if 1 in row else row
        assert ours == witness.generate(name, text, DECODE_LENGTH)
        assert len(ours) > 3


@pytest.mark.data
def test_the_delimiter_of_lm_eval_changes_no_token(data_folder):
    """lm-eval puts a space before choices; T5's SentencePiece drops it and puts its own."""
    from sentencepiece import sentencepiece_model_pb2

    vocabulary = data_folder / "vocab" / "spiece.model"
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(vocabulary.read_bytes())
    assert model.normalizer_spec.remove_extra_whitespaces
    assert model.normalizer_spec.add_dummy_prefix
    texts = {
        choice
        for subset in PROMPTS
        for _, choices in _examples(subset, data_folder)
        for choice in choices
    }
    for path in sorted((data_folder / "p3_t0_train").glob("*.jsonl.gz"))[:4]:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts |= {json.loads(line)["target"] for line in file}
    assert len(texts) > 500
    tokenizer = SentencePieceTokenizer(vocabulary)
    for text in texts:
        assert tokenizer.encode(f" {text}") == tokenizer.encode(text)


@pytest.mark.torch
@pytest.mark.data
def test_hugging_faces_tokenizer_gives_lm_eval_the_same_tokens(data_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = data_folder / "vocab" / "spiece.model"
    (tmp_path / "spiece.model").write_bytes(vocabulary.read_bytes())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = SentencePieceTokenizer(vocabulary)
    for subset in PROMPTS:
        for text, choices in _examples(subset, data_folder):
            assert theirs.encode(text) == ours.encode(text)
            for choice in choices:
                continuation = theirs.encode(f" {choice}", add_special_tokens=False)
                assert continuation == ours.encode(choice, add_eos=False)


def _table(heading):
    """The rows of a table of docs/protocols.md, cells without back quotes, by first cell."""
    text = (Path(__file__).parent.parent / "docs" / "protocols.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n#")[0]
    lines = [line.replace("`", "") for line in section.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_the_page_has_every_preset_pass_and_metric_as_it_is():
    presets, passes, of_metrics = map(_table, ("The presets", "Passes", "Metrics"))
    assert list(presets) == list(PROTOCOLS)
    for name, protocol in PROTOCOLS.items():
        for ranked, cell in zip((True, False), presets[name][2:], strict=True):
            answers = "ranks" if protocol.ranks(ranked) else "generates"
            assert cell == (answers if protocol.passes_for(ranked) else "-"), name
    used = {
        of: [n for n, p in PROTOCOLS.items() if of in (*p.ranked, *p.unranked)] for of in PASSES
    }
    assert {of: row[2].split(", ") for of, row in passes.items()} == used
    functions = {
        name: "yes" if metrics.per_example(fn) else "no"
        for name in metrics.__all__
        if _takes_targets(fn := getattr(metrics, name))
    }
    assert {name: row[2] for name, row in of_metrics.items()} == functions


def _takes_targets(fn):
    return inspect.isfunction(fn) and "targets" in inspect.signature(fn).parameters
