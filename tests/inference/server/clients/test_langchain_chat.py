"""LangChain's own standard tests of chat models, at the server."""

import pytest

_WHY = 'not installed: pip install -r requirements-clients.txt'
langchain_openai = pytest.importorskip('langchain_openai', reason=_WHY)
integration_tests = pytest.importorskip(
  'langchain_tests.integration_tests', reason=_WHY
)
from tests.helpers import servers  # noqa: E402


class _Standard(integration_tests.ChatModelIntegrationTests):
  """The standard tests; the model says the same for every tool."""

  @pytest.fixture(autouse=True)
  def _server(self, scripted):
    type(self)._url = f'{scripted.url}/v1'

  @property
  def chat_model_class(self):
    return langchain_openai.ChatOpenAI

  @property
  def chat_model_params(self):
    return {
      'model': servers.MODEL,
      'base_url': self._url,
      'api_key': 'none',
      'temperature': 0,
      'stream_usage': True,
    }

  @property
  def has_tool_choice(self):
    return False  # no grammar forces a call

  @property
  def has_structured_output(self):
    return False

  @property
  def supports_json_mode(self):
    return False


class TestChatCompletions(_Standard):
  """Over /v1/chat/completions."""


class TestResponses(_Standard):
  """Over /v1/responses."""

  @property
  def chat_model_params(self):
    return {**super().chat_model_params, 'use_responses_api': True}
