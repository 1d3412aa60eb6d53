"""What Gin sets of sharing; everything is off by default."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mtl_jax import patterns
from mtl_jax.errors import UserError, suggest

OWNERS = ("task", "cluster")
STACKS = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class SharingConfig:
    """Who owns what.

    Attributes:
      clusters: a task's name, or a pattern of names such as 'glue_*', to its cluster; the first
        that matches decides, and every task of training needs one. Tasks that are evaluated alone
        belong to the cluster of their pattern, too.
      clusters_file: instead, a JSON file {"groups": [[task, ...], ...]}, as the affinity tool
        writes; a cluster for each group.
      levels: (stack, owner, first, end): layers first, first + 1, ..., end - 1 of "encoder" or
        "decoder" are of each "task" or "cluster". The others are shared.
      copies: (pattern, owner): parameters that each task or cluster has of its own, in all layers,
        by their path in a plain T5 (`patterns.py`), such as 'decoder/decoder_norm/scale'.
      soft_penalty: lambda of the loss `lambda/2 sum_t |theta_t - mean theta|^2` that draws the
        copies of `levels` and `copies` together (Duong et al. 2015).
      soft_pattern: which copies it draws, by their path in a plain T5.
      task_embedding: "task" or "cluster" adds a vector of each to the embedding of every token, in
        encoder and decoder; empty: none. The output must not be tied to the embedding.
    """

    clusters: Mapping[str, str | int] = dataclasses.field(default_factory=dict)
    clusters_file: str = ""
    levels: Sequence[tuple[str, str, int, int]] = ()
    copies: Sequence[tuple[str, str]] = ()
    soft_penalty: float = 0.0
    soft_pattern: str = ".*"
    task_embedding: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(map(tuple, self.levels)))
        object.__setattr__(self, "copies", tuple(map(tuple, self.copies)))
        if self.clusters and self.clusters_file:
            raise UserError("Sharing.clusters and Sharing.clusters_file both say it: set one.")
        for stack, owner, first, end in self.levels:
            _one_of("Sharing.levels", stack, STACKS)
            _one_of("Sharing.levels", owner, OWNERS)
            if not 0 <= first < end:
                raise UserError(
                    f"Sharing.levels: ({stack!r}, {owner!r}, {first}, {end}) is no range of layers:"
                    " write the first one and the one after the last."
                )
        self._check_overlap()
        patterns.check("Sharing.copies", [pattern for pattern, _ in self.copies])
        for _, owner in self.copies:
            _one_of("Sharing.copies", owner, OWNERS)
        if self.soft_penalty < 0:
            raise UserError(f"Sharing.soft_penalty must not be negative, got {self.soft_penalty}.")
        if self.soft_penalty and not self.levels and not self.copies:
            raise UserError(
                "Sharing.soft_penalty draws copies together, but there are none: set "
                "Sharing.levels or Sharing.copies."
            )
        patterns.check("Sharing.soft_pattern", [self.soft_pattern])
        _refuse_idle("Sharing", self, "soft_penalty", ("soft_pattern",))
        if self.task_embedding:
            _one_of("Sharing.task_embedding", self.task_embedding, OWNERS)

    def _check_overlap(self) -> None:
        for stack in STACKS:
            ranges = sorted((first, end) for name, _, first, end in self.levels if name == stack)
            for (_, end), (first, _) in itertools.pairwise(ranges):
                if first < end:
                    raise UserError(f"Sharing.levels: layer {first} of the {stack} is owned twice.")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank differences of kernels: kernel + alpha/rank A B (Hu et al. 2021).

    Attributes:
      rank: r; 0 for none.
      alpha: numerator of the scale; 0: the rank, so that the scale is 1.
      patterns: of kernels, by their path in a plain T5; layers of a stack each have their own A, B.
      owner: "task", "cluster", "shared" (one for all), or "inventory": `inventory` pairs (A, B) of
        which every task, in every layer, mixes its own by sigmoid(logits) / sum (Polytropon, Ponti
        et al. 2023).
      inventory: pairs of the inventory.
    """

    rank: int = 0
    alpha: float = 0.0
    patterns: Sequence[str] = (r".*attention/(query|value)/kernel",)
    owner: str = "task"
    inventory: int = 8

    def __post_init__(self) -> None:
        _refuse_idle("Lora", self, "rank", ("alpha", "patterns", "owner", "inventory"))
        _at_least("Lora.rank", self.rank, 0)
        _at_least("Lora.inventory", self.inventory, 1)
        if self.alpha < 0:
            raise UserError(f"Lora.alpha must not be negative, got {self.alpha}.")
        patterns.check("Lora.patterns", self.patterns)
        object.__setattr__(self, "patterns", tuple(self.patterns))
        if not self.patterns:
            raise UserError("Lora.patterns is empty: name the kernels that get a difference.")
        _one_of("Lora.owner", self.owner, (*OWNERS, "shared", "inventory"))
        if self.owner != "inventory":
            _refuse_option("Lora", self, "inventory", "Lora.owner = 'inventory'")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Bottlenecks behind every attention and MLP (Houlsby et al. 2019).

    Attributes:
      dim: width of the bottleneck; 0 for none.
      owner: "task", "cluster", or "shared" (one for all).
    """

    dim: int = 0
    owner: str = "task"

    def __post_init__(self) -> None:
        _refuse_idle("Adapter", self, "dim", ("owner",))
        _at_least("Adapter.dim", self.dim, 0)
        _one_of("Adapter.owner", self.owner, (*OWNERS, "shared"))


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Trained vectors in front of every input (Lester et al. 2021).

    Attributes:
      length: vectors of one prompt; 0 for none. They live in the last rows of the embedding, which
        must be beyond the tasks' vocabulary; the output must not be tied to the embedding. In
        training they take room of `Data.inputs_length`; elsewhere inputs get longer by them.
      owners: whose prompts there are: "shared", "task", "cluster", or several of them.
      combine: several prompts are added ("add"), or stand one behind the other ("concat").
    """

    length: int = 0
    owners: Sequence[str] = ("task",)
    combine: str = "add"

    def __post_init__(self) -> None:
        object.__setattr__(self, "owners", tuple(self.owners))
        _refuse_idle("Prompt", self, "length", ("owners", "combine"))
        _at_least("Prompt.length", self.length, 0)
        for owner in self.owners:
            _one_of("Prompt.owners", owner, (*OWNERS, "shared"))
        if not self.owners or len(set(self.owners)) < len(self.owners):
            raise UserError(f"Prompt.owners must name each owner once, got {self.owners!r}.")
        _one_of("Prompt.combine", self.combine, ("add", "concat"))
        if len(self.owners) == 1:
            _refuse_option("Prompt", self, "combine", "several Prompt.owners")

    @property
    def rows(self) -> int:
        """Tokens that the prompt takes of every input."""
        return self.length * (len(self.owners) if self.combine == "concat" else 1)


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of MLPs whose router sees the task alone (Kudugunta et al. 2021).

    A task's experts do not depend on the token, so they are one wider MLP: the T5 that runs has an
    `mlp_dim` of `top_k` times that of `T5.mlp_dim`.

    Attributes:
      number: experts of each layer; 0 for none.
      top_k: how many of them a task uses. At least 2: their weights add up to 1, and a single
        weight of 1 would give the router no gradient.
      stacks: whose MLPs are experts. The MLPs of the other stack are padded with zeros to the
        same width: its results stay, but it takes `top_k` times as long in them.
      router_dim: of the vector by which a task is known to the router.
      balance_weight: weight of the loss that spreads tasks over experts (Fedus et al. 2021,
        equation 4, with tasks in the place of tokens); 0 for none.
    """

    number: int = 0
    top_k: int = 2
    stacks: Sequence[str] = STACKS
    router_dim: int = 32
    balance_weight: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stacks", tuple(self.stacks))
        options = ("top_k", "stacks", "router_dim", "balance_weight")
        _refuse_idle("Experts", self, "number", options)
        _at_least("Experts.number", self.number, 0)
        _at_least("Experts.router_dim", self.router_dim, 1)
        if self.number and not 2 <= self.top_k <= self.number:
            raise UserError(
                f"Experts.top_k must be from 2 to Experts.number = {self.number}, got {self.top_k}."
            )
        for stack in self.stacks:
            _one_of("Experts.stacks", stack, STACKS)
        if not self.stacks or len(set(self.stacks)) < len(self.stacks):
            raise UserError(f"Experts.stacks must name each stack once, got {self.stacks!r}.")
        if self.balance_weight < 0:
            raise UserError(
                f"Experts.balance_weight must not be negative, got {self.balance_weight}."
            )


SCHEDULES = ("constant", "linear", "ganin")


@dataclasses.dataclass(frozen=True)
class AdversaryConfig:
    """A classifier that tells tasks apart by the encoder's states, whose gradient is reversed.

    The decoder learns from the encoder alone which task it is to do. So this suits tasks of one
    output format, or a model that knows its task elsewhere (`Sharing.task_embedding`, or layers of
    the decoder of its own); prefixes that name the task belong into `exclude_prefix`. Its learning
    rate is set by `Optimizer.learning_rate_scale`, pattern 'sharing/adversary/.*'.

    Attributes:
      weight: lambda: the encoder gets minus this times the classifier's gradient; 0: no adversary.
      hidden_dim: of the classifier's hidden layer; 0: a linear one.
      schedule: lambda over the steps: "constant"; "linear", from 0; "ganin":
        2 / (1 + exp(-10 p)) - 1 times the weight (Ganin et al. 2016, section 5.2.2).
      ramp_steps: steps until p = 1, of "linear" and "ganin".
      exclude_prefix: tokens at the start of every input that the classifier does not see. Soft
        prompts count.
    """

    weight: float = 0.0
    hidden_dim: int = 256
    schedule: str = "constant"
    ramp_steps: int = 10_000
    exclude_prefix: int = 0

    def __post_init__(self) -> None:
        options = ("hidden_dim", "schedule", "ramp_steps", "exclude_prefix")
        _refuse_idle("Adversary", self, "weight", options)
        if self.weight < 0:
            raise UserError(f"Adversary.weight must not be negative, got {self.weight}.")
        _at_least("Adversary.hidden_dim", self.hidden_dim, 0)
        _at_least("Adversary.exclude_prefix", self.exclude_prefix, 0)
        _at_least("Adversary.ramp_steps", self.ramp_steps, 1)
        _one_of("Adversary.schedule", self.schedule, SCHEDULES)
        if self.schedule == "constant":
            _refuse_option("Adversary", self, "ramp_steps", "another Adversary.schedule")


@dataclasses.dataclass(frozen=True)
class Rooms:
    """All that Gin sets of sharing."""

    sharing: SharingConfig = dataclasses.field(default_factory=SharingConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    experts: ExpertsConfig = dataclasses.field(default_factory=ExpertsConfig)
    adversary: AdversaryConfig = dataclasses.field(default_factory=AdversaryConfig)


def rooms_of(config: Any) -> Rooms:
    """The rooms of a whole configuration (`config.Config`)."""
    return Rooms(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Rooms)})


def _one_of(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(
            f"{field}: {value!r} is not known.{suggest(value, known)} Known: {', '.join(known)}."
        )


def _at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{field} must be at least {least}, got {value}.")


def _default(config: Any, name: str) -> Any:
    (field,) = [field for field in dataclasses.fields(config) if field.name == name]
    return field.default


def _refuse_option(room: str, config: Any, name: str, needs: str) -> None:
    value, default = getattr(config, name), _default(config, name)
    if (tuple(value) if isinstance(value, list) else value) != default:
        raise UserError(f"{room}.{name} = {value!r} needs {needs}: set it, or remove this.")


def _refuse_idle(room: str, config: Any, switch: str, names: Sequence[str]) -> None:
    """An option of something that is switched off is a mistake."""
    if not getattr(config, switch):
        for name in names:
            _refuse_option(room, config, name, f"{room}.{switch}, which is off")
