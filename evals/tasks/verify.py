"""Verified answers: completions that a rule gives a score. The kind `verify`.

    {"prompt": "...", "verifier": "number", "answer": "42"}
    {"prompt": "...", "verifier": "unit_tests", "tests": ["assert f(1) == 2"]}

`evals/verifiers/kinds.py` lists the verifiers; each says which fields it reads.
Further fields are the fields of `evals.tasks.generation`, without `match`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, Self

from evals import options as options_lib, ports
from evals.results import scores
from evals.tasks import generation, records
from evals.verifiers import kinds, verifier
from storage import digests


@dataclasses.dataclass(frozen=True)
class _Graded:
  """The grade of one prompt's completions."""

  verifier: verifier.Verifier
  fields: Mapping[str, Any]
  failures: list[str]

  def __call__(self, completion: str) -> dict[str, float]:
    found = verifier.guarded(self.verifier, completion, self.fields)
    if found.failure:
      self.failures.append(found.reason)
    return {'score': found.value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(generation.Task):
  """The kind `verify`."""

  failures: list[str]  # failures of verifiers, while a model is measured

  @classmethod
  def read(cls, path: str, options: options_lib.Options) -> Self:
    """Reads the prompts, and checks that every verifier can use its line."""
    found = records.read(
      path,
      required=('prompt', 'verifier'),
      optional=('id', 'cluster', 'stop', *kinds.FIELDS),
    )
    failures: list[str] = []
    return cls(
      options=options,
      files={path: digests.of_file(path)},
      prompts=tuple(_prompt(record, failures) for record in found),
      failures=failures,
    )

  def measure(self, model: ports.Model) -> tuple[scores.Group, ...]:
    """Returns one group: the score, and pass@k of several samples."""
    self.failures.clear()
    (group,) = super().measure(model)
    if self.failures:
      note = (
        f'{len(self.failures)} completions count as 0 because their verifier'
        f' failed; the first: {self.failures[0]}'
      )
      group = dataclasses.replace(group, notes=(*group.notes, note))
    return (group,)


def _prompt(record: records.Record, failures: list[str]) -> generation.Prompt:
  if not record.text('prompt'):
    raise record.error('prompt', 'text')
  try:
    rule = kinds.named(record.text('verifier'))
    rule.check(record.fields)
  except ValueError as error:
    raise ValueError(f'{record.place}: {error}') from None
  return generation.Prompt(
    id=record.id,
    text=record.text('prompt'),
    grade=_Graded(rule, record.fields, failures),
    answer=str(record.fields.get('answer', record.text('verifier'))),
    stop=record.texts('stop', 0),
    cluster=record.text('cluster', ''),
  )
