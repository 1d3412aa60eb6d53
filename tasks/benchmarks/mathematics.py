"""GSM8K: word problems of arithmetic; answers are compared as numbers."""

import re
from collections.abc import Mapping
from typing import Any

from mtl_jax import metrics
from mtl_jax.tasks.benchmarks.dataset import Dataset
from mtl_jax.tasks.benchmarks.origins import HuggingFace, Origin, Row, Tfds

_MARK = "####"
_CALCULATOR = re.compile(r"<<[^>]*>>")
_NUMBER = re.compile(r"(?:(?<![\w.])-)?\$?(?:\d[\d,]*)?\.?\d+")  # a minus between numbers is none


def number_in(text: str) -> str:
    """The last number of a text, as a plain decimal: "so $1,050.00." gives "1050"; or ""."""
    found = _NUMBER.findall(text.rpartition(_MARK)[2])
    if not found:
        return ""
    number = found[-1].replace(",", "").replace("$", "")
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number)
    whole, _, fraction = digits.partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    plain = f"{whole}.{fraction}" if fraction else whole
    return plain if plain == "0" else sign + plain


def _with_solution(row: Row) -> Row:
    solution, _, number = row["answer"].partition(_MARK)
    solution = _CALCULATOR.sub("", solution).strip()
    return {**row, "solution": solution, "number": number.strip().replace(",", "")}


def _as_number(text: str, *, example: Mapping[str, Any], is_target: bool = False) -> str:
    del example, is_target
    return number_in(text)


DATASETS = (
    Dataset(
        "gsm8k",
        "mathematics",
        Origin(
            "gsm8k",
            {"question": str, "answer": str},
            {"train": 7473, "test": 1319},
            tfds=Tfds("gsm8k:1.0.0"),
            huggingface=HuggingFace("openai/gsm8k", "main"),
        ),
        family="arithmetic",
        metric_fns=(metrics.exact_match,),
        prepare=_with_solution,
        postprocess=_as_number,
        license="MIT",
        citation="Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems",
    ),
)
