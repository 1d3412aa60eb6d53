"""What a compiled program does how often: collectives and kernels, read from its text.

In the text a loop's body stands once. Here everything counts as often as it runs, as far as the
text tells how often a loop goes round.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
BETWEEN_SLICES = "between slices "  # before the kind of those over a data-centre network
KERNEL_CALLS = ("tpu_custom_call", "__gpu$xla.gpu.triton")  # of Pallas
_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
# Arguments of a computation that it calls; the end of an asynchronous call repeats its start.
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CALL_ENDS = ("async-update", "async-done")
# Fusions of the TPU compiler that sum over devices and keep a part of the sum.
_FUSED_SCATTER = "all-reduce-scatter"
# How libtpu writes the part of a collective that goes from slice to slice, through the hosts.
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_MEGASCALE_TARGET = re.compile(r'_xla_megascale_target="\{([\d,]+)\}')
_PASSED_ON = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: without the percent sign.
      type: of the result, with its layout, such as "f32[8,128]{1,0}".
      opcode: such as "fusion".
      inside: what stands between the parentheses: the operands, or a constant.
      rest: attributes.
      root: it is the result of its computation.
    """

    name: str
    type: str
    opcode: str
    inside: str
    rest: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.inside)

    def attribute(self, name: str) -> str:
        """The value of an attribute that is one word, or ""."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A communication among devices.

    Attributes:
      kind: a name of `KINDS`, after `BETWEEN_SLICES` where it goes over a data-centre network.
      type: of its result, without layouts, such as "f32[32,12]".
      bytes: of its result on one device, each time.
      group: how many devices take part in one.
      times: how often it runs.
      counted: False where it stands in a loop of unknown length, which `times` takes for one round.
    """

    kind: str
    type: str
    bytes: int
    group: int
    times: int
    counted: bool

    @property
    def between_slices(self) -> bool:
        """Whether it goes over a data-centre network."""
        return self.kind.startswith(BETWEEN_SLICES)

    @property
    def sent_bytes(self) -> float:
        """What a device sends at least, all times together: by the ring algorithms in a slice.

        To other slices it hands its array to its host, which does the rest.
        """
        if self.between_slices:
            return float(self.bytes * self.times)
        others = (self.group - 1) / self.group
        share = {
            "all-reduce": 2 * others,
            "all-gather": others,
            "all-to-all": others,
            "reduce-scatter": float(self.group - 1),
            "collective-permute": 1.0,
        }[self.kind]
        return share * self.bytes * self.times


class Program:
    """A program's text, taken apart.

    Attributes:
      computations: name -> name -> instruction.
      entry: the name of the computation that starts.
    """

    def __init__(self, text: str):
        """Reads the text of `executable.as_text()`."""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
                current = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif " = " in line and (instruction := _instruction(line)) is not None:
                current[instruction.name] = instruction

    def collectives(self, devices: int, unknown_trips: int | None = None) -> list[Collective]:
        """All collectives, those within loops as often as they run.

        Args:
          devices: how many run the program.
          unknown_trips: rounds of a loop whose length the text does not tell, at most.
        """
        # One that runs beside other work is in several pieces, which bear the same channel; its
        # start is not in the loops that carry it on.
        found: dict[str, Collective] = {}
        for computation, (times, counted) in self._times(unknown_trips).items():
            for instruction in self.computations[computation].values():
                if (sent := _between_slices(instruction)) is not None:
                    found[f"{computation}/{instruction.name}"] = dataclasses.replace(
                        sent, times=times, counted=counted
                    )
                kind = instruction.opcode.removesuffix("-done")
                if kind not in KINDS:
                    continue
                result = instruction
                if computation.startswith(_FUSED_SCATTER):
                    kind, result = "reduce-scatter", self._root(computation)
                plain = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", result.type)
                known = self._group(computation, instruction, devices)
                one = Collective(kind, plain, bytes_of(plain), known, times, counted)
                channel = instruction.attribute("channel_id")
                key = channel or f"{computation}/{instruction.name}"
                if key not in found or one.times < found[key].times:
                    found[key] = one
        return list(found.values())

    def kernels(self) -> dict[str, int]:
        """Target of custom calls -> how often it stands in the text."""
        calls = [
            re.search(r'custom_call_target="([^"]*)"', instruction.rest)
            for instructions in self.computations.values()
            for instruction in instructions.values()
            if instruction.opcode == "custom-call"
        ]
        return dict(collections.Counter(call[1] for call in calls if call))

    def kept_activations(self) -> int | None:
        """Bytes that the loops over layers keep for the backward pass; None: no such loops.

        Of a loop of the forward pass of a gradient, as JAX's names say, they are the arrays that it
        fills, one part a round.
        """
        found = None
        for computation, instructions in self.computations.items():
            for loop in instructions.values():
                name = re.search(r'op_name="([^"]*)"', loop.rest)
                forward = name and "jvp(" in name[1] and "transpose(" not in name[1]
                if loop.opcode != "while" or not forward:
                    continue
                trips, body = self.trip_count(computation, loop), loop.attribute("body")
                ends = self._root(body).operands
                found = found or 0
                for index, type_ in enumerate(re.findall(r"\w+\[[\d,]*\]", loop.type)):
                    if not type_.partition("[")[2].startswith(f"{trips},"):
                        continue
                    end = self.computations[body].get(ends[index]) if index < len(ends) else None
                    same = end is not None and end.opcode == "get-tuple-element"
                    if not (same and end is not None and end.attribute("index") == str(index)):
                        found += bytes_of(type_)
        return found

    def _group(self, computation: str, instruction: Instruction, devices: int) -> int:
        """Devices of one group; the end of an asynchronous one does not tell, its start does."""
        if instruction.opcode.endswith("-done") and instruction.operands:
            start = self.computations[computation].get(instruction.operands[0])
            instruction = start or instruction
        return group_size(instruction.rest, devices)

    def _times(self, unknown_trips: int | None) -> dict[str, tuple[int, bool]]:
        """Computation -> how often it runs, and whether that is known."""
        times: collections.Counter[str] = collections.Counter({self.entry: 1})
        unknown: set[str] = set()
        for name in self._callers_first():
            for instruction in self.computations[name].values():
                trips: int | None = 1
                if instruction.opcode == "while":
                    trips = self.trip_count(name, instruction) or unknown_trips
                for callee in _callees(instruction):
                    times[callee] += times[name] * (trips or 1)
                    if trips is None or name in unknown:
                        unknown.add(callee)
        return {name: (times[name], name not in unknown) for name in self.computations}

    def _callers_first(self) -> list[str]:
        order: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for instruction in self.computations[name].values():
                for callee in _callees(instruction):
                    visit(callee)
            order.append(name)

        visit(self.entry)
        return order[::-1]

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """Rounds of a `while` of a computation, or None where the text does not tell."""
        if told := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(told[1])
        condition, body = loop.attribute("condition"), loop.attribute("body")
        root = self._root(condition)
        compare, operands = root, root.operands
        if root.opcode == "fusion":
            inner = root.attribute("calls")
            compare = self._root(inner)
            numbers = [self.computations[inner][name].inside for name in compare.operands]
            if not all(number.isdecimal() for number in numbers):
                return None
            operands = [root.operands[int(number)] for number in numbers]
        if compare.opcode != "compare" or compare.attribute("direction") != "LT":
            return None
        counter, bound = (self.computations[condition].get(name) for name in operands)
        if counter is None or bound is None or counter.opcode != "get-tuple-element":
            return None
        index = int(counter.attribute("index"))
        first = self._carried(computation, loop, index)
        if bound.opcode == "get-tuple-element":
            last = self._carried(computation, loop, int(bound.attribute("index")))
        else:
            last = self._constant(condition, bound.name)
        step = self._step(body, index)
        if first is None or last is None or not step:
            return None
        return max(0, -(-(last - first) // step))

    def _carried(self, computation: str, loop: Instruction, index: int) -> int | None:
        """The constant at which a carried value of a loop starts."""
        start = self.computations[computation].get(loop.operands[0])
        if start is None or start.opcode != "tuple" or index >= len(start.operands):
            return None
        return self._constant(computation, start.operands[index])

    def _step(self, body: str, index: int) -> int | None:
        """What a round of a loop adds to a carried value."""
        root = self._root(body)
        if root.opcode != "tuple" or index >= len(root.operands):
            return None
        added = self._origin(body, root.operands[index])
        if added is not None and added.opcode == "fusion":
            inner = added.attribute("calls")
            added, body = self._root(inner), inner
        if added is None or added.opcode != "add":
            return None
        steps = [self._constant(body, name) for name in added.operands]
        return next((step for step in steps if step is not None), None)

    def _origin(self, computation: str, name: str) -> Instruction | None:
        """Where a value comes from, through copies."""
        instruction = self.computations[computation].get(name)
        while instruction is not None and instruction.opcode in _PASSED_ON:
            instruction = self.computations[computation].get(instruction.operands[0])
        return instruction

    def _constant(self, computation: str, name: str) -> int | None:
        origin = self._origin(computation, name)
        if origin is None or origin.opcode != "constant":
            return None
        return int(origin.inside) if re.fullmatch(r"-?\d+", origin.inside) else None

    def _root(self, computation: str) -> Instruction:
        return next(i for i in self.computations[computation].values() if i.root)


def bytes_of(type_: str) -> int:
    """Bytes of a type without layouts: "bf16[2,8]", or a tuple "(f32[2], s32[])"."""
    total = 0
    for name, sizes in re.findall(r"(\w+)\[([\d,]*)\]", type_):
        count = math.prod(int(size) for size in sizes.split(",") if size)
        bits = _BITS.get(name) or int((re.match(r"[a-z]+(\d+)", name) or (0, 0))[1])
        total += count * bits // 8
    return total


def group_size(attributes: str, devices: int) -> int:
    """Devices that take part in one collective, from its attributes."""
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    return devices


def by_kind(collectives: list[Collective]) -> dict[str, Mapping[str, int | float]]:
    """Kind -> how many run, and their bytes of results and sent bytes on one device."""
    found: dict[str, dict[str, int | float]] = {}
    for one in collectives:
        row = found.setdefault(one.kind, {"times": 0, "bytes": 0, "sent_bytes": 0.0})
        row["times"] += one.times
        row["bytes"] += one.bytes * one.times
        row["sent_bytes"] += one.sent_bytes
    return dict(sorted(found.items()))


def _between_slices(instruction: Instruction) -> Collective | None:
    """The part of a collective that goes from slice to slice, seen at its `send`; run once."""
    kind = _MEGASCALE.search(instruction.rest)
    if instruction.opcode != "send" or kind is None:
        return None
    array = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", instruction.type).strip("(").split(", ")[0]
    listed = _MEGASCALE_TARGET.search(instruction.rest)
    slices = listed[1].count(",") + 1 if listed else 2
    name = BETWEEN_SLICES + kind[1].lower().replace("_", "-")
    return Collective(name, array, bytes_of(array), slices, 1, True)


def _callees(instruction: Instruction) -> Iterator[str]:
    if instruction.opcode in _CALL_ENDS:
        return
    yield from _CALLED.findall(instruction.rest)
    for names in _BRANCHES.findall(instruction.rest):
        yield from re.findall(r"%?([\w.\-]+)", names)


def _instruction(line: str) -> Instruction | None:
    left, _, right = line.partition(" = ")
    name = re.fullmatch(r"\s+(ROOT )?%?([\w.\-]+)", left)
    if name is None:
        return None
    end = _closing(right, 0) if right.startswith("(") else right.find(" ")
    type_, right = right[:end], right[end:].lstrip()
    opcode, _, _ = right.partition("(")
    if not re.fullmatch(r"[\w\-]+", opcode):
        return None
    end = _closing(right, len(opcode))
    return Instruction(
        name[2], type_, opcode, right[len(opcode) + 1 : end - 1], right[end:], bool(name[1])
    )


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    return len(text)
