"""Drafts while a grammar is open: the same tokens, and fewer steps."""

import json

import numpy as np
import pytest

from inference.constraints import grammars
from tests.helpers.serving import guesses, reference_engine
from tests.inference.engine import test_engine_constraints as constrained

pytest.importorskip('llguidance', reason='requirements-serve.txt has it')

_LAYOUT = {
  'max_sequences': 4,
  'decode_shapes': (4,),
  'num_pages': 40,
  'speculation': 'ngram',
  'draft_tokens': 3,
}


def _wanted():
  """Returns requests within grammars, and one without beside them."""
  found = [
    constrained._request(
      constraint, seed=seed, logprobs=2, n=2, max_tokens=16, **settings
    )
    for seed, (constraint, settings) in enumerate(
      (constraint, settings)
      for constraint in constrained._CONSTRAINTS.values()
      for settings in constrained._SETTINGS.values()
    )
  ]
  return [*found, constrained._request(None, seed=9, n=2, max_tokens=20)]


@pytest.fixture(scope='module')
def alone():
  """Returns the answers of an engine without drafts."""
  engine = constrained._engine()
  return [
    reference_engine.serve(engine, [each]).completions[0] for each in _wanted()
  ]


def _engine(alone, **how):
  engine = constrained._engine(**_LAYOUT)
  texts = [
    (*request.prompt_ids, *each.token_ids)
    for request, completions in zip(_wanted(), alone, strict=True)
    for each in completions
  ]
  guesses.install(engine, guesses.Guesses(texts, **how))
  return engine


def _check(alone, served):
  for some, others in zip(alone, served.completions, strict=True):
    for one, other in zip(some, others, strict=True):
      assert one.token_ids == other.token_ids
      assert one.logprobs == other.logprobs


@pytest.mark.slow
@pytest.mark.parametrize('sees_ahead', [True, False])
def test_drafts_in_grammars_change_no_token(alone, sees_ahead, monkeypatch):
  """Right and wrong ones, in a crowd, also if the grammar gives no copy."""
  if not sees_ahead:
    monkeypatch.setattr(grammars.Matcher, 'ahead', lambda self: None)
  engine = _engine(alone, wrong=0.2)
  value = engine.metrics.value
  before = [
    value('speculation_tokens_total', kind=kind)
    for kind in ('accepted', 'rejected')
  ]
  with guesses.verified_beside(engine) as beside:
    served = reference_engine.serve(
      engine,
      _wanted(),
      rng=np.random.default_rng(3),
      spread=12,
      preemptions=(0, 1),
    )
  _check(alone, served)
  assert sum(beside.values()) > 5
  accepted, rejected = (
    value('speculation_tokens_total', kind=kind) - num
    for kind, num in zip(('accepted', 'rejected'), before, strict=True)
  )
  assert accepted > 10
  assert rejected > 10


@pytest.mark.slow
def test_a_draft_model_in_grammars_changes_no_token(alone):
  """It samples without masks: most drafts leave the grammar, and it pauses."""
  layout = {name: _LAYOUT[name] for name in _LAYOUT if name != 'speculation'}
  engine = constrained._engine(**layout, noise=0.02)
  _check(alone, reference_engine.serve(engine, _wanted()))
  for kind in ('accepted', 'rejected'):
    value = engine.metrics.value('speculation_tokens_total', kind=kind)
    assert value > 1, kind


@pytest.mark.slow
def test_a_draft_that_leaves_its_grammar_is_rejected(alone):
  """All guesses are of other texts; the answers keep their schema."""
  engine = _engine(alone, wrong=1.0, is_longest=True)
  request = _wanted()[1]
  (found,) = reference_engine.serve(engine, [request]).completions
  for one, other in zip(alone[1], found, strict=True):
    assert one.token_ids == other.token_ids
    text = b''.join(map(constrained._Words().token_bytes, other.token_ids))
    assert 1 <= json.loads(text)['a'] <= 22
  assert sum(each.usage.rejected_tokens for each in found) > 5
