"""The source mix: the source of each row, in exact shares by weight.

The source of a row is computed without the rows before it. Sources are the
leaves of a binary tree. A node whose left side has the share q sends its row i
to the left if round((i + 1) q) > round(i q). Of its first n rows, round(n q)
then go left. On the way down, a row's index at each node becomes its index
within its source. All arithmetic is in integers.

A node errs by half a row at most, and passes its error on times a share. The
tree is Huffman's, in which an inner node has at most two thirds of the share of
its parent. So after any number of rows, each source has had its share of rows
to within one row in a mix of up to three sources, and to within two rows in
larger ones.

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
  """A range of rows of the run that are mixed by the same weights."""

  from_row: int  # first row of the phase, counted over the run
  weights: tuple[float, ...]  # one per source
  taken: tuple[int, ...]  # rows of each source before this phase


@dataclasses.dataclass(frozen=True)
class _Node:
  """A leaf, which is a source, or a node that divides rows between two."""

  share: int  # integer weight; the root has the total
  source: int = -1  # index of a leaf's source
  left: '_Node | None' = None
  right: '_Node | None' = None


def start(weights: Sequence[float]) -> tuple[Phase, ...]:
  """Returns the phases of a run whose weights have never changed."""
  return (Phase(from_row=0, weights=tuple(weights), taken=(0,) * len(weights)),)


def changed(
  phases: tuple[Phase, ...], weights: Sequence[float], row: int
) -> tuple[Phase, ...]:
  """Returns the phases of a run whose weights change at `row`.

  Args:
    weights: weight of each source from `row` on; equal shares change nothing.
    row: first row of the run with the new weights.
  """
  if _tree(phases[-1].weights) == _tree(tuple(weights)):
    return phases
  # A phase that starts at `row` or later has no rows yet: it is dropped.
  kept = tuple(phase for phase in phases if phase.from_row < row)
  if not kept:
    return start(weights)
  taken = tuple(taken_before(phases, row))
  return (*kept, Phase(from_row=row, weights=tuple(weights), taken=taken))


def assign(
  phases: Sequence[Phase], rows_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the source of each row and its index there, int64 [N] each.

  Args:
    phases: in order; the first starts at row 0.
    rows_N: int64 [N], rows counted over the run.
  """
  if len(phases[0].weights) == 1:
    return np.zeros_like(rows_N), rows_N
  pairs = [_locate(phases, row) for row in rows_N.tolist()]
  sources_N, indices_N = np.array(pairs, np.int64).reshape(-1, 2).T
  return sources_N, indices_N


def taken_before(phases: Sequence[Phase], row: int) -> list[int]:
  """Returns the number of rows before `row` of each source."""
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
  """Returns (source, index in the source) of a row, by a walk down the tree."""
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
  """Returns how many of a node's first `count` rows go left."""
  assert node.left is not None
  # round(count x q) for q = left.share / node.share, halves up.
  return (2 * count * node.left.share + node.share) // (2 * node.share)


@functools.lru_cache(maxsize=64)
def _tree(weights: tuple[float, ...]) -> _Node:
  """Returns Huffman's tree; 0.7 and 0.3 give the same tree as 7 and 3."""
  # Exact decimals: 0.1 counts as one tenth, not as the nearest binary fraction.
  exact = [fractions.Fraction(repr(float(weight))) for weight in weights]
  scale = math.lcm(*(share.denominator for share in exact))
  units = [int(share * scale) for share in exact]
  common = math.gcd(*units)
  # The second entry breaks ties, as nodes have no order.
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
