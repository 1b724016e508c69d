"""A server with the tiny engine for each module: an engine has one owner."""

import httpx2
import openai
import pytest

from tests.helpers.serving import scripted_models, servers


@pytest.fixture(scope='session')
def talker(tmp_path_factory):
  """Returns a generator whose answers are known, see `scripted_models`."""
  return scripted_models.weather(tmp_path_factory.mktemp('talker'))


@pytest.fixture(scope='module')
def served(generator):
  with servers.running(generator, feedback=True) as served:
    yield served


@pytest.fixture(scope='module')
def http(served):
  with httpx2.Client(base_url=served.url, timeout=60) as http:
    yield http


@pytest.fixture(scope='module')
def client(served):
  with openai.OpenAI(base_url=f'{served.url}/v1', api_key='none') as client:
    yield client


@pytest.fixture(scope='module')
def complete(http):
  """Returns a function that asks for a completion and returns the answer."""

  def complete(**fields):
    answer = http.post('/v1/completions', json={**servers.GREEDY, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()

  return complete
