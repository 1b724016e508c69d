"""Reports of rollouts: metrics, the table of samples, lines and warnings."""

import json
import pathlib

from storage import atomic, file_names, json_lines
from training import experiment as experiment_lib
from training.lifecycle import run_context
from training.rollouts import (
  diagnostics,
  rollout_config,
  rows as rows_lib,
)
from training.rollouts.draws import drawing


class Reports:
  """Reports every rollout batch of one start of a run."""

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    workdir: pathlib.Path,
    context: run_context.RunContext,
    first_step: int,
  ):
    """Drops samples of steps that are taken again."""
    config = experiment.rollouts
    assert config is not None
    self._config, self._context = config, context
    self._group_size = rollout_config.group_size_of(experiment.objective)
    per_rollout = config.steps_per_rollout(
      self._group_size, experiment.data.batch_size
    )
    self._lines_every = max(1, experiment.log_every_steps // per_rollout)
    self._watch = diagnostics.Watch(config, context.terminal.say)
    self._path = workdir / file_names.SAMPLES
    kept = [
      line
      for line in _read(self._path)
      if first_step and line['step'] <= first_step
    ]
    atomic.write_text(self._path, _text(kept))

  def tell(
    self, step: int, drawn: drawing.Drawn, arrays: rows_lib.Arrays
  ) -> None:
    """Reports a rollout batch before the first step on it."""
    values = diagnostics.figures(step, drawn, arrays, self._group_size)
    self._context.log.write('rollout', step, values)
    if drawn.index % self._lines_every == 0:
      self._context.terminal.say(
        diagnostics.report(
          drawn.index, values, is_rewarded=self._config.is_rewarded
        )
      )
    self._watch.see(step, values)
    every = self._config.samples_every
    if every and drawn.index % every == 0:
      rows = diagnostics.table(
        step, drawn, self._group_size, self._config.num_samples
      )
      with self._path.open('a', encoding='utf-8') as file:
        file.write(_text(rows))


def _read(path: pathlib.Path) -> list[dict]:
  if not path.exists():
    return []
  # Incomplete lines, left by a kill, are of samples that are drawn again.
  lines = path.read_bytes().split(b'\n')[:-1]
  records, _ = json_lines.parse(lines, ('step', 'answer'))
  return records


def _text(rows: list[dict]) -> str:
  return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
