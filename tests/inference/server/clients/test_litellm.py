"""litellm reads completions, streams, errors and embeddings of the server."""

import pytest

litellm = pytest.importorskip(
  'litellm', reason='not installed: pip install -r requirements-clients.txt'
)
from tests.helpers import servers  # noqa: E402

_TEXT = f'text-completion-openai/{servers.MODEL}'


@pytest.fixture
def options(wide):
  return {'api_base': f'{wide.url}/v1', 'api_key': 'none'}


def test_a_text_completion_whole_and_streamed(options, wide):
  asked = {'prompt': 'def f(', 'temperature': 0, 'max_tokens': 12, **options}
  whole = litellm.text_completion(model=_TEXT, **asked)
  stream = litellm.text_completion(model=_TEXT, stream=True, **asked)
  text = ''.join(chunk.choices[0].text or '' for chunk in stream)
  assert text == whole.choices[0].text
  assert text
  assert whole.usage.completion_tokens == 12
  assert whole.usage.prompt_tokens == len(wide.generator.prompt_ids('def f('))


def test_embeddings(options):
  answer = litellm.embedding(
    model=f'openai/{servers.MODEL}', input=['a text', 'b'], **options
  )
  assert [each['index'] for each in answer.data] == [0, 1]
  assert len(answer.data[0]['embedding']) == 24
  assert answer.usage.prompt_tokens == 7


def test_errors_are_its_classes(options):
  with pytest.raises(litellm.NotFoundError):
    litellm.text_completion(
      model='text-completion-openai/other', prompt='a', **options
    )
  with pytest.raises(litellm.BadRequestError, match='temperature'):
    litellm.text_completion(model=_TEXT, prompt='a', temperature=-1, **options)
