"""TensorBoard's HParams of a sweep: every run with its point and its curves.

    tensorboard --logdir=runs/lr/tensorboard

`tensorboard/POINT/seedSEED/` is written again at the end of every start of the
sweep, from the runs' metrics.jsonl. A point is a session group, so that the
HParams tables can show means over seeds.
"""

from collections.abc import Mapping
import pathlib
import shutil
from typing import Any

from tensorboardX import summary as tensorboard_summary
from tensorboardX.proto import plugin_hparams_pb2

from storage import file_names
from studies.sweeps import claims
from studies.sweeps.reporting import results as results_lib
from training.reporting import journal, metrics

# Records of metrics.jsonl that are written; the others depend on the machine.
_KINDS = 'train', 'eval'
# Typed as Any: type checkers cannot read generated modules.
_hparams: Any = plugin_hparams_pb2


def save(results: results_lib.Results, workdir: pathlib.Path) -> None:
  """Writes the event files of all runs of a sweep.

  Raises:
    OSError: they cannot be written.
    ValueError: metrics of a run are damaged.
  """
  root = workdir / file_names.TENSORBOARD
  shutil.rmtree(root, ignore_errors=True)
  for row in results.rows:
    name = f'{row.point:04d}'
    for run in sorted((workdir / claims.TRIALS / name).glob('seed*')):
      _save_run(
        run, root / name / run.name, name, row.params, results.sweep.metric
      )


def _save_run(
  run: pathlib.Path,
  directory: pathlib.Path,
  group: str,
  params: Mapping[str, Any],
  metric: str,
) -> None:
  """Writes the event file of one run."""
  records = [r for r in metrics.read(run) if r['kind'] in _KINDS]
  writer = journal.TensorBoard(directory, purge_step=0)
  try:
    experiment, start, end = tensorboard_summary.hparams(
      dict(params), {f'eval/{metric}': 0.0}
    )
    for each in (experiment, _of_group(start, group), end):
      writer.add(0, each)
    for record in records:
      values = {
        f'{record["kind"]}/{name}': value
        for name, value in record.items()
        if name not in ('kind', 'step')
      }
      writer.write(record['step'], values)
  finally:
    writer.close()


def _of_group(start: Any, group: str) -> Any:
  """Returns the summary of a session's start with the name of its group."""
  plugin = start.value[0].metadata.plugin_data
  content = _hparams.HParamsPluginData.FromString(plugin.content)
  content.session_start_info.group_name = group
  plugin.content = content.SerializeToString()
  return start
