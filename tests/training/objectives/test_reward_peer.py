"""The reward objective beside TRL: losses and gradients of the same pairs.

Our rows hold several pairs, TRL's batches one padded answer per row.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen.huggingface import config_json, exporting, tensor_map
from models import transformer
from tests.helpers import tiny_models
from tests.training.objectives import test_reward
from training.objectives import port, reward

_WHY = 'TRL is not installed: pip install -r requirements-peer.txt'
torch = pytest.importorskip('torch', reason=_WHY)
transformers = pytest.importorskip('transformers', reason=_WHY)
reward_trainer = pytest.importorskip('trl.trainer.reward_trainer', reason=_WHY)

MODEL = tiny_models.llama_like(init_std=0.3)
PAD = 60  # an id that no answer has
# Lengths of chosen and rejected answers, and the margin of the pair.
PAIRS = [(5, 3, 0.5), (2, 9, 0.0), (7, 7, 1.5), (1, 4, 0.25), (6, 2, 1.0)]


@pytest.fixture(scope='module')
def answers():
  """Returns the ids of chosen and rejected answers."""
  rng = np.random.default_rng(0)
  return [
    tuple(rng.integers(0, PAD, size).tolist() for size in pair[:2])
    for pair in PAIRS
  ]


@pytest.fixture(scope='module')
def models():
  """Our params, and the same reward model of `transformers`."""
  module = transformer.Transformer(MODEL)
  params = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))
  heads = reward.Reward().init_heads(MODEL, jax.random.key(2))
  params = {**params, 'heads': heads}
  _, values = config_json.write(MODEL, 'llama')
  values |= {'num_labels': 1, 'pad_token_id': PAD}
  theirs = transformers.LlamaForSequenceClassification(
    transformers.LlamaConfig(**values, attn_implementation='eager')
  )
  state = {k: torch.tensor(x) for k, x in _tensors(params).items()}
  theirs.load_state_dict(state)
  return params, theirs


def _tensors(params):
  """Returns our params, or their gradients, by the names of `transformers`."""
  pieces = [
    piece
    for piece in tensor_map.pieces('llama', MODEL, {})
    if piece.theirs != 'lm_head.weight'
  ]
  tensors = {n: np.array(x) for n, x in exporting.tensors_of(params, pieces)}
  head = params['heads']['reward']['kernel']
  return tensors | {'score.weight': np.array(head).T}


def _rows(answers):
  """Returns the pairs, two to a row of 32 tokens."""
  lengths = [pair[:2] for pair in PAIRS]
  rows = [sum(lengths[i : i + 2], ()) for i in range(0, len(lengths), 2)]
  batch = test_reward.pairs(rows, row_length=32)
  documents = [document for pair in answers for document in pair]
  for row, ids_T in enumerate(batch['segment_ids']):
    for segment in range(1, ids_T.max() + 1):
      index = 4 * row + segment - 1
      batch['tokens'][row][ids_T == segment] = documents[index]
      batch['margins'][row][ids_T == segment] = PAIRS[index // 2][2]
  return batch


@pytest.mark.parametrize(
  ('margin', 'centring'), [(0.0, 0.0), (1.0, 0.0), (0.0, 0.05), (1.0, 0.3)]
)
def test_loss_and_gradients_are_those_of_trl(models, answers, margin, centring):
  params, theirs = models
  objective = reward.Reward(margin=margin, centring=centring)
  objective.validate()
  batch = _rows(answers)
  batch = {name: jnp.asarray(batch[name]) for name in objective.batch_spec()}
  module = transformer.Transformer(MODEL)

  def mean_loss(params):
    loss, sums = objective(params, batch, port.Model(module))
    return loss / sums['weight'], sums

  (loss, sums), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(
    params
  )

  examples = [
    {'chosen_ids': chosen, 'rejected_ids': rejected}
    | ({'margin': pair[2]} if margin else {})
    for (chosen, rejected), pair in zip(answers, PAIRS, strict=True)
  ]
  inputs = reward_trainer.DataCollatorForPreference(PAD)(examples)
  trainer = _trainer(theirs, centring or None)
  theirs.zero_grad()
  their_loss = trainer.compute_loss(theirs, inputs)
  their_loss.backward()
  assert float(loss) == pytest.approx(their_loss.item(), abs=1e-5)
  expected = {n: p.grad.numpy() for n, p in theirs.named_parameters()}
  got = _tensors(grads)
  assert got.keys() == expected.keys()
  assert max(np.abs(x).max() for x in expected.values()) > 1e-2
  for name, gradient in expected.items():
    np.testing.assert_allclose(got[name], gradient, atol=1e-5, err_msg=name)
  # The head of the language model learns nothing.
  assert not np.abs(grads['params']['head']['embedding']).max()
  for ours, name in (('accuracy', 'accuracy'), ('margin', 'margin')):
    mean = sums[ours].total / sums[ours].weight
    assert float(mean) == pytest.approx(
      trainer._metrics['train'][name][-1], abs=1e-5
    )


def _trainer(model, centring):
  """Returns a trainer of TRL that computes losses, and trains nothing."""
  trainer = object.__new__(reward_trainer.RewardTrainer)
  accelerator = types.SimpleNamespace(
    device=torch.device('cpu'),
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
  )
  vars(trainer).update(
    model=model,
    accelerator=accelerator,
    args=types.SimpleNamespace(center_rewards_coefficient=centring),
    _metrics={'train': collections.defaultdict(list)},
    _total_train_tokens=0,
    _tp_size=1,
  )
  return trainer
