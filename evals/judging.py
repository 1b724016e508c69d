"""Asks a served model which of two answers is better, in both orders.

    python -m evals.judging --pairs=pairs.jsonl --model=NAME \
      --url=http://127.0.0.1:8000/v1 --out=verdicts.json

evals/tasks/judge.py describes a line of the file. Prints the accuracy (or
the rate at which `a` wins), the position bias, the consistency, ties and
verdicts that cannot be read, each with its error. `python serve.py --model=DIR
--eval=judge:FILE` asks a model in its own process, where a reward model can be
the judge too.
"""

import dataclasses
import os
import sys

from absl import app, flags

from checks import path_flags
from evals import endpoint, judges, options as options_lib, ports
from evals.results import report, scores
from evals.tasks import judge as judge_task


def run(
  pairs: str,
  *,
  url: str,
  model: str,
  options: options_lib.Options | None = None,
  api_key: str = '',
  concurrency: int = 8,
) -> scores.Result:
  """Returns the scores of a served model as the judge of a file of pairs.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: a line is wrong, the server does not answer, or no verdict can
      be read.
  """
  options = options or options_lib.Options()
  settings = ports.SampleSettings(
    max_tokens=options.max_tokens,
    temperature=options.temperature,
    seed=options.seed,
  )
  ask = endpoint.ask(
    url, model, settings, api_key=api_key, concurrency=concurrency
  )
  task = judge_task.Task.read(pairs, options)
  return scores.Result(
    task=f'judge:{pairs}',
    groups=(task.judged(judges.by_asking(ask)),),
    options=dataclasses.asdict(options),
    model={'name': model, 'url': url},
    files=task.files,
  )


def main(argv: list[str]) -> int:
  """Judges the pairs that the flags name."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags only')
  values = flags.FLAGS
  try:
    options = options_lib.Options(
      limit=values.limit,
      max_tokens=values.max_tokens,
      temperature=values.temperature,
      seed=values.seed,
    )
    result = run(
      values.pairs,
      url=values.url,
      model=values.model,
      options=options,
      api_key=os.environ.get(values.api_key_variable, ''),
      concurrency=values.concurrency,
    )
    print(report.text(result))
    if values.out:
      result.save(values.out)
      print(f'saved {values.out}; python -m evals.compare A.json B.json')
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


def _define_flags() -> None:
  path_flags.DEFINE_path(
    'pairs', None, 'JSON Lines file of pairs: prompt, chosen, rejected.'
  )
  flags.DEFINE_string(
    'url', None, 'URL of an OpenAI-compatible API: http://127.0.0.1:8000/v1.'
  )
  flags.DEFINE_string('model', None, 'Name of the judge on that server.')
  path_flags.DEFINE_path(
    'out', '', 'File for the result, as JSON; empty: it is only printed.'
  )
  flags.DEFINE_string(
    'api_key_variable',
    'OPENAI_API_KEY',
    'Environment variable with the key of the API; none is sent if not set.',
  )
  flags.DEFINE_integer(
    'limit', 0, 'Judges only this many first pairs; 0: all.', lower_bound=0
  )
  flags.DEFINE_integer(
    'max_tokens', 512, "Most tokens of the judge's reply.", lower_bound=1
  )
  flags.DEFINE_float(
    'temperature', 0.0, "The judge's temperature; 0: greedy.", lower_bound=0.0
  )
  flags.DEFINE_integer('seed', 0, "Seed of the judge's samples.", lower_bound=0)
  flags.DEFINE_integer(
    'concurrency', 8, 'Requests that are open at once.', lower_bound=1
  )
  flags.mark_flags_as_required(['pairs', 'url', 'model'])


if __name__ == '__main__':
  # Not at import: serve.py has flags of these names.
  _define_flags()
  app.run(main)
