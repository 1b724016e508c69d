"""Samples of the engine have the distribution that NumPy computes.

Of two tokens in a row, so that penalties and the minimum of tokens see what
came before; every outcome of a vocabulary of 13 is counted. All settings share
the engine's steps: each row has to find its own.
"""

import collections
import itertools

import numpy as np
import pytest
from scipy import stats

from inference.requests import requests
from inference.sampling import settings as settings_lib
from tests.helpers.serving import reference_engine

_LAYOUT = {
  'max_sequences': 32,
  'decode_shapes': (32,),
  'num_pages': 64,
  'chunk_tokens': 8,
  'max_chunks': 1,
  'max_mixed_chunks': 1,
}
_PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
_NUM_SAMPLES = 600
_SETTINGS = {
  'plain': {},
  'temperature': {'temperature': 0.6},
  'top_k': {'top_k': 4},
  'top_p': {'top_p': 0.8},
  'min_p': {'min_p': 0.2},
  'penalties': {
    'repetition_penalty': 2.5,
    'presence_penalty': 1.5,
    'frequency_penalty': -0.5,
  },
  'penalties, bias, filters': {
    'repetition_penalty': 0.7,
    'presence_penalty': -1.5,
    'logit_bias': ((0, 2.5), (1, -100), (8, 1.0)),
    'temperature': 1.4,
    'top_k': 9,
    'top_p': 0.9,
  },
  'minimum, bias, filters': {
    'frequency_penalty': 2.0,
    'logit_bias': ((11, 2.0), (7, 2.0)),
    'min_tokens': 2,
    'stop_ids': (7,),
    'temperature': 2.0,
    'min_p': 0.05,
  },
}


@pytest.fixture(scope='module')
def counts():
  """Returns the count of each outcome, by name of the settings."""
  engine = reference_engine.engine(is_small=True, **_LAYOUT)
  counts = {name: collections.Counter() for name in _SETTINGS}
  num_each = 50
  pending = collections.deque(
    itertools.product(range(0, _NUM_SAMPLES, num_each), _SETTINGS)
  )
  names = {}
  while pending or engine.has_work:
    while pending and engine.num_waiting < 100:
      seed, name = pending.popleft()
      settings = settings_lib.Settings(
        seed=seed, n=num_each, max_tokens=2, **_SETTINGS[name]
      )
      names[
        engine.submit(requests.Request(prompt_ids=_PROMPT, settings=settings))
      ] = name
    for update in engine.step():
      if update.completion:
        outcome = tuple(update.completion.token_ids)
        counts[names[update.request_id]][outcome] += 1
  return counts


@pytest.fixture(scope='module')
def logits():
  """Returns `outcomes`."""
  return outcomes()


def outcomes():
  """Returns the logits after the prompt, and after each next token."""
  reference = reference_engine.Reference(is_small=True)
  vocabulary = range(reference_engine.SmallTokenizer.vocab_size)
  each = [reference.logits_TV([*_PROMPT, token])[-2:] for token in vocabulary]
  return each[0][0], [behind for _, behind in each]


def _expected(logits, chosen):
  """Returns the exact probability of each outcome."""
  settings = settings_lib.Settings(**chosen)
  eos_id = reference_engine.SmallTokenizer.eos_id
  first_V, second_VV = logits

  def next_V(logits_V, output):
    return reference_engine.distribution(
      logits_V, settings, _PROMPT, output, eos_id
    )

  probs = {}
  for token, prob in enumerate(next_V(first_V, [])):
    if token in (eos_id, *settings.stop_ids):
      probs[token,] = prob
      continue
    for other, then in enumerate(next_V(second_VV[token], [token])):
      probs[token, other] = prob * then
  return probs


def _pvalue(counts, probs):
  """Returns the p-value of the counts; 0 if an outcome is impossible."""
  if any(not probs.get(outcome, 0) for outcome in counts):
    return 0.0
  observed, expected, rare = [], [], np.zeros(2)
  for outcome, prob in probs.items():
    pair = counts[outcome], prob * _NUM_SAMPLES
    if pair[1] < 5:  # chi-square needs 5 or more: rare outcomes share a cell
      rare += pair
    else:
      observed.append(pair[0])
      expected.append(pair[1])
  if rare[1] >= 5:
    observed.append(0)
    expected.append(0)
  # Too rare even together: added to another cell, so that sums are equal.
  observed[-1] += rare[0]
  expected[-1] += rare[1]
  assert len(observed) >= 4
  return stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize('name', _SETTINGS)
def test_the_engine_samples_what_numpy_expects(name, counts, logits):
  # At p = 1e-4, with its fixed seeds, each of these eight tests would fail by
  # chance once in 10,000 choices of them.
  assert sum(counts[name].values()) == _NUM_SAMPLES
  assert _pvalue(counts[name], _expected(logits, _SETTINGS[name])) > 1e-4


def test_rows_that_took_each_others_settings_would_be_noticed(counts, logits):
  for name, other in itertools.permutations(_SETTINGS, 2):
    pvalue = _pvalue(counts[name], _expected(logits, _SETTINGS[other]))
    assert pvalue < 1e-4, (name, other)
