"""The answer to one sequence: its usage, tokens and logprobs."""

import jax
import numpy as np

from inference.engine import adapter_table
from inference.requests import answer, requests
from inference.sampling import logprobs, settings as settings_lib
from inference.scheduling import sequence_manager, spans
from tests.helpers import tiny_models
from tests.helpers.serving import simulated_device

_PROMPT = (256, 97, 98, 99)


def _live(index=0, *, target=None, max_tokens=3, **settings):
  request = requests.Request(
    prompt_ids=_PROMPT,
    settings=settings_lib.Settings(**settings),
    target=target,
  )
  limits = simulated_device.limits()
  manager = sequence_manager.SequenceManager(limits, num_pages=32)
  return answer.Live(
    7,
    index,
    request,
    manager.submit((7, index), _PROMPT, max_tokens),
    seed=40 + index,
    tokenizer=tiny_models.byte_tokenizer(),
    adapter=adapter_table.Loaded('', 0, 0),
  )


def _found(num_rows, num_steps=1):
  """Returns log-probabilities [S, R] whose values name their row and step."""
  rows = np.arange(num_rows) + 100 * np.arange(num_steps)[:, None]
  rows = rows.astype(np.float32)
  return logprobs.Logprobs(
    -rows,
    np.tile(np.arange(20, dtype=np.int32), (num_steps, num_rows, 1)),
    -rows[..., None] - np.arange(20, dtype=np.float32) / 32,
  )


def _scored(row, num):
  values = tuple(-row - k / 32 for k in range(num))
  return logprobs.TokenLogprobs(-row, tuple(range(num)), values)


def test_time_is_split_at_the_first_step_and_the_first_token():
  live = _live()
  live.submitted_at, live.seated_at = 10.0, 11.0
  times = 14.0, 16.0, 21.0
  updates = [
    live.push([token], _found(1), 0, now)[0]
    for token, now in zip(b'abc', times, strict=True)
  ]
  assert [update.text for update in updates] == ['a', 'b', 'c']
  completion = updates[-1].completion
  assert completion.usage.prefill_seconds == 3
  assert completion.usage.decode_seconds == 7
  assert updates[0].completion is updates[1].completion is None
  assert completion.token_ids == [*b'abc']
  assert completion.num_completion_tokens == 3
  assert completion.num_prompt_tokens == 4
  assert completion.seed == 40
  assert completion.logprobs is completion.prompt_logprobs is None
  assert (updates[0].request_id, updates[0].index) == (7, 0)


def test_each_token_has_the_log_probabilities_of_its_place():
  live = _live(logprobs=2)
  live.seated_at = 0.0
  updates = [live.push([97], _found(6), place, 1.0)[0] for place in (4, 0, 5)]
  expected = [_scored(4, 2), _scored(0, 2), _scored(5, 2)]
  assert updates[-1].completion.logprobs == expected
  assert [list(update.logprobs) for update in updates] == [
    [score] for score in expected
  ]


def test_tokens_of_one_dispatch_are_one_update_up_to_the_end():
  live = _live(logprobs=1, max_tokens=3)
  live.submitted_at, live.seated_at = 0.0, 1.0
  first, num_taken = live.push([97, 98], _found(2, 2), 1, 2.0)
  assert (first.text, first.token_ids, num_taken) == ('ab', (97, 98), 2)
  assert list(first.logprobs) == [_scored(1, 1), _scored(101, 1)]
  last, num_taken = live.push([99, 100, 101], _found(2, 3), 0, 5.0)
  assert (last.text, last.token_ids, num_taken) == ('c', (99,), 1)
  assert last.completion.text == 'abc'
  assert last.completion.usage.prefill_seconds == 1
  assert last.completion.usage.decode_seconds == 3


def test_a_token_that_does_not_exist_ends_the_answer_after_those_before():
  live = _live(max_tokens=9)
  live.seated_at = 0.0
  update, num_taken = live.push([97, -1, 98], None, 0, 2.0)
  assert (update.text, num_taken) == ('a', 2)
  assert update.completion.finish_reason == 'error'
  assert update.completion.token_ids == [97]


def test_a_prompt_is_scored_chunk_by_chunk_and_only_once_per_request():
  live = _live(prompt_logprobs=1, max_tokens=1)
  assert live.scored_prompt() == (_PROMPT, 1)
  assert _live(1, prompt_logprobs=1).scored_prompt() is None
  assert _live().scored_prompt() is None

  def chunk(start, length):
    return spans.Span(
      sequence=live.sequence, slot=0, start=start, length=length, tokens=(),
      pages=(), samples=False,
    )  # fmt: skip

  scores = jax.tree.map(lambda leaf: leaf[0], _found(9))
  live.take_prompt_logprobs(scores, chunk(0, 2), 3)
  # The last token of the prompt has no target.
  live.take_prompt_logprobs(scores, chunk(2, 2), 6)
  live.seated_at = 0.0
  update, num_taken = live.push([97], _found(1), 0, 1.0)
  assert num_taken == 1
  completion = update.completion
  assert completion.prompt_logprobs == [
    None,
    _scored(3, 1),
    _scored(4, 1),
    _scored(6, 1),
  ]


def test_a_target_is_taken_at_its_position_alone():
  live = _live(target=0)
  assert live.forced_token(4) == 0
  assert live.forced_token(5) is None
  assert _live().forced_token(4) is None


def test_how_it_samples_is_of_its_settings_and_its_seed():
  row = _live(2, min_tokens=2, logprobs=5).sampler_row()
  assert row.key_B.tolist() == [0, 42]
  assert row.min_position_B == len(_PROMPT) + 2
  assert row.num_logprobs_B == 5
  assert 257 in row.stop_ids_BI.tolist()  # EOS
  for name, value in (
    ('repetition_penalty', 1.1),
    ('presence_penalty', -0.5),
    ('frequency_penalty', 0.5),
  ):
    assert _live(**{name: value}).has_penalties
  assert not _live(temperature=0.5, top_k=3).has_penalties
