r"""Answers of a frozen model to many questions, as data to train on.

    python -m studies.answers --model=runs/skilled/frozen \
      --questions='problems:families=additions&levels=2&count=6000' \
      --out=runs/answers.jsonl
    python -m studies.answers --model=DIR --questions=questions.jsonl \
      --samples=8 --temperature=1 --verifier=number --out=right.jsonl

The first makes data for distillation of sequences: a student learns a teacher's
answers (Kim & Rush 2016, arXiv:1606.07947). The second keeps right answers
alone, for fine-tuning by rejection (Yuan et al. 2023, arXiv:2308.01825).

Questions are records with a prompt (data/examples/prompts.py). The output has a
conversation for each answer that is kept, with the fields of its question that
a verifier reads; a run reads the output with data.examples = chat. Answers that
did not end within --max_tokens, answers with a lower score than --least_score,
and repetitions of an answer to the same question are left out. The counts, the
settings and the digest of the weights are in a file beside it, OUT.about.json.

An answer is a function of the weights, the question, the settings and the seed.
Answers are kept in blocks while the program works, so the same command resumes
where it was stopped.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
from typing import Any

from absl import app, flags

from checks import expect, path_flags
from data import data_config, sources
from data.examples import prompts as prompts_lib
from evals.verifiers import kinds, verifier as verifier_lib
from inference import generate, model_port
from inference.engine import engine_config
from inference.requests import requests as requests_lib
from storage import atomic
from text.replies import fitting, turns
from training.rollouts.draws import drawing

PROBLEMS = 'problems:'
_MARK = 'XmarkX'  # an answer that no template changes
_BLOCK = 256  # questions that are answered between two files on disk
ENGINE = engine_config.EngineConfig(
  max_sequences=64, decode_shapes=(8, 64), max_chunks=8, max_mixed_chunks=8
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """The answers to make, and the ones to keep."""

  num_samples: int = 1  # of each question
  temperature: float = 0.0
  max_tokens: int = 256
  seed: int = 0
  verifier: str = ''  # of `evals.verifiers.kinds`; '': every answer is kept
  least_score: float = 1.0  # of an answer that is kept

  def validate(self) -> None:
    """Raises ValueError for values that no answer can have."""
    expect.at_least('samples', self.num_samples, 1)
    expect.at_least('max_tokens', self.max_tokens, 1)
    if self.verifier:
      kinds.named(self.verifier)
    if self.num_samples > 1 and not self.temperature:
      raise ValueError(
        f'samples: got {self.num_samples} at temperature 0, expected 1: the'
        ' likeliest tokens are the same each time; set --temperature'
      )


@dataclasses.dataclass(kw_only=True)
class Counts:
  """How many answers there were, and the reasons why some are left out."""

  questions: int = 0
  answers: int = 0
  kept: int = 0
  truncated: int = 0
  repeated: int = 0
  low_score: int = 0
  failed: int = 0  # part of low_score: answers that the verifier cannot read
  prompt_tokens: int = 0
  tokens: int = 0  # sampled
  flops: float = 0.0

  def add(self, other: 'Counts') -> None:
    """Adds the counts of a block."""
    for field in dataclasses.fields(self):
      total = getattr(self, field.name) + getattr(other, field.name)
      setattr(self, field.name, total)


def questions_of(
  place: str, split: str, generator: generate.Generator
) -> prompts_lib.Prompts:
  """Returns the questions of a file or of `problems:QUERY`, encoded.

  Raises:
    ValueError: a record has no prompt, or a prompt is longer than the context.
    FileNotFoundError: there is no file.
  """
  if place.startswith(PROBLEMS):
    query = place.removeprefix(PROBLEMS)
    source = sources.problems(f'{query}&kind=questions', split, text_key=None)
  else:
    source = sources.jsonl(place, text_key=None)
  return prompts_lib.open_prompts(
    source,
    generator.tokenizer,
    generator.frozen.chat_template,
    name=place,
    most_tokens=generator.engine.context - 1,
    too_long=data_config.ERROR,
  )


def answer(
  generator: generate.Generator,
  questions: prompts_lib.Prompts,
  settings: Settings,
  out: pathlib.Path,
) -> Iterator[Counts]:
  """Writes the answers block by block; yields the counts so far.

  Raises:
    ValueError: an unfinished file was begun with other settings, or a question
      leaves no room for an answer.
  """
  settings.validate()
  rule = kinds.named(settings.verifier) if settings.verifier else None
  if rule is not None:
    for question in questions.prompts:
      rule.check(question.record)
  blocks = _Blocks(
    out,
    {
      **dataclasses.asdict(settings),
      'weights_digest': generator.frozen.manifest.weights_digest,
      'questions_digest': questions.digest,
    },
  )
  total = Counts()
  for first in range(0, len(questions), _BLOCK):
    found = blocks.read(first)
    if found is None:
      found = _answered(generator, questions, settings, first, rule)
      blocks.write(first, *found)
    total.add(found[0])
    yield dataclasses.replace(total)
  blocks.finish(total)


def write_greedy(
  place: str | os.PathLike[str],
  query: str,
  out: pathlib.Path,
  *,
  max_tokens: int,
) -> None:
  """Writes a model's likeliest answers to problems, if they are not there yet.

  Args:
    place: frozen directory of the model.
    query: the problems of the training split, see `data/problems/generator.py`.
    out: JSONL file.
    max_tokens: most tokens of an answer.
  """
  if out.exists():
    return
  generator = generate.load(place, ENGINE, compile_all=False)
  questions = questions_of(f'{PROBLEMS}{query}', 'train', generator)
  for _ in answer(generator, questions, Settings(max_tokens=max_tokens), out):
    pass


def _answered(
  generator: generate.Generator,
  questions: prompts_lib.Prompts,
  settings: Settings,
  first: int,
  rule: verifier_lib.Verifier | None,
) -> tuple[Counts, list[dict[str, Any]]]:
  """Returns the counts and the records of one block."""
  block = questions.prompts[first : first + _BLOCK]
  stop = prompts_lib.stop_strings(generator.frozen.chat_template)
  requests = [
    generator.request(
      question.ids,
      dataclasses.replace(
        generator.defaults,
        n=settings.num_samples,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=drawing.folded(settings.seed, first + i),
        stop=stop,
      ),
    )
    for i, question in enumerate(block)
  ]
  answers = model_port.answer_all(generator.engine, requests)
  counts, records = Counts(questions=len(block)), []
  lead = _lead(generator, block[0])
  for question, completions in zip(block, answers, strict=True):
    ended = _ended(completions, counts)
    scores: Sequence[verifier_lib.Score | None] = [None] * len(ended)
    if rule is not None:
      scores = verifier_lib.score_all(
        rule, [(text, question.record) for text in ended]
      )
    for text, score in zip(ended, scores, strict=True):
      if score is not None and score.value < settings.least_score:
        counts.low_score += 1
        counts.failed += bool(score.failure)
        continue
      records.append(_record(question, text.removeprefix(lead), score))
  counts.kept = len(records)
  return counts, records


def _lead(generator: generate.Generator, question: prompts_lib.Prompt) -> str:
  """Returns the template's own text between a prompt and its answer.

  It is sampled with the answer, and the template writes it again when the
  answer is trained: a space, in most of our own templates.
  """
  template = turns.of(generator.tokenizer, generator.frozen.chat_template)
  messages = fitting.fitted(question.messages, template.style)
  tools = question.record.get('tools')
  prompt, whole = (
    template.render(shown, tools, add_generation_prompt=is_prompt).text
    for shown, is_prompt in (
      (messages, True),
      ([*messages, {'role': 'assistant', 'content': _MARK}], False),
    )
  )
  before, mark, _ = whole.partition(_MARK)
  if not mark or not before.startswith(prompt):
    return ''
  return before.removeprefix(prompt)


def _ended(
  completions: Sequence[requests_lib.Completion], counts: Counts
) -> list[str]:
  """Returns the different answers that ended, in order; counts all."""
  texts: dict[str, None] = {}
  for each in completions:
    counts.answers += 1
    counts.tokens += each.num_completion_tokens
    counts.prompt_tokens += each.num_prompt_tokens
    counts.flops += each.usage.flops
    if each.finish_reason == 'length':
      counts.truncated += 1
    elif each.text in texts:
      counts.repeated += 1
    else:
      texts[each.text] = None
  return list(texts)


def _record(
  question: prompts_lib.Prompt, text: str, score: verifier_lib.Score | None
) -> dict[str, Any]:
  """Returns a conversation as data/examples/shapes.py reads it."""
  kept = {
    name: question.record[name]
    for name in (*kinds.FIELDS, 'tools')
    if name in question.record
  }
  said = {'role': 'assistant', 'content': text}
  record = {'messages': [*map(dict, question.messages), said], **kept}
  return record | ({} if score is None else {'score': score.value})


class _Blocks:
  """The blocks of an unfinished file, in a directory beside it."""

  def __init__(self, out: pathlib.Path, settings: dict[str, Any]):
    """Opens or makes the directory.

    Raises:
      ValueError: it has the blocks of other settings.
    """
    self._out, self._settings = out, settings
    self._place = out.with_name(f'{out.name}.parts')
    atomic.make_directory(self._place)
    begun = self._place / 'settings.json'
    if not begun.exists():
      atomic.write_text(begun, json.dumps(settings))
    if (before := json.loads(begun.read_text())) != settings:
      differs = [k for k in settings if before.get(k) != settings[k]]
      raise ValueError(
        f'{self._place}: got answers of other settings ({", ".join(differs)}),'
        ' expected the settings of this command; remove the directory, or give'
        ' another --out'
      )

  def read(self, first: int) -> tuple[Counts, list[dict[str, Any]]] | None:
    """Returns a block that is on disk; None: it is not there."""
    path = self._path(first)
    if not path.exists():
      return None
    found = json.loads(path.read_text(encoding='utf-8'))
    return Counts(**found['counts']), found['records']

  def write(self, first: int, counts: Counts, records: list[dict]) -> None:
    """Keeps a block."""
    found = {'counts': dataclasses.asdict(counts), 'records': records}
    atomic.write_text(self._path(first), json.dumps(found, ensure_ascii=False))

  def finish(self, total: Counts) -> None:
    """Writes the file of all blocks, and removes them."""
    lines = []
    for path in sorted(self._place.glob('block*.json')):
      for record in json.loads(path.read_text(encoding='utf-8'))['records']:
        lines.append(json.dumps(record, ensure_ascii=False) + '\n')
    text = ''.join(lines)
    atomic.write_text(self._out, text)
    about = {
      'settings': self._settings,
      'counts': dataclasses.asdict(total),
      'sha256': hashlib.sha256(text.encode()).hexdigest(),
    }
    atomic.write_text(
      self._out.with_name(f'{self._out.name}.about.json'),
      json.dumps(about, indent=2) + '\n',
    )
    shutil.rmtree(self._place)

  def _path(self, first: int) -> pathlib.Path:
    return self._place / f'block{first:09d}.json'


def main(argv: list[str]) -> int:
  """Answers the questions that the flags name."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags only')
  values = flags.FLAGS
  settings = Settings(
    num_samples=values.samples,
    temperature=values.temperature,
    max_tokens=values.max_tokens,
    seed=values.seed,
    verifier=values.verifier or '',
    least_score=values.least_score,
  )
  total = Counts()
  try:
    settings.validate()
    generator = generate.load(values.model, ENGINE, compile_all=False)
    questions = questions_of(values.questions, values.split, generator)
    out = pathlib.Path(values.out)
    for total in answer(generator, questions, settings, out):
      print(
        f'{total.questions:,} of {len(questions):,} questions,'
        f' {total.kept:,} answers kept',
        flush=True,
      )
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(
    f'{total.answers:,} answers, {total.tokens:,} tokens,'
    f' {total.flops:.2g} FLOPs; left out: {total.truncated:,} without an end,'
    f' {total.repeated:,} repeated, {total.low_score:,} below the least score'
  )
  print(f'wrote {values.out}')
  return 0


def _define_flags() -> None:
  path_flags.DEFINE_path('model', None, 'Frozen directory of the model.')
  flags.DEFINE_string(
    'questions',
    None,
    'JSON Lines file with a prompt, question or messages in each line; or'
    f" {PROBLEMS}QUERY, as '{PROBLEMS}families=additions&levels=2&count=100'.",
  )
  path_flags.DEFINE_path(
    'out', None, 'File to write: a conversation in each line, for training.'
  )
  default = Settings()
  flags.DEFINE_string(
    'split', 'train', f'Split of {PROBLEMS}QUERY. A file has one split.'
  )
  flags.DEFINE_integer('samples', 1, 'Answers to each question.')
  flags.DEFINE_float(
    'temperature', default.temperature, '0: the likeliest tokens.', 0.0
  )
  flags.DEFINE_integer(
    'max_tokens', default.max_tokens, 'Of an answer; longer ones are left out.'
  )
  flags.DEFINE_integer('seed', 0, 'Another seed draws other answers.')
  flags.DEFINE_enum(
    'verifier', None, list(kinds.KINDS), 'Rule that scores answers; none: all.'
  )
  flags.DEFINE_float(
    'least_score', default.least_score, 'Of an answer that is kept.'
  )
  flags.mark_flags_as_required(['model', 'questions', 'out'])


if __name__ == '__main__':
  # Not at import: other programs have flags of these names.
  _define_flags()
  app.run(main)
