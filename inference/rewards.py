"""Rewards: the numbers that a reward model gives to answers.

    python -m inference.rewards --model=DIR --input=answers.jsonl \
      --out=scored.jsonl

A line of the input has `prompt`, a text or a list of messages, and `answer`, a
text. The output has the same lines with a field `reward`. A Python program
calls `model_port.rewarder` instead.
"""

from collections.abc import Sequence
import json
import pathlib
import sys

from absl import app, flags, logging
import numpy as np

from checks import path_flags
from evals import judges
from evals.results import statistics
from evals.tasks import judge as judge_task, records
from inference import generate, model_port
from inference.engine import engine_config
from storage import atomic


def score_file(
  generator: generate.Generator, source: str, out: str
) -> Sequence[float]:
  """Writes the lines of a file with the reward of each; returns the rewards.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: a line is wrong, or an answer does not fit the model.
  """
  found = records.read(source, required=('prompt', 'answer'), optional=None)
  answers = []
  for record in found:
    prompt, answer = judge_task.prompt_of(record), record.text('answer')
    try:
      answers.append(model_port.encode_answer(generator, prompt, answer))
      generator.check_length(answers[-1])
    except ValueError as error:
      raise ValueError(f'{record.place}: {error}') from None
  numbers = model_port.rewarder(generator)(answers)
  lines = [
    json.dumps(record.fields | {'reward': number}, ensure_ascii=False)
    for record, number in zip(found, numbers, strict=True)
  ]
  atomic.write_text(pathlib.Path(out), '\n'.join(lines) + '\n')
  return numbers


def open_scorer(path: str) -> judges.ScoreFn:
  """Loads a reward model; returns the function from answers to rewards.

  Raises:
    FileNotFoundError: there is no such directory.
    ValueError: the directory holds no reward model. The returned function
      raises it for an answer that does not fit the model.
  """
  return scorer_of(_load(path))


def scorer_of(generator: generate.Generator) -> judges.ScoreFn:
  """Returns the function from answers to rewards of a reward model."""
  score = model_port.rewarder(generator)

  def scored(
    answered: Sequence[tuple[judges.Prompt, str]],
  ) -> Sequence[float]:
    return score(
      [model_port.encode_answer(generator, *each) for each in answered]
    )

  return scored


def _load(path: str) -> generate.Generator:
  # One chunk of a prompt at a time compiles quickly.
  return generate.load(
    path,
    engine_config.EngineConfig(max_chunks=1, max_mixed_chunks=1),
    is_for_rewards=True,
  )


def main(argv: list[str]) -> int:
  """Scores the answers that the flags name."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags only')
  values = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  try:
    numbers = score_file(_load(values.model), values.input, values.out)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  mean, error = np.mean(numbers), statistics.standard_error(numbers)
  print(f'{len(numbers)} answers, mean reward {mean:.4f} +- {error:.4f}')
  print(f'scored {values.out}')
  return 0


def _define_flags() -> None:
  path = path_flags.DEFINE_path
  path('model', None, 'Frozen directory of a reward model.')
  path('input', None, 'JSON Lines file of answers: prompt, answer.')
  path('out', None, 'File to write: the lines of --input, with their rewards.')
  flags.mark_flags_as_required(['model', 'input', 'out'])


if __name__ == '__main__':
  # Not at import: serve.py has flags of these names.
  _define_flags()
  app.run(main)
