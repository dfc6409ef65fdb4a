"""What a compiled program moves: bytes of its memory and between devices, from the text of its HLO.

    Program(compiled.as_text(), trips).traffic()    Traffic of one device

XLA's own `cost_analysis` counts the body of a loop once. Here a body counts as often as it runs.
These are estimates: caches are ignored, and a kernel such as attention counts as if it read its
operands once. It reads the programs of XLA's compilers for CPU, TPU and CUDA. Imports numpy.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

COLLECTIVES = (
    *("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "collective-broadcast"),
)
# Instructions that name, or end, what others have moved.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
    *("optimization-barrier", "partition-id", "replica-id", "add-dependency"),
}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one device moves in one call of a program.

    Attributes:
        memory: read from and written to the device's memory.
        sent: {kind of collective: bytes sent to other devices}, by a ring.
        network: the part of `sent` that leaves an island, see `Program`.
        unknown_loops: loops of unknown length; their bodies count once.
        host: read from and written to the memory of the host.
    """

    memory: float = 0.0
    sent: Mapping[str, float] = dataclasses.field(default_factory=dict)
    network: float = 0.0
    unknown_loops: int = 0
    host: float = 0.0

    def __add__(self, other):
        kinds = self.sent | other.sent
        sent = {kind: self.sent.get(kind, 0) + other.sent.get(kind, 0) for kind in kinds}
        return Traffic(
            self.memory + other.memory,
            sent,
            self.network + other.network,
            self.unknown_loops + other.unknown_loops,
            self.host + other.host,
        )

    def times(self, n):
        """The traffic of n such calls."""
        sent = {kind: n * size for kind, size in self.sent.items()}
        return Traffic(n * self.memory, sent, n * self.network, self.unknown_loops, n * self.host)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    root: bool
    type: str
    opcode: str
    operands: list[str]
    attributes: str


class Program:
    """A module of HLO after all of XLA's passes, the program of one device.

    Args:
        text: of `jax.stages.Compiled.as_text`.
        trips: expected iterations of loops whose length is a traced value, by the name of the
            jitted function that the loop is in; "" for all others. See `flops.count`.
        islands: the slice of a TPU, or the node of GPUs, of each device, in the order of the mesh:
            only a network joins them. None for one island.
    """

    def __init__(self, text, trips=MappingProxyType({}), islands: Sequence[int] | None = None):
        self._trips, self._islands = trips, islands
        found = re.search(r"num_partitions=(\d+)", text)
        self._partitions = int(found[1]) if found else 1
        self._computations, self._entry = _parse(text)
        self._known: dict[str, Traffic] = {}
        # {body or condition of a loop: (the loop, the computation that it is in)}
        self._callers = {
            _named(part, x): (x, name)
            for name, computation in self._computations.items()
            for x in computation.values()
            if x.opcode == "while"
            for part in ("body", "condition")
        }

    def traffic(self) -> Traffic:
        """The bytes of one call on one device."""
        return self._computation(self._entry)

    def _computation(self, name):
        if name not in self._known:
            instructions = self._computations[name]
            total = Traffic()
            for instruction in instructions.values():
                total = total + self._instruction(instruction, instructions)
            self._known[name] = total
        return self._known[name]

    def _instruction(self, x, around):
        """The traffic of an instruction, `around` which stand those of its computation."""
        kind = x.opcode.removesuffix("-start")
        if x.opcode in FREE or x.opcode.endswith(("-done", "-update")):
            return Traffic()
        called = _called(x)
        if x.opcode == "while":
            return self._loop(x)
        if x.opcode == "conditional":
            branches = [self._computation(name) for name in called]
            return max(branches, key=lambda traffic: traffic.memory)
        if x.opcode in ("call", "async-start"):
            return sum(map(self._computation, called), Traffic())
        if kind in COLLECTIVES:
            return self._collective(x, kind, around)
        if x.opcode == "fusion":
            memory = _fusion_bytes(x, self._computations[called[0]], around)
            return Traffic(memory) + self._sent_inside(called[0])
        return Traffic(_bytes_of(x, around), host=_host_bytes(x))

    def _loop(self, x):
        """A while loop: its body as often as it runs."""
        once = self._computation(_named("body", x))
        found = re.search(r'"known_trip_count":\{"n":"?(\d+)', x.attributes)
        trips = int(found[1]) if found else self._counted_trips(_named("condition", x))
        if trips is None:
            trips = self._expected_trips(x)
        return once + Traffic(unknown_loops=1) if trips is None else once.times(trips)

    def _counted_trips(self, name):
        """How often a loop runs whose counter and limit are constant when it begins; or None."""
        condition = self._computations[name]
        root, compare = _root(condition), _root(condition)
        if root.opcode == "fusion":
            compare = _root(self._computations[_called(root)[0]])
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        ends = [self._constant(condition[operand], name) for operand in root.operands]
        return None if None in ends else max(ends) - min(ends, default=0)

    def _constant(self, x, name):
        """The integer that an instruction of a computation stands for; None if it is not constant.

        It may come into a loop, or through several, with the first values of what they carry.
        """
        around = self._computations[name]
        x = _source(x, around)
        if x.opcode == "constant":
            return int(x.operands[0]) if x.operands[0].isdecimal() else None
        if x.opcode != "get-tuple-element":
            return None
        carried = _source(around[x.operands[0]], around)
        if carried.opcode == "parameter" and name in self._callers:
            loop, name = self._callers[name]
            around = self._computations[name]
            carried = _source(around[loop.operands[0]], around)
        if carried.opcode != "tuple":
            return None
        index = int(re.search(r"index=(\d+)", x.attributes)[1])
        return self._constant(around[carried.operands[index]], name)

    def _expected_trips(self, x):
        """The number in `trips` of the innermost jitted function that has one."""
        path = re.search(r'op_name="([^"]*)"', x.attributes)
        scopes = re.findall(r"jit\(([^()]*)\)", path[1]) if path else []
        return self._trips.get(scopes[-1] if scopes else "", self._trips.get(""))

    def _sent_inside(self, name):
        """What collectives within a fusion send; their memory is the fusion's.

        A TPU's compiler fuses an all-reduce with the slice that makes it a reduce-scatter. Of an
        all-gather that runs beside other work, copies stand in the fusions that wait for it.
        """
        total, inside = Traffic(), self._computations[name]
        for x in inside.values():
            kind = x.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or re.search(r'"flag_start":"\d', x.attributes):
                continue
            if name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            total = total + dataclasses.replace(self._collective(x, kind, inside), memory=0.0)
        return total

    def _collective(self, x, kind, around):
        """What a collective reads, writes and, as in a ring, sends."""
        operands = sum(_size(around[name].type) for name in x.operands if name in around)
        groups = self._groups(x.attributes)
        n = len(groups[0])
        sent = operands * {
            "all-gather": n - 1,
            "reduce-scatter": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "all-to-all": (n - 1) / n,
            "ragged-all-to-all": (n - 1) / n,
        }.get(kind, 1)
        network = max(self._leaving(kind, operands, sent, group) for group in groups)
        return Traffic(_bytes_of(x, around), {kind: sent}, network)

    def _leaving(self, kind, operands, sent, group):
        """The part of `sent` that leaves the island of a device, as of the groups' busiest.

        A ring leaves an island once. Its devices lay rings of equal shares, one over the network
        card of each.
        """
        places = [0] * len(group) if self._islands is None else [self._islands[i] for i in group]
        own = places.count(places[0])
        if own == len(group):
            return 0.0
        if kind.endswith("all-to-all"):
            return operands * (len(group) - own) / len(group)
        return sent / own

    def _groups(self, attributes):
        """Groups of devices of a collective: all pairs, or the first group of all like it."""
        if found := re.search(r"source_target_pairs=\{([\d,{}]+)\}", attributes):
            return [[int(i), int(j)] for i, j in re.findall(r"(\d+),(\d+)", found[1])]
        return [self._group(attributes)]

    def _group(self, attributes):
        """The devices of the first group of a collective."""
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
            return [int(i) for i in found[1].split(",")]
        if found := re.search(
            r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
        ):
            shape, dims, order = (
                [int(i) for i in t.split(",")] if t else None for t in found.groups()
            )
            ids = np.arange(math.prod(dims)).reshape(dims)
            return (ids if order is None else ids.transpose(order)).reshape(shape)[0].tolist()
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes):
            return self._mesh_group(*found.groups())
        return list(range(self._partitions))

    def _mesh_group(self, mesh, order, axes):
        """The devices along some axes of a mesh: "'a'=2,'b'=4", ", device_ids=...", "'b'"."""
        sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", mesh)}
        ids = np.arange(self._partitions)
        if found := re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", order):
            shape, axis = (tuple(map(int, text.split(","))) for text in found.groups())
            ids = ids.reshape(shape).transpose(axis)
        ids = ids.reshape(tuple(sizes.values()))
        along = re.findall(r"'([^']*)'", axes)
        return ids[tuple(slice(None) if name in along else 0 for name in sizes)].ravel().tolist()


def _parse(text):
    """({computation: {name: instruction}}, name of the entry) of a module's text."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":  # an attribute of a kernel may run over several lines
            current = None
        elif found := _LINE.match(line):
            x = _parse_instruction(found[2], bool(found[1]), found[3])
            current[x.name] = x
    if entry is None:
        raise ValueError("this is no text of a compiled program: it has no ENTRY computation")
    return computations, entry


def _parse_instruction(name, root, rest):
    """The instruction of a line "[ROOT] name = rest", where rest is "type opcode(...), ..."."""
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 2
    inside, attributes = rest[:end], rest[end + 1 :]
    literal = opcode in ("constant", "parameter")
    operands = [inside] if literal else re.findall(r"%([\w.-]+)", inside)
    return _Instruction(name, root, kind, opcode, operands, attributes)


def _closing(text):
    """The position after the bracket that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced brackets in HLO: {text[:80]!r}")


def _root(computation):
    """The instruction whose value a computation returns."""
    return next(x for x in computation.values() if x.root)


def _source(x, around):
    """The instruction whose value `x` hands on."""
    while x.opcode in ("bitcast", "copy", "copy-start", "copy-done"):
        x = around[x.operands[0]]
    return x


def _named(attribute, x):
    """The computation that an attribute of a loop names."""
    return re.search(rf"{attribute}=%?([\w.-]+)", x.attributes)[1]


def _called(x):
    """Names of the computations that an instruction calls."""
    found = _CALLS.findall(x.attributes)
    return [name.strip(" %") for one, many in found for name in (one or many).split(",")]


def _size(kind, *, stored=False):
    """Bytes of a type; with `stored`, of those parts that lie in the device's main memory.

    A layout with S(1) lies in a TPU's own fast memory.
    """
    total = 0
    for dtype, axes, layout in _SHAPE.findall(kind):
        if stored and re.search(r"S\([1-9]", layout):
            continue
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
        total += bits * math.prod(int(n) for n in axes.split(",") if n) / 8
    return total


def _host_bytes(x):
    """Bytes that a copy moves between host memory, S(5), and the device."""
    copies = ("copy-start", "dynamic-slice-start", "dynamic-update-slice-start")
    if x.opcode not in copies or "S(5)" not in x.type:
        return 0
    return min(_size(found[0]) for found in _SHAPE.finditer(x.type) if found[2])


def _bytes_of(x, around):
    """Bytes that an instruction outside of a fusion reads and writes."""
    operands = [around[name].type for name in x.operands if name in around]
    result = _size(x.type, stored=True)
    if x.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * result
    if x.opcode == "dynamic-update-slice":
        return 2 * _size(operands[1], stored=True)
    if x.opcode in ("broadcast", "iota"):
        return result
    if x.opcode == "slice-start":  # what it reads, into the fast memory
        return _size(x.type) - sum(map(_size, operands))
    if x.opcode.endswith("-start") and x.opcode != "all-reduce-start":
        return result  # which repeats the operands
    return result + sum(_size(kind, stored=True) for kind in operands)


def _fusion_bytes(x, inside, around):
    """Bytes that a fusion reads and writes: of an operand that it only slices, the slices."""
    parameters = {y.operands[0]: y for y in inside.values() if y.opcode == "parameter"}
    total = 0.0
    for number, name in enumerate(x.operands):
        whole = _size(around[name].type, stored=True) if name in around else 0
        total += min(whole, _read(parameters.get(str(number)), inside, whole))
    total += _size(x.type, stored=True)
    root = _root(inside)
    for result in [inside[o] for o in root.operands] if root.opcode == "tuple" else [root]:
        result = _source(result, inside)
        if result.opcode == "dynamic-update-slice":  # in place: it writes the slice alone
            update = inside[result.operands[1]]
            total -= _size(result.type, stored=True) - _size(update.type, stored=True)
    return total


def _read(parameter, inside, whole):
    """Bytes of one operand that a fusion reads."""
    if parameter is None:
        return whole
    total, names = 0.0, [parameter.name]
    while names:
        name = names.pop()
        for user in (y for y in inside.values() if name in y.operands):
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += _size(user.type)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return whole  # an array that is updated in place is not read
    return total
