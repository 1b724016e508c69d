r"""Verifiers of a text: its number, its words, its choice, its pattern.

A completion gives its answer after '####', in '\boxed{...}' or after 'the
answer is', and else by the rules of `text.replies.answers`, which reads values.
"""

import dataclasses
import functools
import json
import re

from checks import expect
from evals.verifiers import verifier
from evals.verifiers.sandbox import runner
from text.replies import answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number(verifier.Verifier):
  """The right number, in any spelling.

  Field of the record: `answer`, a number, or a solution that ends with '####'
  and a number, as in GSM8K.
  """

  is_strict: bool = False  # only a number after '####' counts

  def check(self, record: verifier.Record) -> None:
    """Raises ValueError for an answer that is no number."""
    _number_of(verifier.text_field(record, 'answer'))

  def __call__(self, answer: str, record: verifier.Record) -> verifier.Score:
    """Returns 1 for an answer with the same value."""
    right = _number_of(verifier.text_field(record, 'answer'))
    return _read(right, answer, is_strict=self.is_strict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice(verifier.Verifier):
  """The right word of a few, such as letters or yes and no.

  Fields of the record: `answer`, and `choices`, a list that holds it.
  """

  is_strict: bool = False  # only a choice after '####' counts

  def check(self, record: verifier.Record) -> None:
    """Raises ValueError for an answer that is not among the choices."""
    self._answer(record)

  def __call__(self, answer: str, record: verifier.Record) -> verifier.Score:
    """Returns 1 for an answer that names the right choice and no other."""
    return _read(self._answer(record), answer, is_strict=self.is_strict)

  def _answer(self, record: verifier.Record) -> answers.Answer:
    choices = verifier.texts_field(record, 'choices')
    return answers.Answer(
      'word', verifier.text_field(record, 'answer'), choices
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(verifier.Verifier):
  """One of the right texts.

  Field of the record: `answer`, a text or a list of texts. It is compared with
  the text after '####' or in a box, and else with the whole answer.
  """

  ignores_case: bool = False
  is_strict: bool = False  # only a text after '####' counts

  def check(self, record: verifier.Record) -> None:
    """Raises ValueError for a record without a right text."""
    verifier.texts_field(record, 'answer')

  def __call__(self, answer: str, record: verifier.Record) -> verifier.Score:
    """Returns 1 for a text that is equal, except for white space around it."""
    right = map(self._plain, verifier.texts_field(record, 'answer'))
    given = answers.given(answer, is_strict=self.is_strict)
    if given is None:
      return verifier.Score(0.0, f'got no answer behind {answers.MARK}')
    is_right = self._plain(given) in set(right)
    return verifier.passed(is_right, f'got {expect.shown(given.strip())}')

  def _plain(self, text: str) -> str:
    text = text.strip()
    return text.casefold() if self.ignores_case else text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern(verifier.Verifier):
  """A regular expression of Python that must be found in the answer.

  Field of the record: `pattern`; write ^ and \\Z around a pattern for the whole
  answer. It is searched in a confined process, because some expressions take
  exponential time.
  """

  cpu_seconds: int = 1

  def check(self, record: verifier.Record) -> None:
    """Raises ValueError for an invalid pattern."""
    pattern = verifier.text_field(record, 'pattern')
    try:
      re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
      raise verifier.wrong(
        record, 'pattern', f'a regular expression ({error})'
      ) from None
    _checked_sandbox()

  def __call__(self, answer: str, record: verifier.Record) -> verifier.Score:
    """Returns 1 if the pattern is found; a failure if that took too long."""
    pattern = verifier.text_field(record, 'pattern')
    ran = runner.run(
      _SEARCH,
      runner.Limits(cpu_seconds=self.cpu_seconds),
      stdin=json.dumps([pattern, answer]),
    )
    if ran.status != 'ok':
      why = 'time' if ran.status == 'time' else 'error'
      return verifier.Score(0.0, f'pattern: {ran.reason}', failure=why)
    is_found = ran.output.strip() == 'True'
    said = 'got a match' if is_found else 'got no match'
    return verifier.passed(is_found, f'{said} of {expect.shown(pattern)}')


_SEARCH = """\
import json, re
pattern, text = json.loads(input())
print(re.search(pattern, text) is not None)
"""


@functools.cache
def _checked_sandbox() -> None:
  runner.check()


def _number_of(text: str) -> answers.Answer:
  _, mark, marked = text.partition(answers.MARK)
  return answers.Answer('number', (marked if mark else text).strip())


def _read(
  right: answers.Answer, completion: str, *, is_strict: bool
) -> verifier.Score:
  given = answers.given(completion, is_strict=is_strict)
  if given is None:
    return verifier.Score(0.0, f'got no answer behind {answers.MARK}')
  is_right = answers.is_right(right, completion, strict=is_strict)
  shown = expect.shown(given.strip()[-60:])
  return verifier.passed(is_right, f'got {shown}, expected {right.text}')
