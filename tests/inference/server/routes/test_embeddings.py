"""Embeddings over HTTP: unit vectors of the cache-free forward, as asked."""

import base64
from concurrent import futures
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from inference.requests import answer as answer_lib
from inference.server.answers import embeddings
from models import transformer
from tests.helpers import frozen_dirs
from tests.helpers.serving import servers

_TEXTS = ['a', 'a longer text', 'ä€', 'a']


@functools.cache
def _weights():
  config = dataclasses.replace(
    frozen_dirs.config(num_layers=1), scan_layers=False
  )
  return transformer.Transformer(config), frozen_dirs.params(config)


def _expected_D(ids, pooling='mean', dimensions=None):
  """Returns the vector of the forward without a cache."""
  model, params = _weights()
  hidden_1TD, _ = model.apply(params, jnp.array([ids]), method='hidden')
  hidden_TD = np.asarray(hidden_1TD[0], np.float64)
  pooled_D = hidden_TD.mean(0) if pooling == 'mean' else hidden_TD[-1]
  kept_D = pooled_D[:dimensions]
  return kept_D / np.linalg.norm(kept_D)


@pytest.fixture
def embed(http):
  """Returns a function that asks for vectors and returns the answer."""

  def embed(**fields):
    body = {'model': servers.MODEL, **fields}
    answer = http.post('/v1/embeddings', json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()

  return embed


def _vectors(answer):
  assert [each['index'] for each in answer['data']] == list(
    range(len(answer['data']))
  )
  return np.array([each['embedding'] for each in answer['data']])


@pytest.mark.slow
@pytest.mark.parametrize('pooling', [None, 'mean', 'last'])
def test_a_vector_is_the_pooled_state_of_the_full_forward(
  embed, served, pooling
):
  answer = embed(input=_TEXTS, pooling=pooling)
  ids = [served.generator.prompt_ids(text) for text in _TEXTS]
  for found_D, each in zip(_vectors(answer), ids, strict=True):
    # float32 sums in another order; a unit vector of 24 numbers.
    np.testing.assert_allclose(
      found_D, _expected_D(each, pooling or 'mean'), atol=1e-5
    )
    assert np.linalg.norm(found_D) == pytest.approx(1, abs=1e-6)
  num = sum(map(len, ids))
  assert answer['usage'] == {'prompt_tokens': num, 'total_tokens': num}
  assert answer['object'] == 'list'
  assert answer['model'] == servers.MODEL


def test_poolings_differ(embed):
  mean, last = (
    _vectors(embed(input='a text', pooling=pooling))
    for pooling in ('mean', 'last')
  )
  assert np.abs(mean - last).max() > 0.01


def test_every_form_of_input(embed, served):
  ids = list(served.generator.prompt_ids('ab'))
  of_text = _vectors(embed(input='ab'))
  for form in (['ab'], ids, [ids]):
    np.testing.assert_array_equal(_vectors(embed(input=form)), of_text)
  both = _vectors(embed(input=[ids, [5]]))
  np.testing.assert_allclose(both[0], of_text[0], atol=1e-6)
  np.testing.assert_allclose(both[1], _expected_D([5]), atol=1e-5)


def test_fewer_dimensions_are_the_first_ones_at_length_one(embed, served):
  ids = served.generator.prompt_ids('a text')
  (found_D,) = _vectors(embed(input='a text', dimensions=7))
  np.testing.assert_allclose(found_D, _expected_D(ids, dimensions=7), atol=1e-5)
  assert found_D.shape == (7,)


def test_base64_has_the_same_numbers(embed):
  numbers = _vectors(embed(input=_TEXTS))
  answer = embed(input=_TEXTS, encoding_format='base64')
  for each, expected_D in zip(answer['data'], numbers, strict=True):
    raw = base64.b64decode(each['embedding'], validate=True)
    found_D = np.frombuffer(raw, '<f4')
    np.testing.assert_array_equal(found_D, expected_D.astype('<f4'))


def test_the_client_of_openai_gets_vectors(client, embed):
  asked = {'model': servers.MODEL, 'input': _TEXTS}
  found = client.embeddings.create(**asked)  # asks for base64
  np.testing.assert_allclose(
    [each.embedding for each in found.data], _vectors(embed(input=_TEXTS))
  )
  assert (
    found.usage.total_tokens == embed(input=_TEXTS)['usage']['total_tokens']
  )


def test_a_text_that_fills_the_context_fits_and_a_longer_one_does_not(
  embed, http, served
):
  context = served.generator.engine.context
  (found_D,) = _vectors(embed(input=[97] * context))
  np.testing.assert_allclose(found_D, _expected_D([97] * context), atol=1e-5)
  for longer, unit in (
    ([97] * (context + 1), 'token ids'),
    ('a' * context, 'tokens'),  # with BOS
  ):
    answer = http.post(
      '/v1/embeddings', json={'model': servers.MODEL, 'input': longer}
    )
    assert answer.status_code == 400
    error = answer.json()['error']
    assert error['param'] == 'input'
    assert (
      f'got {context + 1} {unit}, expected at most {context}'
      in (error['message'])
    )


@pytest.mark.parametrize(
  ('fields', 'param', 'message'),
  [
    ({'input': []}, 'input', 'got 0 inputs, expected 1 to 2048'),
    ({'input': ['a'] * 2049}, 'input', 'got 2049 inputs'),
    ({'input': ''}, 'input', 'got an empty input'),
    ({'input': ['a', '']}, 'input', 'got an empty input'),
    ({'input': [[5], []]}, 'input', 'got an empty input'),
    ({'input': [5, 270]}, 'input', 'got token id 270, expected 0 <= id'),
    ({'input': [-1]}, 'input', 'got token id -1'),
    ({'input': {'text': 'a'}}, 'input', 'valid string; or: '),
    ({'input': 'a', 'dimensions': 0}, 'dimensions', 'got 0, expected 1 to'),
    ({'input': 'a', 'dimensions': 99}, 'dimensions', 'got 99, expected 1 to'),
    ({'input': 'a', 'dimensions': True}, 'dimensions', 'valid integer'),
    ({'input': 'a', 'encoding_format': 'int8'}, 'encoding_format', "'base64'"),
    ({'input': 'a', 'pooling': 'max'}, 'pooling', "'mean' or 'last'"),
    ({'input': 'a', 'truncate': 5}, 'truncate', 'does not know'),
    ({}, 'input', 'Field required'),
  ],
)
def test_what_is_wrong_is_refused(http, fields, param, message):
  body = {'model': servers.MODEL, **fields}
  answer = http.post('/v1/embeddings', json=body)
  assert answer.status_code == 400
  error = answer.json()['error']
  assert error['param'] == param
  assert message in error['message']


def test_more_numbers_than_an_answer_may_have_are_refused(http, monkeypatch):
  monkeypatch.setitem(embeddings._MOST_NUMBERS, 'float', 30)
  body = {'model': servers.MODEL, 'input': ['a', 'b']}
  answer = http.post('/v1/embeddings', json=body)
  assert answer.status_code == 400
  assert (
    'got 2 inputs of 24 dimensions, expected at most 30 numbers as float'
    in (answer.text)
  )
  for fewer in ({'dimensions': 15}, {'encoding_format': 'base64'}):
    answer = http.post('/v1/embeddings', json={**body, **fewer})
    assert answer.status_code == 200


def test_more_inputs_than_wait_together_come_in_their_order(embed, served):
  """As LangChain sends them: a thousand texts in a request."""
  texts = [f'text {n}' for n in range(embeddings._MOST_TOGETHER + 10)]
  found = _vectors(embed(input=texts))
  for index in (0, 1, embeddings._MOST_TOGETHER, len(texts) - 1):
    ids = served.generator.prompt_ids(texts[index])
    np.testing.assert_allclose(found[index], _expected_D(ids), atol=1e-5)


@pytest.mark.slow
def test_two_thousand_inputs_of_ids_pass_the_checks_of_a_body(embed):
  answer = embed(input=[[5]] * 2048, dimensions=1)
  assert len(answer['data']) == 2048


def test_completions_beside_them_are_undisturbed(embed, complete):
  expected = complete(prompt='abc', max_tokens=20)['choices'][0]['text']
  vector = _vectors(embed(input='a text'))
  with futures.ThreadPoolExecutor(8) as pool:
    texts = [pool.submit(complete, prompt='abc', max_tokens=20)]
    found = [pool.submit(embed, input='a text') for _ in range(6)]
    texts.append(pool.submit(complete, prompt='abc', max_tokens=20))
    assert [t.result()['choices'][0]['text'] for t in texts] == [expected] * 2
    for each in found:
      # Other shapes of a step round differently in the last bits.
      np.testing.assert_allclose(_vectors(each.result()), vector, atol=1e-6)


def test_the_work_is_counted(embed, served):
  before = served.counted('prefill_tokens_total')
  answer = embed(input=['a text', 'another'])
  after = served.counted('prefill_tokens_total')
  assert after - before == answer['usage']['prompt_tokens']


def test_numbers_that_are_not_finite_are_an_error_and_no_vector(
  http, served, monkeypatch
):
  push = answer_lib.Live.push

  def broken(self, tokens, *args):
    return push(self, [-1], *args)

  with monkeypatch.context() as patched:
    patched.setattr(answer_lib.Live, 'push', broken)
    answer = http.post(
      '/v1/embeddings', json={'model': servers.MODEL, 'input': 'a'}
    )
  assert answer.status_code == 500
  assert 'not finite' in answer.json()['error']['message']
