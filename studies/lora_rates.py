"""LoRA against full fine-tuning: the losses at the best learning rates.

    python -m studies.lora_rates --workdir=runs/lora \
      --figure=runs/lora.svg

    python -m studies.lora_rates --experiment=experiments/smollm2.py \
      --kinds=cpu,cpu-rank-8 --base=runs/SmolLM2-135M-Instruct \
      --workdir=runs/smol_rates

Trains the base of `experiments/problems.py`, unless --base names another, then
fine-tunes it with all weights and with adapters, as the experiment says. The
learning rates are powers of two. They start at the experiment's own rate and
move towards lower losses until the best rate has a higher loss on both sides,
so that no optimum lies at the edge of a grid. The optimum is the vertex of the
parabola through these three. Every run is a workdir below --workdir, so the
same command resumes after an interruption.

Reference: Schulman et al. 2025, LoRA Without Regret
(thinkingmachines.ai/blog/lora): the best rate of LoRA is about ten times that
of full fine-tuning, at any rank.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import pathlib
import statistics

from absl import app, flags, logging
import jax

from checks import path_flags
from experiments import problems
from hardware import host_memory
from models import adapter_config, transformer
from studies.common import figure, load, quiet_run, rate_grid, study_flags
from training import experiment as experiment_lib, state as state_lib
from training.reporting import metrics, reporter

_EXPERIMENT = path_flags.DEFINE_path(
  'experiment',
  'experiments/lora_against_full.py',
  'File of the experiment. Its variants are KIND:DIRECTORY of a base.',
)
_KINDS = flags.DEFINE_list(
  'kinds',
  ['full', 'rank-8'],
  'Variants of the experiment; the others are compared with the first.',
)
_BASE = path_flags.DEFINE_path(
  'base',
  '',
  'Frozen directory that is fine-tuned. Default: the base of'
  ' experiments/problems.py is trained first.',
)
_NUM_SEEDS = 1
_MOST_RUNS = 12  # of one kind

Losses = dict[int, float]  # log2 of the learning rate -> loss, nats per token


def bracketed(loss_of: Callable[[int], float], first: int) -> Losses:
  """Returns losses around the best rate, which has a neighbour on both sides.

  Args:
    loss_of: returns the loss at log2 of a learning rate; not finite if training
      diverged.
    first: log2 of the rate to start from.

  Raises:
    ValueError: the loss still falls after `_MOST_RUNS` rates.
  """
  losses = {rate: loss_of(rate) for rate in (first - 1, first, first + 1)}
  while len(losses) < _MOST_RUNS:
    best = min(losses, key=lambda rate: _comparable(losses[rate]))
    missing = [rate for rate in (best - 1, best + 1) if rate not in losses]
    if not missing:
      return dict(sorted(losses.items()))
    losses[missing[0]] = loss_of(missing[0])
  raise ValueError(
    f'learning rates: got losses {losses} from 2^{first}, expected a best rate'
    ' between two others; the run is too short, or the first rate is far off'
  )


def _comparable(loss: float) -> float:
  return loss if loss == loss else float('inf')


def share_of_parameters(experiment: experiment_lib.Experiment) -> float:
  """Returns the trained parameters as a share of the model's parameters."""
  model = transformer.Transformer(experiment.model)
  params = state_lib.abstract_params(model)['params']
  whole = _size(params)
  if not experiment.adapter.rank:
    return 1.0
  trained = jax.eval_shape(
    lambda: adapter_config.init(experiment.adapter, params, jax.random.key(0))
  )
  return _size(trained) / whole


def _size(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def measure(
  workdir: pathlib.Path, kinds: list[str], base: str
) -> dict[str, Losses]:
  """Trains the missing runs in the workdir; returns the losses of each kind.

  Args:
    workdir: directory with a workdir for each run.
    kinds: variants of the experiment.
    base: frozen directory that is fine-tuned.
  """
  num_seeds = study_flags.SEEDS.value or _NUM_SEEDS

  def loss_of(kind: str, rate: int) -> float:
    losses = []
    for seed in range(num_seeds):
      place = workdir / f'{kind}_{rate}_{seed}'
      losses.append(_train(_experiment(kind, rate, seed, base), place))
      print(f'{kind:8} 2^{rate:<3} seed {seed}: {losses[-1]:.4f}', flush=True)
    return statistics.mean(losses)

  return {
    kind: bracketed(
      functools.partial(loss_of, kind), first_rate(_load(kind, base))
    )
    for kind in kinds
  }


def first_rate(experiment: experiment_lib.Experiment) -> int:
  """Returns log2 of an experiment's own learning rate, rounded."""
  return round(math.log2(experiment.optimizer.peak_lr))


def _load(kind: str, base: str) -> experiment_lib.Experiment:
  return load.experiment(f'{_EXPERIMENT.value}:{kind}:{base}', '--experiment')


def _base(workdir: pathlib.Path) -> str:
  """Returns the frozen directory to fine-tune; trains it if none is named."""
  if _BASE.value:
    return _BASE.value
  _train(problems.get_config('base'), workdir / 'base')
  return str(workdir / 'base' / 'frozen')


def _train(
  experiment: experiment_lib.Experiment, workdir: pathlib.Path
) -> float:
  """Trains or resumes in `workdir`; returns the last validation loss."""
  try:
    result = quiet_run.run(experiment, workdir)
  except reporter.NonFiniteError:
    return math.nan
  if result.exit_code:
    raise SystemExit('stopped by a signal; the same command resumes')
  records = metrics.read(workdir)
  return [each['loss'] for each in records if each['kind'] == 'eval'][-1]


def _experiment(kind, rate, seed, base) -> experiment_lib.Experiment:
  experiment = _load(kind, base)
  optimizer = dataclasses.replace(experiment.optimizer, peak_lr=2.0**rate)
  return dataclasses.replace(
    experiment,
    optimizer=optimizer,
    seed=seed,
    num_steps=study_flags.STEPS.value or experiment.num_steps,
    # Only the last loss counts.
    eval_at_start=False,
    freeze=experiment_lib.FreezeConfig(enabled=False),
  )


def report(losses: dict[str, Losses], shares: dict[str, float]) -> str:
  """Returns the table of the best losses and rates, beside the first kind."""
  lines = [
    '| fine-tuning | share of parameters | best loss | against full |'
    ' best rate | against full |',
    '|---|---|---|---|---|---|',
  ]
  best_of = {kind: min(each.values()) for kind, each in losses.items()}
  rate_of = {kind: _optimum(each) for kind, each in losses.items()}
  first = next(iter(losses))
  for kind in losses:
    gap = best_of[kind] / best_of[first] - 1
    ratio = 2 ** (rate_of[kind] - rate_of[first])
    lines.append(
      f'| {kind} | {shares[kind]:.2%} | {best_of[kind]:.4f} | {gap:+.2%} |'
      f' 2^{rate_of[kind]:.2f} = {2 ** rate_of[kind]:.1e} | {ratio:.1f} x |'
    )
  return '\n'.join(lines)


def _optimum(losses: Losses) -> float:
  rates = sorted(losses)
  found = rate_grid.optimum(rates, [losses[rate] for rate in rates])
  # A diverged neighbour leaves no parabola, but the best rate is known.
  return float(min(losses, key=losses.__getitem__)) if found is None else found


def panel(losses: dict[str, Losses]) -> figure.Panel:
  """Returns the loss over the learning rate, a line per kind."""
  return figure.Panel(
    title='fine-tuning by learning rate',
    x_label='learning rate',
    y_label='validation loss, nats per trained token',
    lines={
      kind: figure.Line(
        x=[2.0**rate for rate in each], y=list(each.values()), style='.-'
      )
      for kind, each in losses.items()
    },
    log_x=True,
  )


def main(argv: list[str]) -> None:
  """Measures the kinds and prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  # TFDS logs every data set that it loads, twice.
  logging.set_verbosity(logging.ERROR)
  host_memory.reuse_freed_memory()
  kinds = list(_KINDS.value)
  workdir = pathlib.Path(study_flags.required_workdir())
  base = _base(workdir)
  losses = measure(workdir, kinds, base)
  shares = {kind: share_of_parameters(_load(kind, base)) for kind in kinds}
  print(report(losses, shares))
  if study_flags.FIGURE.value:
    figure.save(study_flags.FIGURE.value, [panel(losses)])


if __name__ == '__main__':
  app.run(main)
