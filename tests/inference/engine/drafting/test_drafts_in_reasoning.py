"""Drafts under a cap on reasoning, and in the grammar behind it."""

import dataclasses
import re

import numpy as np
import pytest

from inference.constraints import (
  constraint as constraint_lib,
  grammars,
  thinking,
)
from inference.requests import requests
from inference.sampling import settings as settings_lib
from tests.helpers import tiny_models
from tests.helpers.serving import guesses, reference_engine
from tests.inference.engine import test_engine_speculation

pytest.importorskip('llguidance', reason='requirements-serve.txt has it')

_OPENING, _CLOSING = '<think>', '</think>'
_MARKER = list(_CLOSING.encode())
_PATTERN = '(abc|xyz)[0-9]{2,4}'
_THOUGHT = constraint_lib.Thought(
  opening=_OPENING, closing=_CLOSING, is_open=True
)
_REGEX = constraint_lib.Constraint(
  kind='regex', text=_PATTERN, thought=_THOUGHT
)


def _request(most, temperature, constraint):
  return requests.Request(
    prompt_ids=tuple(f'{most} {temperature} q{_OPENING}'.encode()),
    settings=settings_lib.Settings(
      seed=most,
      temperature=temperature,
      logprobs=2,
      max_tokens=most + 24,
      constraint=constraint,
      ignore_eos=constraint is None,
    ),
    thinking=thinking.Cap(
      most_tokens=most, opening=_OPENING, closing=_CLOSING, is_open=True
    ),
  )


_WANTED = [
  _request(most, temperature, constraint)
  for most in (0, 1, 9, 17)
  for temperature in (0.0, 1.0)
  for constraint in (None, _REGEX)
]


def _served(engine, **crowd):
  served = reference_engine.serve(engine, _WANTED, **crowd)
  return [each for (each,) in served.completions]


@pytest.mark.slow
@pytest.mark.parametrize('spread', [0, 20])
def test_a_cap_holds_with_drafts_and_no_token_changes(spread):
  """Also beside prompts, and after preemptions."""
  plain = reference_engine.engine(**test_engine_speculation._PLAIN)
  expected = _served(plain)
  texts = [
    (*request.prompt_ids, *each.token_ids)
    for request, each in zip(_WANTED, expected, strict=True)
  ]
  engine = test_engine_speculation._engine(guesses.Guesses(texts, wrong=0.15))
  before = guesses.counted(engine)
  with guesses.verified_beside(engine) as beside:
    found = _served(
      engine, rng=np.random.default_rng(1), spread=spread, preemptions=(0, 1)
    )
  for request, each, other in zip(_WANTED, found, expected, strict=True):
    assert (each.token_ids, each.logprobs) == (other.token_ids, other.logprobs)
    most = request.thinking.most_tokens
    assert each.token_ids[most : most + 8] == _MARKER
    if request.settings.constraint:
      _, answer = each.text.rsplit(_CLOSING, 1)
      assert re.fullmatch(_PATTERN, answer.strip(' \n'))
  accepted, rejected = np.subtract(guesses.counted(engine), before)
  assert accepted == sum(each.usage.accepted_tokens for each in found)
  # Some caps are in the middle of a character, where no grammar has a marker.
  assert any(
    '\N{REPLACEMENT CHARACTER}' + _CLOSING in each.text
    for request, each in zip(_WANTED, found, strict=True)
    if request.settings.constraint
  )
  # A token of a draft is taken within the reasoning, the marker and the answer.
  assert accepted > 0.3 * sum(len(each.token_ids) for each in found)
  assert rejected > 10
  assert sum(beside.values()) > 3


def test_the_copy_of_a_cap_counts_a_draft_apart():
  cap = thinking.Cap(
    most_tokens=4, opening=_OPENING, closing=_CLOSING, is_open=True
  )
  tokenizer = tiny_models.byte_tokenizer()
  matcher = thinking.Capped(cap, None, tokenizer).matcher()
  text = 'aé'.encode()
  for token in text[:2]:  # ends within a character
    matcher.push(token)
  ahead, allowed = matcher.ahead(), []
  for token in (text[2], ord('b'), *_MARKER):
    ahead.push(token)
    bits_W = np.full(9, 2**32 - 1, np.uint32)
    ahead.fill(bits_W)
    bits_V = np.unpackbits(bits_W.view(np.uint8), bitorder='little')
    allowed.append(np.flatnonzero(bits_V).tolist())
  everything = list(range(288))
  assert allowed == [
    everything,
    *([token] for token in _MARKER),
    everything,
  ]
  # The copy of a copy, and the one that took only sampled tokens.
  assert ahead.ahead()._forced == []
  assert (matcher.num_tokens, matcher._forced) == (2, [])
  assert matcher._decoder.push(text[2]) == 'é'


@pytest.mark.parametrize('is_open', [True, False])
def test_a_cap_within_a_character_keeps_the_grammar_behind_it(is_open):
  tokenizer = tiny_models.byte_tokenizer()
  cap = thinking.Cap(
    most_tokens=2, opening=_OPENING, closing=_CLOSING, is_open=is_open
  )
  constraint = dataclasses.replace(
    _REGEX, thought=dataclasses.replace(_THOUGHT, is_open=is_open)
  )
  inner = grammars.Grammars(tokenizer).compile(constraint)
  matcher = thinking.Capped(cap, inner, tokenizer).matcher()
  opening = '' if is_open else _OPENING
  # The marker that the model opens counts no token; one and a half character.
  text = f'{opening}a'.encode() + 'é'.encode()[:1]
  for token in (*text, *_MARKER, *b'abc12', tokenizer.eos_id):
    bits_W = np.full(9, 2**32 - 1, np.uint32)
    matcher.fill(bits_W)
    assert bits_W[token >> 5] >> (token & 31) & 1, (token, matcher.failure)
    matcher.push(token)
  assert not matcher.failure


@pytest.fixture(autouse=True)
def _checked():
  yield
  reference_engine.check_engines()
