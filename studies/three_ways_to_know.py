"""Three ways to know new facts: in the context, by fine-tuning, by retraining.

    python -m studies.three_ways_to_know --workdir=runs/three_ways \
      --figure=runs/three_ways.svg

A small model learns 160 people from statements. It learns to answer questions
about half of them from its weights, and about any person whose statement stands
before the question. Three quarters of its rows are about strangers, of whom
some share names: a row has statements, then questions or the same statements.
Without these repetitions it did not learn to look up a name in 6,000 steps.
Then 40 new people are added; the model gets their facts by

    context      an index finds statements by the names of the question
    fine-tuning  all weights, or a LoRA adapter; each fact stated once, or in
                 three paraphrases; no other text is trained
    retraining   a new model, from all statements, old and new

For each way the table has the right answers about new people, the right answers
about old people (which show forgetting), its cost in FLOPs, once and for each
question, and the digest of the weights that answer. The crossing point of a way
is the number of questions from which it costs less than the context. Means over
seeds have an interval at 95 %.

Measured with three seeds: the context answers 90 % about new people, changes no
weight, forgets nothing and costs five times as much per question. Fine-tuning
on paraphrases knows 98 % (65 % with LoRA; 43 to 63 % where each fact is stated
once) and forgets four fifths of the old facts. Retraining keeps both (90 and 92
%) and costs 25 times as much. LOG.md has the intervals.
Three seeds take about eleven minutes on one CPU core.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import statistics

from absl import app
import numpy as np

from data.synthetic import people as people_lib
from frozen import format as frozen_format
from models import adapter_config, flops, model_config
from studies.common import figure, study_flags
from studies.papers import port, small_models, verdicts

_OLD, _NEW = 160, 40  # people
_FOUND = 3  # statements that the index returns
_ROW = 32  # ids
_BATCH = 32  # rows
_BASE_STEPS, _TUNE_STEPS = 7000, 300
_NUM_SEEDS = 3
WAYS = (
  'context',
  'LoRA, stated once',
  'LoRA, paraphrased',
  'full, stated once',
  'full, paraphrased',
  'retrained',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
  """A way, measured once."""

  new: float  # right answers about new people
  old: float  # about old people, without context
  at_once: float  # FLOPs of training
  per_question: float  # FLOPs
  digest: str  # of the weights that answer, without an adapter


def model() -> model_config.ModelConfig:
  """Returns the model: 2 layers of width 48."""
  return model_config.ModelConfig(
    vocab_size=people_lib.NUM_IDS,
    num_layers=2,
    model_width=48,
    num_heads=4,
    num_kv_heads=4,
    head_width=12,
    mlp='gelu',
    mlp_width=192,
    max_length=_ROW,
    tie_embeddings=False,
    scan_layers=False,
  )


def _recipe(num_steps: int, rate: float, rank: int = 0) -> small_models.Recipe:
  return small_models.Recipe(
    model=model(),
    optimizer=small_models.adam(rate),
    num_steps=num_steps,
    look_every=100,
    adapter=adapter_config.AdapterConfig(rank=rank, alpha=2.0 * rank)
    if rank
    else adapter_config.AdapterConfig(),
  )


def _base_recipe() -> small_models.Recipe:
  found = _recipe(study_flags.STEPS.value or _BASE_STEPS, 3e-3)
  # At a constant rate, the answers from the context rise and fall.
  falling = dataclasses.replace(found.optimizer, schedule='linear', end_lr=0.0)
  return dataclasses.replace(found, optimizer=falling)


class Index:
  """Statements by the names in them."""

  def __init__(self, statements: Sequence[Sequence[int]]):
    """Counts in how many statements each name is."""
    self._statements = [list(each) for each in statements]
    self._names = [set(_names(each)) for each in self._statements]
    counted = np.bincount(
      [name for names in self._names for name in names],
      minlength=people_lib.NUM_IDS,
    )
    # Rare names weigh more, as in every index of words (tf-idf).
    self._weights = np.log1p(len(self._statements) / np.maximum(counted, 1))

  def find(self, question: Sequence[int], num: int) -> list[list[int]]:
    """Returns the `num` statements that share most with a question."""
    asked = _names(question)
    scores = [
      sum(self._weights[name] for name in names.intersection(asked))
      for names in self._names
    ]
    best = np.argsort(scores, kind='stable')[::-1][:num]
    return [self._statements[i] for i in best]


def _names(ids: Sequence[int]) -> list[int]:
  array = np.asarray(ids)
  return array[people_lib.is_name(array)].tolist()


def _filled(parts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Returns a row of the parts side by side, and which ids are not padding."""
  ids = np.concatenate([np.asarray(part) for part in parts])[:_ROW]
  row = np.full(_ROW, people_lib.PAD, np.int32)
  row[: len(ids)] = ids
  return row, np.arange(_ROW) < len(ids)


def _statements_row(rng, people, templates: Sequence[Sequence[int]]):
  """Returns a row of statements about people at random, all trained.

  Args:
    templates: templates of each person in the text.
  """
  chosen = rng.integers(len(people), size=6)
  return _filled(
    [people.statement(i, int(rng.choice(templates[i]))) for i in chosen]
  )


def _questions_row(rng, people):
  chosen = rng.integers(len(people), size=5)
  return _filled([people.question(i) for i in chosen])


def _strangers(rng):
  """Returns people who are new each time; some share names, as found ones do.

  Of statements that an index finds, most share one name with the question.
  """
  if rng.random() < 0.5:
    return people_lib.draw_alike(rng)
  return people_lib.draw(rng, _FOUND)


def _stated(rng, people) -> list[list[int]]:
  return [
    people.statement(i, int(rng.integers(people_lib.NUM_TEMPLATES)))
    for i in range(len(people))
  ]


def _context_row(rng):
  """Returns questions about strangers behind statements; answers train.

  Only the row has the answers.
  """
  people = _strangers(rng)
  parts = _stated(rng, people)
  questions = [people.question(i) for i in rng.permutation(len(people))]
  row, _ = _filled([*parts, *questions])
  ends = sum(map(len, parts)) + np.cumsum([len(each) for each in questions])
  return row, np.isin(np.arange(_ROW), ends - 1)


def _repeated_row(rng):
  """Returns statements about strangers, and the same again, which train.

  Nearly every id of the repetition can be looked up, in a question only one.
  """
  parts = _stated(rng, _strangers(rng))
  order = rng.permutation(len(parts))
  row, is_there = _filled([*parts, *(parts[i] for i in order)])
  return row, is_there & (np.arange(_ROW) >= sum(map(len, parts)))


def _base_draw(people, asked) -> small_models.Draw:
  """Returns the rows that a model is trained on: statements and questions."""
  every = [range(people_lib.NUM_TEMPLATES)] * len(people)

  def draw(rng):
    rows = [
      *(_statements_row(rng, people, every) for _ in range(_BATCH // 8)),
      *(_questions_row(rng, asked) for _ in range(_BATCH // 8)),
      *(_context_row(rng) for _ in range(3 * _BATCH // 8)),
      *(_repeated_row(rng) for _ in range(3 * _BATCH // 8)),
    ]
    ids, is_trained = zip(*rows, strict=True)
    return np.stack(ids), np.stack(is_trained)

  return draw


def _tune_draw(people, templates) -> small_models.Draw:
  def draw(rng):
    rows = [_statements_row(rng, people, templates) for _ in range(_BATCH)]
    ids, is_trained = zip(*rows, strict=True)
    return np.stack(ids), np.stack(is_trained)

  return draw


def _right(trainer, variables, prompts: Sequence[Sequence[Sequence[int]]]):
  """Returns the share of prompts whose last id is the likeliest one."""
  rows = [_filled(parts) for parts in prompts]
  ids_BT = np.stack([ids for ids, _ in rows])
  last_B = np.array([int(is_there.sum()) for _, is_there in rows]) - 1
  _, is_right_BT = trainer.seen(variables, ids_BT)
  return float(is_right_BT[np.arange(len(rows)), last_B - 1].mean())


def measure(seed: int) -> dict[str, Known]:
  """Trains all ways of a seed; returns them by name."""
  rng = np.random.default_rng([seed, 2])
  everybody = people_lib.draw(rng, _OLD + _NEW)
  old, new = everybody[:_OLD], everybody[_OLD:]
  asked = old[: _OLD // 2]
  base_recipe = _base_recipe()
  base_trainer = small_models.Trainer(base_recipe)
  base = base_trainer.last(seed, _base_draw(old, asked))
  closed = [[new.question(i)] for i in range(_NEW)]
  known = [[old.question(i)] for i in range(_OLD)]
  once = [[int(rng.integers(people_lib.NUM_TEMPLATES))] for _ in range(_NEW)]
  paraphrased = [range(people_lib.NUM_TEMPLATES)] * _NEW

  def found(trainer, variables, prompts, at_once, start=base) -> Known:
    weights = {'params': variables['params']}
    return Known(
      new=_right(trainer, variables, prompts),
      old=_right(trainer, variables, known),
      at_once=at_once,
      per_question=_question_flops(prompts),
      digest=frozen_format.weights_digest(weights),
    )

  index = Index(
    [new.statement(i, once[i][0]) for i in range(_NEW)]
    + [old.statement(i, 0) for i in range(_OLD)]
  )
  with_context = [
    [*index.find(question, _FOUND), question] for (question,) in closed
  ]
  ways = {'context': found(base_trainer, base, with_context, 0.0)}
  for kind, rank, rate in (('LoRA', 8, 3e-3), ('full', 0, 1e-3)):
    recipe = _recipe(_TUNE_STEPS, rate, rank)
    trainer = small_models.Trainer(recipe)
    for told, templates in (
      ('stated once', once),
      ('paraphrased', paraphrased),
    ):
      tuned = trainer.last(seed, _tune_draw(new, templates), base)
      ways[f'{kind}, {told}'] = found(
        trainer, tuned, closed, _train_flops(recipe)
      )
  retrained = base_trainer.last(seed, _base_draw(everybody, asked))
  ways['retrained'] = found(
    base_trainer, retrained, closed, _train_flops(base_recipe)
  )
  return ways


def _train_flops(recipe: small_models.Recipe) -> float:
  # A frozen kernel needs no gradient, which saves a third of the work.
  each = flops.train_flops_per_token(
    recipe.model, _ROW - 1, is_frozen=bool(recipe.adapter.rank)
  )
  return each * recipe.num_steps * _BATCH * (_ROW - 1)


def _question_flops(prompts: Sequence[Sequence[Sequence[int]]]) -> float:
  """Returns the mean FLOPs of a prompt up to its answer."""
  lengths = [sum(map(len, parts)) - 1 for parts in prompts]
  return statistics.mean(
    flops.span_flops(model(), 0, length, 1) for length in lengths
  )


def crossing(way: Known, context: Known) -> float:
  """Returns the number of questions from which a way costs less."""
  saved = context.per_question - way.per_question
  return way.at_once / saved if saved > 0 else float('inf')


def read_or_measure(workdir: pathlib.Path, seed: int) -> dict[str, Known]:
  """Returns the ways of a seed, from the workdir if they are there."""
  setting = port.Setting(seeds=[seed], workdir=workdir, inputs={})
  found = small_models.kept(
    setting,
    _base_recipe(),
    'ways',
    seed,
    lambda: {
      name: dataclasses.asdict(way) for name, way in measure(seed).items()
    },
  )
  return {name: Known(**fields) for name, fields in found.items()}


def table(seeds: Sequence[Mapping[str, Known]]) -> str:
  """Returns the ways as a table, means over seeds with their intervals."""
  base = [ways['context'] for ways in seeds]
  lines = [
    '| way | new facts, % | old facts, % | FLOPs at once | FLOPs per question |'
    ' cheaper than context from | weights |',
    '|---|---|---|---|---|---|---|',
  ]
  for name in WAYS:
    ways = [each[name] for each in seeds]
    is_same = all(
      way.digest == other.digest for way, other in zip(ways, base, strict=True)
    )
    weights = 'the same' if is_same else 'others'
    if is_same and name != 'context':
      weights += ', and an adapter'
    questions = crossing(ways[0], base[0])
    since = f'{questions:,.0f} questions' if name != 'context' else ''
    lines.append(
      f'| {name} | {_shown([way.new for way in ways])} |'
      f' {_shown([way.old for way in ways])} |'
      f' {ways[0].at_once:.2g} | {ways[0].per_question:.3g} | {since} |'
      f' {weights}, {ways[0].digest[:8]} |'
    )
  return '\n'.join(lines)


def _percent(shares: Sequence[float]) -> list[float]:
  """Returns the mean in percent and its interval; [mean] of a single seed."""
  values = [100 * share for share in shares]
  if len(values) == 1:
    return values
  found = verdicts.finding(values)
  return [found.value, max(found.low, 0.0), min(found.high, 100.0)]


def _shown(shares: Sequence[float]) -> str:
  mean, *interval = _percent(shares)
  if not interval:
    return f'{mean:.1f}'
  return f'{mean:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]'


def _colour(name: str) -> str:
  """Returns the colour of a way, the same in both panels."""
  return f'C{WAYS.index(name)}'


def panels(seeds: Sequence[Mapping[str, Known]]) -> list[figure.Panel]:
  """Returns total cost over questions, and the right answers of each way."""
  questions = np.geomspace(1, 1e8, 60)
  costs = {
    name: figure.Line(
      x=questions.tolist(),
      y=(ways.at_once + questions * ways.per_question).tolist(),
      colour=_colour(name),
    )
    for name, ways in seeds[0].items()
    if 'once' not in name  # they cost as much as the paraphrased
  }
  kept = {}
  for name in WAYS:
    new = _percent([ways[name].new for ways in seeds])
    old = _percent([ways[name].old for ways in seeds])
    colour = _colour(name)
    kept[name] = figure.Line(
      x=old[:1], y=new[:1], style='o', width=2.0, colour=colour
    )
    if len(seeds) == 1:
      continue
    # The intervals; a name that begins with '_' is not in the legend.
    kept[f'_new, {name}'] = figure.Line(
      x=[old[0], old[0]], y=new[1:], colour=colour
    )
    kept[f'_old, {name}'] = figure.Line(
      x=old[1:], y=[new[0], new[0]], colour=colour
    )
  return [
    figure.Panel(
      title='cost',
      x_label='questions about the new facts',
      y_label='FLOPs, training and answers',
      lines=costs,
      log_x=True,
      log_y=True,
      log_base=10,
    ),
    figure.Panel(
      title='knowledge',
      x_label='right about old facts, %',
      y_label='right about new facts, %',
      lines=kept,
      y_limits=(-5, 105),
    ),
  ]


def main(argv: list[str]) -> None:
  """Measures the missing seeds, prints the table and draws the figure."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  workdir = pathlib.Path(study_flags.required_workdir())
  seeds = []
  for seed in range(study_flags.SEEDS.value or _NUM_SEEDS):
    seeds.append(read_or_measure(workdir, seed))
    print(f'seed {seed} is measured', flush=True)
  print(table(seeds))
  if study_flags.FIGURE.value:
    figure.save(study_flags.FIGURE.value, panels(seeds), share_y=False)


if __name__ == '__main__':
  app.run(main)
