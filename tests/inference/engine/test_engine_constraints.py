"""Constrained answers: the model's distribution, without other texts.

Every outcome of a tiny vocabulary is counted, against the product of the
distributions in which each step leaves out the tokens that a grammar has not.
The false alarm rate of each test of chi square is 1e-4, with fixed seeds.
"""

import collections
import dataclasses
import json
import threading

import numpy as np
import pytest
from scipy import stats

from inference.constraints import (
  constraint as constraint_lib,
  grammars,
  side_by_side,
)
from inference.engine import flight
from inference.requests import requests
from inference.sampling import settings as settings_lib
from tests.helpers.serving import reference_engine

pytest.importorskip('llguidance', reason='requirements-serve.txt has it')

_WORDS = b'', b'{', b'}', b'"', b':', b'a', b'1', b'2', b'ab', b'b'


class _Words(reference_engine.SmallTokenizer):
  """Thirteen tokens that spell some JSON, two of them in two ways."""

  def token_bytes(self, token_id: int) -> bytes:
    return _WORDS[token_id] if token_id < len(_WORDS) else b''

  def encode(self, text: str) -> list[int]:
    spelled = [bytes([each]) for each in text.encode()]
    return [_WORDS.index(each) for each in spelled if each in _WORDS]


_PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
_LAYOUT = {
  'max_sequences': 32,
  'decode_shapes': (32,),
  'num_pages': 64,
  'chunk_tokens': 8,
  'max_chunks': 1,
  'max_mixed_chunks': 1,
  'numerics': 'invariant',
}
_SCHEMA = {
  'type': 'object',
  'properties': {'a': {'type': 'integer', 'minimum': 1, 'maximum': 22}},
  'required': ['a'],
  'additionalProperties': False,
}
_CONSTRAINTS = {
  'schema': constraint_lib.json_schema(_SCHEMA),
  'regex': constraint_lib.regex('(ab|b1|a)(12)?b?'),
  'choice': constraint_lib.choice(['ab', 'a12', 'b', 'abb']),
}
_SETTINGS = {
  'greedy': {'temperature': 0.0},
  'sampled': {'temperature': 1.2},
  'penalties': {
    'repetition_penalty': 1.5,
    'presence_penalty': -0.5,
    'frequency_penalty': 0.7,
    'logit_bias': ((5, 1.5), (8, 0.5)),
    'top_k': 5,
    'top_p': 0.95,
  },
}


def _engine(**changes):
  made = reference_engine.engine(is_small=True, **{**_LAYOUT, **changes})
  made._grammars = grammars.Grammars(_Words())
  return made


def _request(constraint, **settings):
  return requests.Request(
    prompt_ids=_PROMPT,
    settings=settings_lib.Settings(
      constraint=constraint, **{'max_tokens': 16, **settings}
    ),
  )


def _allowed(constraint, output):
  matcher = grammars.Grammars(_Words()).compile(constraint).matcher()
  for token in output:
    matcher.push(token)
  bits_W = np.zeros(1, np.uint32)
  matcher.fill(bits_W)
  return [i for i in range(13) if bits_W[0] >> i & 1]


def _outcomes(constraint, settings):
  """Returns the probability of each text, token by token."""
  reference = reference_engine.Reference(is_small=True)
  eos, found = reference.tokenizer.eos_id, {}
  todo = [((), 1.0)]
  while todo:
    output, mass = todo.pop()
    if output and output[-1] == eos:
      found[output] = mass
      continue
    logits_V = np.array(
      reference.logits_TV([*_PROMPT, *output])[-1], np.float64
    )
    allowed = _allowed(constraint, output)
    # A logit so low that nothing of it is left, as penalties are applied first.
    lowered_V = logits_V - 1e6 * ~np.isin(np.arange(13), allowed)
    probs_V = reference_engine.distribution(
      lowered_V, settings, _PROMPT, output, eos
    )
    if not settings.temperature:
      probs_V = np.eye(13)[np.argmax(probs_V)]
    todo += [
      ((*output, token), mass * probs_V[token])
      for token in allowed
      if mass * probs_V[token] > 1e-7
    ]
  return found


@pytest.mark.slow
@pytest.mark.parametrize('how', _SETTINGS)
@pytest.mark.parametrize('which', _CONSTRAINTS)
def test_distribution(which, how):
  engine, num = _engine(), 600
  request = _request(_CONSTRAINTS[which], seed=1, n=num, **_SETTINGS[how])
  served = reference_engine.serve(engine, [request])
  counts = collections.Counter(
    tuple(each.token_ids) for each in served.completions[0]
  )
  expected = _outcomes(request.settings.constraint, request.settings)
  assert set(counts) <= set(expected)
  if how == 'greedy':
    assert len(counts) == 1
    return
  common = [each for each, mass in expected.items() if mass * num >= 5]
  assert len(common) >= 3
  observed = [counts[each] for each in common]
  wanted = [expected[each] * num for each in common]
  rest = num - sum(wanted)
  if rest >= 5:
    observed.append(num - sum(observed))
    wanted.append(rest)
  else:
    wanted = np.array(wanted) * sum(observed) / sum(wanted)
  assert stats.chisquare(observed, wanted).pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
  'layout',
  [
    {},
    {'page_size': 1, 'chunk_tokens': 3, 'decode_steps': 4, 'num_pages': 200},
    {'max_sequences': 4, 'decode_shapes': (2, 4), 'num_pages': 9},
  ],
)
def test_same_tokens_in_every_layout(layout):
  """Also in a crowd, beside free answers, and preempted."""
  constrained = [
    _request(constraint, seed=seed, logprobs=2, n=2, temperature=t)
    for seed, (constraint, t) in enumerate(
      (c, t) for c in _CONSTRAINTS.values() for t in (0.0, 1.0)
    )
  ]
  free = [
    dataclasses.replace(
      each,
      settings=dataclasses.replace(
        each.settings, constraint=None, max_tokens=9
      ),
    )
    for each in constrained
  ]
  mixed = [
    each for pair in zip(constrained, free, strict=True) for each in pair
  ]
  alone = [
    reference_engine.serve(_engine(), [each]).completions[0] for each in mixed
  ]
  together = reference_engine.serve(
    _engine(**layout),
    mixed,
    rng=np.random.default_rng(3),
    spread=12,
    preemptions=(0, 1, 2),
  ).completions
  reference = reference_engine.Reference(is_small=True)
  for request, some, others in zip(mixed, alone, together, strict=True):
    for index, (one, other) in enumerate(zip(some, others, strict=True)):
      assert one.token_ids == other.token_ids
      assert one.logprobs == other.logprobs
      if request.settings.constraint is None:
        assert one.token_ids == reference.answer(request, index).token_ids


@pytest.mark.slow
def test_masks_of_a_batch_on_several_threads_are_the_same(monkeypatch):
  request = _request(_CONSTRAINTS['schema'], seed=3, n=8, temperature=1.0)
  (alone,) = reference_engine.serve(_engine(), [request]).completions
  threads = set()
  fill = flight._fill

  def watched(*args):
    threads.add(threading.get_ident())
    fill(*args)

  monkeypatch.setattr(flight, '_fill', watched)
  monkeypatch.setattr(flight, '_LARGE_WORDS', 1)
  monkeypatch.setattr(side_by_side, '_num_cores', lambda: 3)
  (found,) = reference_engine.serve(_engine(), [request]).completions
  assert [each.token_ids for each in found] == [
    each.token_ids for each in alone
  ]
  assert len(threads) > 1


def test_an_answer_is_whole_and_ends_where_the_grammar_does():
  request = _request(_CONSTRAINTS['schema'], seed=3, n=20, temperature=3.0)
  (found,) = reference_engine.serve(_engine(), [request]).completions
  for each in found:
    assert each.finish_reason == 'stop'
    text = b''.join(map(_Words().token_bytes, each.token_ids))
    assert 1 <= json.loads(text)['a'] <= 22


def test_a_grammar_without_a_next_token_ends_with_its_error():
  # No token has the letter c.
  request = _request(constraint_lib.regex('ac'), seed=3)
  ((found,),) = reference_engine.serve(_engine(), [request]).completions
  assert found.finish_reason == 'error'
  assert len(found.token_ids) == 1
  with pytest.raises(requests.Stuck, match='constraint: got no next token'):
    found.check()


def test_a_cancelled_answer_leaves_nothing():
  engine = _engine()
  request_id = engine.submit(_request(_CONSTRAINTS['schema'], seed=3, n=4))
  for _ in range(3):
    engine.step()
  assert len(engine.cancel(request_id)) == 4
  list(engine.run())
  assert engine._answers.num_constrained == 0


def test_refusals():
  engine = reference_engine.engine(
    is_small=True, **_LAYOUT | {'constraints': False}
  )
  with pytest.raises(settings_lib.SettingError, match='--engine.constraints'):
    engine.submit(_request(_CONSTRAINTS['regex']))
  for fields in ({'min_tokens': 2}, {'ignore_eos': True}):
    with pytest.raises(settings_lib.SettingError, match='beside a constraint'):
      _request(_CONSTRAINTS['regex'], **fields)


def test_metrics():
  engine = _engine()
  before = engine.metrics.value('constraint_rows_total')
  reference_engine.serve(engine, [_request(_CONSTRAINTS['choice'], seed=1)])
  made = engine.metrics.value('constraint_rows_total') - before
  assert made >= 2
  assert engine.metrics.value('constraint_mask_seconds_count') >= made


@pytest.fixture(autouse=True)
def _checked():
  yield
  reference_engine.check_engines()
