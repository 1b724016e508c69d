"""The arrays of planned steps, written out."""

import dataclasses

import numpy as np

from inference.engine import inputs as inputs_lib
from inference.engine.compiled import keys
from inference.scheduling import page_tables, spans


def _sequence(id):
  return page_tables.Sequence(
    id=id,
    tokens=[],
    num_prompt=0,
    max_known=0,
    principal=None,
    priority=0,
    scope=None,
    reads_prefix_cache=True,
    arrival=0,
    submitted=0,
  )


_SEQUENCES = {id: _sequence(id) for id in 'abcd'}


class _Live:
  """The part of an answer that `fill` reads."""

  def __init__(self, scored, targets):
    self._scored, self._targets = scored, targets

  def scored_prompt(self):
    return self._scored

  def forced_token(self, position):
    return self._targets.get(position)


def _span(id, slot, start, tokens, pages, *, length=0, samples=True):
  return spans.Span(
    sequence=_SEQUENCES[id],
    slot=slot,
    start=start,
    length=length or len(tokens),
    tokens=tokens,
    pages=pages,
    samples=samples,
  )


# Two of three decodes, and two of three chunks of four tokens. One chunk is of
# a prompt that is scored, the other of one that is not.
_STEP = spans.Step(
  copies=(),
  decodes=(
    _span('a', 5, 7, None, (4, 2), length=3),  # three tokens, one by one
    _span('b', 0, 8, (33,), (6, 7, 1)),
  ),
  chunks=(
    _span('c', 2, 4, (14, 15, 16, 17), (8, 9), samples=False),
    _span('d', 3, 0, (20, 21), (5,)),
  ),
  seated=(),
  preempted=(),
)


def _filled(scored, targets=None, step=_STEP, num_decodes=3):
  flat_I, inputs = inputs_lib.empty(
    inputs_lib.Layout(
      num_decodes, 3, chunk_tokens=4, table_width=3, num_sampled=8
    ),
    padding_slot=9,
  )
  inputs_lib.fill(
    inputs,
    step,
    chunk_tokens=4,
    answers={
      _SEQUENCES[id]: _Live(scored.get(id), (targets or {}).get(id, {}))
      for id in _SEQUENCES
    },
  )
  assert all(np.shares_memory(flat_I, each) for each in inputs)
  return inputs


def test_decodes_and_chunks_are_laid_out_with_padding_between():
  inputs = _filled({})
  tokens_T = [-1, 33, 0] + [14, 15, 16, 17] + [20, 21, 0, 0] + [0] * 4
  assert inputs.tokens_T.tolist() == tokens_T
  positions_T = [7, 8, -1] + [4, 5, 6, 7] + [0, 1, -1, -1] + [-1] * 4
  assert inputs.positions_T.tolist() == positions_T
  assert inputs.lengths_D.tolist() == [3, 1, 0]
  assert inputs.decode_table_DL.tolist() == [[4, 2, 0], [6, 7, 1], [0, 0, 0]]
  assert inputs.chunk_table_XL.tolist() == [[8, 9, 0], [5, 0, 0], [0, 0, 0]]
  # A token follows the last of a chunk; padding has the padding slot.
  assert inputs.rows_R.tolist() == [0, 1, 0, 6, 8, 0, 0, 0]
  assert inputs.slots_R.tolist() == [5, 0, 9, 9, 3, 9, 9, 9]
  assert (inputs.targets_M == -1).all()
  assert (inputs.forced_R == -1).all()
  assert (inputs.prompt_logprobs_X == -1).all()


def test_drafts_beside_chunks_have_a_row_for_each_token():
  step = dataclasses.replace(
    _STEP,
    decodes=(
      _span('a', 5, 7, (31, 32, 33), (4, 2)),
      _span('b', 0, 8, (41,), (6, 7, 1)),
    ),
    is_verified=True,
  )
  inputs = _filled({}, {'a': {8: 70, 9: 71}, 'd': {2: 72}}, step, num_decodes=5)
  assert inputs.tokens_T[:5].tolist() == [31, 32, 33, 41, 0]
  assert inputs.positions_T[:5].tolist() == [7, 8, 9, 8, -1]
  tables = [[4, 2, 0]] * 3 + [[6, 7, 1], [0, 0, 0]]
  assert inputs.decode_table_DL.tolist() == tables
  assert inputs.rows_R.tolist() == [0, 1, 2, 3, 0, 8, 10, 0]
  assert inputs.slots_R.tolist() == [5, 5, 5, 0, 9, 9, 3, 9]
  # The token after the first one is forced: drafts follow known tokens.
  assert inputs.forced_R.tolist() == [70, -1, -1, -1, -1, -1, 72, -1]
  key = keys.Beside(size=8, num_decodes=2, num_chunks=3, width=4)
  rows_XW, tokens_XW = inputs_lib.drafted_rows(step, key, 5)
  none = [-1] * 4
  assert rows_XW.tolist() == [
    [0, 1, 2, -1], [3, -1, -1, -1], [5, -1, -1, -1], [6, -1, -1, -1], none,
  ]  # fmt: skip
  assert tokens_XW[:2].tolist() == [[31, 32, 33, -1], [41, -1, -1, -1]]


def test_the_targets_of_a_scored_prompt_are_one_further():
  prompt = tuple(range(10, 20))
  inputs = _filled({'c': (prompt, 2), 'd': ((20, 21), 0)})
  assert inputs.prompt_logprobs_X.tolist() == [2, 0, -1]
  # The token after a prompt is not known.
  targets = [15, 16, 17, 18] + [21, -1, -1, -1] + [-1] * 4
  assert inputs.targets_M.tolist() == targets


def test_tokens_beyond_a_prompt_have_no_targets():
  # After a preemption, a chunk holds sampled tokens too.
  inputs = _filled({'c': (tuple(range(10, 17)), 0)})
  assert inputs.targets_M.tolist() == [15, 16] + [-1] * 10


def test_a_token_is_forced_at_its_position():
  # After 7 + 1, 8 + 1 and 0 + 2 tokens; 'c' samples no token.
  inputs = _filled({}, {'a': {8: 70}, 'b': {8: 71}, 'c': {8: 72}, 'd': {2: 0}})
  assert inputs.forced_R.tolist() == [70, -1, -1, -1, 0, -1, -1, -1]


def test_spans_are_found_in_the_outputs():
  found = inputs_lib.placed_spans(_STEP, num_decodes=3)
  assert [(place, span.sequence.id) for place, span in found] == [
    (0, 'a'),
    (1, 'b'),
    (3, 'c'),
    (4, 'd'),
  ]
