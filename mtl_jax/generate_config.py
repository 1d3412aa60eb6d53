"""How text is generated: plain values."""

import dataclasses
import math
from collections.abc import Sequence

from mtl_jax.errors import UserError, suggest

METHODS = {
    "greedy": "the most likely token at each step",
    "sample": "a random token of the model's distribution, changed by temperature, top_k and top_p",
    "beam": "the best num_beams hypotheses side by side",
}
LENGTH_PENALTIES = {
    "t5x": "T5X's search and its brevity penalty ((5 + length) / 6) ** length_alpha",
    "hugging_face": "Hugging Face's search and its penalty length ** length_alpha",
}
EARLY_STOPPING = {
    "heuristic": "when no live beam, at its present length, beats the worst finished one (False)",
    "when_full": "as soon as num_beams hypotheses have finished (True)",
    "never": "when no live beam can beat the worst finished one at any length ('never')",
}
_DEFAULT_ALPHA = {"t5x": 0.6, "hugging_face": 1.0}
ONLY_OF = dict.fromkeys(("temperature", "top_k", "top_p", "seed"), "sample") | dict.fromkeys(
    ("num_beams", "length_penalty", "length_alpha", "early_stopping"), "beam"
)


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How text is generated.

    Attributes:
      method: a name of `METHODS`: "greedy", "sample" or "beam".
      max_length: tokens generated at most, the end of sequence among them.
      min_length: the end of sequence is forbidden before so many tokens have been made.
      num_return: continuations of each input: samples, or the best of the beams; best first.
      stop: texts that end a continuation as soon as one of them is in it.
      temperature: logits are divided by it; below 1 likely tokens become likelier.
      top_k: draw among so many of the most likely tokens; 0: among all.
      top_p: then among the fewest of the most likely ones that hold this share of the probability;
        1.0: among all.
      seed: of the random numbers.
      num_beams: hypotheses that are followed.
      length_penalty: which beam search, by how it ranks: a name of `LENGTH_PENALTIES`.
      length_alpha: exponent of the penalty; None: 0.6 for "t5x", 1.0 for "hugging_face".
      early_stopping: when "hugging_face" gives up its live beams: a name of `EARLY_STOPPING`.
    """

    method: str = "greedy"
    max_length: int = 128
    min_length: int = 0
    num_return: int = 1
    stop: Sequence[str] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    num_beams: int = 4
    length_penalty: str = "t5x"
    length_alpha: float | None = None
    early_stopping: str = "heuristic"

    def __post_init__(self) -> None:
        for field, known in (
            ("method", METHODS),
            ("length_penalty", LENGTH_PENALTIES),
            ("early_stopping", EARLY_STOPPING),
        ):
            if (name := getattr(self, field)) not in known:
                raise UserError(
                    f"Generate.{field}: unknown name {name!r}.{suggest(str(name), known)}"
                    f" Known: {', '.join(known)}."
                )
        self._check_applicable()
        self._check_ranges()
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise UserError(
                f"Generate.stop must be a list of texts, none of them empty, got {self.stop!r}."
            )
        object.__setattr__(self, "stop", tuple(self.stop))

    def _check_applicable(self) -> None:
        for option in dataclasses.fields(self):
            owner = ONLY_OF.get(option.name, self.method)
            if owner != self.method and getattr(self, option.name) != option.default:
                raise UserError(
                    f"Generate.{option.name} belongs to the method {owner!r}, but Generate.method "
                    f"= {self.method!r}: remove one of the two."
                )
        if self.early_stopping != "heuristic" and self.length_penalty != "hugging_face":
            raise UserError(
                "Generate.early_stopping belongs to Generate.length_penalty = 'hugging_face'; "
                "T5X's search stops when no live beam can win."
            )
        if self.method == "greedy" and self.num_return != 1:
            raise UserError(
                f"Generate.num_return = {self.num_return}, but greedy decoding has one result: "
                "set Generate.method to 'sample' or 'beam'."
            )
        if self.method == "beam" and self.num_return > self.num_beams:
            raise UserError(
                f"Generate.num_return = {self.num_return} is more than Generate.num_beams = "
                f"{self.num_beams}: only so many hypotheses are kept."
            )

    def _check_ranges(self) -> None:
        for field, least in (
            *(("max_length", 1), ("min_length", 0), ("num_return", 1)),
            *(("top_k", 0), ("num_beams", 1), ("seed", 0)),
        ):
            if (value := getattr(self, field)) < least:
                raise UserError(f"Generate.{field} must be at least {least}, got {value}.")
        if self.seed >= 2**32:
            raise UserError(f"Generate.seed must be below 2 ** 32, got {self.seed}.")
        if self.min_length > self.max_length:
            raise UserError(
                f"Generate.min_length = {self.min_length} is more than Generate.max_length = "
                f"{self.max_length}."
            )
        if not 0.0 < self.temperature < math.inf:
            raise UserError(
                f"Generate.temperature must be positive, got {self.temperature}; for the most "
                "likely token at each step set Generate.method to 'greedy'."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(
                f"Generate.top_p must be in (0, 1], where 1.0 is off, got {self.top_p}."
            )
        if not math.isfinite(self.alpha):
            raise UserError(f"Generate.length_alpha must be a number, got {self.length_alpha}.")
        if self.alpha < 0 and self.length_penalty == "t5x":
            raise UserError(
                f"Generate.length_alpha must not be negative for 't5x', got {self.alpha}: its "
                "search stops on the assumption that longer is no worse."
            )

    @property
    def alpha(self) -> float:
        """`length_alpha`, or the default of the length penalty."""
        if self.length_alpha is None:
            return _DEFAULT_ALPHA[self.length_penalty]
        return self.length_alpha

    @property
    def width(self) -> int:
        """Continuations of each row that are made side by side."""
        return self.num_beams if self.method == "beam" else self.num_return
