"""Answers of a model with an open model's tokenizer: offsets and warnings."""

import asyncio
import logging

import pytest

from inference import generate
from inference.engine import engine_config
from inference.server.answers import completions
from inference.server.api import completion_schema
from tests.helpers import frozen_dirs
from tests.helpers.open_weights import hf_files
from text import hf_tokenizer


@pytest.fixture(scope='module', params=['llama2', 'wordpiece'])
def generator(request, tmp_path_factory):
  """Returns a generator whose tokenizer puts a space in front of a text."""
  root = tmp_path_factory.mktemp(request.param)
  hf_files.FAMILIES[request.param](root / 'theirs')
  hf_tokenizer.convert(root / 'theirs', root / 'ours')
  frozen_dirs.write(
    root / 'm',
    config=frozen_dirs.config(num_layers=1, vocab_size=420),
    tokenizer_dir=root / 'ours',
  )
  engine = engine_config.EngineConfig(
    max_sequences=1, chunk_tokens=64, max_chunks=1, max_mixed_chunks=1
  )
  return generate.load(root / 'm', engine)


def _answer(generator, **fields):
  body = completion_schema.CompletionRequest(
    model='m', temperature=1.0, seed=5, max_tokens=20, **fields
  )
  return completions.Answer(generator, body, principal='')


def _whole(generator, **fields):
  """Returns the only choice of an answer."""
  answer = _answer(generator, **fields)

  async def updates():
    for update in generator.engine.answer(answer.requests):
      yield update

  asyncio.run(answer.finish(updates()))
  (choice,) = answer.whole()['choices']
  return choice


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('echo', [False, True])
def test_a_token_with_text_has_it_at_its_offset(generator, echo):
  choice = _whole(generator, prompt='the cat', logprobs=2, echo=echo)
  found = choice['logprobs']
  num_named = 0
  for name, offset in zip(found['tokens'], found['text_offset'], strict=True):
    if not name.startswith('token_id:'):
      num_named += 1
      assert choice['text'].startswith(name, offset), (name, offset)
  assert num_named > 10


def test_a_prompt_with_special_tokens_as_text_is_warned_of_once(
  generator, caplog, monkeypatch
):
  # Both generators have the same weights.
  monkeypatch.setattr(completions, '_WARNED', set())
  (token, *_) = generator.tokenizer.special_tokens
  assert generator.warning('a < b') == ''
  assert generator.warning(f'a {token}').startswith(
    f'prompt: got the special token {token!r} as text'
  )
  with caplog.at_level(logging.WARNING, 'uvicorn.error'):
    for prompt in ('plain', [1, 2], ['x', f'{token} y'], f'{token} z'):
      _answer(generator, prompt=prompt)
  (record,) = caplog.records
  assert 'serve.py --chat' in record.getMessage()
