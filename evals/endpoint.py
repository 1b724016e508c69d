"""A model behind an OpenAI-compatible endpoint, as a function of conversations.

    ask = endpoint.ask('http://127.0.0.1:8000/v1', 'name', settings)
    answers = ask([[{'role': 'user', 'content': 'Hello'}], ...])

Only the standard library speaks HTTP here. An answer that the server could give
later (429, 5xx) is requested again, up to `_TRIES` times.
"""

from collections.abc import Sequence
import concurrent.futures
import http.client
import json
import time
from typing import Any
import urllib.error
import urllib.parse
import urllib.request

from evals import judges, ports

_TRIES = 5
_MOST_SHOWN = 200  # characters of a server's error
_LONGEST_WAIT = 30.0  # seconds


def ask(
  url: str,
  model: str,
  settings: ports.SampleSettings,
  *,
  api_key: str = '',
  concurrency: int = 8,
  timeout: float = 600.0,
) -> judges.Ask:
  """Returns a function that answers conversations through an endpoint.

  Args:
    url: URL of the API, such as http://127.0.0.1:8000/v1.
    model: its name on the server.
    settings: settings of the answers; filters are not sent.
    api_key: '' sends none.
    concurrency: requests that are open at once.
    timeout: seconds that an answer may take.

  Raises:
    ValueError: the URL is none. When asked: the server cannot be reached,
      refuses a request, or its answer is no chat completion.
  """
  parts = urllib.parse.urlsplit(url)
  if parts.scheme not in ('http', 'https') or not parts.netloc:
    raise ValueError(
      f'url: got {url!r}, expected an API, as http://127.0.0.1:8000/v1'
    )
  headers = {'Content-Type': 'application/json'}
  if api_key:
    headers['Authorization'] = f'Bearer {api_key}'
  where = url.rstrip('/') + '/chat/completions'

  def answer(index: int, messages: Sequence[judges.Message]) -> str:
    body = {
      'model': model,
      'messages': list(messages),
      'max_tokens': settings.max_tokens,
      'temperature': settings.temperature,
      # Equal conversations get samples of their own.
      'seed': settings.seed + index,
    }
    if settings.stop:
      body['stop'] = list(settings.stop)
    request = urllib.request.Request(
      where, json.dumps(body).encode(), headers, method='POST'
    )
    return _text(_sent(request, timeout), where)

  def answer_all(conversations) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
      futures = [
        pool.submit(answer, *each) for each in enumerate(conversations)
      ]
      try:
        return [future.result() for future in futures]
      except ValueError:
        pool.shutdown(cancel_futures=True)
        raise

  return answer_all


def _sent(request: urllib.request.Request, timeout: float) -> Any:
  """Returns the JSON value of a response; tries again after passing errors."""
  url = request.full_url
  for attempt in range(1, _TRIES + 1):
    try:
      with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)
    except urllib.error.HTTPError as error:
      text = error.read().decode('utf-8', 'replace')
      is_passing = error.code == 429 or error.code >= 500
      if not is_passing or attempt == _TRIES:
        raise ValueError(
          f'url: got status {error.code} from {url}: {_message(text)};'
          ' expected an answer'
        ) from None
      wait = error.headers.get('retry-after', '')
      seconds = float(wait) if wait.isdigit() else 0.5 * 2**attempt
      time.sleep(min(seconds, _LONGEST_WAIT))
    except (OSError, http.client.HTTPException) as error:
      reason = getattr(error, 'reason', error)
      raise ValueError(
        f'url: got no answer from {url} ({reason}), expected an'
        ' OpenAI-compatible server; start one with `python serve.py --model=DIR'
        ' --port=8000`'
      ) from None
    except ValueError:
      raise ValueError(
        f'url: got no JSON from {url}, expected an OpenAI-compatible server'
      ) from None
  raise AssertionError('the last attempt returns or raises')


def _text(value: Any, url: str) -> str:
  """Returns the text of a chat completion; '' if it has none."""
  try:
    return value['choices'][0]['message']['content'] or ''
  except (LookupError, TypeError):
    raise ValueError(
      f'url: got {json.dumps(value)[:_MOST_SHOWN]} from {url}, expected a chat'
      ' completion'
    ) from None


def _message(text: str) -> str:
  try:
    return str(json.loads(text)['error']['message'])[:_MOST_SHOWN]
  except (ValueError, LookupError, TypeError):
    return repr(text[:_MOST_SHOWN])
