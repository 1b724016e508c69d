"""Judging: the model says which of two answers is better. The kind `judge`.

    {"prompt": "...", "chosen": "...", "rejected": "..."}
    {"prompt": "...", "a": "...", "b": "..."}

The first form knows the better answer: the score is the judge's accuracy. The
second compares two answers: the score is the rate at which `a` wins. A prompt
is a text, or a list of messages; other fields are described in
`evals.tasks.records`.

A reward model compares rewards. A language model is asked in words, with the
chat template. Each pair is judged in both orders.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any, Self

from evals import encoding, judges, options as options_lib, ports
from evals.results import scores, verdicts
from evals.tasks import records, task
from storage import digests

_LABELLED, _UNLABELLED = ('chosen', 'rejected'), ('a', 'b')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
  """A prompt and two answers; the first is the better one if that is known."""

  id: str
  comparison: judges.Comparison
  is_labelled: bool
  cluster: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(task.Task):
  """The kind `judge`."""

  READS = ('limit', 'max_tokens', 'temperature', 'seed')

  pairs: tuple[Pair, ...]

  @classmethod
  def read(cls, path: str, options: options_lib.Options) -> Self:
    """Reads the pairs."""
    pairs = read_pairs(path)
    files = {path: digests.of_file(path)}
    return cls(options=options, files=files, pairs=pairs)

  def measure(self, model: ports.Model) -> tuple[scores.Group, ...]:
    """Returns one group: accuracy or win rate, position bias, and more."""
    return (self.judged(judge_of(model, self.options)),)

  def judged(self, judge: judges.Judge) -> scores.Group:
    """Returns the scores of a judge's verdicts on the pairs.

    Raises:
      ValueError: no verdict can be read.
    """
    pairs = self.pairs[: self.options.limit or None]
    found = judges.both_orders(judge, [pair.comparison for pair in pairs])
    return verdicts.group(
      'judge',
      found,
      [pair.id for pair in pairs],
      clusters=records.clusters(pairs),
      is_labelled=pairs[0].is_labelled,
    )


def judge_of(model: ports.Model, options: options_lib.Options) -> judges.Judge:
  """Returns the judge that a model is.

  Raises:
    ValueError: the model gives no rewards and answers no conversations.
  """
  if model.reward_fn is not None:
    return judges.by_score(functools.partial(_rewards, model))
  if model.encode_chat is None:
    raise ValueError(
      'judge: got a model that neither gives rewards nor has a chat template,'
      ' expected one of them; take a reward model, or one trained on chats'
    )
  return judges.by_asking(functools.partial(_answers, model, options))


def _rewards(model: ports.Model, answered) -> Sequence[float]:
  assert model.reward_fn is not None
  assert model.encode_answer is not None
  return model.reward_fn([model.encode_answer(*each) for each in answered])


def _answers(model: ports.Model, options, conversations) -> list[str]:
  """Returns the model's answer to each conversation."""
  assert model.encode_chat is not None
  prompts = []
  for conversation in conversations:
    ids = model.encode_chat(conversation)
    pair = encoding.fit_prompt(model, ids, options.max_tokens)
    if pair.num_dropped:
      raise ValueError(
        f'judge: got a comparison of {len(ids)} tokens, expected at most'
        f' {model.max_length - options.max_tokens} beside the verdict; lower'
        ' max_tokens, or leave out long answers'
      )
    prompts.append(pair.context)
  settings = ports.SampleSettings(
    max_tokens=options.max_tokens,
    temperature=options.temperature,
    seed=options.seed,
  )
  samples = model.required_sample_fn()(prompts, settings, 1)
  return [completion.text for (completion,) in samples]


def read_pairs(path: str) -> tuple[Pair, ...]:
  """Returns the pairs of a file.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: a line is wrong, or lines with and without labels are mixed.
  """
  found = records.read(
    path,
    required=('prompt',),
    optional=(*_LABELLED, *_UNLABELLED, 'id', 'cluster', 'margin'),
  )
  pairs = tuple(_pair(record) for record in found)
  if len({pair.is_labelled for pair in pairs}) > 1:
    raise ValueError(
      f'{path}: got lines with {" and ".join(_LABELLED)} and lines with'
      f' {" and ".join(_UNLABELLED)}, expected one kind; split the file'
    )
  return pairs


def _pair(record: records.Record) -> Pair:
  kinds = [
    names
    for names in (_LABELLED, _UNLABELLED)
    if any(name in record.fields for name in names)
  ]
  if len(kinds) != 1 or not all(name in record.fields for name in kinds[0]):
    raise ValueError(
      f'{record.place}: got the fields {", ".join(record.fields)}, expected'
      ' prompt, chosen and rejected, or prompt, a and b'
    )
  first, second = (_answer(record, name) for name in kinds[0])
  return Pair(
    id=record.id,
    comparison=judges.Comparison(prompt_of(record), first, second),
    is_labelled=kinds[0] == _LABELLED,
    cluster=record.text('cluster', ''),
  )


def prompt_of(record: records.Record) -> judges.Prompt:
  """Returns the prompt of a line: text, or messages."""
  prompt = record.fields['prompt']
  if isinstance(prompt, str) and prompt or _are_messages(prompt):
    return prompt
  raise record.error('prompt', 'text, or messages with role and content')


def _answer(record: records.Record, name: str) -> str:
  """Returns the text of an answer: a string, or one message."""
  answer = record.fields[name]
  if _are_messages(answer) and len(answer) == 1:
    answer = answer[0]['content']
  if isinstance(answer, str):
    return answer
  raise record.error(name, 'text, or a list of one message with its content')


def _are_messages(value: Any) -> bool:
  return (
    isinstance(value, list)
    and bool(value)
    and all(
      isinstance(each, Mapping)
      and isinstance(each.get('role'), str)
      and isinstance(each.get('content'), str)
      for each in value
    )
  )
