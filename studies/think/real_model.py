"""Votes of a model that is there, on questions with a number as the answer.

    python -m studies.test_time_scaling --model=runs/chat/SmolLM2 \
      --questions=gsm8k_test.jsonl --num_questions=200 --workdir=runs/gsm8k

One pool of samples per question gives the accuracy of a majority of 1 to N, of
best of n by the model's own likelihood, and of pass@n, with 95 % intervals over
questions, and the receipt of each: tokens sampled and discarded, FLOPs, and how
many times the FLOPs of one answer that is. The pool is drawn in parts that are
kept below --workdir: the same command resumes. On one GPU the same command is
enough; its engine fills 64 sequences at a time.
"""

from collections.abc import Hashable
import dataclasses
import json
import pathlib

import numpy as np

from checks import expect
from evals import ports
from evals.results import pass_at_k
from evals.tasks import numbers, records
from frozen import manifest as manifest_lib
from inference import generate
from storage import atomic, digests
from studies.common import figure
from studies.think import estimates, pool as pool_lib
from text.replies import answers
from training.reporting.page import document

RESULTS, REPORT = 'real_model.json', 'real_model.html'
MAJORITY, EARLY = 'majority', 'majority, early stop'
LIKELIEST, COVERAGE = 'best of n: likelihood', 'pass@n'
_PART = 8  # questions that are kept together
_INSTRUCTION = (
  '\n\nThink step by step. Then write the final answer alone after ####.'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What is asked of which model.

  Raises:
    ValueError: one of both is missing, or a number is out of range.
  """

  model: str  # frozen directory
  questions: str  # file
  num_questions: int = 0  # 0: all
  num_samples: int = 64
  max_tokens: int = 320
  temperature: float = 0.8

  def __post_init__(self):
    for name in ('model', 'questions'):
      if not getattr(self, name):
        raise ValueError(
          f'--{name}: got none, expected --model=DIR and --questions=FILE'
          ' together'
        )
    expect.at_least('num_questions', self.num_questions, 0)
    expect.at_least('samples_per_question', self.num_samples, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """A question of a file."""

  id: str
  question: str
  answer: answers.Answer
  level: int = 0


def read_questions(path: str, num: int = 0) -> list[Question]:
  """Returns the first questions of a file.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: a line has no question, or no number as its answer.
  """
  found = []
  lines = records.read(path, required=('question', 'answer'), optional=None)
  for record in lines:
    text = record.text('answer')
    given = answers.given(text, is_strict=answers.MARK in text) or ''
    if numbers.number(given) is None:
      raise record.error('answer', f'a number, or text that ends in {_MARKED}')
    question = record.text('question')
    found.append(
      Question(
        id=digests.of_json({'question': question})[:16],
        question=question + _INSTRUCTION,
        answer=answers.Answer('number', given.strip()),
      )
    )
  return found[: num or None]


_MARKED = f"'{answers.MARK} 42'"


def reader(max_tokens: int) -> pool_lib.Read:
  """Returns the function that reads the number of an answer.

  After the mark, in a box or after 'the answer is'; else the last number, as in
  the flexible reading of GSM8K. An answer that was cut at `max_tokens` counts
  only with its mark: the last number of half a solution is none.
  """

  def read(
    question: pool_lib.Asked, completion: ports.Completion
  ) -> tuple[Hashable, bool]:
    is_cut = len(completion.all_ids) >= max_tokens
    given = answers.given(completion.text, is_strict=is_cut)
    value = None if given is None else numbers.last_number(given)
    right = numbers.number(question.answer.text)
    return value, value is not None and value == right

  return read


def draw(settings: Settings, workdir: pathlib.Path) -> pool_lib.Pool:
  """Returns the pool of samples; draws the parts that are missing."""
  questions = read_questions(settings.questions, settings.num_questions)
  generator = None
  manifest = manifest_lib.read(pathlib.Path(settings.model))
  how = settings.num_samples, settings.max_tokens, settings.temperature
  ids = [each.id for each in questions]
  drawn = {'weights': manifest.weights_digest, 'ids': ids, 'how': how}
  key = digests.of_json(drawn)[:12]
  parts = []
  for start in range(0, len(questions), _PART):
    path = workdir / f'pool_{key}_{start}.npz'
    if not path.exists():
      if generator is None:
        generator = generate.load(settings.model, pool_lib.ENGINE)
      part = pool_lib.draw(
        generator,
        questions[start : start + _PART],
        num_samples=settings.num_samples,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=start,
        read=reader(settings.max_tokens),
      )
      part.save(path)
      print(
        f'{start + len(part.ids)} of {len(questions)} questions, one sample'
        f' {part.is_right_QN.mean():.3f}',
        flush=True,
      )
    parts.append(pool_lib.load(path))
  return pool_lib.Pool.joined(parts)


def curves(pool: pool_lib.Pool) -> dict[str, estimates.Curve]:
  """Returns the ways to choose, at 1, 2, 4 ... samples."""
  ks = pass_at_k.useful_ks(pool.codes_QN.shape[1])
  return {
    MAJORITY: estimates.majority(pool, ks),
    EARLY: estimates.majority(pool, ks, stops_early=True),
    LIKELIEST: estimates.best_of(pool, pool.scores_CQN[0], ks),
    COVERAGE: estimates.coverage(pool, ks),
  }


def rows(pool: pool_lib.Pool) -> list[dict]:
  """Returns accuracy, interval and receipt of each way and number."""
  found = []
  tokens = float(pool.tokens_QN.mean())
  for name, curve in curves(pool).items():
    for i, k in enumerate(curve.ks):
      low, high = estimates.interval(curve.accuracy_KQ[i])
      flops = float(curve.flops_KQ[i].mean())
      # Of an early stop, the part of the FLOPs behind the prompt.
      prompt = float(pool.prompt_flops_Q.mean())
      num = (flops - prompt) / float(pool.answer_flops_QN.mean())
      found.append(
        {
          'way': name,
          'n': k,
          'accuracy': float(curve.accuracy_KQ[i].mean()),
          'low': low,
          'high': high,
          'samples': num,
          'sampled tokens': num * tokens,
          # Random orders of samples: of one, `num` is 1 up to their noise.
          'discarded tokens': max(num - 1, 0.0) * tokens,
          'flops': flops,
          'times one answer': flops / float(curve.flops_KQ[0].mean()),
        }
      )
  return found


_HEAD = (
  'way',
  'n',
  'accuracy [95 %]',
  'sampled tokens',
  'discarded',
  'FLOPs',
  'times one answer',
)


def _cells(row: dict) -> list[str]:
  return [
    row['way'],
    str(row['n']),
    f'{row["accuracy"]:.3f} [{row["low"]:.3f}, {row["high"]:.3f}]',
    f'{row["sampled tokens"]:,.0f}',
    f'{row["discarded tokens"]:,.0f}',
    f'{row["flops"]:.3g}',
    f'{row["times one answer"]:.2f}',
  ]


def report(
  settings: Settings, workdir: pathlib.Path, figure_path: str = ''
) -> str:
  """Draws what is missing, writes page, numbers and figure; returns a table.

  Raises:
    FileNotFoundError, ValueError: model or questions are missing or damaged.
  """
  pool = draw(settings, workdir)
  found = rows(pool)
  # An answer that was cut at the most tokens seldom has a number at its end.
  is_cut = float(np.mean(pool.tokens_QN >= settings.max_tokens))
  words = (
    f'{len(pool.ids)} questions, {settings.num_samples} samples of each at'
    f' temperature {settings.temperature:g}, {pool.tokens_QN.mean():.0f} tokens'
    f' on average, {is_cut:.1%} cut at {settings.max_tokens}; 95 % intervals'
    ' by the bootstrap over questions'
  )
  cells = [_cells(row) for row in found]
  page = [
    '<h1>Votes of a model</h1>\n',
    document.paragraph(words),
    document.table(list(_HEAD), cells),
  ]
  atomic.write_text(workdir / REPORT, document.document('Votes', page))
  tree = {'settings': dataclasses.asdict(settings), 'rows': found}
  atomic.write_text(workdir / RESULTS, json.dumps(tree, indent=2) + '\n')
  if figure_path:
    figure.save(figure_path, [_panel(found)])
  lines = [
    words,
    '',
    f'| {" | ".join(_HEAD)} |',
    f'|{"---|" * len(_HEAD)}',
    *(f'| {" | ".join(row)} |' for row in cells),
  ]
  return '\n'.join(lines)


def _panel(found: list[dict]) -> figure.Panel:
  ways = dict.fromkeys(row['way'] for row in found)
  lines = {}
  for way in ways:
    mine = [row for row in found if row['way'] == way]
    lines[way] = figure.Line(
      x=[row['flops'] for row in mine],
      y=[row['accuracy'] for row in mine],
      low=[row['low'] for row in mine],
      high=[row['high'] for row in mine],
      style='.-',
    )
  return figure.Panel(
    title='votes',
    x_label='FLOPs per question',
    y_label='accuracy',
    lines=lines,
    log_x=True,
    log_base=10,
  )
