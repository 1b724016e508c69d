"""LangChain's own standard tests of embeddings, at the server."""

import pytest

_WHY = 'not installed: pip install -r requirements-clients.txt'
langchain_openai = pytest.importorskip('langchain_openai', reason=_WHY)
integration_tests = pytest.importorskip(
  'langchain_tests.integration_tests', reason=_WHY
)
from tests.helpers.serving import servers  # noqa: E402


class TestOpenAIEmbeddings(integration_tests.EmbeddingsIntegrationTests):
  """The standard tests."""

  @pytest.fixture(autouse=True)
  def _server(self, wide):
    type(self)._url = f'{wide.url}/v1'

  @property
  def embeddings_class(self):
    return langchain_openai.OpenAIEmbeddings

  @property
  def embedding_model_params(self):
    return {
      'model': servers.MODEL,
      'base_url': self._url,
      'api_key': 'none',
      # Without it LangChain sends ids of OpenAI's own tokenizer.
      'check_embedding_ctx_length': False,
    }
