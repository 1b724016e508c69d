"""A judge behind an OpenAI-compatible endpoint, on loopback."""

import contextlib
from http import server
import json
import threading

import pytest

from evals import endpoint, judging, options as options_lib, ports
from evals.results import scores
from tests.helpers import commands

SETTINGS = ports.SampleSettings(max_tokens=7, seed=5)


class _Handler(server.BaseHTTPRequestHandler):
  """Answers with what the test's function says."""

  def do_POST(self):  # noqa: N802, the name of the standard library
    body = json.loads(self.rfile.read(int(self.headers['content-length'])))
    self.server.asked.append((self.path, dict(self.headers), body))
    status, answer, headers = self.server.answer(body)
    text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    self.send_response(status)
    for name, value in {'content-length': len(text), **headers}.items():
      self.send_header(name, str(value))
    self.end_headers()
    self.wfile.write(text)

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def _serving(answer):
  """Yields the URL of a server, and the requests that it got."""
  made = server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
  made.answer, made.asked = answer, []
  thread = threading.Thread(target=made.serve_forever, daemon=True)
  thread.start()
  try:
    yield f'http://127.0.0.1:{made.server_port}/v1', made.asked
  finally:
    made.shutdown()
    made.server_close()
    thread.join()


def _says(words):
  """Returns an answer of the API."""
  message = {'role': 'assistant', 'content': words}
  return 200, {'choices': [{'index': 0, 'message': message}]}, {}


def _prefers(text):
  """Returns a server that prefers the answer with `text` in it."""

  def answer(body):
    (message,) = body['messages']
    first = message['content'].partition('### Answer B')[0]
    is_first = text in first.partition('### Answer A')[2]
    return _says(f'Because.\n[[{"A" if is_first else "B"}]]')

  return answer


@pytest.fixture
def pairs(tmp_path):
  path = tmp_path / 'pairs.jsonl'
  lines = [
    {'prompt': 'p', 'chosen': f'good {i}', 'rejected': f'bad {i}'}
    for i in range(5)
  ]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


@pytest.mark.slow
def test_conversations_are_answered_in_order_with_the_settings():
  def answer(body):
    return _says(body['messages'][0]['content'].upper())

  conversations = [[{'role': 'user', 'content': f'c{i}'}] for i in range(20)]
  with _serving(answer) as (url, asked):
    ask = endpoint.ask(f'{url}/', 'name', SETTINGS, api_key='secret')
    assert ask(conversations) == [f'C{i}' for i in range(20)]
  assert {path for path, _, _ in asked} == {'/v1/chat/completions'}
  assert {headers['Authorization'] for _, headers, _ in asked} == {
    'Bearer secret'
  }
  bodies = sorted((body for _, _, body in asked), key=lambda b: b['seed'])
  assert [body['seed'] for body in bodies] == list(range(5, 25))
  assert bodies[3] == {
    'model': 'name',
    'messages': conversations[3],
    'max_tokens': 7,
    'temperature': 0.0,
    'seed': 8,
  }


@pytest.mark.slow
def test_a_busy_server_is_asked_again():
  answers = iter([(429, {}, {'retry-after': 0}), (503, {}, {}), _says('yes')])
  with _serving(lambda _: next(answers)) as (url, asked):
    ask = endpoint.ask(url, 'name', SETTINGS)
    assert ask([[{'role': 'user', 'content': 'c'}]]) == ['yes']
  assert len(asked) == 3
  assert 'Authorization' not in asked[0][1]


@pytest.mark.parametrize(
  ('answer', 'message'),
  [
    (
      (404, {'error': {'message': 'no model name'}}, {}),
      'got status 404 from http.*: no model name; expected an answer',
    ),
    ((400, b'<html>', {}), "got status 400 from .*: '<html>'"),
    ((200, b'hello', {}), 'got no JSON from http'),
    ((200, {'object': 'list'}, {}), 'got {"object": "list"} from http'),
  ],
)
def test_what_is_no_answer_is_an_error(answer, message):
  with _serving(lambda _: answer) as (url, _):
    ask = endpoint.ask(url, 'name', SETTINGS)
    with pytest.raises(ValueError, match=message):
      ask([[{'role': 'user', 'content': 'c'}]] * 3)


def test_a_url_without_a_server_is_an_error():
  with _serving(lambda _: _says('')) as (url, _):
    pass
  ask = endpoint.ask(url, 'name', SETTINGS)
  with pytest.raises(
    ValueError, match='got no answer from .*refused.*serve.py'
  ):
    ask([[{'role': 'user', 'content': 'c'}]])
  for wrong in ('127.0.0.1:8000/v1', 'file:///v1', ''):
    with pytest.raises(ValueError, match=f"url: got '{wrong}', expected an"):
      endpoint.ask(wrong, 'name', SETTINGS)


def test_a_served_model_judges_pairs_in_both_orders(pairs):
  with _serving(_prefers('good')) as (url, asked):
    result = judging.run(str(pairs), url=url, model='name')
  assert len(asked) == 10
  assert result.score('accuracy').value == 1.0
  assert result.score('position_bias').value == 0.0
  assert result.model == {'name': 'name', 'url': url}
  with _serving(lambda _: _says('[[A]]')) as (url, asked):
    result = judging.run(
      str(pairs), url=url, model='name', options=options_lib.Options(limit=2)
    )
  assert len(asked) == 4
  assert result.score('accuracy').value == 0.5
  assert result.score('position_bias').value == 1.0


def test_the_command(pairs, tmp_path):
  out = tmp_path / 'out.json'
  command = 'evals/judging.py', f'--pairs={pairs}', '--model=name'
  with _serving(_prefers('bad')) as (url, _):
    done = commands.run(*command, f'--url={url}', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert 'position_bias' in done.stdout
  assert scores.load(out).score('accuracy').value == 0.0
  done = commands.run(*command, f'--url={url}')
  assert done.returncode == 2
  assert done.stderr.startswith('error: url: got no answer from')
  done = commands.run(
    'evals/judging.py', '--pairs=none.jsonl', '--model=m', f'--url={url}'
  )
  assert done.returncode == 2
  assert 'none.jsonl: got no such file' in done.stderr
