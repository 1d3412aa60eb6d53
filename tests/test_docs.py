"""The pages of docs/ that show commands are run as they stand."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warm

DOCS = Path(__file__).parent.parent / "docs"
# A block is a file where the text before it ends or begins its last paragraph with `name.ext`.
_BLOCK = re.compile(r"((?:[^\n]+\n)+)\n```(\w+)\n(.*?)```", re.DOTALL)
_FILE = re.compile(r"`([\w.]+\.(?:py|gin|jsonl|tsv|yaml))`(?::| says| shows)")


def section(page, title):
    """The text of a page below a heading of the second level."""
    text = page.read_text(encoding="utf-8")
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def play(page, folder, title=""):
    """Writes the files and runs the commands of a page, or of a section, in their order."""
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(warm.folder()), str(scripts), os.environ["PATH"]]),
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "100",
    }
    environment.pop("MTL_JAX_DATA", None)
    output = notebook = ""
    text = section(page, title) if title else page.read_text(encoding="utf-8")
    for paragraph, language, code in _BLOCK.findall(text):
        if language == "sh":
            done = subprocess.run(
                ["bash", "-e", "-c", code],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=500,
            )  # fmt: skip
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            output += done.stdout
        elif names := _FILE.findall(paragraph):
            (folder / names[0]).write_text(code, encoding="utf-8")
        else:  # to be typed in a notebook
            notebook += code
    if notebook:
        done = subprocess.run(
            [sys.executable, "-c", notebook],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, f"{notebook}\n{done.stdout}\n{done.stderr}"
    return output


@pytest.mark.slow
def test_add_a_task(tmp_path):
    output = play(DOCS / "add_a_task.md", tmp_path)
    assert "Is this review good or bad? A warm and funny film." in output
    run = tmp_path / "runs" / "reviews"
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert {(row["task"], row["metric"], row["n"]) for row in rows} >= {("reviews", "accuracy", 2)}
    assert {row["step"] for row in rows} == {20}
    assert (run / "report.html").exists()
    assert "reviews" in output[output.index("Run directory") - 2000 :]


def save_hugging_face(family, folder):
    """A tiny random model of a family with a tokenizer, as `transformers` saves them."""
    import hf_models
    import torch
    import transformers

    from mtl_jax.tasks.embedded import VOCABULARY_FILE

    if family == "byt5":
        network, words = hf_models.tiny("byt5"), transformers.ByT5Tokenizer()
    else:
        network = hf_models.tiny(family, vocab_size=640)
        with torch.no_grad():
            # Neither unknown tokens nor rows without a token: the two libraries write them
            # differently.
            for row in (2, slice(606, 640)):
                network.lm_head.weight[row] = 0.0
        words = transformers.T5Tokenizer.from_pretrained(_vocabulary(VOCABULARY_FILE, folder))
    network.save_pretrained(folder / "my_t5")
    words.save_pretrained(folder / "my_t5")


def _vocabulary(file, folder):
    place = folder / "vocabulary"
    place.mkdir()
    shutil.copy(file, place / "spiece.model")
    (place / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))
    return place


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "t5_1_1", "mt5", "umt5", "byt5"])
def test_checkpoints(family, tmp_path):
    pytest.importorskip("transformers")
    save_hugging_face(family, tmp_path)
    output = play(DOCS / "checkpoints.md", tmp_path)
    compared = [line for line in output.splitlines() if re.match("(True|False) ", line)]
    assert len(compared) == 4
    assert all(line.startswith("True ") for line in compared), output
    read = lambda name: [json.loads(x) for x in (tmp_path / name).read_text().splitlines()]  # noqa: E731
    rows, before = read("in.jsonl"), read("before.jsonl")
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in before] == rows
    assert all(np.isfinite(row["score"]) for row in read("scores.jsonl"))
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("my_t5", "my_t5_tuned")]
    assert weights[0] != weights[1]
    configs = [
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("my_t5", "my_t5_tuned")
    ]
    for name in ("model_type", "eos_token_id", "initializer_factor", "transformers_version"):
        assert configs[0][name] == configs[1][name]
    assert (tmp_path / "my_t5_tuned" / "tokenizer_config.json").exists()


@pytest.mark.slow
def test_add_a_method(tmp_path):
    output = play(DOCS / "add_a_method.md", tmp_path)
    assert "All weights are as computed by hand." in output
    found = {name: float(value) for name, value in re.findall(r'"([\w/]+)": ([\d.]+)', output)}
    assert found.keys() == {
        "weight/nli", "weight/arithmetic", "effective_share/nli", "effective_share/arithmetic",
        "geometric_mean",
    }  # fmt: skip
    shares = found["effective_share/nli"], found["effective_share/arithmetic"]
    np.testing.assert_allclose(sum(shares), 1.0, rtol=1e-5)
    run = tmp_path / "runs" / "geometric_mean"
    told = json.loads((run / "method.json").read_text())
    assert told == {"method": "GeometricMean", "options": {"floor": 0.01}}
    assert (run / "report.html").exists()


def own_methods():
    from mtl_jax.balance.balance_config import BalanceConfig
    from mtl_jax.balance.method import METHODS

    BalanceConfig()  # registers them
    own = {n: k for n, k in METHODS.items() if k.__module__.startswith("mtl_jax.balance.")}
    return dict(sorted(own.items()))


def defaults(kind):
    """Field -> default as Gin writes it."""
    import dataclasses

    from mtl_jax.config_types import format_value

    instance = kind()
    return {f.name: format_value(getattr(instance, f.name)) for f in dataclasses.fields(kind)}


def test_methods_page_has_every_method_with_its_fields():
    from mtl_jax.balance.method import GRAM, LOSSES, LOSSES_AFTER, REFERENCE

    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE))
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL))
    methods = own_methods()
    assert sorted(rows) == list(methods)
    for name, kind in methods.items():
        sees = "gradients" if GRAM in kind.needs else "losses" if LOSSES in kind.needs else None
        learns = "observe" in vars(kind)
        assert rows[name] == (sees or ("past losses" if learns else "nothing"))
        row = re.search(rf"^\| `{name}` .*", page, re.MULTILINE)[0]
        assert ("a forward pass after" in row) == (LOSSES_AFTER in kind.needs)
        assert ("of a reference" in row) == (REFERENCE in kind.needs)
        stated = dict(re.findall(rf"`{name}\.(\w+) = ([^`]+)`", sections[name]))
        assert stated == defaults(kind)
        assert ("No fields" in sections[name]) == (not stated)
        has_rates = (
            "It has rates" in sections[name] or "mixture rates for a second" in sections[name]
        )
        assert hasattr(kind, "rates") == has_rates


def test_methods_page_has_every_field_of_balance():
    from mtl_jax.balance import balance_config

    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `Balance\.(\w+)` \| `([^`]+)` \| (.*) \|$", page, re.MULTILINE)
    assert {name: value for name, value, _ in rows} == defaults(balance_config.BalanceConfig)
    text = {name: what for name, _, what in rows}
    for field, values in (
        ("by", balance_config.BY),
        ("groups", balance_config.GROUPS),
        ("reduction", balance_config.REDUCTIONS),
        ("rescale", balance_config.RESCALES),
    ):
        default = defaults(balance_config.BalanceConfig)[field]
        assert all(f"'{value}'" in text[field] + default for value in values)
    ways = re.findall(r"^\| `'(\w+)'` \|", page, re.MULTILINE)
    assert ways == list(balance_config.TASK_GRADIENTS)


@pytest.mark.slow
def test_methods_page_names_what_methods_log():
    """The names are those that the methods themselves give for a batch of two tasks."""
    import jax
    import jax.numpy as jnp

    from mtl_jax.balance.method import GRAM, Observations

    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    logged = page[page.index("## What is logged") : page.index("## Edge cases")]
    ones, names = jnp.ones(2), ("a", "b")
    seen = Observations(
        step=jnp.int32(0), tokens=ones, shares=ones / 2, losses=ones, correct=ones,
        gram=jnp.eye(2)[None], excess=ones, rng=jax.random.key(0), names=names,
    )  # fmt: skip
    for name, kind in own_methods().items():
        given = {"source": ("a",), "target": ("b",)} if name == "TransferObjective" else {}
        method = kind(**given)
        logs = method.weights(method.init(2, 1), seen)[2]
        for column, value in logs.items():
            shown = column if jnp.ndim(value) == 0 else f"{column}/TASK"
            where = "methods of gradients" if GRAM in kind.needs else name
            assert re.search(rf"`{shown}`[^;:]*\({where}\)", logged), column


def test_commands_of_the_methods_page_load(tmp_path, monkeypatch):
    from mtl_jax import cli, config

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "doremi").mkdir(parents=True)
    rates = config.rates_text({"embedded_nli_true_or_false": 1.0})
    (tmp_path / "runs" / "doremi" / "rates.gin").write_text(rates)
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    commands = [code for _, language, code in _BLOCK.findall(page) if language == "sh"]
    assert len(commands) == 2
    loaded = [
        config.load_args(cli.parse(shlex.split(code.replace("\\\n", ""))[1:])) for code in commands
    ]
    assert loaded[0].balance.method == "PCGrad"
    assert loaded[1].mixture.rates == {"embedded_nli_true_or_false": 1.0}
    assert loaded[1].mixture.name == loaded[1].data.mixture == "found_rates"


# ---------------------------------------------------------------------------------------------
# sharing.md
# ---------------------------------------------------------------------------------------------

SHARING = DOCS / "sharing.md"


def rows_of_sharing(title):
    """File -> the other cells, of the rows of both tables that begin with one."""
    text = section(SHARING, title)
    first, second = (re.split(r"^\| file \|", text, flags=re.MULTILINE))[1:]
    found = [re.findall(r"^\| `(\w+)` \| (.*) \|$", part, re.MULTILINE) for part in (first, second)]
    return [{name: rest.split(" | ") for name, rest in part} for part in found]


def sharing_rooms():
    import dataclasses

    from mtl_jax.sharing.sharing_config import Rooms

    return {field.name.capitalize(): field.default_factory for field in dataclasses.fields(Rooms)}


def sharing_sections():
    text = section(SHARING, "The structures")
    return dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL))


def test_sharing_page_has_every_structure_and_field():
    import test_sharing_gin

    chosen, costs = rows_of_sharing("All structures")
    sections = sharing_sections()
    assert list(chosen) == list(costs) == list(sections)
    assert sorted(chosen) == test_sharing_gin.FILES
    for name, (switches, *_, source) in chosen.items():
        # The file sets what the row says; the section has the row's source.
        text = (DOCS.parent / "gin" / "sharing" / f"{name}.gin").read_text(encoding="utf-8")
        for switch in re.findall(r"`([\w.]+)`", switches):
            assert re.search(rf"^{re.escape(switch)} = ", text, re.MULTILINE), (name, switch)
        assert " ".join(source.split()) in " ".join(sections[name].split()), name
    page = SHARING.read_text(encoding="utf-8")
    for room, kind in sharing_rooms().items():
        stated = dict(re.findall(rf"^- `{room}\.(\w+) = ([^`]+)`", page, re.MULTILINE))
        assert stated == defaults(kind), room


def test_sharing_page_names_what_there_is():
    """Fields that the page mentions exist; what may change on resuming is what the code says."""
    from mtl_jax.sharing import plan, sharing_config

    page = SHARING.read_text(encoding="utf-8")
    for room, kind in sharing_rooms().items():
        mentioned = set(re.findall(rf"\b{room}\.([a-z]\w*)", page))
        assert mentioned <= defaults(kind).keys(), room
    text = sharing_sections()["adversary"]
    assert all(f"'{name}'" in text for name in sharing_config.SCHEDULES)
    resuming = page[page.index("**Resuming**") : page.index("## With methods")]
    named = {(r.lower(), f) for r, f in re.findall(r"`([A-Z]\w+)\.(\w+)`", resuming)}
    adversary = defaults(sharing_config.AdversaryConfig).keys() - {"hidden_dim"}
    named |= {("adversary", name) for name in adversary}
    # The patterns of clusters may change; which task is in which, may not.
    assert named == plan._MAY_CHANGE - {("sharing", "clusters")}


def sharing_cases(cfg):
    """File -> (what Gin sets, the letters of its formula), by the T5's own numbers."""
    import sharing_plans as plans

    from mtl_jax import model, patterns
    from mtl_jax.sharing.sharing_config import (
        AdapterConfig,
        AdversaryConfig,
        ExpertsConfig,
        LoraConfig,
        PromptConfig,
        Rooms,
        SharingConfig,
    )

    sizes = {k: x.size for k, x in patterns.by_path(model.abstract_params(cfg)).items()}
    size = lambda start: sum(n for path, n in sizes.items() if path.startswith(start))  # noqa: E731
    letters = {
        "N": 3, "E": 3, "D": cfg.emb_dim, "I": cfg.emb_dim, "O": cfg.num_heads * cfg.head_dim,
        "LE": cfg.num_encoder_layers, "LD": cfg.num_decoder_layers,
        "S": cfg.num_encoder_layers + cfg.num_decoder_layers,
        "K": 2 * cfg.num_encoder_layers + 4 * cfg.num_decoder_layers,
    }  # fmt: skip
    own = {"clusters": plans.CLUSTERS}
    last = (("decoder", "cluster", cfg.num_decoder_layers - 1, cfg.num_decoder_layers),)
    mlps = size("encoder/layers/mlp/") + size("decoder/layers/mlp/")
    return letters, {
        "hierarchy": (
            Rooms(SharingConfig(**own, levels=last)),
            {"E": 2, "P": size("decoder/layers/") // cfg.num_decoder_layers},
        ),
        "soft": (
            Rooms(SharingConfig(copies=(("decoder/layers/.*", "task"),), soft_penalty=0.1)),
            {"P": size("decoder/layers/")},
        ),
        "lora": (Rooms(lora=LoraConfig(rank=5)), {"R": 5}),
        "polytropon": (
            Rooms(lora=LoraConfig(rank=5, owner="inventory", inventory=7)), {"R": 5, "M": 7},
        ),
        "adapters": (Rooms(SharingConfig(**own), adapter=AdapterConfig(6, "cluster")),
                     {"E": 2, "A": 6}),
        "prompts": (Rooms(prompt=PromptConfig(length=3)), {"L": 3}),
        "task_embedding": (Rooms(SharingConfig(task_embedding="task")), {}),
        "experts": (
            Rooms(experts=ExpertsConfig(number=4, router_dim=9)), {"X": 4, "C": 9, "P": mlps},
        ),
        "adversary": (Rooms(adversary=AdversaryConfig(weight=1.0, hidden_dim=11)), {"H": 11}),
    }  # fmt: skip


def test_sharing_page_counts_parameters():
    """The formulas of the page, computed, against the trees of parameters."""
    import golden
    import jax
    import sharing_plans as plans

    from mtl_jax import model
    from mtl_jax.sharing import tree
    from mtl_jax.sharing.plan import make_plan

    # Sizes differ, so that no letter can stand for another.
    cfg = golden.config("1.1", num_heads=3, num_encoder_layers=2, num_decoder_layers=4)
    base = model.abstract_params(cfg)
    count = lambda params: sum(leaf.size for leaf in jax.tree.leaves(params))  # noqa: E731
    costs = rows_of_sharing("All structures")[1]
    letters, cases = sharing_cases(cfg)
    assert cases.keys() == costs.keys()
    for name, (rooms, more) in cases.items():
        plan = make_plan(rooms, plans.NAMES, cfg)
        params = jax.eval_shape(lambda plain, p=plan: tree.init(p, jax.random.key(0), plain), base)
        formula = re.match("`([^`]+)`", costs[name][0])[1]
        assert count(params) - count(base) == eval(formula, letters | more), name


def test_sharing_page_tells_what_a_token_costs():
    """The T5 that runs has the size of the one that was asked for, where the page says so."""
    import golden
    import sharing_plans as plans

    from mtl_jax.sharing.plan import make_plan

    cfg = golden.config("1.1")
    costs = rows_of_sharing("All structures")[1]
    for name, (rooms, _) in sharing_cases(cfg)[1].items():
        plan = make_plan(rooms, plans.NAMES, cfg)
        assert costs[name][1].startswith("as plain") == (plan.model_config == cfg), name
        assert ("`hf`" in costs[name][2]) == (plan.model_config.adapter_dim == 0), name


def test_command_of_the_sharing_page_loads(tmp_path, monkeypatch):
    from mtl_jax import cli, config

    monkeypatch.chdir(tmp_path)
    (code,) = (
        x for _, kind, x in _BLOCK.findall(section(SHARING, "All structures")) if kind == "sh"
    )
    loaded = config.load_args(cli.parse(shlex.split(code.replace("\\\n", ""))[1:]))
    assert loaded.lora.rank == 8
    assert loaded.run.directory == "runs/lora"


@pytest.mark.slow
def test_sharing(tmp_path):
    """The run of the page; in the family's model a low-rank difference and nothing else is new."""
    from mtl_jax import interop
    from mtl_jax.interop.source import tensors

    play(SHARING, tmp_path, "One run")  # its `cmp` compares the scores before and after the export
    read = lambda name: [json.loads(x) for x in (tmp_path / name).read_text().splitlines()]  # noqa: E731
    nli, other = (
        np.array([row["score"] for row in read(f"{name}.jsonl")]) for name in ("nli", "arithmetic")
    )
    assert np.abs(nli - other).min() > 1e-3
    plain = interop.open_source(tmp_path / "runs" / "plain")
    tuned = interop.open_source(tmp_path / "runs" / "lora", task="nli")
    exported = interop.open_source(tmp_path / "my_nli")
    for path in tensors(plain.config):
        layer = 0 if "layers" in path else None
        before, after = plain.read(path, layer), tuned.read(path, layer)
        np.testing.assert_array_equal(exported.read(path, layer), after)
        if re.fullmatch(r".*attention/(query|value)/kernel", "/".join(path)):
            values = np.linalg.svd(after - before, compute_uv=False)
            assert values[3] > 1e-4
            assert values[4] < 1e-4 * values[0]  # rank 4, but for float32's rounding of the sum
        else:
            np.testing.assert_array_equal(before, after)
