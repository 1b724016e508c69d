"""Which source each row comes from: weights as exact shares of the rows.

A row knows its source without the rows before it. Sources are the leaves of a
binary tree; a node whose left side has the share q sends its row i to the left
where round((i + 1) q) is more than round(i q), so that of its first n rows
round(n q) went left, and a row learns on the way down which row of its source
it is. All of it is done in integers.

A node is off by half a row at most, and hands on what it is off times a share.
The tree is Huffman's, in which an inner node has at most two thirds of the one
above it: of any first rows, each source has had its share to less than one row
in a mixture of up to three sources, and to less than two in any other.

Reference: Huffman 1952 (A method for the construction of minimum-redundancy
codes).
"""

import bisect
from collections.abc import Sequence
import dataclasses
import fractions
import functools
import heapq
import math

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """Rows that are mixed by the same weights."""

  from_row: int  # of the run
  weights: tuple[float, ...]  # of each source
  taken: tuple[int, ...]  # rows of each source before this phase


@dataclasses.dataclass(frozen=True)
class _Node:
  """A source, or two nodes between which rows are divided."""

  share: int  # of the tree's total
  source: int = -1  # of a leaf
  left: '_Node | None' = None
  right: '_Node | None' = None


def start(weights: Sequence[float]) -> tuple[Phase, ...]:
  """Returns the phases of a run that was never told other weights."""
  return (Phase(from_row=0, weights=tuple(weights), taken=(0,) * len(weights)),)


def changed(
  phases: tuple[Phase, ...], weights: Sequence[float], row: int
) -> tuple[Phase, ...]:
  """Returns the phases of a run that has other weights from `row` on."""
  if _tree(phases[-1].weights) == _tree(tuple(weights)):
    return phases
  # Of a change that no row has seen nothing is left.
  kept = tuple(phase for phase in phases if phase.from_row < row)
  if not kept:
    return start(weights)
  taken = tuple(taken_before(phases, row))
  return (*kept, Phase(from_row=row, weights=tuple(weights), taken=taken))


def assign(
  phases: Sequence[Phase], rows_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns where rows of the run come from.

  Args:
    phases: in order, the first from row 0.
    rows_N: int64 [N].

  Returns:
    int64 [N] each: the source of a row, and which of that source's rows it is.
  """
  if len(phases[0].weights) == 1:
    return np.zeros_like(rows_N), rows_N
  pairs = [_locate(phases, row) for row in rows_N.tolist()]
  sources_N, indices_N = np.array(pairs, np.int64).reshape(-1, 2).T
  return sources_N, indices_N


def taken_before(phases: Sequence[Phase], row: int) -> list[int]:
  """Returns how many of the rows before `row` come from each source."""
  phase = _phase_of(phases, row)
  taken = list(phase.taken)
  nodes = [(_tree(phase.weights), row - phase.from_row)]
  while nodes:
    node, count = nodes.pop()
    if node.left is None or node.right is None:
      taken[node.source] += count
      continue
    left = _rounded(count, node)
    nodes += [(node.left, left), (node.right, count - left)]
  return taken


def _phase_of(phases: Sequence[Phase], row: int) -> Phase:
  at = bisect.bisect_right(phases, row, key=lambda phase: phase.from_row)
  return phases[at - 1]


def _locate(phases: Sequence[Phase], row: int) -> tuple[int, int]:
  """Walks down to the source of a row."""
  phase = _phase_of(phases, row)
  node, index = _tree(phase.weights), row - phase.from_row
  while node.left is not None and node.right is not None:
    before = _rounded(index, node)
    if _rounded(index + 1, node) > before:
      node, index = node.left, before
    else:
      node, index = node.right, index - before
  return node.source, phase.taken[node.source] + index


def _rounded(count: int, node: _Node) -> int:
  """Returns how many of a node's first `count` rows went left."""
  assert node.left is not None
  return (2 * count * node.left.share + node.share) // (2 * node.share)


@functools.lru_cache(maxsize=64)
def _tree(weights: tuple[float, ...]) -> _Node:
  """Returns Huffman's tree; the same one for 0.7 and 0.3 as for 7 and 3."""
  exact = [fractions.Fraction(repr(float(weight))) for weight in weights]
  scale = math.lcm(*(share.denominator for share in exact))
  units = [int(share * scale) for share in exact]
  common = math.gcd(*units)
  # The second entry settles ties, so that nodes are never compared.
  heap = [
    (unit // common, i, _Node(unit // common, i))
    for i, unit in enumerate(units)
  ]
  heapq.heapify(heap)
  while len(heap) > 1:
    light, order, right = heapq.heappop(heap)
    heavy, _, left = heapq.heappop(heap)
    joined = _Node(light + heavy, left=left, right=right)
    heapq.heappush(heap, (joined.share, order + len(units), joined))
  return heap[0][2]
