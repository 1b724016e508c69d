"""Planned steps as arrays, written out."""

from inference.engine import inputs as inputs_lib, steps
from inference.scheduling import sequence_manager


def _row(id, slot, start, tokens, pages, *, length=0, samples=True):
  return sequence_manager.Row(
    id=id,
    slot=slot,
    start=start,
    length=length or len(tokens),
    tokens=tokens,
    pages=pages,
    samples=samples,
  )


# Two of three decode rows, two of three chunks of four; the chunks are parts of
# one prompt that is scored and of one that is not.
_STEP = sequence_manager.Step(
  copies=(),
  decodes=(
    _row('a', 5, 7, None, (4, 2), length=1),
    _row('b', 0, 8, (33,), (6, 7, 1)),
  ),
  chunks=(
    _row('c', 2, 4, (14, 15, 16, 17), (8, 9), samples=False),
    _row('d', 3, 0, (20, 21), (5,)),
  ),
  seated=(),
  preempted=(),
)


def _filled(scored, forced=lambda *_: None):
  inputs = inputs_lib.empty(
    steps.Shape(3, 3),
    chunk_tokens=4,
    table_width=3,
    num_sampled=8,
    padding_slot=9,
  )
  inputs_lib.fill(
    inputs,
    _STEP,
    chunk_tokens=4,
    scored_prompt=scored.get,
    forced_token=forced,
  )
  return inputs


def test_rows_and_chunks_are_laid_out_with_padding_between():
  inputs = _filled({})
  tokens_T = [-1, 33, 0] + [14, 15, 16, 17] + [20, 21, 0, 0] + [0] * 4
  assert inputs.tokens_T.tolist() == tokens_T
  positions_T = [7, 8, -1] + [4, 5, 6, 7] + [0, 1, -1, -1] + [-1] * 4
  assert inputs.positions_T.tolist() == positions_T
  assert inputs.decode_table_DL.tolist() == [[4, 2, 0], [6, 7, 1], [0, 0, 0]]
  assert inputs.chunk_table_XL.tolist() == [[8, 9, 0], [5, 0, 0], [0, 0, 0]]
  # The last row of a chunk is sampled behind; what yields no token is nobody's.
  assert inputs.rows_R.tolist() == [0, 1, 0, 6, 8, 0, 0, 0]
  assert inputs.slots_R.tolist() == [5, 0, 9, 9, 3, 9, 9, 9]
  assert (inputs.targets_M == -1).all()
  assert (inputs.forced_R == -1).all()
  assert (inputs.prompt_logprobs_X == -1).all()


def test_the_targets_of_a_scored_prompt_are_one_further():
  prompt = tuple(range(10, 20))
  inputs = _filled({'c': (prompt, 2), 'd': ((20, 21), 0)})
  assert inputs.prompt_logprobs_X.tolist() == [2, 0, -1]
  # The last token of a prompt has nothing behind it that is known.
  targets = [15, 16, 17, 18] + [21, -1, -1, -1] + [-1] * 4
  assert inputs.targets_M.tolist() == targets


def test_tokens_beyond_a_prompt_have_no_targets():
  # After a preemption a chunk holds what was sampled too.
  inputs = _filled({'c': (tuple(range(10, 17)), 0)})
  assert inputs.targets_M.tolist() == [15, 16] + [-1] * 10


def test_a_token_is_forced_at_its_position():
  # Behind 7 + 1, 8 + 1 and 0 + 2 tokens; what samples nothing is not asked.
  targets = {('a', 8): 70, ('b', 8): 71, ('c', 8): 72, ('d', 2): 0}
  inputs = _filled({}, lambda *key: targets.get(key))
  assert inputs.forced_R.tolist() == [70, -1, -1, -1, 0, -1, -1, -1]


def test_rows_that_sample_are_found_in_the_outputs():
  found = inputs_lib.sampling_rows(_STEP, num_decodes=3)
  assert [(place, row.id) for place, row in found] == [
    (0, 'a'),
    (1, 'b'),
    (4, 'd'),
  ]
