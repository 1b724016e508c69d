"""Completions over HTTP: the fields of requests and of their answers."""

import concurrent.futures
import dataclasses
import math

import jax
import numpy as np
import openai
import pytest

from inference.sampling import settings as settings_lib
from tests.helpers.serving import servers

_MODEL, _GREEDY = servers.MODEL, servers.GREEDY
_TEXT = 'hello'
_IDS = [256, *_TEXT.encode()]


@pytest.mark.parametrize(
  ('prompt', 'texts'),
  [
    ('ab', ['ab']),
    (['ab', 'xyz'], ['ab', 'xyz']),
    ([256, 97, 98], ['ab']),
    ([[256, 97, 98], [256, 120, 121, 122]], ['ab', 'xyz']),
    ('', ['']),
  ],
)
def test_every_form_of_prompt(served, client, prompt, texts):
  answer = client.completions.create(prompt=prompt, echo=True, **_GREEDY)
  settings = settings_lib.Settings(temperature=0.0, max_tokens=8)
  completions = served.offline(texts, settings)
  assert [choice.text for choice in answer.choices] == [
    text + completion.text
    for text, completion in zip(texts, completions, strict=True)
  ]
  assert [choice.index for choice in answer.choices] == [*range(len(texts))]


def test_choices_have_seeds_of_their_own_that_reproduce_them(client):
  sampled = {'model': _MODEL, 'max_tokens': 8, 'temperature': 1.0}
  answer = client.completions.create(prompt=['ab', 'c'], n=2, seed=5, **sampled)
  assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
  seeds = [choice.seed for choice in answer.choices]
  assert seeds[::2] == [5, 5]
  assert seeds[1] == seeds[3]
  assert answer.choices[0].text != answer.choices[1].text
  # The prompts are BOS + 'ab' and BOS + 'c'; each counts once.
  assert answer.usage.prompt_tokens == 5
  again = client.completions.create(prompt='ab', seed=seeds[1], **sampled)
  assert again.choices[0].text == answer.choices[1].text


@pytest.mark.parametrize('fields', [{'prompt': ['ab', 'c']}, {'n': 3}])
def test_several_choices_are_streamed_by_index(http, complete, fields):
  body = {'prompt': 'ab', 'echo': True, 'temperature': 0.7, 'seed': 3, **fields}
  whole = complete(**body)['choices']
  answer = http.post(
    '/v1/completions', json={**_GREEDY, **body, 'stream': True}
  )
  texts, reasons = [''] * len(whole), [None] * len(whole)
  for event in servers.events(answer.content):
    (choice,) = event['choices']
    texts[choice['index']] += choice['text']
    reasons[choice['index']] = choice['finish_reason']
  assert texts == [choice['text'] for choice in whole]
  assert reasons == ['length'] * len(whole)


def test_stop_as_a_string_or_a_list(complete):
  text = complete(prompt=_TEXT)['choices'][0]['text']
  stop = text[3]
  for form in (stop, [stop], ['nowhere', 'x' * 30, 'y', 'q', '~~', stop]):
    (choice,) = complete(prompt=_TEXT, stop=form)['choices']
    assert choice['text'] == text[: text.index(stop)]
    assert (choice['finish_reason'], choice['stop_reason']) == ('stop', stop)


def _token_ids(answer):
  """Returns the ids of the tokens of an answer."""
  tokens = answer['choices'][0]['logprobs']['tokens']
  return [int(token.removeprefix('token_id:')) for token in tokens]


@pytest.fixture(scope='module')
def ids_of(complete):
  def ids_of(**fields):
    return _token_ids(
      complete(
        **{
          'prompt': _TEXT,
          'logprobs': 0,
          'return_tokens_as_token_ids': True,
          **fields,
        }
      )
    )

  return ids_of


def test_settings_reach_the_sampler(ids_of):
  free = ids_of(max_tokens=20)
  assert len(free) == 20
  repeated = next(i for i in range(1, 20) if free[i] in free[:i])
  for penalty in (
    {'repetition_penalty': 1000.0},
    {'presence_penalty': 2.0},
    {'frequency_penalty': 2.0},
  ):
    # The texts agree up to the first repeated token.
    ids = ids_of(max_tokens=20, **penalty)
    assert ids != free
    assert ids[:1] == free[:1]
  strict = ids_of(max_tokens=20, repetition_penalty=1000.0)
  assert len({*strict}) == 20
  assert repeated < 20
  biased = ids_of(logit_bias={str(free[0]): -100, '65': 90})
  assert biased == [65] * 8
  assert ids_of(top_k=1, temperature=1.0) == free[:8]
  assert ids_of(top_p=1e-6, temperature=1.0) == free[:8]
  assert ids_of(min_p=0.999, temperature=1.0) == free[:8]
  assert ids_of(temperature=1.0, seed=1) == ids_of(temperature=1.0, seed=1)
  assert ids_of(temperature=1.0, seed=1) != ids_of(temperature=1.0, seed=2)


def test_what_ends_a_completion(ids_of, complete):
  free = ids_of()
  end = free.index(free[2]) + 1
  assert ids_of(stop_token_ids=[free[2]]) == free[:end]
  assert ids_of(stop_token_ids=[free[2]], min_tokens=8)[:2] == free[:2]
  assert len(ids_of(stop_token_ids=[free[2]], min_tokens=8)) == 8
  (choice,) = complete(prompt=_TEXT, stop_token_ids=[free[2]])['choices']
  assert choice['stop_reason'] == free[2]
  eos = {'logit_bias': {'257': 100}, 'max_tokens': 4}
  assert ids_of(**eos) == [257]
  assert ids_of(**eos, ignore_eos=True) == [257] * 4
  assert ids_of(**eos, min_tokens=2)[:2] == free[:2]
  assert ids_of(**eos, min_tokens=2)[2:] == [257]
  (choice,) = complete(prompt=_TEXT, **eos)['choices']
  assert (choice['text'], choice['finish_reason']) == ('', 'stop')
  assert choice['stop_reason'] is None


# ------------------------------------------------------------------------------
# Log-probabilities


@pytest.fixture(scope='module')
def scored(served):
  settings = settings_lib.Settings(
    temperature=0.0, max_tokens=8, logprobs=3, prompt_logprobs=3
  )
  return served.offline([_TEXT], settings)[0]


def test_logprobs_of_the_completion(complete, scored):
  (choice,) = complete(prompt=_TEXT, logprobs=3)['choices']
  found = choice['logprobs']
  assert found['token_logprobs'] == [each.chosen for each in scored.logprobs]
  for top, each in zip(found['top_logprobs'], scored.logprobs, strict=True):
    assert [*top.values()] == [*each.values]
  # An offset is the character at which a token begins.
  for name, at in zip(found['tokens'], found['text_offset'], strict=True):
    assert name.startswith('token_id:') or choice['text'][at:].startswith(name)
  assert any(not name.startswith('token_id:') for name in found['tokens'])


def test_logprobs_0_is_of_the_chosen_tokens_alone(complete):
  found = complete(prompt=_TEXT, logprobs=0)['choices'][0]['logprobs']
  assert [len(top) for top in found['top_logprobs']] == [1] * 8
  for name, value, top in zip(
    found['tokens'], found['token_logprobs'], found['top_logprobs'], strict=True
  ):
    assert top == {name: value}


def test_logprobs_of_a_stream_are_those_of_the_whole(http, complete):
  # Half characters and a stop string hold tokens back, but none is lost.
  body = {'prompt': 'ab', 'logprobs': 2, 'temperature': 1.0, 'seed': 11}
  text = complete(**body, max_tokens=40)['choices'][0]['text']
  body = {**body, 'max_tokens': 40, 'stop': [text[12:14]]}
  whole = complete(**body)['choices'][0]
  assert whole['finish_reason'] == 'stop'
  answer = http.post(
    '/v1/completions', json={**_GREEDY, **body, 'stream': True}
  )
  joined = {name: [] for name in whole['logprobs']}
  for event in servers.events(answer.content):
    (choice,) = event['choices']
    for name, values in choice['logprobs'].items():
      joined[name] += values
  assert joined == whole['logprobs']
  assert len(joined['tokens']) > len(set(joined['text_offset']))


@pytest.mark.parametrize('n', [1, 2])
def test_what_lm_eval_asks_and_reads(http, served, n):
  prompts = [_IDS, [256, 98, 99]]
  body = {
    'model': _MODEL,
    'prompt': prompts,
    'temperature': 0,
    'max_tokens': 1,
    'logprobs': 1,
    'seed': 1234,
    'echo': True,
    'n': n,
  }
  # The prompt is cached, but its log-probabilities are computed again.
  for _ in range(2):
    answer = http.post('/v1/completions', json=body).json()
    assert answer['usage']['prompt_tokens_details']['cached_tokens'] == 0
  settings = settings_lib.Settings(
    temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=1
  )
  for choice in answer['choices']:
    ids = prompts[choice['index'] // n]
    (expected,) = served.offline([ids], settings)
    found = choice['logprobs']
    assert {len(values) for values in found.values()} == {len(ids) + 1}
    assert found['token_logprobs'][0] is None
    assert found['top_logprobs'][0] is None
    scores = [*expected.prompt_logprobs[1:], *expected.logprobs]
    assert found['token_logprobs'][1:] == [each.chosen for each in scores]
    # Equal to the bit: lm-eval compares them to see whether a token is greedy.
    is_greedy = [
      value == max(top.values())
      for value, top in zip(
        found['token_logprobs'][1:], found['top_logprobs'][1:], strict=True
      )
    ]
    assert is_greedy == [each.chosen == each.values[0] for each in scores]
    assert is_greedy[-1]
    assert not all(is_greedy)


def test_echoed_text_and_offsets_go_together(complete):
  (choice,) = complete(prompt='h\u00e9', echo=True, logprobs=0)['choices']
  found = choice['logprobs']
  # BOS, h, the two halves of a character, and then the completion.
  assert found['tokens'][:4] == [
    'token_id:256',
    'h',
    'token_id:195',
    'token_id:169',
  ]
  assert found['text_offset'][:5] == [0, 0, 1, 1, 2]
  assert len(found['tokens']) == 4 + 8


def test_a_prompt_is_scored_without_a_completion(http, complete):
  for fields in ({}, {'n': 2}):
    answer = complete(
      prompt=_IDS, max_tokens=0, echo=True, logprobs=1, **fields
    )
    assert answer['usage']['completion_tokens'] == 0
    assert answer['usage']['prompt_tokens'] == len(_IDS)
    longer = complete(prompt=_IDS, max_tokens=1, echo=True, logprobs=1)
    for choice in answer['choices']:
      assert choice['text'] == _TEXT
      assert choice['finish_reason'] == 'length'
      for name, values in choice['logprobs'].items():
        assert values == longer['choices'][0]['logprobs'][name][:-1]
  # The prompt fills the context: no completion needs room.
  answer = complete(prompt='x' * 63, max_tokens=0, echo=True, logprobs=0)
  assert len(answer['choices'][0]['logprobs']['tokens']) == 64
  body = {**_GREEDY, 'prompt': _TEXT, 'max_tokens': 0, 'echo': True}
  stream = http.post('/v1/completions', json={**body, 'stream': True})
  first, last = servers.events(stream.content)
  assert [first['choices'][0]['text'], last['choices'][0]['text']] == [
    _TEXT,
    '',
  ]
  assert last['choices'][0]['finish_reason'] == 'length'


def test_scores_that_are_no_numbers_fail_and_are_not_sent(
  served, http, monkeypatch, caplog
):
  engine = served.generator.engine
  step = engine.step

  def broken_step():
    return [_with_nan(update) for update in step()]

  monkeypatch.setattr(engine, 'step', broken_step)
  body = {**_GREEDY, 'prompt': _TEXT, 'logprobs': 1}
  whole = http.post('/v1/completions', json=body)
  assert whole.status_code == 500
  stream = http.post('/v1/completions', json={**body, 'stream': True})
  assert b'NaN' not in whole.content + stream.content
  *_, last = servers.events(stream.content)
  assert last['error']['type'] == 'server_error'
  monkeypatch.undo()
  assert 'not JSON compliant' in caplog.text
  servers.until(lambda: not engine.has_work)


def _with_nan(update):
  def broken(scores):
    return [
      score._replace(chosen=math.nan, ids=(), values=()) for score in scores
    ]

  completion = update.completion
  if completion:
    completion = dataclasses.replace(
      completion, logprobs=broken(completion.logprobs)
    )
  return dataclasses.replace(
    update, logprobs=broken(update.logprobs), completion=completion
  )


# ------------------------------------------------------------------------------
# Accounting


def test_an_answer_tells_what_it_took(complete):
  prompt = 'a prompt of several pages, asked twice'
  first, again = (complete(prompt=prompt, n=2) for _ in range(2))
  assert first['usage'] == {
    'prompt_tokens': 39,
    'completion_tokens': 16,
    'total_tokens': 55,
    'prompt_tokens_details': {'cached_tokens': 0},
  }
  # Four whole pages of eight tokens.
  assert again['usage']['prompt_tokens_details'] == {'cached_tokens': 32}
  fields = {
    'prompt_tokens',
    'prefill_tokens',
    'decode_tokens',
    'accepted_tokens',
    'rejected_tokens',
    'cached_tokens',
    'preemptions',
    'flops',
    'kv_byte_seconds',
    'queue_seconds',
    'prefill_seconds',
    'decode_seconds',
  }
  leader, follower = (each['accounting'] for each in first['choices'])
  assert leader.keys() == follower.keys() == fields
  assert (leader['prefill_tokens'], leader['decode_tokens']) == (39, 7)
  # The second choice shares the prompt of the first except the last token.
  assert follower['cached_tokens'] > 30
  assert 0 < follower['flops'] < leader['flops']
  for name in ('kv_byte_seconds', 'prefill_seconds', 'decode_seconds'):
    assert leader[name] > 0
  found = again['choices'][0]['accounting']
  assert found['prefill_tokens'] == 39 - 32
  assert found['flops'] < leader['flops']


def test_a_priority_changes_who_comes_first(served, http):
  inbox = served.engine_loop._inbox
  waited = {}

  def ask(name, priority, n):
    body = {**_GREEDY, 'prompt': name, 'n': n, 'priority': priority}
    answer = http.post('/v1/completions', json={**body, 'max_tokens': 20})
    accounting = answer.json()['choices'][0]['accounting']
    waited[name] = accounting['queue_seconds']

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    # All requests wait before the first one runs; four can run at once.
    inbox.put(lambda: servers.until(lambda: inbox.qsize() >= 3))
    pool.submit(ask, 'first', 0, 4)
    servers.until(lambda: inbox.qsize() == 1)
    pool.submit(ask, 'later', 5, 4)
    servers.until(lambda: inbox.qsize() == 2)
    pool.submit(ask, 'sooner', -5, 4)
  assert sorted(waited, key=waited.get) == ['sooner', 'first', 'later']


def test_the_user_is_logged(complete, caplog):
  with caplog.at_level('INFO', logger='uvicorn.error'):
    complete(prompt=_TEXT, user='some\nbody')
  assert "principal='' user='some\\nbody'" in caplog.text


def test_what_is_sampled_is_distributed_as_it_should_be(complete):
  # Eight tokens of one distribution: the reported one at temperature 0.7.
  scores = complete(prompt='ab', logprobs=8, max_tokens=1)['choices'][0]
  (top,) = scores['logprobs']['top_logprobs']
  weights = np.exp(np.array([*top.values()]) / 0.7)
  probabilities = weights / weights.sum()
  counts = dict.fromkeys(top, 0)
  num_samples = 0
  for seed in range(0, 1024, 128):
    answer = complete(
      prompt='ab',
      n=128,
      seed=seed,
      max_tokens=1,
      logprobs=0,
      temperature=0.7,
      top_k=8,
    )
    for choice in answer['choices']:
      (name,) = choice['logprobs']['tokens']
      counts[name] += 1  # a KeyError is a token outside of the top eight
      num_samples += 1
  expected = num_samples * probabilities
  assert num_samples == 1024
  assert expected.min() > 5
  statistic = np.sum((np.array([*counts.values()]) - expected) ** 2 / expected)
  # A right sampler exceeds this once in a million (7 degrees of freedom). The
  # seeds are fixed, so the test passes always or never.
  assert statistic < 40.5


def test_openais_client_reads_all_of_it(client):
  answer = client.completions.create(
    prompt=_TEXT, logprobs=2, echo=True, user='me', **_GREEDY
  )
  (choice,) = answer.choices
  assert len(choice.logprobs.tokens) == len(_IDS) + 8
  assert answer.usage.prompt_tokens_details.cached_tokens == 0
  with pytest.raises(openai.BadRequestError, match='best_of: got 2'):
    client.completions.create(prompt='a', best_of=2, **_GREEDY)


# ------------------------------------------------------------------------------
# A model whose numbers are not finite.


@pytest.fixture
def spoilt(served):
  """Makes the embedding of 'z' NaN; the engine's thread does it."""
  engine = served.generator.engine

  def swap(params, digest):
    done = concurrent.futures.Future()

    def command():
      engine.set_params(params, digest)
      done.set_result(None)

    servers.until(lambda: not engine.has_work)
    served.engine_loop._inbox.put(command)
    done.result(timeout=60)

  params, digest = engine.params, engine.weights_digest
  bad = jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      leaf.at[ord('z')].set(np.nan)
      if "'embed'" in jax.tree_util.keystr(path)
      else leaf
    ),
    params,
  )
  swap(bad, 'bad')
  yield
  swap(params, digest)


@pytest.mark.usefixtures('spoilt')
def test_a_choice_that_is_not_finite_ends_with_an_error(served, http, complete):
  before = served.counted('finished_total', reason='error')
  whole = complete(prompt=['ab', 'xyz'], logprobs=2, n=2)['choices']
  assert [choice['finish_reason'] for choice in whole] == [
    'length', 'length', 'error', 'error'
  ]  # fmt: skip
  assert all('not finite' in choice['error'] for choice in whole[2:])
  assert not any('error' in choice for choice in whole[:2])
  assert whole[2]['text'] == ''
  for body in (
    {'echo': True, 'logprobs': 1},
    {'echo': True, 'logprobs': 1, 'max_tokens': 0},
    {'logprobs': 0},
    {},
  ):
    (choice,) = complete(prompt='abz', **body)['choices']
    assert choice['finish_reason'] == 'error'
  answer = http.post(
    '/v1/completions', json={**_GREEDY, 'prompt': 'abz', 'stream': True}
  )
  (event,) = servers.events(answer.content)
  assert event['choices'][0]['finish_reason'] == 'error'
  after = served.counted('finished_total', reason='error')
  assert after == before + 7
