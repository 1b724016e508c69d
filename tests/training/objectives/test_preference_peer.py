"""Losses and gradients of preferences, beside the trainers of TRL.

The same weights, completions and reference log-probabilities: our rows hold
several units, TRL's batches one padded completion per row.
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
from tests.helpers.training import preference_rows
from training import step as step_lib
from training.objectives import (
  next_token,
  port,
  preference,
  preference_losses,
)

_WHY = 'TRL is not installed: pip install -r requirements-peer.txt'
torch = pytest.importorskip('torch', reason=_WHY)
transformers = pytest.importorskip('transformers', reason=_WHY)
trl = pytest.importorskip('trl', reason=_WHY)

MODEL = tiny_models.llama_like(init_std=0.3)
ROW = 64


@pytest.fixture(scope='module')
def pair():
  """Our model with its params, and the same one of `transformers`."""
  module = transformer.Transformer(MODEL)
  params = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))
  _, values = config_json.write(MODEL, 'llama')
  theirs = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**values, attn_implementation='eager')
  )
  state = {k: torch.tensor(x) for k, x in _tensors(params).items()}
  missing, unexpected = theirs.load_state_dict(state, strict=False)
  assert not unexpected
  assert not missing
  # As its trainers do when they are made.
  trl.trainer.utils.add_fused_lm_head(
    theirs, outputs=('log_probs', 'entropy', 'mean_logits', 'is_top1')
  )
  return module, params, theirs.train()


def _tensors(params):
  pieces = tensor_map.pieces('llama', MODEL, {})
  return {name: np.array(x) for name, x in exporting.tensors_of(params, pieces)}


def _ours(module, params, objective, units):
  """Returns loss, gradients by TRL's names and metrics of a whole batch."""
  objective.validate()
  rows = preference_rows.pack(units, ROW, units_per_row=3)
  assert len(rows) < len(units)  # several units share a row
  batch = preference_rows.batch(rows, row_length=ROW)
  batch = {k: jnp.asarray(batch[k]) for k in objective.batch_spec()}
  model = port.Model(module)

  @jax.jit
  def run(params):
    totals = objective.totals(params, batch, model)
    given = {} if totals is None else {'totals': totals}

    def loss(params):
      total, sums = objective(params, batch, model, **given)
      return total / sums['weight'], sums

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, sums), gradient = run(params)
  metrics = step_lib._reported(
    {k: v for k, v in sums.items() if k not in ('weight', 'tokens')},
    sums['weight'],
  )
  return float(loss), _tensors(gradient), metrics


def _padded(documents, is_left=False):
  """Returns ids, attention mask and completion mask, as TRL collates them."""
  longest = max(document.length for document in documents)
  arrays = np.zeros((3, len(documents), longest), np.int64)
  for i, document in enumerate(documents):
    size = document.length
    place = slice(longest - size, None) if is_left else slice(0, size)
    arrays[0, i, place] = [*document.prompt, *document.completion]
    arrays[1, i, place] = 1
    start = place.start + len(document.prompt)
    arrays[2, i, start : start + len(document.completion)] = 1
  return map(torch.tensor, arrays)


def _sums(documents):
  return torch.tensor([sum(d.ref_logprobs) for d in documents])


def _trainer(trainer, model, **fields):
  """Returns a trainer of TRL that computes losses, and trains nothing."""
  accelerator = types.SimpleNamespace(
    device=torch.device('cpu'),
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
  )
  made = object.__new__(trainer)
  fields = {
    'model': model,
    'accelerator': accelerator,
    'aux_loss_enabled': False,
    'precompute_ref_logps': True,
    '_metrics': {'train': collections.defaultdict(list)},
    '_total_train_tokens': 0,
    '_tp_size': 1,
    'label_smoothing': 0.0,
    **fields,
  }
  vars(made).update(fields)
  return made


def _gradients(model, loss):
  model.zero_grad()
  loss.backward()
  return {name: p.grad.numpy() for name, p in model.named_parameters()}


def _assert_same(ours, loss, gradients):
  got, got_gradients, _ = ours
  assert got == pytest.approx(loss.item(), abs=1e-5)
  assert got_gradients.keys() == gradients.keys()
  size = max(np.abs(x).max() for x in gradients.values())
  assert size > 1e-3
  for name, expected in gradients.items():
    # Float32 on both sides: 1e-5 of the largest gradient.
    np.testing.assert_allclose(
      got_gradients[name], expected, atol=1e-5 * max(size, 1), err_msg=name
    )


def _dpo(model, units, kinds, weights=(1.0,), **fields):
  trainer = _trainer(
    trl.DPOTrainer,
    model,
    ld_alpha=None,
    f_divergence_type='reverse_kl',
    loss_types=kinds,
    loss_weights=weights,
    use_weighting=False,
    **fields,
  )
  chosen, rejected = zip(*units, strict=True)
  ids, attention, completion = _padded([*chosen, *rejected])
  inputs = {
    'input_ids': ids,
    'attention_mask': attention,
    'completion_mask': completion,
    'ref_chosen_logps': _sums(chosen),
    'ref_rejected_logps': _sums(rejected),
  }
  loss = trainer._compute_loss(model, inputs, return_outputs=False)
  return loss, _gradients(model, loss), trainer._metrics['train']


@pytest.mark.parametrize(
  ('options', 'kinds', 'fields'),
  [
    ({}, ['sigmoid'], {'beta': 0.1}),
    ({'beta': 0.5}, ['sigmoid'], {'beta': 0.5}),
    (
      {'loss': 'robust', 'beta': 0.3, 'label_smoothing': 0.2},
      ['robust'],
      {'beta': 0.3, 'label_smoothing': 0.2},
    ),
    # TRL has no conservative DPO by this name: its trainer of CPO has.
    ({'length_normalised': True}, ['sigmoid_norm'], {'beta': 0.1}),
    (
      {'loss': 'ipo', 'beta': 0.2, 'length_normalised': True},
      ['ipo'],
      {'beta': 0.2},
    ),
    # Imitation is a mean over all tokens of the batch.
    (
      {'imitation_weight': 0.7},
      ['sigmoid', 'sft'],
      {'beta': 0.1, 'weights': (1.0, 0.7)},
    ),
  ],
  ids=str,
)
def test_losses_with_a_reference(pair, options, kinds, fields):
  module, params, theirs = pair
  units = preference_rows.draw(7, vocab_size=61, seed=3)
  ours = _ours(module, params, preference.Preference(**options), units)
  loss, gradients, metrics = _dpo(theirs, units, kinds, **fields)
  _assert_same(ours, loss, gradients)
  if options.get('length_normalised'):
    return  # TRL's rewards are sums there
  for name, theirs_name in (
    ('accuracy', 'rewards/accuracies'),
    ('margin', 'rewards/margins'),
    ('chosen_reward', 'rewards/chosen'),
    ('rejected_reward', 'rewards/rejected'),
    ('chosen_logprob', 'logps/chosen'),
    ('rejected_logprob', 'logps/rejected'),
  ):
    assert ours[2][name] == pytest.approx(metrics[theirs_name][0], abs=1e-4)


@pytest.mark.parametrize(
  ('options', 'fields'),
  [
    ({'label_smoothing': 0.2}, {'label_smoothing': 0.2}),
    ({'loss': 'ipo', 'beta': 0.3}, {'beta': 0.3, 'loss_type': 'ipo'}),
  ],
  ids=str,
)
def test_formulas_that_one_trainer_has_with_a_reference_and_one_without(
  options, fields
):
  """Conservative DPO, and IPO of sums: of the same scores."""
  rng = np.random.default_rng(0)
  chosen, rejected = rng.normal(0, 5, (2, 50)).astype(np.float32)
  trainer = _trainer(
    _trainers()[0],
    None,
    **{'alpha': 0.0, 'beta': 0.1, 'loss_type': 'sigmoid', **fields},
  )
  expected, _, _ = trainer.cpo_loss(
    torch.tensor(chosen), torch.tensor(rejected)
  )
  objective = preference.Preference(**options)
  of_pairs = objective._loss.of_pairs
  assert of_pairs is not None
  got = of_pairs(
    chosen,
    rejected,
    preference_losses.Options(objective._beta, objective.label_smoothing, 0.0),
  )
  np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5)


def test_fine_tuning(pair):
  """Cross-entropy of the completions' tokens, a mean over all of them."""
  module, params, theirs = pair
  units = preference_rows.draw(7, vocab_size=61, seed=3)
  ours = _ours(module, params, next_token.NextToken(), units)
  documents = [document for unit in units for document in unit]
  ids, attention, completion = _padded(documents)
  labels = ids.masked_fill(completion == 0, -100)
  loss = theirs(input_ids=ids, attention_mask=attention, labels=labels).loss
  _assert_same(ours, loss, _gradients(theirs, loss))


@pytest.mark.parametrize(
  'options', [{}, {'beta': 0.4, 'desirable_weight': 1.3}], ids=str
)
def test_kto(pair, options):
  module, params, theirs = pair
  units = preference_rows.draw(7, vocab_size=61, labelled=True, seed=5)
  objective = preference.Preference(loss='kto', **options)
  ours = _ours(module, params, objective, units)
  trainer = _trainer(
    trl.KTOTrainer,
    theirs,
    beta=objective._beta,
    loss_type='kto',
    calculate_KL=True,
    desirable_weight=objective.desirable_weight,
    undesirable_weight=objective.undesirable_weight,
  )
  own, other = zip(*units, strict=True)
  ids, attention, completion = _padded(own)
  kl_ids, kl_attention, kl_completion = _padded(other)
  inputs = {
    'input_ids': ids,
    'attention_mask': attention,
    'completion_mask': completion,
    'KL_input_ids': kl_ids,
    'KL_attention_mask': kl_attention,
    'KL_completion_mask': kl_completion,
    'label': torch.tensor([d.label > 0 for d in own]),
    'ref_logps': _sums(own),
    'ref_KL_logps': _sums(other),
  }
  loss = trainer._compute_loss(theirs, inputs, return_outputs=False)
  _assert_same(ours, loss, _gradients(theirs, loss))
  metrics = trainer._metrics['train']
  assert metrics['kl'][0] > 1.0
  for name, theirs_name in (
    ('kl', 'kl'),
    ('chosen_reward', 'rewards/chosen'),
    ('rejected_reward', 'rewards/rejected'),
    ('chosen_logprob', 'logps/chosen'),
    ('rejected_logprob', 'logps/rejected'),
  ):
    assert ours[2][name] == pytest.approx(metrics[theirs_name][0], abs=1e-4)


def _without_reference(model, units, trainer_class, **fields):
  trainer = _trainer(
    trainer_class, model, is_encoder_decoder=False, padding_value=0, **fields
  )
  trainer.pad_token_id = 0
  batch = {}
  for side, documents in zip(
    ('chosen', 'rejected'), zip(*units, strict=True), strict=True
  ):
    ids, attention, completion = _padded(documents)
    batch[f'{side}_input_ids'] = ids
    batch[f'{side}_attention_mask'] = attention
    batch[f'{side}_labels'] = ids.masked_fill(completion == 0, -100)
  loss, metrics = trainer.get_batch_loss_metrics(model, batch)
  return loss, _gradients(model, loss), metrics


def _trainers():
  from trl.experimental import cpo, orpo

  return cpo.CPOTrainer, orpo.ORPOTrainer


@pytest.mark.parametrize(
  ('options', 'fields'),
  [
    ({'loss': 'cpo'}, {'beta': 0.1, 'loss_type': 'sigmoid', 'cpo_alpha': 1.0}),
    (
      {'loss': 'cpo', 'beta': 0.3, 'label_smoothing': 0.1,
       'imitation_weight': 0.0},
      {'beta': 0.3, 'loss_type': 'sigmoid', 'cpo_alpha': 0,
       'label_smoothing': 0.1},
    ),
    (
      {'loss': 'simpo'},
      {'beta': 2.0, 'loss_type': 'simpo', 'simpo_gamma': 1.0, 'cpo_alpha': 0},
    ),
    (
      {'loss': 'simpo', 'beta': 2.5, 'gamma': 0.3, 'imitation_weight': 0.5},
      {'beta': 2.5, 'loss_type': 'simpo', 'simpo_gamma': 0.3,
       'cpo_alpha': 0.5},
    ),
  ],
  ids=str,
)  # fmt: skip
def test_cpo_and_simpo(pair, options, fields):
  module, params, theirs = pair
  units = preference_rows.draw(7, vocab_size=61, seed=3)
  ours = _ours(module, params, preference.Preference(**options), units)
  fields = {'alpha': 0.0, **fields}
  loss, gradients, metrics = _without_reference(
    theirs, units, _trainers()[0], **fields
  )
  _assert_same(ours, loss, gradients)
  assert ours[2]['margin'] == pytest.approx(
    metrics['rewards/margins'], abs=1e-4
  )
  if fields['cpo_alpha']:
    assert ours[2]['chosen_nll'] == pytest.approx(metrics['nll_loss'], abs=1e-4)


@pytest.mark.parametrize('beta', [0.1, 2.0])
def test_orpo(pair, beta):
  module, params, theirs = pair
  units = preference_rows.draw(7, vocab_size=61, seed=3)
  objective = preference.Preference(loss='orpo', beta=beta)
  ours = _ours(module, params, objective, units)
  # TRL imitates the prompt too, which the paper's equation 6 does not: its
  # cross-entropy is replaced by that of the completions.
  loss, gradients, metrics = _without_reference(
    theirs, units, _orpo_of_completions(), beta=beta
  )
  _assert_same(ours, loss, gradients)
  assert ours[2]['margin'] == pytest.approx(
    metrics['rewards/margins'], abs=1e-4
  )


def _orpo_of_completions():
  class Trainer(_trainers()[1]):
    def concatenated_forward(self, model, batch):
      found = super().concatenated_forward(model, batch)
      labels = batch['chosen_labels']
      counts = (labels[:, 1:] != -100).sum(-1)
      # chosen_logps are means over a completion's tokens.
      nll = -(found[0] * counts).sum() / counts.sum()
      return (*found[:4], nll, *found[5:])

  return Trainer
