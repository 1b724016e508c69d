"""A group: trials with all their seeds, trained at once in one program.

The group trains from evaluation to evaluation. There each trial is recorded,
and may end: complete, pruned, or diverged. A diverged run does not disturb the
other runs. The places of ended and diverged runs are still computed until half
of the places are free; then the program is compiled for fewer places.
"""

from collections.abc import Sequence
import dataclasses
import math
import pathlib
from typing import Any

import jax
import numpy as np

from data import batches as batches_lib
from studies.sweeps import (
  claims as claims_lib,
  points,
  single,
  store as store_lib,
)
from studies.sweeps.groups import programs, run_records, run_states, together
from training import assemble, experiment as experiment_lib
from training.checkpoints import init_from, workdir as workdir_lib
from training.evaluation import validation
from training.lifecycle import interrupt


@dataclasses.dataclass(kw_only=True)
class _Run:
  """One seed of one trial."""

  member: together.Member
  seed: int
  experiment: experiment_lib.Experiment
  workdir: pathlib.Path
  records: run_records.Records
  is_finite: bool = True


class Structure:
  """The shared parts of a structure's trials: data, and compiled program."""

  def __init__(self, root: pathlib.Path, member: together.Member):
    """Opens the data; builds the tokenizer, if this is the first time."""
    experiment = next(iter(member.experiments.values()))
    place = together.workdir_of(root, member.structure)
    self.parts = assemble.assemble(experiment, place)
    self.parts.batches.close()
    # `together.reason_apart` leaves runs with rollouts out.
    assert isinstance(self.parts.batches, batches_lib.TrainBatches)
    self._sources = self.parts.batches.sources
    config = self.parts.learner.model.config
    self.program = programs.Program(experiment, config.spare_ids)
    most = experiment.eval_batches or None
    self.eval_batches = list(self.parts.eval_batches)[:most]

  def batches(
    self, experiment: experiment_lib.Experiment, seed: int, step: int
  ) -> batches_lib.TrainBatches:
    """Returns the batches of a seed, from a step on."""
    batches = batches_lib.TrainBatches(
      self._sources, experiment.data, seed=seed
    )
    batches.seek(step)
    return batches


def common_steps(members: Sequence[together.Member]) -> list[tuple[int, list]]:
  """Returns (step, members) pairs: trials that can continue together.

  There is usually one pair. If a group was killed while it saved, some trials
  may lack its last step; then all return to the step before.
  """
  available = {}
  for i, member in enumerate(members):
    places = [single.directory(member.claim, s) for s in member.experiments]
    shared = set.intersection(*(run_states.steps(place) for place in places))
    available[i] = shared or {0}
  left, found = set(available), []
  while left:
    counts: dict[int, list[int]] = {}
    for i in sorted(left):
      for step in available[i]:
        counts.setdefault(step, []).append(i)
    # The step that most trials have; of these, the last one.
    step = max(counts, key=lambda step: (len(counts[step]), step))
    found.append((step, [members[i] for i in counts[step]]))
    left -= set(counts[step])
  return found


class Group:
  """The runs of a group, from a common step to their ends."""

  def __init__(
    self,
    structure: Structure,
    members: Sequence[together.Member],
    step: int,
    store: store_lib.Store,
    progress: single.Progress,
  ):
    """Restores or starts the runs.

    Args:
      step: a step at which every run has a state; 0: the runs begin.
    """
    self._structure = structure
    self._program = structure.program
    self._store = store
    self._progress = progress
    self._members = list(members)  # not finished
    self._step = step
    first = next(iter(members[0].experiments.values()))
    self._experiment = first
    self._steps = points.evaluations(first)
    self._runs = [
      _Run(
        member=member,
        seed=seed,
        experiment=experiment,
        workdir=(place := single.directory(member.claim, seed)),
        records=run_records.Records(place, step),
      )
      for member in members
      for seed, experiment in member.experiments.items()
    ]
    self._seeds = sorted({run.seed for run in self._runs})
    start = init_from.describe(first, structure.parts.stop_ids)
    for run in self._runs:
      workdir_lib.record(run.workdir, run.experiment, start=start)
    self._place(self._first_states())
    self._pending: list[tuple[int, dict[str, jax.Array]]] = []

  def run(self) -> None:
    """Trains until every trial of the group is finished.

    Raises:
      single.Stopped: a signal came, and all runs are saved.
      ValueError: the metric of the sweep is no value of the evaluations.
    """
    batches = {
      seed: self._structure.batches(self._experiment, seed, self._step)
      for seed in self._seeds
    }
    grace_s = self._experiment.checkpoint.grace_s
    try:
      with interrupt.Interrupt(grace_s=grace_s) as stop:
        if self._step in self._steps:
          # Killed between the save and the record of this evaluation.
          self._settle()
        while self._members:
          self._take_step({s: next(each) for s, each in batches.items()})
          self._after_step()
          if stop and self._members:
            self._save()
            raise single.Stopped(stop.exit_code)
    finally:
      for each in batches.values():
        each.close()

  def _take_step(self, rows_of: dict[int, Any]) -> None:
    rows = {
      name: np.stack([rows_of[seed][name] for seed in self._seeds])
      for name in rows_of[self._seeds[0]]
    }
    self._states, metrics = self._program.train(
      self._states, rows, self._seeds_R, self._numbers
    )
    self._step += 1
    self._pending.append((self._step, metrics))

  def _after_step(self) -> None:
    """Reports, evaluates, saves and settles, where the step is due."""
    step, experiment = self._step, self._experiment
    is_evaluated = step in self._steps
    is_saved = step % experiment.checkpoint.every_steps == 0
    if step % experiment.log_every_steps == 0 or is_evaluated or is_saved:
      self._report()
    if is_evaluated:
      self._evaluate()
    if is_evaluated or is_saved:
      self._save()
    if is_evaluated:
      self._settle()

  def _report(self) -> None:
    """Records the metrics of the steps so far; notices runs that diverged."""
    for step, metrics in jax.device_get(self._pending):
      for i, run in enumerate(self._runs):
        values = {name: float(value[i]) for name, value in metrics.items()}
        if not run.is_finite:
          continue
        if not all(map(math.isfinite, values.values())):
          run.is_finite = False
          continue
        weight = values.pop('weight')
        values['learning_rate'] = float(self._rates_RT[i, step - 1])
        tokens = int(values.pop('tokens', weight))
        run.records.add('train', step, {**values, 'tokens': tokens})
    self._pending = []
    for run in self._runs:
      run.records.write()
    for member in self._members:
      self._progress(member.claim.point, None, self._step)

  def _evaluate(self) -> None:
    """Adds the evaluation of every run to its records."""
    parts, batches = self._structure.parts, self._structure.eval_batches
    sums = jax.device_get(
      [self._program.evaluate(self._states.params, b) for b in batches]
    )
    num_bytes_V = parts.tokenizer.num_bytes_V()
    for i, run in enumerate(self._runs):
      own = iter([jax.tree.map(lambda x, i=i: x[i], each) for each in sums])
      if run.is_finite:
        values = validation.evaluate(
          lambda params, batch, own=own: next(own),
          None,
          batches,
          put_batch=lambda batch: batch,
          num_bytes_V=num_bytes_V,
          predicts_text=run.experiment.objective.predicts_text,
        )
        run.records.add('eval', self._step, values)
      run.records.write()

  def _settle(self) -> None:
    """Records the evaluation of each trial; ends the finished ones."""
    metric, ended = self._store.sweep.metric, []
    for member in self._members:
      values = {}
      for run in self._runs:
        if run.member is member:
          found = single.scores(run.workdir, metric)
          if run.is_finite and self._step not in found:
            raise ValueError(
              f'metric: got no {metric} at step {self._step}, expected one at'
              ' each evaluation'
            )
          values[run.seed] = found.get(self._step, math.nan)
      if single.settle(
        self._store, member.claim, values, self._steps, self._step
      ):
        ended.append(member)
    for member in ended:
      self._members.remove(member)
      for seed in member.experiments:
        run_states.keep(single.directory(member.claim, seed), [])
      member.claim.release()
    self._compact()

  def _save(self) -> None:
    """Saves every run that continues."""
    self._report()
    host = jax.device_get(run_states.raw(self._states))
    alive = [(i, r) for i, r in enumerate(self._runs) if self._is_alive(r)]
    for i, run in alive:
      own = jax.tree.map(lambda x, i=i: x[i], host)
      run_states.save(run.workdir, self._step, own)
    # Older states are deleted only now: after a kill in between, every run
    # still has the step before.
    for _, run in alive:
      run_states.keep(run.workdir, [self._step])

  def _is_alive(self, run: _Run) -> bool:
    return any(run.member is member for member in self._members)

  def _compact(self) -> None:
    """Gives up the places of ended trials, if there are many."""
    alive = [i for i, run in enumerate(self._runs) if self._is_alive(run)]
    if not alive or 2 * len(alive) > len(self._runs):
      return
    host = jax.device_get(run_states.raw(self._states))
    self._runs = [self._runs[i] for i in alive]
    self._place(
      [jax.tree.map(lambda x, i=i: x[i], host) for i in alive],
    )

  def _first_states(self) -> list[Any]:
    """Returns the states of the runs at the first step, on the host."""
    if self._step:
      abstract = jax.eval_shape(run_states.raw, self._program.abstract_state)
      return [
        run_states.load(run.workdir, self._step, abstract) for run in self._runs
      ]
    of_seed = {
      seed: jax.device_get(run_states.raw(self._program.first_state(seed)))
      for seed in self._seeds
    }
    return [of_seed[run.seed] for run in self._runs]

  def _place(self, states: list[Any]) -> None:
    """Lays the states of `_runs` on the devices, padded to equal shares."""
    num = self._program.padded(len(self._runs))
    runs = [*self._runs, *[self._runs[-1]] * (num - len(self._runs))]
    states = [*states, *[states[-1]] * (num - len(states))]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
    self._states = self._program.placed(run_states.with_key(stacked))
    self._numbers = self._program.numbers([run.experiment for run in runs])
    self._rates_RT = np.asarray(self._numbers['rates'])
    self._seeds_R = self._program.placed(
      np.array([self._seeds.index(run.seed) for run in runs], np.int32)
    )


def train(
  structure: Structure,
  members: Sequence[together.Member],
  store: store_lib.Store,
  progress: single.Progress,
) -> None:
  """Trains trials of one structure to their ends.

  Raises:
    single.Stopped: a signal came, and all runs are saved.
  """
  for step, group in common_steps(members):
    try:
      Group(structure, group, step, store, progress).run()
    except (ValueError, OSError) as error:
      finish_errored(store, [m.claim for m in group], single.one_line(error))


def finish_errored(
  store: store_lib.Store, claims: Sequence[claims_lib.Claim], note: str
) -> None:
  """Records unfinished trials as errored."""
  running = {row.number for row in store.rows() if row.state == 'running'}
  for claim in claims:
    if claim.trial.number in running:
      store.finish(claim.trial, state='errored', note=note)
