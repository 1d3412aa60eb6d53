"""What of a report is shown at first, and what its selectors choose from.

Every row carries tokens such as `c1 s0 p2 p* m*`: the checkpoint, shots, protocol, metric, dataset,
pair of checkpoints, prompt or outcome that it is about. A selector's value is a token or "" (all);
a row is shown unless it has tokens of the selector's kind and not the chosen one. The page is
written with the first choice, so that it can be read without JavaScript.
"""

import dataclasses
from collections.abc import Sequence

from mtl_jax.sweep_report.gather import Checkpoint, Material
from mtl_jax.sweep_report.lines import OWN, Line, protocols

FIRST = "*"  # of protocols and metrics: the dataset's, the protocol's first
ALL = "*"  # of datasets: their average, which goes when one of them is chosen


@dataclasses.dataclass(frozen=True)
class Selector:
    """One choice: its options as (token, text)."""

    kind: str
    label: str
    options: tuple[tuple[str, str], ...]
    chosen: str


class Choosing:
    """Tokens of all that can be chosen."""

    def __init__(
        self,
        material: Material,
        found: Sequence[Line],
        pairs: Sequence[tuple[Checkpoint, Checkpoint]] = (),
    ):
        """Numbers the names; the newest checkpoint is chosen at first, and the fewest shots."""
        self._checkpoints = {c: f"c{i}" for i, c in enumerate(material.checkpoints)}
        self._shots = {count: f"s{i}" for i, count in enumerate(material.shots)}
        names = protocols(found)
        self._protocols = {OWN: f"p{FIRST}"} | {name: f"p{i}" for i, name in enumerate(names)}
        metrics = dict.fromkeys(line.metric for line in found)
        self._metrics = {name: f"m{i}" for i, name in enumerate(metrics)}
        datasets = sorted({result.dataset for result in material.results})
        self._datasets = {ALL: f"d{ALL}"} | {name: f"d{i}" for i, name in enumerate(datasets)}
        self._pairs = {pair: f"a{i}" for i, pair in enumerate(pairs)}
        self.first = {
            "c": f"c{len(self._checkpoints) - 1}",
            "s": "s0",
            "p": f"p{FIRST}",
            "m": f"m{FIRST}",
            "a": "a0",
        }

    def tokens(
        self,
        *,
        checkpoint: Checkpoint | None = None,
        shots: int | None = None,
        protocol: str | None = None,
        own: bool = False,
        metric: str = "",
        main: bool = False,
        dataset: str = "",
        pair: tuple[Checkpoint, Checkpoint] | None = None,
    ) -> list[str]:
        """Tokens of a row about these; what is left out does not bind it."""
        made = []
        if checkpoint is not None:
            made.append(self._checkpoints[checkpoint])
        if shots is not None:
            made.append(self._shots[shots])
        if protocol is not None:
            made.append(self._protocols[protocol])
        if own:
            made.append(self._protocols[OWN])
        if metric:
            made.append(self._metrics[metric])
        if main:
            made.append(f"m{FIRST}")
        if dataset:
            made.append(self._datasets[dataset])
        if pair is not None:
            made.append(self._pairs[pair])
        return made

    def of_line(self, line: Line, *without: str) -> list[str]:
        """Tokens of a line, without those kinds that its row spans."""
        made = self.tokens(
            checkpoint=line.view.checkpoint,
            shots=line.view.shots,
            protocol=line.view.protocol,
            own=line.own,
            metric=line.metric,
            main=line.main,
            dataset=line.dataset,
        )
        return [token for token in made if token[0] not in without]

    def hidden(self, tokens: Sequence[str]) -> bool:
        """Whether a row with these tokens waits behind a selector at first."""
        return any(
            token not in tokens and any(other[0] == kind for other in tokens)
            for kind, token in self.first.items()
        )

    def selectors(self) -> list[Selector]:
        """Those with more than one option, for the whole page."""
        own = "each dataset's first"
        every = (
            ("c", "checkpoint", {t: c.label for c, t in self._checkpoints.items()}),
            ("s", "shots", {t: str(count) for count, t in self._shots.items()}),
            ("p", "protocol", {t: name or own for name, t in self._protocols.items()}),
            ("m", "metric", {f"m{FIRST}": "the first"} | {t: n for n, t in self._metrics.items()}),
            ("d", "dataset", {t: name for name, t in self._datasets.items() if name != ALL}),
        )  # fmt: skip
        made = []
        for kind, label, options in every:
            concrete = [token for token in options if not token.endswith(FIRST)]
            if len(concrete) > 1:
                texts = (("", "all"), *options.items())
                made.append(Selector(kind, label, texts, self.first.get(kind, "")))
        return made

    def pair_selector(self) -> Selector | None:
        """Which two checkpoints are compared; None where there is one pair."""
        if len(self._pairs) < 2:
            return None
        texts = {t: f"{first.label} → {second.label}" for (first, second), t in self._pairs.items()}
        return Selector("a", "from → to", (("", "all"), *texts.items()), self.first["a"])

    @property
    def shown(self) -> str:
        """The first choice in words."""
        words = []
        for selector in self.selectors():
            if selector.chosen:
                words.append(f"{selector.label}: {dict(selector.options)[selector.chosen]}")
        return ", ".join(words)
