"""LangChain's own standard tests of chat models, at the server."""

import pytest

_WHY = 'not installed: pip install -r requirements-clients.txt'
langchain_openai = pytest.importorskip('langchain_openai', reason=_WHY)
integration_tests = pytest.importorskip(
  'langchain_tests.integration_tests', reason=_WHY
)
from tests.helpers.serving import servers  # noqa: E402

# These two force a call, whatever `has_tool_choice` says. The grammar keeps its
# form, but the scripted model has no words for these tools.
_NO_WORDS = pytest.mark.xfail(reason='the model has no words for the call')


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
    return False  # the model knows no other call

  @_NO_WORDS
  def test_structured_few_shot_examples(self, model, my_adder_tool):
    super().test_structured_few_shot_examples(
      model, my_adder_tool=my_adder_tool
    )

  @_NO_WORDS
  def test_unicode_tool_call_integration(self, model):
    super().test_unicode_tool_call_integration(model)

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
