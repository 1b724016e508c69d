"""Learning rate, weight decay and depth, by TPE; ASHA ends the poor trials.

    python sweep.py --config=experiments/quickstart.py \
      --sweep=experiments/sweeps/tpe_asha.py --workdir=runs/tpe_asha \
      --config.num_steps=270 --config.eval_every_steps=30 \
      --config.eval_batches=16

TPE is Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization, and
ASHA is arXiv:1810.05934. ASHA needs evaluations before the last step. Trials of
equal depth run together.
"""

from training import sweep


def get_sweep() -> sweep.Sweep:
  """Returns the sweep."""
  return sweep.Sweep(
    name='tpe_asha',
    parameters={
      'optimizer.peak_lr': sweep.LogUniform(1e-3, 1e-1),
      'optimizer.weight_decay': sweep.LogUniform(1e-3, 1.0),
      'model.num_layers': sweep.Integer(1, 4),
    },
    strategy='tpe',
    pruner='asha',
    num_trials=32,
    num_seeds=2,
  )
