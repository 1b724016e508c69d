"""Rows of conversations: no document leaks, and no layout changes the loss.

The rows are made by the whole path of a run: JSON Lines, chat template, token
store, packing. In JAX and in TRL, a batch of the same conversations has the
same loss and the same gradients.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import batches as batches_lib, data_config, rows as rows_lib, sources
from frozen.huggingface import config_json, exporting, tensor_map
from models import transformer
from tests.helpers import tiny_models
from tests.helpers.open_weights import hf_files
from tests.helpers.training import chat_run
from text import hf_tokenizer
from training.objectives import next_token, port

MODEL = tiny_models.llama_like(vocab_size=352, init_std=0.3, max_length=512)
PACKINGS = ('none', 'first_fit', 'best_fit')


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """A tokenizer's source, and conversations."""
  root = tmp_path_factory.mktemp('rows')
  hf_files.qwen(root / 'source', template=chat_run.TEMPLATE)
  hf_tokenizer.convert(root / 'source', root / 'tokenizer')
  chat_run.write_chats(root / 'chats', train=12, validation=1)
  return root


@pytest.fixture(scope='module')
def params():
  module = transformer.Transformer(MODEL)
  return jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))


def _rows(root, packing='best_fit', row_length=160):
  config = data_config.DataConfig(
    open_source=sources.jsonl,
    path=str(root / 'chats' / '{split}.jsonl'),
    examples='chat',
    packing=packing,
    row_length=row_length,
    data_dir=str(root / 'data'),
  )
  (source,) = config.train_sources()
  return rows_lib.open_rows(
    source.open(config.data_dir, config.examples),
    hf_tokenizer.load(root / 'tokenizer'),
    config,
    name='chats',
    template=chat_run.TEMPLATE,
  )


def _batch(rows, num_rows=None):
  """Returns all rows as one batch."""
  num_rows = num_rows or rows.num_rows
  (batch,) = batches_lib.EvalBatches(rows, num_rows)
  return batch


@functools.cache
def _compiled():
  model = port.Model(transformer.Transformer(MODEL))
  objective = next_token.NextToken()

  def loss(params, batch):
    total, sums = objective(params, batch, model)
    return total / sums['weight']

  return jax.jit(jax.value_and_grad(loss))


def _tensors(params):
  pieces = tensor_map.pieces('llama', MODEL, {})
  return {name: np.array(x) for name, x in exporting.tensors_of(params, pieces)}


def _assert_same(found, expected):
  """Float32 sums in other orders: 1e-5 of the loss and largest gradient."""
  loss, gradients = found
  assert float(loss) == pytest.approx(float(expected[0]), abs=1e-5)
  size = max(np.abs(x).max() for x in expected[1].values())
  assert size > 1e-3
  for name, values in expected[1].items():
    np.testing.assert_allclose(
      gradients[name], values, atol=1e-5 * max(size, 1), err_msg=name
    )


def _ours(params, batch):
  loss, gradients = _compiled()(params, batch)
  return loss, _tensors(gradients)


def test_no_gradient_crosses_from_one_document_to_another(tmp_path, params):
  """As NanoDO shows causality, through packing.

  The loss of one document depends on embeddings of its own ids alone.
  """
  hf_files.qwen(tmp_path / 'source', template=chat_run.TEMPLATE)
  hf_tokenizer.convert(tmp_path / 'source', tmp_path / 'tokenizer')
  (tmp_path / 'chats').mkdir()
  with (tmp_path / 'chats' / 'train.jsonl').open('w') as file:
    for letter in 'QXZ':  # no document has the letter of another one
      messages = [
        {'role': role, 'content': letter * 5} for role in ('user', 'assistant')
      ]
      file.write(json.dumps({'messages': messages}) + '\n')
  batch = _batch(_rows(tmp_path, row_length=256))
  assert len(batch['tokens']) == 1  # one row
  segments = batch['segment_ids'][0]
  assert segments.max() == 3
  own_ids = {
    s: set(batch['tokens'][0][segments == s].tolist()) for s in (1, 2, 3)
  }
  for segment in (1, 2, 3):
    others = set.union(*(own_ids[s] for s in own_ids if s != segment))
    alone = batch | {
      'weights': batch['weights'] * (batch['segment_ids'] == segment)
    }
    assert alone['weights'].any()
    _, gradients = _compiled()(params, alone)
    table = np.asarray(gradients['params']['embed']['embedding'])
    foreign = sorted(others - own_ids[segment])
    own = sorted(own_ids[segment] - others)
    assert foreign
    assert own
    assert not table[foreign].any()
    assert table[own].any(axis=1).all()


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('row_length', [160, 320])
def test_packing_changes_no_loss_and_no_gradient(
  places, params, packing, row_length
):
  expected = _ours(params, _batch(_rows(places, 'none')))
  batch = _batch(_rows(places, packing, row_length))
  if packing != 'none':
    assert batch['segment_ids'].max() > 1
  _assert_same(_ours(params, batch), expected)


def test_the_side_and_the_size_of_padding_change_nothing(places, params):
  rows = _rows(places)
  batch = _batch(rows)
  expected = _ours(params, batch)
  longer = _batch(rows, rows.num_rows + 3)
  _assert_same(_ours(params, longer), expected)
  left = {name: x.copy() for name, x in batch.items()}
  for b, segments in enumerate(batch['segment_ids']):
    used = int((segments > 0).sum())
    for x in left.values():
      x[b] = np.roll(x[b], len(segments) - used)
  assert (left['segment_ids'] != batch['segment_ids']).any()
  _assert_same(_ours(params, left), expected)


# TRL sets options that newer versions of transformers call by another name.
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_loss_and_gradients_are_those_of_trl(places, params):
  why = 'TRL is not installed: pip install -r requirements-peer.txt'
  torch = pytest.importorskip('torch', reason=why)
  transformers = pytest.importorskip('transformers', reason=why)
  trl = pytest.importorskip('trl', reason=why)
  datasets = pytest.importorskip('datasets', reason=why)
  lines = (places / 'chats' / 'train.jsonl').read_text().splitlines()
  tokenizer = transformers.AutoTokenizer.from_pretrained(places / 'source')
  _, values = config_json.write(MODEL, 'llama')
  theirs = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**values, attn_implementation='eager')
  )
  theirs.load_state_dict(
    {name: torch.tensor(x) for name, x in _tensors(params).items()}
  )
  trainer = trl.SFTTrainer(
    theirs,
    args=trl.SFTConfig(
      output_dir=str(places / 'trl'),
      assistant_only_loss=True,
      max_length=None,
      per_device_train_batch_size=len(lines),
      bf16=False,
      use_cpu=True,
      report_to='none',
    ),
    train_dataset=datasets.Dataset.from_list([json.loads(x) for x in lines]),
    processing_class=tokenizer,
  )
  inputs = trainer.data_collator(list(trainer.train_dataset))
  batch = _batch(_rows(places))
  assert (inputs['labels'] >= 0).sum() == batch['weights'].sum() > 50
  theirs.zero_grad()
  loss = trainer.compute_loss(theirs, inputs)
  loss.backward()
  gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
  _assert_same(_ours(params, batch), (loss.item(), gradients))
