"""Drafts change no token, no log-probability and no account.

The engine's matrix of promises with drafts is in `test_engine_matrix`.
"""

import collections
import dataclasses
import time

import numpy as np
import pytest

from inference.engine import engine_config
from inference.engine.compiled import keys
from inference.requests import requests
from inference.sampling import settings as settings_lib
from inference.speculation import choice as choice_lib, ngrams
from tests.helpers.serving import guesses, reference_engine
from tests.inference.engine import test_engine_matrix, test_engine_sampling

_Settings = settings_lib.Settings
_PLAIN = {
  **test_engine_matrix._INVARIANT,
  'num_pages': 40,
  'prefix_cache': False,
}
_DRAFTED = {**_PLAIN, 'speculation': 'ngram', 'draft_tokens': 5}


def _engine(drafter):
  engine = reference_engine.engine(**_DRAFTED)
  guesses.install(engine, drafter)
  return engine


def _without_guesses(completion):
  found = test_engine_matrix._without_times(completion)
  for name in ('accepted_tokens', 'rejected_tokens'):
    found['usage'].pop(name)
  return found


@pytest.mark.slow
def test_drafts_change_no_end_and_no_account():
  """Of stop ids, stop strings, EOS and lengths in the middle of a draft."""
  plain = reference_engine.engine(**_PLAIN)
  wanted = test_engine_matrix._ended_requests()

  def answers(engine):
    return [
      reference_engine.serve(engine, [request]).completions[0]
      for request in wanted
    ]

  expected = answers(plain)
  texts = [
    (*request.prompt_ids, *completion.token_ids)
    for request, completions in zip(wanted, expected, strict=True)
    for completion in completions
  ]
  drafter = guesses.Guesses(texts, wrong=0.1)
  engine = _engine(drafter)
  value = engine.metrics.value
  names = 'flops_total', 'accepted', 'rejected'

  def counted():
    return [
      value(name) or value('speculation_tokens_total', kind=name)
      for name in names
    ]

  before = counted()
  found = answers(engine)
  for one, other in zip(expected, found, strict=True):
    assert [*map(_without_guesses, one)] == [*map(_without_guesses, other)]
  usages = [each.usage for completions in found for each in completions]
  flops, *tokens = (
    after - first for first, after in zip(before, counted(), strict=True)
  )
  assert flops == pytest.approx(sum(usage.flops for usage in usages), rel=1e-12)
  accepted = sum(usage.accepted_tokens for usage in usages)
  rejected = sum(usage.rejected_tokens for usage in usages)
  # Tokens come from drafts, and some behind an end are dropped.
  assert accepted > 0.4 * sum(usage.decode_tokens for usage in usages)
  assert rejected > 20
  assert tokens == [accepted, rejected]
  # Each sequence is forgotten once.
  assert len(drafter.forgotten) == len(usages) == len({*drafter.forgotten})


@pytest.mark.slow
def test_tokens_of_a_verification_are_those_of_the_formula(monkeypatch):
  """(1 - a^(g+1)) / (1 - a), Leviathan et al. (arXiv:2211.17192), eq. 1."""
  right, length, lanes, seeds = 0.7, 5, 8, 12
  wanted = [
    requests.Request(
      prompt_ids=(lane + 1, seed + 1),
      settings=_Settings(max_tokens=90, seed=seed, ignore_eos=True),
    )
    for seed in range(seeds)
    for lane in range(lanes)
  ]

  def texts(engine):
    served = reference_engine.serve(engine, wanted)
    return [
      (*request.prompt_ids, *completions[0].token_ids)
      for request, completions in zip(wanted, served.completions, strict=True)
    ]

  expected = texts(reference_engine.engine(**_PLAIN))
  engine = _engine(guesses.Guesses(expected, wrong=1 - right, is_longest=True))
  found = []
  monkeypatch.setattr(
    engine.metrics,
    'count_draft',
    lambda drafted, accepted: found.append((drafted, accepted)),
  )
  assert texts(engine) == expected
  tokens = [accepted + 1 for drafted, accepted in found if drafted == length]
  assert len(tokens) > 2000
  formula = (1 - right ** (length + 1)) / (1 - right)
  assert np.mean(tokens) == pytest.approx(formula, rel=0.02)


@pytest.mark.slow
def test_a_text_that_repeats_itself_takes_fewer_steps():
  repeated = tuple(range(40, 52)) * 3
  asked = requests.Request(
    prompt_ids=repeated,
    settings=_Settings(
      temperature=0.0,
      max_tokens=48,
      # The weights are random: an answer of few tokens soon repeats itself.
      logit_bias=tuple((token, 30.0) for token in (40, 41)),
    ),
  )
  found, steps = [], []
  for engine in (
    reference_engine.engine(**_PLAIN),
    _engine(ngrams.Ngrams()),
  ):
    before = engine.metrics.value('engine_steps_total')
    ((completion,),) = reference_engine.serve(engine, [asked]).completions
    found.append(completion)
    steps.append(engine.metrics.value('engine_steps_total') - before)
  assert found[0].token_ids == found[1].token_ids
  assert found[1].usage.accepted_tokens > 20
  assert steps[1] < 0.6 * steps[0]


def test_a_pause_behind_an_answer_is_no_time_of_a_step():
  """A dispatch that is left is read late, and drafts would seem to pay."""
  engine = reference_engine.engine(**_DRAFTED, decode_steps=1)
  asked = requests.Request(
    prompt_ids=(1, 2), settings=_Settings(max_tokens=60, seed=3)
  )
  ((whole,),) = reference_engine.serve(engine, [asked]).completions
  # The device does not know strings, and sends a step too many.
  settings = dataclasses.replace(asked.settings, stop=(whole.text[20:22],))
  list(engine.answer([dataclasses.replace(asked, settings=settings)]))
  assert engine._flight is not None  # sent before the last token was known
  accounts, measured = engine._accounts, engine._speculator._measured
  before = dict(accounts._step_seconds), dict(measured._found)
  assert all(before)
  time.sleep(0.05)
  list(engine.step())
  assert engine._flight is None
  assert before == (accounts._step_seconds, measured._found)


def test_the_choice_knows_whether_requests_wait_for_a_place(monkeypatch):
  engine = _engine(ngrams.Ngrams())
  choice, found = engine._speculator._choice, []

  def choose(drafts, shapes, rows, *, is_queue):
    found.append((is_queue, engine.manager.num_waiting > 0))
    return choice_lib.Chosen({}, 1.0)

  monkeypatch.setattr(choice, 'choose', choose)
  most = engine.config.max_sequences
  repeated = tuple(range(40, 44)) * 3
  settings = _Settings(max_tokens=4, seed=1, ignore_eos=True)
  asked = requests.Request(
    prompt_ids=repeated,
    settings=dataclasses.replace(settings, logit_bias=((40, 90.0),)),
  )
  reference_engine.serve(engine, [asked] * (2 * most))
  assert all(told == waits for told, waits in found)
  assert {told for told, _ in found} == {False, True}


@pytest.mark.parametrize('num', [1, 3])
def test_drafts_are_verified_beside_the_chunks_of_prompts(num):
  """In a loaded server, nearly every step has chunks."""
  settings = _Settings(max_tokens=40, seed=num, ignore_eos=True, logprobs=2)
  answering = [
    requests.Request(prompt_ids=(5, 6, each), settings=settings)
    for each in range(num)
  ]
  long = requests.Request(
    prompt_ids=tuple(range(100)),
    settings=_Settings(max_tokens=3, seed=9, prompt_logprobs=1, logprobs=1),
  )
  plain = reference_engine.engine(**_PLAIN)
  expected = [
    reference_engine.serve(plain, [each]).completions[0][0]
    for each in (*answering, long)
  ]
  texts = [
    (*each.prompt_ids, *found.token_ids)
    for each, found in zip(answering, expected, strict=False)
  ]
  engine = _engine(guesses.Guesses(texts, wrong=0.15, is_longest=True))
  value = engine.metrics.value
  names = 'flops_total', 'accepted', 'rejected'

  def counted():
    return [
      value(name) or value('speculation_tokens_total', kind=name)
      for name in names
    ]

  before, found = counted(), {}
  which = [engine.submit(each) for each in answering]
  while any(live.last_at is None for live in engine._live.values()):
    engine.step()
  which.append(engine.submit(long))
  (waiting,) = (x for x in engine._live.values() if x.request_id == which[-1])
  with guesses.verified_beside(engine) as beside:
    num_tokens, num_steps = 0, 0
    while engine.has_work:
      updates = engine.step()
      engine.manager.check()
      found |= {x.request_id: x.completion for x in updates if x.completion}
      if waiting.sequence.num_computed < 100:
        num_steps += 1
        num_tokens += sum(len(x.token_ids) for x in updates)
  # The prompt has 7 chunks; answers take more than a token per step meanwhile.
  assert sum(beside.values()) >= 5
  assert num_tokens > 1.5 * num * num_steps
  served = [found[each] for each in which]
  assert [*map(_without_guesses, served)] == [*map(_without_guesses, expected)]
  flops, *tokens = (
    after - first for first, after in zip(before, counted(), strict=True)
  )
  assert flops == pytest.approx(sum(x.usage.flops for x in served), rel=1e-12)
  assert tokens == [
    sum(getattr(each.usage, f'{kind}_tokens') for each in served)
    for kind in names[1:]
  ]
  assert min(tokens) > 3


def test_a_request_may_be_cancelled_while_its_draft_is_verified():
  texts = [tuple(range(30)) * 4]
  drafter = guesses.Guesses(texts, wrong=0.0)
  engine = _engine(drafter)
  settings = _Settings(max_tokens=60, ignore_eos=True, seed=1)
  cancelled = []
  for number in range(6):
    asked = requests.Request(
      prompt_ids=(*range(10 + number),), settings=settings
    )
    request_id = engine.submit(asked)
    while not (engine._flight and engine._flight.step.is_verified):
      engine.step()
    (update,) = engine.cancel(request_id)
    cancelled.append(update.completion)
    engine.manager.check()
    # The pages that the dispatch writes to belong to others now.
    other = requests.Request(prompt_ids=(7, 8, 9), settings=settings)
    ((completion,),) = reference_engine.serve(engine, [other]).completions
    assert completion.token_ids == _alone(other)
  assert {each.finish_reason for each in cancelled} == {'cancelled'}


def _alone(request):
  plain = reference_engine.engine(**_PLAIN)
  ((completion,),) = reference_engine.serve(plain, [request]).completions
  return completion.token_ids


@pytest.mark.slow
def test_samples_with_drafts_have_the_distribution_that_numpy_computes():
  """Chi-square of two tokens, with wrong and right drafts of the second."""
  layout = {**test_engine_sampling._LAYOUT, 'speculation': 'ngram'}
  engine = reference_engine.engine(is_small=True, **layout, draft_tokens=1)
  prompt, num = test_engine_sampling._PROMPT, test_engine_sampling._NUM_SAMPLES
  drafter = guesses.Guesses(
    [(*prompt, *rest) for rest in np.ndindex(11, 11)], wrong=0.0
  )
  guesses.install(engine, drafter)
  name = 'penalties, bias, filters'
  chosen = test_engine_sampling._SETTINGS[name]
  asked = [
    requests.Request(
      prompt_ids=prompt,
      settings=_Settings(seed=seed, n=30, max_tokens=3, **chosen),
    )
    for seed in range(num // 30)
  ]
  counts = collections.Counter()
  for request in asked:  # the prompt of another would be computed beside it
    for _, update in engine.answer([request]):
      if update.completion:
        counts[tuple(update.completion.token_ids[:2])] += 1
  assert counts.total() == num
  assert engine.metrics.value('speculation_tokens_total', kind='accepted') > 20
  logits = test_engine_sampling.outcomes()
  # Fails by chance once in 10,000 choices of seeds.
  expected = test_engine_sampling._expected(logits, chosen)
  assert test_engine_sampling._pvalue(counts, expected) > 1e-4


def test_an_engine_without_speculation_has_no_programs_for_it():
  engine = reference_engine.engine(**_PLAIN)
  assert engine._programs.verified == []
  assert engine._programs.verified_for(1, 2) is None
  speculating = _engine(None)._programs
  narrow, wide = keys.Verified(4, 3), keys.Verified(4, 6)
  assert speculating.verified == [narrow, wide]
  assert speculating.verified_for(1, 2) == narrow
  assert speculating.verified_for(4, 4) == wide
  assert speculating.verified_for(4, 7) is None
  plain = engine._programs._compiled.keys()
  assert plain < speculating._compiled.keys()


def test_settings_of_speculation_that_cannot_be_are_refused():
  for fields, message in (
    ({'speculation': 'magic'}, "got 'magic', expected one of off, ngram"),
    (
      {'draft_tokens': 3},
      'draft_tokens: got 3 without speculation, expected none; add'
      ' --engine.speculation=ngram',
    ),
    ({'speculation': 'ngram', 'draft_tokens': 0}, 'got 0, expected at least 1'),
  ):
    with pytest.raises(ValueError, match=message):
      engine_config.EngineConfig(**fields)
  config = engine_config.EngineConfig(speculation='ngram', max_sequences=2)
  assert config.verified_shapes() == [(1, 4), (1, 8), (2, 4), (2, 8)]
  assert dataclasses.replace(config, draft_tokens=1).verified_shapes() == [
    (1, 2),
    (2, 2),
  ]
