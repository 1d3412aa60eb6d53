"""The one object that says how tasks share parameters: values, tasks and model together."""

import dataclasses
import fnmatch
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import model, patterns
from mtl_jax.errors import UserError, suggest
from mtl_jax.model_config import T5Config
from mtl_jax.sharing.sharing_config import Rooms, SharingConfig

# A parameter's owners: (first layer, layer after the last, owner), or one with None for the layers
# of a parameter that is not stacked, or is owned whole.
Pieces = tuple[tuple[int | None, int | None, str], ...]
# What may change while a run goes on: what is of training alone, and the patterns of clusters.
_MAY_CHANGE = {
    ("sharing", "clusters"),
    *(("sharing", "soft_penalty"), ("sharing", "soft_pattern"), ("experts", "balance_weight")),
    *(("adversary", name) for name in ("weight", "schedule", "ramp_steps", "exclude_prefix")),
}


@dataclasses.dataclass(frozen=True, eq=False)
class SharingPlan:
    """How tasks share parameters; hashed by identity.

    Attributes:
      rooms: what Gin set.
      names: of the tasks; the task of id i is `names[i - 1]`.
      base: the T5 that was asked for, which sharing starts from.
      model_config: the T5 that `tree.plain` gives parameters for; all that runs the model takes
        this one.
      axes: logical axis names of the parameters of `base` and its adapters, by path.
      owned: the parameters that are copied, and for whom.
      lora_paths: the kernels that get a low-rank difference.
      cluster_names: of the clusters, in the order of their entries.
      cluster_of: each task's cluster, in the order of `names`; empty if there are none.
    """

    rooms: Rooms
    names: tuple[str, ...]
    base: T5Config
    model_config: T5Config
    axes: Mapping[str, tuple[str | None, ...]]
    owned: Mapping[str, Pieces]
    lora_paths: tuple[str, ...]
    cluster_names: tuple[str, ...]
    cluster_of: tuple[int, ...]

    @property
    def empty(self) -> bool:
        """Whether the tree of parameters is that of a plain T5."""
        rooms = self.rooms
        return not (
            self.owned
            or rooms.lora.rank
            or rooms.adapter.dim
            or rooms.prompt.length
            or rooms.experts.number
            or rooms.adversary.weight
            or rooms.sharing.task_embedding
        )

    @property
    def by_task(self) -> bool:
        """Whether `tree.plain` gives different tasks different parameters."""
        return bool(_owners_in_use(self.rooms) - {"", "shared"} or self.rooms.experts.number)

    @property
    def _by_cluster_alone(self) -> bool:
        owners = _owners_in_use(self.rooms)
        return owners <= {"", "shared", "cluster"} and not self.rooms.experts.number

    def alike(self, task: str) -> str:
        """A name that tasks have in common to which `tree.plain` gives the same parameters."""
        if not self.by_task:
            return ""
        if self._by_cluster_alone:
            return self.cluster_names[self.cluster_of[self.names.index(task)]]
        return task

    def entries(self, owner: str) -> int:
        """How many entries the banks of "task", "cluster", "inventory" or "experts" have."""
        return {
            "task": len(self.names),
            "cluster": len(self.cluster_names),
            "inventory": self.rooms.lora.inventory,
            "experts": self.rooms.experts.number,
        }[owner]

    def index(self, owner: str, task: jax.Array | int) -> jax.Array:
        """The entry of a task in the banks of "task" or "cluster", int32; -1 for none.

        Behind the tasks' own ids are those of tasks that are not known, one for each cluster.
        """
        clusters = range(len(self.cluster_names))
        if owner == "task":
            entries = (-1, *range(len(self.names)), *(-1 for _ in clusters))
        else:
            entries = (-1, *self.cluster_of, *clusters)
        return jnp.asarray(entries, jnp.int32)[task]

    def present(self, owner: str, present_N: jax.Array) -> jax.Array | None:
        """Which entries of a bank have a task in the batch; None for banks of all tasks.

        Args:
          owner: the bank.
          present_N: bool, the tasks in the batch.
        """
        if owner == "task":
            return present_N
        if owner == "cluster":
            member_CN = np.equal(
                np.arange(len(self.cluster_names))[:, None], np.array(self.cluster_of)[None]
            )
            return jnp.any(member_CN & present_N[None], axis=1)
        return None

    def task_id(self, name: str) -> int:
        """The id of a task, of "*" (0), or of a task that is not known in a cluster of this name.

        Raises:
          UserError: there is none of that name.
        """
        if name in self.names:
            return self.names.index(name) + 1
        if name in self.cluster_names:
            return self._id_in_cluster(name)
        if name == "*":
            return 0
        known = (*self.names, *self.cluster_names)
        raise UserError(f"Unknown task {name!r}.{suggest(name, known)} {self.choices}")

    @property
    def choices(self) -> str:
        """What a user may name where parameters of a task are wanted, in a sentence."""
        clusters = f", or its cluster ({listed(self.cluster_names)})" * bool(self.cluster_names)
        return (
            f"The model was trained on {listed(self.names)}; for another task name '*', the mean "
            f"of all{clusters}."
        )

    def evaluation_id(self, name: str) -> int:
        """The id by which a task is evaluated; the same for tasks with the same parameters.

        A task that is not known is of the cluster whose pattern matches its name, or of none.
        """
        if not self.by_task:
            return 0
        if name in self.names:
            return [self.alike(other) for other in self.names].index(self.alike(name)) + 1
        for pattern, cluster in self.rooms.sharing.clusters.items():
            if self.cluster_names and fnmatch.fnmatchcase(name, pattern):
                # Earlier patterns may have left none of the trained tasks to this cluster.
                trained = str(cluster) in self.cluster_names
                return self._id_in_cluster(str(cluster)) if trained else 0
        return 0

    def evaluated_as(self, name: str) -> str | None:
        """The name by which `task_id` gives what `evaluation_id` does; None: any, all are alike."""
        if not self.by_task:
            return None
        number = self.evaluation_id(name)
        if number == 0:
            return "*"
        own = number <= len(self.names)
        return self.names[number - 1] if own else self.cluster_names[number - len(self.names) - 1]

    def _id_in_cluster(self, cluster: str) -> int:
        entry = self.cluster_names.index(cluster)
        if self._by_cluster_alone:
            return self.cluster_of.index(entry) + 1
        return len(self.names) + 1 + entry

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must say so that the plan can be made again from it alone (JSON).

        The clusters are written out: the file that they came from may change.
        """
        values = json.loads(json.dumps(dataclasses.asdict(self.rooms)))
        if self.cluster_names:
            clusters = (self.cluster_names[c] for c in self.cluster_of)
            # Patterns stay behind, for tasks that are not known.
            named = dict(zip(self.names, clusters, strict=True))
            values["sharing"]["clusters"] = named | {
                name: str(cluster)
                for name, cluster in self.rooms.sharing.clusters.items()
                if name not in named
            }
            values["sharing"]["clusters_file"] = ""
        return {"rooms": values, "tasks": list(self.names)}

    def check_description(self, saved: Mapping[str, Any] | None, place: str | Path) -> None:
        """Refuses a checkpoint whose tasks share parameters in another way.

        What is of training alone (weights of losses) may be another.

        Args:
          saved: `describe` of the checkpoint; None: a plain T5.
          place: the checkpoint, for messages.

        Raises:
          UserError: names the field and both values.
        """
        ours = None if self.empty else self.describe()
        if saved is None or ours is None:
            if (saved is None) != (ours is None):
                what = "has no parameters of" if saved is None else "has parameters of"
                raise UserError(
                    f"The checkpoint {place} {what} tasks (Sharing, Lora, ...), other than this "
                    "run: set the values that it was trained with, or take one task out of it with "
                    "`mtl-jax convert --task`."
                )
            return
        if saved["tasks"] != ours["tasks"]:
            raise UserError(
                f"The checkpoint {place} has parameters of the tasks {listed(saved['tasks'])}, "
                f"this run of {listed(ours['tasks'])}: they must be the same."
            )
        theirs, mine = (x["rooms"]["sharing"]["clusters"] for x in (saved, ours))
        for name in self.names if self.cluster_names else ():
            if theirs.get(name) != mine[name]:
                raise UserError(
                    f"The checkpoint {place} has task {name!r} in the cluster {theirs.get(name)!r},"
                    f" this run in {mine[name]!r} (Sharing.clusters): they must be the same."
                )
        for room, values in ours["rooms"].items():
            for field, value in values.items():
                theirs = saved["rooms"].get(room, {}).get(field, value)
                # An adversary that is switched on or off is another tree of parameters.
                switched = (room, field) == ("adversary", "weight") and not (theirs and value)
                if theirs != value and (switched or (room, field) not in _MAY_CHANGE):
                    raise UserError(
                        f"The checkpoint {place} has {room.capitalize()}.{field} = {theirs!r}, "
                        f"this run {value!r}: they must be the same."
                    )


def from_description(saved: Mapping[str, Any], cfg: T5Config) -> SharingPlan:
    """The plan that `describe` wrote down, for the T5 that was asked for."""
    kinds = {field.name: field.default_factory for field in dataclasses.fields(Rooms)}
    rooms = {name: kinds[name](**values) for name, values in saved["rooms"].items()}  # type: ignore
    return make_plan(Rooms(**rooms), saved["tasks"], cfg)


def make_plan(rooms: Rooms, names: Sequence[str], cfg: T5Config) -> SharingPlan:
    """Puts values, tasks and model together.

    Args:
      rooms: what Gin set.
      names: of the tasks, in the order of their ids, which start at 1.
      cfg: the T5 that was asked for.

    Raises:
      UserError: names the field and what does not fit.
    """
    if rooms.adapter.dim and cfg.adapter_dim:
        raise UserError("Adapter.dim and T5.adapter_dim both ask for adapters: set Adapter.dim.")
    narrow = dataclasses.replace(cfg, adapter_dim=rooms.adapter.dim or cfg.adapter_dim)
    axes = _axes(narrow)
    wide = narrow.mlp_dim * (rooms.experts.top_k if rooms.experts.number else 1)
    cluster_names, cluster_of = _clusters(rooms, tuple(names))
    plan = SharingPlan(
        rooms=rooms,
        names=tuple(names),
        base=cfg,
        model_config=dataclasses.replace(narrow, mlp_dim=wide),
        axes=axes,
        owned=_owned(rooms, narrow, axes),
        lora_paths=_lora_paths(rooms, axes),
        cluster_names=cluster_names,
        cluster_of=cluster_of,
    )
    _check(plan)
    return plan


@functools.lru_cache(maxsize=8)
def _axes(cfg: T5Config) -> Mapping[str, tuple[str | None, ...]]:
    return patterns.by_path(model.param_axes(cfg))


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names for a message, a long list cut short."""
    more = f", ... ({len(names)} in all)" * (len(names) > most)
    return ", ".join(names[:most]) + more


# ---------------------------------------------------------------------------------------------
# Clusters
# ---------------------------------------------------------------------------------------------


def _owners_in_use(rooms: Rooms) -> set[str]:
    used = {owner for _, owner, *_ in rooms.sharing.levels}
    used |= {owner for _, owner in rooms.sharing.copies}
    used.add(rooms.sharing.task_embedding)
    used |= {rooms.lora.owner} if rooms.lora.rank else set()
    used |= {rooms.adapter.owner} if rooms.adapter.dim else set()
    return used | (set(rooms.prompt.owners) if rooms.prompt.length else set())


def _clusters(rooms: Rooms, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    cfg = rooms.sharing
    field = "Sharing.clusters_file" if cfg.clusters_file else "Sharing.clusters"
    given = bool(cfg.clusters or cfg.clusters_file)
    if "cluster" not in _owners_in_use(rooms):
        if given:
            raise UserError(f"{field} is set, but nothing is owned by clusters: remove it.")
        return (), ()
    if not given:
        raise UserError("Something is owned by clusters: say which task is in which, in "
                        "Sharing.clusters or Sharing.clusters_file.")  # fmt: skip
    found = _from_file(cfg.clusters_file, names) if cfg.clusters_file else _matched(cfg, names)
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{field} has no cluster for {listed(missing)}: add it.")
    order = tuple(dict.fromkeys(found[name] for name in names))
    return order, tuple(order.index(found[name]) for name in names)


def _matched(cfg: SharingConfig, names: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern, cluster in cfg.clusters.items():
        matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            raise UserError(
                f"Sharing.clusters: {pattern!r} matches no task.{suggest(pattern, names)}"
            )
        found = dict.fromkeys(matches, str(cluster)) | found  # the first that matches decides
    return found


def _from_file(file: str, names: Sequence[str]) -> dict[str, str]:
    try:
        groups = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))["groups"]
        listed = [(str(name), f"group_{n}") for n, group in enumerate(groups) for name in group]
    except OSError as error:
        raise UserError(f"Sharing.clusters_file: cannot read {file}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'Sharing.clusters_file: {file} must hold {{"groups": [[task, ...], ...]}} as JSON.'
        ) from error
    found: dict[str, str] = {}
    for name, group in listed:
        if name in found:
            raise UserError(f"Sharing.clusters_file: {file} has task {name!r} twice.")
        found[name] = group
    # Tasks of the file that are not in this run do no harm: the rest of its groups holds.
    return {name: group for name, group in found.items() if name in names}


# ---------------------------------------------------------------------------------------------
# Who owns which parameters
# ---------------------------------------------------------------------------------------------


def is_adapter(path: str) -> bool:
    """Whether a parameter of a plain T5 is an adapter's."""
    return any(key.endswith("_adapter") for key in path.split("/"))


def is_expert(rooms: Rooms, path: str) -> bool:
    """Whether a parameter of a plain T5 is one of those that there are several experts of."""
    stacks = rooms.experts.stacks if rooms.experts.number else ()
    return any(path.startswith(f"{stack}/layers/mlp/") for stack in stacks)


def _owned(rooms: Rooms, cfg: T5Config, axes: Mapping[str, Any]) -> dict[str, Pieces]:
    owned: dict[str, Pieces] = {}
    cfgs = {"encoder": cfg.num_encoder_layers, "decoder": cfg.num_decoder_layers}
    for stack, _, _, end in rooms.sharing.levels:
        if end > cfgs[stack]:
            raise UserError(
                f"Sharing.levels: layer {end - 1} of the {stack}, which has layers 0 to "
                f"{cfgs[stack] - 1}."
            )
        if stack in rooms.experts.stacks and rooms.experts.number:
            raise UserError(
                f"Sharing.levels and Experts.stacks both say who owns the MLPs of the {stack}: "
                "take it out of one of the two."
            )
    # Adapters belong to Adapter.owner alone; those of T5.adapter_dim are parameters as others.
    others = [path for path in axes if not (rooms.adapter.dim and is_adapter(path))]
    for path in others:
        if path.split("/")[1] == "layers":
            ranges = [x for x in rooms.sharing.levels if x[0] == path.split("/")[0]]
            if ranges:
                owned[path] = tuple(sorted((first, end, o) for _, o, first, end in ranges))
    copies = rooms.sharing.copies
    decided = patterns.decide("Sharing.copies", [pattern for pattern, _ in copies], others)
    for path, number in decided.items():
        if path in owned or is_expert(rooms, path):
            other = "Sharing.levels" if path in owned else "Experts.stacks"
            raise UserError(
                f"Sharing.copies: {copies[number][0]!r} matches {path}, whose owner {other} says."
            )
        owned[path] = ((None, None, copies[number][1]),)
    if rooms.adapter.dim and rooms.adapter.owner != "shared":
        owned |= {path: ((None, None, rooms.adapter.owner),) for path in axes if is_adapter(path)}
    return owned


def _lora_paths(rooms: Rooms, axes: Mapping[str, Any]) -> tuple[str, ...]:
    if not rooms.lora.rank:
        return ()
    kernels = [path for path in axes if path.endswith("/kernel")]
    found = patterns.decide("Lora.patterns", rooms.lora.patterns, kernels)
    for path, number in found.items():
        if is_expert(rooms, path):
            raise UserError(
                f"Lora.patterns: {rooms.lora.patterns[number]!r} matches {path}, but the MLPs of "
                f"the {path.split('/')[0]} are experts (Experts.stacks): take one of them out."
            )
    return tuple(path for path in axes if path in found)


def _check(plan: SharingPlan) -> None:
    rooms, cfg = plan.rooms, plan.base
    if not plan.empty and not plan.names:
        raise UserError("Sharing among tasks needs tasks: set Data.mixture.")
    for field, on in (
        ("Sharing.task_embedding", rooms.sharing.task_embedding),
        ("Prompt.length", rooms.prompt.length),
    ):
        if on and cfg.logits_via_embedding:
            raise UserError(
                f"{field} changes the embedding, which T5.logits_via_embedding = True makes the "
                "output matrix, too: set it to False, or use Lora or Adapter instead."
            )
    if rooms.prompt.rows >= cfg.vocab_size:
        raise UserError(
            f"Prompt.length takes {rooms.prompt.rows} rows of the embedding, which has "
            f"T5.vocab_size = {cfg.vocab_size}: make it larger."
        )
    if rooms.adversary.weight and len(plan.names) < 2:
        raise UserError("Adversary.weight needs at least two tasks to tell apart.")
    if rooms.sharing.soft_penalty:
        copies = [path for path in plan.owned if not (rooms.adapter.dim and is_adapter(path))]
        patterns.decide("Sharing.soft_pattern", [rooms.sharing.soft_pattern], copies)
