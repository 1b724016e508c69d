"""The HTTP surface: OpenAI's own client, raw bytes, and everything refused."""

import concurrent.futures
import dataclasses
import json

import openai
import prometheus_client.parser
import pytest

from inference.sampling import settings as settings_lib
from inference.server.records import responses as responses_store
from tests.helpers.serving import servers

_MODEL, _GREEDY = servers.MODEL, servers.GREEDY


@pytest.fixture(scope='module')
def expected(served):
  settings = settings_lib.Settings(temperature=0.0, max_tokens=8)
  return served.offline(['hello'], settings)[0]


def test_it_is_alive_and_ready(http):
  for path in ('/health', '/ready'):
    answer = http.get(path)
    assert (answer.status_code, answer.json()) == (200, {'status': 'ok'})


def test_models_tell_their_lineage(client, generator):
  (card,) = client.models.list().data
  assert card == client.models.retrieve(_MODEL)
  assert (card.id, card.object) == (_MODEL, 'model')
  assert card.max_model_len == 64
  manifest = generator.frozen.manifest
  lineage = card.model_dump()['lineage']
  assert lineage['weights_digest'] == manifest.weights_digest
  assert lineage['step'] == 7
  assert lineage['code_commit'] == 'c0ffee'
  assert lineage['parents'] == manifest.lineage
  with pytest.raises(openai.NotFoundError, match="got 'gpt-4', expected"):
    client.models.retrieve('gpt-4')


def test_a_completion_is_the_engines(client, expected):
  answer = client.completions.create(prompt='hello', **_GREEDY)
  (choice,) = answer.choices
  assert choice.text == expected.text
  assert (choice.index, choice.finish_reason) == (0, 'length')
  assert choice.logprobs is None
  assert answer.object == 'text_completion'
  assert answer.id.startswith('cmpl-')
  assert answer.usage.prompt_tokens == 6
  assert answer.usage.completion_tokens == 8
  assert answer.usage.total_tokens == 14


def test_a_stream_joins_to_the_completion(client, expected):
  chunks = list(
    client.completions.create(
      prompt='hello',
      stream=True,
      stream_options={'include_usage': True},
      **_GREEDY,
    )
  )
  *body, last = chunks
  assert ''.join(chunk.choices[0].text for chunk in body) == expected.text
  reasons = [chunk.choices[0].finish_reason for chunk in body]
  assert reasons == [None] * (len(body) - 1) + ['length']
  assert all(chunk.usage is None for chunk in body)
  assert (last.choices, last.usage.completion_tokens) == ([], 8)
  assert len({chunk.id for chunk in chunks}) == 1


def test_the_bytes_of_a_stream(http):
  answer = http.post(
    '/v1/completions', json={'prompt': 'hello', 'stream': True, **_GREEDY}
  )
  assert answer.headers['content-type'].startswith('text/event-stream')
  assert b'\r' not in answer.content
  *events, done, rest = answer.content.split(b'\n\n')
  assert (done, rest) == (b'data: [DONE]', b'')
  for event in events:
    assert event.startswith(b'data: {')
    assert b'\n' not in event
    assert 'usage' not in json.loads(event.removeprefix(b'data: '))


def test_an_event_per_token(http):
  # The text of each id is complete, so that no token's text is held back.
  body = {
    'prompt': 'hello',
    'logit_bias': {str(token_id): 100 for token_id in b'abc'},
    **_GREEDY,
  }
  answer = http.post('/v1/completions', json={**body, 'stream': True})
  pieces = [
    event['choices'][0]['text'] for event in servers.events(answer.content)
  ]
  assert len(pieces) == 8
  assert all(len(piece) == 1 for piece in pieces)


# ------------------------------------------------------------------------------
# The engine behind it


def test_requests_share_steps(served, http):
  def steps_of(prompts):
    before = served.counted('engine_steps_total')
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
      answers = pool.map(
        lambda prompt: http.post(
          '/v1/completions',
          json={**_GREEDY, 'prompt': prompt, 'max_tokens': 50},
        ).json(),
        prompts,
      )
      texts = [answer['choices'][0]['text'] for answer in answers]
    return served.counted('engine_steps_total') - before, texts

  # The thread is held until all three requests can join the batch.
  inbox = served.engine_loop._inbox
  inbox.put(lambda: servers.until(lambda: inbox.qsize() >= 3))
  num_steps, together = steps_of(['x1', 'y2', 'z3'])
  alone = [steps_of([prompt]) for prompt in ('x1', 'y2', 'z3')]
  assert together == [text for _, (text,) in alone]
  assert num_steps < 1.2 * max(num for num, _ in alone)


def test_the_metrics_parse_and_nothing_was_compiled(served, http, complete):
  complete(prompt='hello', logprobs=2, repetition_penalty=1.5, top_k=3)
  answer = http.get('/metrics')
  assert answer.headers['content-type'].startswith('text/plain; version=0.0.4')
  samples = {
    sample.name: sample.value
    for family in prometheus_client.parser.text_string_to_metric_families(
      answer.text
    )
    for sample in family.samples
  }
  assert samples['compilations_after_ready_total'] == 0
  assert samples['engine_steps_total'] > 0
  assert samples['time_to_first_token_seconds_count'] > 0
  assert served.counted('compilations_after_ready_total') == 0


def test_too_much_at_once_is_turned_away(served, http, monkeypatch):
  engine = served.generator.engine
  monkeypatch.setattr(
    engine, 'config', dataclasses.replace(engine.config, max_waiting=2)
  )
  body = {'prompt': 'hello', **_GREEDY}
  # A request that never fits is a 400, since trying again would not help.
  error = _refused(http, {**body, 'n': 3})
  assert 'got 3 completions to make, expected at most 2' in error['message']
  with monkeypatch.context() as busy:
    busy.setattr(type(engine.manager), 'num_waiting', 2)
    answer = http.post('/v1/completions', json=body)
  assert answer.status_code == 429
  assert int(answer.headers['retry-after']) > 0
  error = answer.json()['error']
  assert (error['type'], error['code']) == ('rate_limit_error', 'overloaded')
  assert 'while 2 wait, expected at most 2' in error['message']
  assert http.post('/v1/completions', json=body).status_code == 200


# ------------------------------------------------------------------------------
# What is refused


def _refused(http, body, status=400):
  answer = http.post('/v1/completions', json=body)
  assert answer.status_code == status, answer.text
  assert answer.headers['x-request-id'].startswith('req_')
  error = answer.json()['error']
  assert error['type'] == 'invalid_request_error'
  assert '\n' not in error['message']
  return error


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize(
  ('fields', 'param', 'message'),
  [
    ({'temperature': -1}, 'temperature', 'temperature: got -1.0, expected a'),
    ({'stop_token_ids': [-1]}, 'stop_token_ids', 'stop_token_ids: got (-1,)'),
    ({'prompt': [[]]}, 'prompt', 'got no token ids'),
    ({'prompt': ['a'] * 65, 'n': 2}, 'n', 'got 130 completions to make'),
  ],
)
def test_a_bad_value_is_refused_before_the_first_byte(
  http, stream, fields, param, message
):
  body = {'prompt': 'a', 'stream': stream, **_GREEDY, **fields}
  error = _refused(http, body)
  assert (error['param'], error['code']) == (param, None)
  assert message in error['message']


@pytest.mark.parametrize('length', [60, 10**5])
def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for(
  client, length
):
  text = 'x' * length
  chat = [{'role': 'user', 'content': text}]
  asked = {
    'prompt': lambda: client.completions.create(prompt=text, **_GREEDY),
    'messages': lambda: client.chat.completions.create(
      model=_MODEL, messages=chat, max_tokens=8
    ),
    'input': lambda: client.responses.create(
      model=_MODEL, input=text, max_output_tokens=16
    ),
  }
  for param, ask in asked.items():
    with pytest.raises(
      openai.BadRequestError, match='the context of this'
    ) as e:
      ask()
    assert (e.value.param, e.value.code) == (param, 'context_length_exceeded')


def test_a_body_that_is_no_request_is_refused(http):
  assert 'prompt: Field required' in _refused(http, _GREEDY)['message']
  assert 'got no JSON object' in _refused(http, [])['message']
  for content in (b'{', b'', b'{"model": "tiny", "prompt": "\\ud800"}'):
    answer = http.post(
      '/v1/completions',
      content=content,
      headers={'content-type': 'application/json'},
    )
    assert answer.status_code == 400, answer.content
    assert answer.json()['error']['type'] == 'invalid_request_error'


def test_another_model_is_not_found(client, http):
  error = _refused(http, {'prompt': 'a', **_GREEDY, 'model': 'gpt-4'}, 404)
  assert (error['param'], error['code']) == ('model', 'model_not_found')
  with pytest.raises(openai.NotFoundError) as caught:
    client.completions.create(prompt='a', **{**_GREEDY, 'model': 'gpt-4'})
  assert caught.value.code == 'model_not_found'
  assert (caught.value.request_id or '').startswith('req_')


def test_routes_that_do_not_exist_answer_in_the_same_shape(http):
  for answer in (http.get('/v1/nowhere'), http.get('/v1/completions')):
    assert answer.status_code in (404, 405)
    assert answer.json()['error']['type'] == 'invalid_request_error'


def test_an_error_of_a_route_is_a_500_in_the_shape_of_all_errors(
  http, monkeypatch
):
  async def get(*_):
    raise RuntimeError('a secret')

  monkeypatch.setattr(responses_store.Store, 'get', get)
  answer = http.get('/v1/responses/resp_1')
  assert answer.status_code == 500
  assert answer.json()['error']['type'] == 'server_error'
  assert 'secret' not in answer.text
  assert answer.headers['x-request-id'].startswith('req_')
