"""Traffic of a compiled program: bytes sent to other devices, bytes of memory.

XLA's cost analysis counts the body of a loop once. This module parses the text
of the optimised program and counts a loop's body as often as the loop runs.
All figures are for one device.

    program = hlo.parse(compiled.as_text())
    traffic = hlo.traffic(program)

Breaks first when jax moves: `compiled.as_text()` is XLA's own text format and
no stable interface. The parser depends on how XLA spells opcodes, shapes and
layouts, `replica_groups`, `source_target_pairs`, `known_trip_count` and the
names of called computations. A loop whose number of turns cannot be read is
counted once, a collective whose devices cannot be read is not counted, and both
are reported in `Traffic.unknown`.
"""

from collections import defaultdict
from collections.abc import Iterator
import dataclasses
import math
import re

COLLECTIVES = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
  'ragged-all-to-all', 'collective-permute', 'collective-broadcast',
)  # fmt: skip
# Instructions that move no bytes: they name existing arrays, or are structure.
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
  'conditional', 'call', 'after-all', 'partition-id', 'replica-id', 'iota',
  'add-dependency', 'opt-barrier', 'async-update',
}  # fmt: skip
_BITS = {'pred': 8, 'token': 0, 'opaque': 0, 's4': 4, 'u4': 4}
_SHAPE = re.compile(r'([a-z]+\d*\w*)\[([\d,<=]*)\](\{[^{}]*\})?')
# Memory space 0 is main memory; TPU layouts mark memory on the chip as S(1).
_FAST_MEMORY = re.compile(r'S\([1-9]\)')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  shape: str  # 'f32[2,3]{1,0}', or a tuple of such shapes
  operands: tuple[str, ...]
  literal: str  # text in parentheses: a constant, or a parameter's number
  attributes: str  # text after the operands
  is_root: bool

  def called(self, key: str) -> str | None:
    """Returns the computation named by an attribute such as `body`."""
    match = re.search(rf'\b{key}=%?([\w.-]+)', self.attributes)
    return match.group(1) if match else None


@dataclasses.dataclass(frozen=True)
class Program:
  """The computations of a module, by name."""

  computations: dict[str, dict[str, Instruction]]
  entry: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """All executions of one collective operation in a program."""

  kind: str  # one of COLLECTIVES
  num_devices: int  # of one group that exchanges data
  payload_bytes: int  # operands of one execution, on one device
  count: int  # executions per execution of the program

  @property
  def sent_bytes(self) -> float:
    """The bytes that one device sends in all executions; it receives as many.

    Reference: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce
    algorithms": a ring reaches the least possible number.
    """
    n = self.num_devices
    # An operand is one device's part for a gather, the whole array for a sum.
    # An all-reduce is a reduce-scatter and a gather of its result.
    factor = {
      'all-gather': n - 1,
      'all-reduce': 2 * (n - 1) / n,
      'reduce-scatter': (n - 1) / n,
      'all-to-all': (n - 1) / n,
      'ragged-all-to-all': (n - 1) / n,
    }.get(self.kind, 1)
    return self.count * factor * self.payload_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
  """The bytes that one device moves in one execution of a program."""

  collectives: tuple[Collective, ...]
  memory_bytes: float  # read from and written to main memory
  unknown: tuple[str, ...]  # names of unreadable loops and collectives

  def by_kind(self) -> dict[str, tuple[int, float]]:
    """Returns {kind of collective: (executions, bytes sent)}."""
    totals: dict[str, tuple[int, float]] = {}
    for item in self.collectives:
      count, sent = totals.get(item.kind, (0, 0.0))
      totals[item.kind] = count + item.count, sent + item.sent_bytes
    return totals

  @property
  def sent_bytes(self) -> float:
    """The bytes sent to other devices."""
    return sum(item.sent_bytes for item in self.collectives)


def shape_bytes(shape: str, *, is_main_memory: bool = False) -> int:
  """Returns the bytes of a shape or of a tuple of shapes, without padding.

  Args:
    is_main_memory: counts only arrays in main memory, not arrays on the chip.
  """
  total = 0
  for dtype, dims, layout in _SHAPE.findall(shape):
    if is_main_memory and _FAST_MEMORY.search(layout):
      continue
    sizes = [int(size.strip('<=')) for size in dims.split(',') if size]
    total += math.prod(sizes) * _bits(dtype) // 8
  return total


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  match = re.match(r'[a-z]+(\d+)', dtype)
  return int(match.group(1)) if match else 0


def parse(text: str) -> Program:
  """Returns the program of `compiled.as_text()`.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    match = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line)
    if match:
      current = computations.setdefault(match.group(2), {})
      entry = match.group(2) if match.group(1) else entry
    # A kernel's metadata may continue on further lines, which are no
    # instructions and are skipped.
    elif current is not None and (instruction := _instruction(line)):
      current[instruction.name] = instruction
  if not entry:
    raise ValueError(
      'got a text without an ENTRY computation, expected an XLA program, as'
      ' compiled.as_text() returns it'
    )
  return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
  match = re.match(r'\s*(ROOT )?%?([\w.-]+) = ', line)
  if not match:
    return None
  shape_end = _closing(line, match.end()) if line[match.end()] == '(' else 0
  shape_end = shape_end or line.index(' ', match.end())
  opened = line.index('(', shape_end)
  closed = _closing(line, opened)
  return Instruction(
    name=match.group(2),
    opcode=line[shape_end:opened].strip(),
    shape=line[match.end() : shape_end],
    operands=tuple(re.findall(r'%([\w.-]+)', line[opened:closed])),
    literal=line[opened + 1 : closed - 1],
    attributes=line[closed:],
    is_root=bool(match.group(1)),
  )


def _closing(line: str, start: int) -> int:
  """Returns the index after the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(line)):
    depth += {'(': 1, ')': -1}.get(line[i], 0)
    if not depth:
      return i + 1
  return len(line)


def traffic(program: Program) -> Traffic:
  """Returns the traffic of a program, summed over all executions of loops."""
  counts: dict[tuple[str, int, int], int] = defaultdict(int)
  memory_bytes, unknown = 0.0, []
  for instruction, name, times, is_fused in _executed(
    program, program.entry, 1, unknown
  ):
    body = program.computations[name]
    kind = _collective_kind(instruction)
    if kind == 'all-reduce' and name.startswith('all-reduce-scatter'):
      # libtpu writes a reduce-scatter as a fusion of this name: an all-reduce
      # of which each device keeps a slice.
      kind = 'reduce-scatter'
    if kind:
      payload = _operand_bytes(instruction, body)
      size = _group_size(instruction)
      if size is None:
        unknown.append(instruction.name)
      elif size > 1:
        counts[kind, size, payload] += times
    # Values inside a fusion never reach main memory: its operands and results
    # are counted where it is called.
    if not is_fused:
      memory_bytes += times * _memory_bytes(program, instruction, body)
  return Traffic(
    collectives=tuple(
      Collective(kind=kind, num_devices=n, payload_bytes=payload, count=count)
      for (kind, n, payload), count in sorted(counts.items())
    ),
    memory_bytes=memory_bytes,
    unknown=tuple(unknown),
  )


def kernels(program: Program) -> dict[str, int]:
  """Returns the number of kernel starts in the program, by opcode.

  A fusion is one kernel. A custom call counts under the name of its target.
  """
  counts: dict[str, int] = defaultdict(int)
  for instruction, _, times, is_fused in _executed(
    program, program.entry, 1, []
  ):
    opcode = instruction.opcode
    if is_fused or opcode in _FREE or opcode.endswith('-done'):
      continue
    target = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
    counts[target.group(1) if target else opcode] += times
  return dict(counts)


def _executed(
  program: Program,
  name: str,
  times: int,
  unknown: list[str],
  is_fused: bool = False,
) -> Iterator[tuple[Instruction, str, int, bool]]:
  """Yields (instruction, computation, number of executions, is in a fusion)."""
  body = program.computations.get(name, {})
  for instruction in body.values():
    yield instruction, name, times, is_fused
    opcode = instruction.opcode
    if opcode == 'while':
      trips = trip_count(program, instruction, body)
      if trips is None:
        unknown.append(instruction.name)
      called = [(instruction.called('body'), trips or 1, is_fused)]
    elif opcode == 'conditional':
      # The branch is chosen at run time: the longest one is counted.
      names = re.findall(
        r'(?:branch_computations=\{|true_computation=|false_computation=|, )'
        r'%([\w.-]+)',
        instruction.attributes.split('metadata')[0],
      )
      largest = max(
        names, key=lambda n: len(program.computations.get(n, {})), default=None
      )
      called = [(largest, 1, is_fused)]
    elif opcode == 'call':
      called = [(instruction.called('to_apply'), 1, is_fused)]
    elif opcode in ('fusion', 'async-start'):
      called = [(instruction.called('calls'), 1, True)]
    else:
      called = []
    for callee, factor, fused in called:
      if callee is not None:
        yield from _executed(program, callee, times * factor, unknown, fused)


def trip_count(
  program: Program, loop: Instruction, body: dict[str, Instruction]
) -> int | None:
  """Returns the number of turns of a while loop, None if it cannot be read.

  Some backends write the number down. Otherwise the condition compares a
  constant with a counter, which changes by one per turn.
  """
  match = re.search(
    r'known_trip_count\\?"?:\{\\?"n\\?":\\?"(\d+)', loop.attributes
  )
  if match:
    return int(match.group(1))
  condition = program.computations.get(loop.called('condition') or '', {})
  found = _compared(program, condition)
  if found is None:
    return None
  index, limit, direction = found
  start = _initial(loop, body, index)
  if start is None or direction not in ('LT', 'LE', 'GT'):
    return None
  if direction == 'GT':
    return max(start - limit, 0)
  return max(limit - start + (direction == 'LE'), 0)


def _compared(program, condition) -> tuple[int, int, str] | None:
  """Returns (the counter's index in the state, the limit, the direction)."""
  compare = next((i for i in condition.values() if i.is_root), None)
  inner = condition
  given: dict[str, Instruction] = {}  # operands of a fused comparison
  if compare is not None and compare.opcode == 'fusion':
    outer = [condition.get(name) for name in compare.operands]
    inner = program.computations.get(compare.called('calls') or '', {})
    given = {
      i.name: outer[int(i.literal)]
      for i in inner.values()
      if i.opcode == 'parameter'
    }
    compare = next((i for i in inner.values() if i.is_root), None)
  if compare is None or compare.opcode != 'compare':
    return None
  place = limit = None
  for name in compare.operands:
    source = given.get(name) or inner.get(name)
    if source is None:
      return None
    # An operand is the limit, or element `index` of the loop's state.
    if source.opcode == 'constant':
      limit = int(source.literal)
    elif match := re.search(r'index=(\d+)', source.attributes):
      place = int(match.group(1))
  direction = re.search(r'direction=(\w+)', compare.attributes)
  if place is None or limit is None or direction is None:
    return None
  return place, limit, direction.group(1)


def _initial(
  loop: Instruction, body: dict[str, Instruction], place: int
) -> int | None:
  """Returns the constant from which a loop's counter starts."""
  start = body.get(loop.operands[0])
  if start is not None and start.opcode == 'tuple':
    start = body.get(start.operands[place])
  while start is not None and start.opcode in ('copy', 'bitcast'):
    start = body.get(start.operands[0])
  if start is None or start.opcode != 'constant':
    return None
  return int(start.literal)


def _collective_kind(instruction: Instruction) -> str | None:
  """Returns the kind of the collective that an instruction is or starts."""
  kind = instruction.opcode.removesuffix('-start')
  return kind if kind in COLLECTIVES else None


def _operand_bytes(instruction, body) -> int:
  return sum(
    shape_bytes(body[name].shape)
    for name in instruction.operands
    if name in body
  )


def _group_size(instruction: Instruction) -> int | None:
  """Returns the number of devices of a group, None if it cannot be read.

  XLA writes groups as lists, {{0,1},{2,3}}; as an iota, [groups,size]<=[...];
  or as axes of a mesh, mesh['a'=2,'b'=4] {'a'}.
  """
  text = instruction.attributes
  if instruction.opcode.startswith('collective-permute'):
    pairs = re.search(r'source_target_pairs=\{(.*?\})\}', text)
    return pairs.group(1).count('{') if pairs else None
  if match := re.search(r'replica_groups=\{\{([\d,]*)\}', text):
    return len(match.group(1).split(','))
  if match := re.search(r'replica_groups=\[\d+,(\d+)\]<=', text):
    return int(match.group(1))
  if match := re.search(
    r'replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}', text
  ):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
    names = re.findall(r"'(\w+)'", match.group(2))
    return math.prod(int(sizes[name]) for name in names)
  return None


def _memory_bytes(program, instruction, body) -> float:
  """Returns the main-memory bytes of one execution: reads and writes.

  A slice reads the elements that it takes, not its whole operand. An update in
  place writes the elements that it replaces, not the whole array.
  """
  opcode = instruction.opcode
  if (
    opcode in _FREE or opcode.endswith('-done') or _collective_kind(instruction)
  ):
    return 0.0
  inner, operands = None, list(instruction.operands)
  if opcode == 'fusion':
    inner = program.computations.get(instruction.called('calls') or '', {})
    parameters = sorted(
      (i for i in inner.values() if i.opcode == 'parameter'),
      key=lambda i: int(i.literal),
    )
    total = sum(
      _read_bytes(program, inner, parameter, body.get(name))
      for parameter, name in zip(parameters, operands, strict=False)
    )
    return total + _written_bytes(program, inner, instruction)
  if opcode == 'copy-start':  # (to, from, context), between two memories
    places = _SHAPE.finditer(instruction.shape)
    return float(
      sum(
        shape_bytes(place.group(), is_main_memory=True)
        for place, _ in zip(places, range(2), strict=False)
      )
    )
  if opcode == 'slice-start':  # ((from), to, context)
    places = [place.group() for place in _SHAPE.finditer(instruction.shape)]
    return float(shape_bytes(places[1]))
  if opcode in ('dynamic-slice', 'slice', 'gather'):
    return 2.0 * shape_bytes(instruction.shape, is_main_memory=True)
  if opcode == 'dynamic-update-slice':
    update = body.get(operands[1])
    return 2.0 * shape_bytes(update.shape) if update else 0.0
  read = sum(
    shape_bytes(body[name].shape, is_main_memory=True)
    for name in operands
    if name in body
  )
  return float(read + shape_bytes(instruction.shape, is_main_memory=True))


def _read_bytes(program, inner, parameter, operand) -> int:
  """Returns the bytes that a fusion reads of one operand."""
  shape = operand.shape if operand else parameter.shape
  whole = shape_bytes(shape, is_main_memory=True)
  return min(_taken_bytes(program, inner, parameter.name, whole), whole)


def _taken_bytes(program, inner, name: str, whole: int) -> int:
  """Returns the bytes that the users of a value in a fusion read of it."""
  total = 0
  for user in inner.values():
    if not whole or name not in user.operands:
      continue
    is_first = user.operands[0] == name
    if user.opcode in ('dynamic-slice', 'gather', 'slice') and is_first:
      total += min(shape_bytes(user.shape), whole)
    elif user.opcode == 'bitcast':
      total += _taken_bytes(program, inner, user.name, whole)
    elif user.opcode == 'fusion':
      nested = program.computations.get(user.called('calls') or '', {})
      total += sum(
        _taken_bytes(program, nested, parameter.name, whole)
        for parameter in nested.values()
        if parameter.opcode == 'parameter'
        and user.operands[int(parameter.literal)] == name
      )
    # An update in place does not read the array that it updates.
    elif not (user.opcode == 'dynamic-update-slice' and is_first):
      return whole
  return total


def _written_bytes(program, inner, fusion) -> int:
  """Returns the bytes that a fusion writes."""
  whole = shape_bytes(fusion.shape, is_main_memory=True)
  root = next((i for i in inner.values() if i.is_root), None)
  if root is None or not whole:
    return whole
  results = (
    [inner[name] for name in root.operands if name in inner]
    if root.opcode == 'tuple'
    else [root]
  )
  total = sum(_put_bytes(program, inner, result) for result in results)
  return min(total, whole)


def _put_bytes(program, inner, result) -> int:
  """Returns the bytes written of one result: the update, if it is in place."""
  if result.opcode == 'bitcast' and result.operands[0] in inner:
    return _put_bytes(program, inner, inner[result.operands[0]])
  if result.opcode == 'dynamic-update-slice' and result.operands[1] in inner:
    return shape_bytes(inner[result.operands[1]].shape)
  if result.opcode == 'fusion':
    nested = program.computations.get(result.called('calls') or '', {})
    return _written_bytes(program, nested, result)
  return shape_bytes(result.shape)
