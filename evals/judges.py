"""Judges: which of two answers to a prompt is better.

    verdicts = judge([Comparison(prompt, first, second), ...])

A judge is a function, so that a reward model, a verifier, a gold reward and a
language model can take the same place. `both_orders` asks for each pair twice,
since a language model as judge may prefer a position (Zheng et al. 2023,
arXiv:2306.05685, section 3.3).
"""

from collections.abc import Callable, Mapping, Sequence
import enum
import re
from typing import Any, NamedTuple, Protocol

Message = Mapping[str, Any]
# A text, or the messages of a conversation that ends with the user's turn.
Prompt = str | Sequence[Message]
# [(prompt, answer), ...] -> one number each; a larger number is better.
ScoreFn = Callable[[Sequence[tuple[Prompt, str]]], Sequence[float]]
# Conversations -> the answer of a language model to each.
Ask = Callable[[Sequence[list[dict[str, Any]]]], Sequence[str]]


class Comparison(NamedTuple):
  """Two answers to one prompt, in the order in which the judge sees them."""

  prompt: Prompt
  first: str
  second: str


class Choice(enum.Enum):
  """The answer that a judge prefers."""

  FIRST = 'first'
  SECOND = 'second'
  TIE = 'tie'
  MALFORMED = 'malformed'  # the judge's words hold no verdict


class Verdict(NamedTuple):
  """The choice of a judge, and its words."""

  choice: Choice
  words: str = ''  # of a language model; otherwise the scores of both answers


class Judge(Protocol):
  """Compares any number of pairs."""

  def __call__(self, comparisons: Sequence[Comparison], /) -> Sequence[Verdict]:
    """Returns a verdict per comparison, in order."""
    ...


class Orders(NamedTuple):
  """The verdicts of one pair in both orders."""

  forward: Verdict  # the pair as given
  backward: Verdict  # the second answer was shown first


def both_orders(
  judge: Judge, comparisons: Sequence[Comparison]
) -> list[Orders]:
  """Returns the verdicts of each pair, shown in both orders.

  Raises:
    ValueError: the judge gives another number of verdicts than it got pairs.
  """
  turned = [Comparison(c.prompt, c.second, c.first) for c in comparisons]
  verdicts = list(judge([*comparisons, *turned]))
  if len(verdicts) != 2 * len(comparisons):
    raise ValueError(
      f'judge: got {len(verdicts)} verdicts on {2 * len(comparisons)}'
      ' comparisons, expected one for each'
    )
  half = len(comparisons)
  pairs = zip(verdicts[:half], verdicts[half:], strict=True)
  return [Orders(*pair) for pair in pairs]


def by_score(score: ScoreFn, *, tie_margin: float = 0.0) -> Judge:
  """Returns the judge that prefers the answer with the higher score.

  Args:
    score: a reward model, a verifier or a gold reward. It gets each answer of
      the comparisons once.
    tie_margin: scores that differ by no more are a tie.
  """

  def judge(comparisons: Sequence[Comparison]) -> list[Verdict]:
    asked = {}
    for each in comparisons:
      for answer in (each.first, each.second):
        asked.setdefault((_key(each.prompt), answer), (each.prompt, answer))
    found = dict(zip(asked, score(list(asked.values())), strict=True))

    def verdict(each: Comparison) -> Verdict:
      first, second = (
        float(found[_key(each.prompt), answer])
        for answer in (each.first, each.second)
      )
      words = f'{first:.6g} {second:.6g}'
      # Scores that are not finite compare with nothing.
      if not abs(gap := first - second) < float('inf'):
        return Verdict(Choice.MALFORMED, words)
      if abs(gap) <= tie_margin:
        return Verdict(Choice.TIE, words)
      return Verdict(Choice.FIRST if gap > 0 else Choice.SECOND, words)

    return [verdict(each) for each in comparisons]

  return judge


def _key(prompt: Prompt) -> str:
  return prompt if isinstance(prompt, str) else repr(list(map(dict, prompt)))


_INSTRUCTIONS = """\
Two assistants have answered the same request. Compare the two answers: are \
they correct, do they do what was asked, are they helpful? The order of the \
answers and their length must not matter. Say in a few sentences how the \
answers differ. Then end with a line that holds nothing but [[A]] if answer A \
is better, [[B]] if answer B is better, or [[C]] if both are equally good."""
_MARKS = {'A': Choice.FIRST, 'B': Choice.SECOND, 'C': Choice.TIE}
_MARK = re.compile(r'\[\[([ABC])\]\]')


def by_asking(ask: Ask, instructions: str = _INSTRUCTIONS) -> Judge:
  """Returns the judge that asks a language model.

  Args:
    ask: answers conversations.
    instructions: tells the model to end with [[A]], [[B]] or [[C]], a tie.
  """

  def judge(comparisons: Sequence[Comparison]) -> list[Verdict]:
    answers = ask([_question(each, instructions) for each in comparisons])
    return [Verdict(read_choice(words), words) for words in answers]

  return judge


def read_choice(words: str) -> Choice:
  """Returns the choice at the end of a judge's words.

  The last mark counts: a judge may quote other marks from the answers before.
  """
  marks = _MARK.findall(words)
  return _MARKS[marks[-1]] if marks else Choice.MALFORMED


def _question(each: Comparison, instructions: str) -> list[dict[str, Any]]:
  """Returns the conversation that asks for a verdict.

  All of it is one message of the user: not every template has a system role.
  """
  text = '\n\n'.join(
    (
      instructions,
      f'### Request\n{_transcript(each.prompt)}',
      f'### Answer A\n{each.first}',
      f'### Answer B\n{each.second}',
      '### Verdict',
    )
  )
  return [{'role': 'user', 'content': text}]


def _transcript(prompt: Prompt) -> str:
  if isinstance(prompt, str):
    return prompt
  if len(prompt) == 1:
    return str(prompt[0].get('content', ''))
  return '\n\n'.join(
    f'{each.get("role", "")}: {each.get("content", "")}' for each in prompt
  )
