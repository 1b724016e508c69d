"""Inspect evaluates a model over the chat API."""

import pytest

_WHY = 'not installed: pip install -r requirements-clients.txt'
inspect_ai = pytest.importorskip('inspect_ai', reason=_WHY)
dataset, model_lib, scorer, solver = (
  pytest.importorskip(f'inspect_ai.{name}', reason=_WHY)
  for name in ('dataset', 'model', 'scorer', 'solver')
)
from tests.helpers.serving import servers  # noqa: E402


@pytest.mark.parametrize('is_responses', [False, True])
def test_a_task_has_its_score(scripted, tmp_path, is_responses):
  asked = model_lib.get_model(
    f'openai/{servers.MODEL}',
    base_url=f'{scripted.url}/v1',
    api_key='none',
    responses_api=is_responses,
  )
  task = inspect_ai.Task(
    dataset=[
      dataset.Sample(input='Say hello.', target='Hello'),
      dataset.Sample(input='Say goodbye.', target='Goodbye'),
    ],
    solver=[solver.generate()],
    scorer=scorer.includes(),
  )
  (log,) = inspect_ai.eval(
    task,
    model=asked,
    log_dir=str(tmp_path),
    display='none',
    temperature=0.0,
  )
  assert log.status == 'success', log.error
  assert log.results.scores[0].metrics['accuracy'].value == 0.5
  texts = {sample.output.completion for sample in log.samples}
  assert texts == {'Hello there!'}
