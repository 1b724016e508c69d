"""Multiple choice: the model takes the most probable answer. The kind `choice`.

    {"context": "...", "choices": ["...", "..."], "label": 0}

Optional fields of a line are `delimiter`, the text between context and choice,
by default a space; and the fields of `evals.tasks.records`.

There are three accuracies, as in the LM Evaluation Harness. `acc` compares the
log-probabilities of the answers. `acc_norm` divides each by the characters of
the answer, and `acc_bytes` by its bytes, so that long answers are not at a
disadvantage. The delimiter is scored, but its length does not count. Of equal
answers the first is taken.
"""

from collections.abc import Sequence
import dataclasses
import os
from typing import Self

import numpy as np

from evals import encoding, options as options_lib, ports
from evals.results import calibration, scores
from evals.tasks import records, task
from storage import digests


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """A context and the answers that may follow it."""

  id: str
  context: str
  choices: tuple[str, ...]
  label: int  # index of the right choice
  delimiter: str = ' '  # between the context and each choice
  cluster: str = ''  # questions of one cluster may err together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(task.Task):
  """The kind `choice`."""

  READS = ('limit',)
  ONLY_SCORES = True

  questions: tuple[Question, ...]

  @classmethod
  def read(cls, path: str, options: options_lib.Options) -> Self:
    """Reads the questions."""
    questions = read_questions(path)[: options.limit or None]
    return cls(
      options=options,
      files={path: digests.of_file(path)},
      questions=tuple(questions),
    )

  def measure(self, model: ports.Model) -> tuple[scores.Group, ...]:
    """Returns one group: accuracies, and how well calibrated the model is."""
    return (measure(self.questions, model),)


def read_questions(path: str | os.PathLike) -> list[Question]:
  """Returns the questions of a file.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: a line is wrong, or there is none.
  """
  found = records.read(
    path,
    required=('context', 'choices', 'label'),
    optional=('id', 'cluster', 'delimiter'),
  )
  return [_question(record) for record in found]


def _question(record: records.Record) -> Question:
  choices = record.texts('choices', 2)
  label = record.fields['label']
  if (
    not isinstance(label, int)
    or isinstance(label, bool)
    or not 0 <= label < len(choices)
  ):
    raise record.error(
      'label', f'an integer from 0 to {len(choices) - 1}: which choice is right'
    )
  return Question(
    id=record.id,
    context=record.text('context'),
    choices=choices,
    label=label,
    delimiter=record.text('delimiter', ' '),
    cluster=record.text('cluster', ''),
  )


def measure(questions: Sequence[Question], model: ports.Model) -> scores.Group:
  """Returns the accuracies and the calibration of the model.

  `ece`, `brier` and `nll` use the probabilities of the choices that `acc`
  compares.

  Raises:
    ValueError: there are no questions, or a question does not fit the model.
  """
  if not questions:
    raise ValueError('questions: got none, expected at least one')
  pairs, notes = _pairs(questions, model)
  scored = model.required_logprob_fn()(
    [(pair.context, pair.continuation) for pair in pairs]
  )
  if len(scored) != len(pairs):
    raise ValueError(
      f'logprob_fn: got {len(scored)} scores of {len(pairs)} requests, expected'
      ' one for each'
    )
  logprobs = iter(float(one.logprob) for one in scored)
  asked = [
    np.array([next(logprobs) for _ in question.choices])
    for question in questions
  ]
  clusters = records.clusters(questions)
  examples = [_answered(*one) for one in zip(questions, asked, strict=True)]
  confidences = [example['confidence'] for example in examples]
  is_right = [example['acc'] for example in examples]
  columns = {
    name: [example[name] for example in examples]
    for name in ('acc', 'acc_norm', 'acc_bytes', 'brier', 'nll')
  }
  columns['ece'] = calibration.error_values(confidences, is_right).tolist()
  return scores.Group(
    name='choice',
    scores=tuple(
      scores.of_values(
        name, values, higher_is_better=name.startswith('acc'), clusters=clusters
      )
      for name, values in columns.items()
    ),
    num_examples=len(questions),
    example_ids=tuple(question.id for question in questions),
    clusters=clusters,
    examples=tuple(examples),
    details={
      'reliability': [
        found._asdict() for found in calibration.bins(confidences, is_right)
      ]
    },
    notes=notes,
  )


def _pairs(questions, model):
  pairs = []
  num_dropped = 0
  for question in questions:
    try:
      pairs += [
        encoding.encode_pair(
          model, question.context, question.delimiter + choice
        )
        for choice in question.choices
      ]
    except ValueError as error:
      raise ValueError(f'{question.id}: {error}') from None
    last = pairs[-len(question.choices) :]
    num_dropped += any(pair.num_dropped for pair in last)
  notes = []
  if num_dropped:
    notes.append(
      f'{num_dropped} of {len(questions)} contexts were cut from the left to'
      f' the {model.max_length} tokens that the model reads'
    )
  return pairs, tuple(notes)


def _answered(question: Question, logprobs: np.ndarray) -> dict:
  num_chars = np.array([len(choice) for choice in question.choices])
  num_bytes = np.array([len(choice.encode()) for choice in question.choices])
  ways = {
    'acc': logprobs,
    'acc_norm': logprobs / num_chars,
    'acc_bytes': logprobs / num_bytes,
  }
  probabilities = calibration.probabilities(logprobs)
  return {
    'id': question.id,
    'label': question.label,
    'logprobs': logprobs.tolist(),
    'confidence': float(np.max(probabilities)),
    'brier': calibration.brier_value(probabilities, question.label),
    'nll': calibration.nll_value(logprobs, question.label),
    **{
      name: float(np.argmax(values) == question.label)
      for name, values in ways.items()
    },
  }
