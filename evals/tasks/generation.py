"""Generation: completions of the model are graded. The kind `generate`.

    {"prompt": "...", "answer": "..." or ["...", "..."]}

Optional fields of a line are `stop`, a list of strings that end the completion;
`match`, exact (the whole text, the default) or number (the last number); and
the fields of `evals.tasks.records`.

With several samples per prompt, the score of an example is the mean over its
samples, and pass@k is the probability that one of k samples is right.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
from typing import Self

from evals import encoding, options as options_lib, ports
from evals.results import pass_at_k, scores
from evals.tasks import numbers, records, task
from storage import digests

MATCHES = ('exact', 'number')
# (completion) -> scores from 0 to 1 by name; pass@k is of the first score.
Grade = Callable[[str], Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """A prompt, and the grade of its completion."""

  id: str
  text: str
  grade: Grade
  answer: str  # shown in saved results; only `grade` decides
  stop: tuple[str, ...] = ()
  cluster: str = ''  # prompts of one cluster may err together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(task.Task):
  """The kind `generate`, and the base of kinds that grade completions."""

  READS = ('limit', 'max_tokens', 'temperature', 'num_samples', 'seed', 'chat')

  prompts: tuple[Prompt, ...]

  @classmethod
  def read(cls, path: str, options: options_lib.Options) -> Self:
    """Reads the prompts."""
    prompts = tuple(read_prompts(path))
    return cls(
      options=options, files={path: digests.of_file(path)}, prompts=prompts
    )

  def measure(self, model: ports.Model) -> tuple[scores.Group, ...]:
    """Returns one group: the grades, and pass@k of several samples."""
    options = self.options
    settings = ports.SampleSettings(
      max_tokens=options.max_tokens,
      temperature=options.temperature,
      seed=options.seed,
    )
    group = measure(
      self.prompts[: options.limit or None],
      model,
      settings,
      num_samples=options.num_samples,
      is_chat=options.chat,
    )
    return (group,)


def read_prompts(path: str | os.PathLike) -> list[Prompt]:
  """Returns the prompts of a file of the kind `generate`.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: a line is wrong, or there is none.
  """
  found = records.read(
    path,
    required=('prompt', 'answer'),
    optional=('id', 'cluster', 'stop', 'match'),
  )
  return [_prompt(record) for record in found]


def _prompt(record: records.Record) -> Prompt:
  if isinstance(record.fields['answer'], str):
    answers = (record.text('answer'),)
  else:
    answers = record.texts('answer', 1)
  match = record.text('match', 'exact')
  if match not in MATCHES:
    raise record.error('match', f'one of {", ".join(MATCHES)}')
  if not record.text('prompt'):
    raise record.error('prompt', 'text')
  try:
    grade = exact_match(answers, match)
  except ValueError as error:
    raise ValueError(f'{record.place}: {error}') from None
  return Prompt(
    id=record.id,
    text=record.text('prompt'),
    grade=grade,
    answer=' | '.join(answers),
    stop=record.texts('stop', 0),
    cluster=record.text('cluster', ''),
  )


def exact_match(answers: Sequence[str], match: str = 'exact') -> Grade:
  """Returns a grade: 1 if the completion is one of the answers, else 0.

  Args:
    answers: the right answers, of which one is enough.
    match: 'exact' compares texts without surrounding white space; 'number'
      compares the last number of the completion, in any spelling.
  """
  if match == 'number':
    right = [numbers.number(answer) for answer in answers]
    if None in right:
      raise ValueError(
        f'answer: got {list(answers)} with match number, expected numbers'
      )
    return lambda text: {
      'exact_match': float(numbers.last_number(text) in right)
    }
  texts = {answer.strip() for answer in answers}
  return lambda text: {'exact_match': float(text.strip() in texts)}


def measure(
  prompts: Sequence[Prompt],
  model: ports.Model,
  settings: ports.SampleSettings,
  *,
  num_samples: int = 1,
  is_chat: bool = False,
) -> scores.Group:
  """Returns the grades of the model's completions.

  Args:
    prompts: their stop strings are added to the stop strings of the settings.
    is_chat: puts each prompt into the model's chat template, as a message of
      the user.

  Raises:
    ValueError: there are no prompts, or a prompt does not fit the model.
  """
  if not prompts:
    raise ValueError('prompts: got none, expected at least one')
  if num_samples > 1 and not settings.temperature:
    raise ValueError(
      f'num_samples: got {num_samples} with temperature 0, expected 1: all'
      ' samples would be the same; set a temperature'
    )
  ids, notes = _encoded(prompts, model, settings.max_tokens, is_chat)
  completions = _completed(prompts, ids, model, settings, num_samples)
  examples = []
  for prompt, samples in zip(prompts, completions, strict=True):
    texts = [sample.text for sample in samples]
    examples.append(
      {
        'id': prompt.id,
        'answer': prompt.answer,
        'completions': texts,
        'grades': [dict(prompt.grade(text)) for text in texts],
      }
    )
  clusters = records.clusters(prompts)
  return scores.Group(
    name='generation',
    scores=tuple(
      scores.of_values(name, values, higher_is_better=True, clusters=clusters)
      for name, values in _columns(examples, num_samples).items()
    ),
    num_examples=len(prompts),
    example_ids=tuple(prompt.id for prompt in prompts),
    clusters=clusters,
    examples=tuple(examples),
    details={'num_samples': num_samples},
    notes=notes,
  )


def _columns(examples, num_samples) -> dict[str, list[float]]:
  """Returns the values of every score by name, one value per example."""
  names = list(examples[0]['grades'][0])
  columns = {
    name: [
      sum(grade[name] for grade in example['grades']) / num_samples
      for example in examples
    ]
    for name in names
  }
  if num_samples > 1:
    num_right = [
      sum(grade[names[0]] == 1 for grade in example['grades'])
      for example in examples
    ]
    for k in pass_at_k.useful_ks(num_samples):
      columns[f'pass@{k}'] = pass_at_k.values(
        [num_samples] * len(examples), num_right, k
      )
  return columns


def _encoded(prompts, model, max_tokens, is_chat):
  ids, num_cut = [], 0
  for prompt in prompts:
    try:
      if is_chat:
        pair = _chat_pair(prompt.text, model, max_tokens)
      else:
        text_ids = encoding.encode(model, prompt.text)
        pair = encoding.fit_prompt(model, text_ids, max_tokens)
    except ValueError as error:
      raise ValueError(f'{prompt.id}: {error}') from None
    ids.append(pair.context)
    num_cut += pair.num_dropped > 0
  notes = []
  if num_cut:
    notes.append(
      f'{num_cut} of {len(prompts)} prompts were cut from the left to'
      f' {model.max_length - max_tokens} tokens'
    )
  return ids, tuple(notes)


def _chat_pair(text, model, max_tokens) -> encoding.Pair:
  if model.encode_chat is None:
    raise ValueError(
      'chat: got a model without a chat template, expected a model that has'
      ' one; leave chat out'
    )
  ids = model.encode_chat([{'role': 'user', 'content': text}])
  return encoding.fit_prompt(model, ids, max_tokens)


def _completed(prompts, ids, model, settings, num_samples):
  """Returns the samples of each prompt: one call per set of stop strings."""
  sample = model.required_sample_fn()
  by_stop: dict[tuple[str, ...], list[int]] = {}
  for i, prompt in enumerate(prompts):
    by_stop.setdefault((*settings.stop, *prompt.stop), []).append(i)
  completions: list = [None] * len(prompts)
  for stop, members in by_stop.items():
    found = sample(
      [ids[i] for i in members],
      dataclasses.replace(settings, stop=stop),
      num_samples,
    )
    for i, samples in zip(members, found, strict=True):
      if len(samples) != num_samples:
        raise ValueError(
          f'sample_fn: got {len(samples)} completions of a prompt, expected'
          f' {num_samples}'
        )
      completions[i] = samples
  return completions
