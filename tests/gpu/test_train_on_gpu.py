"""Training on a real GPU: cuDNN's attention, its gradients, and whole steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import dense, form as form_lib
from models.attention.kernels import cudnn_gpu
from tests.helpers import gpu, tiny_models
from tests.helpers.training import tiny_experiment
from training import experiment as experiment_lib, learner as learner_lib
from training.planning import choices

pytestmark = gpu.MARKS

TIME, CHANNELS = 256, 64
ROWS = {
  'alone': ([1] * 256, [1] * 200 + [0] * 56),
  'packed': ([1] * 10 + [2] * 130 + [3] * 116, [1] * 1 + [2] * 200 + [0] * 55),
}


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize(
  ('rows', 'max_documents', 'window'),
  [
    ('alone', 1, 0),
    ('alone', 1, 40),
    ('alone', 0, 0),
    ('packed', 3, 0),
    ('packed', 16, 0),
    ('packed', 0, 0),
    ('packed', 3, 40),
  ],
)
def test_attention_and_its_gradients(rows, max_documents, window, kv_heads):
  keys = jax.random.split(jax.random.key(0), 4)
  q, g = (jax.random.normal(k, (2, TIME, 4, CHANNELS)) for k in keys[:2])
  k, v = (jax.random.normal(k, (2, kv_heads, TIME, CHANNELS)) for k in keys[2:])
  segments = jnp.array(ROWS[rows], jnp.int32)
  weights = (segments > 0).astype(jnp.float32)[..., None, None]
  form = form_lib.Form(window=window)

  def run(attend, dtype):
    out, pull = jax.vjp(
      functools.partial(attend, segment_ids_BT=segments, form=form),
      *(x.astype(dtype) for x in (q, k, v)),
    )
    cotangent = (g * weights).astype(dtype)
    return [out * weights.astype(dtype), *pull(cotangent)]

  ours = functools.partial(cudnn_gpu.attend, max_documents=max_documents)
  got = jax.jit(lambda: run(ours, jnp.bfloat16))()
  plain = jax.jit(lambda: run(dense.attend, jnp.bfloat16))()
  exact = jax.jit(lambda: run(dense.attend, jnp.float32))()
  for mine, theirs, reference in zip(got, plain, exact, strict=True):
    scale = float(jnp.linalg.norm(reference))
    error, plain_error = (
      float(jnp.linalg.norm(x.astype(jnp.float32) - reference)) / scale
      for x in (mine, theirs)
    )
    # Operands and results are rounded to 8 bits in both.
    assert error <= max(2 * plain_error, 1e-2)


@pytest.mark.parametrize('remat', ['none', 'minimal', 'full'])
@pytest.mark.parametrize('layers', ['apart', 'scanned'])
@pytest.mark.parametrize('max_documents', [None, 3, 1])
def test_steps_equal_those_of_plain_attention(remat, layers, max_documents):
  def losses(attention, most):
    experiment = tiny_experiment.make(
      model=tiny_models.llama_like(
        vocab_size=64,
        num_layers=2,
        model_width=64,
        head_width=16,
        max_length=TIME,
        scan_layers=True,
      ),  # fmt: skip
      data={'row_length': TIME, 'batch_size': 4},
      compute_dtype='bfloat16',
      execution=experiment_lib.ExecutionConfig(
        remat=remat, layers=layers, attention=attention
      ),
    )
    learner = learner_lib.make(experiment, jax.devices()[:1], most)
    state = learner.init(jax.random.key(0))
    batch = tiny_models.batch(
      batch_size=4, row_length=TIME, vocab_size=64,
      num_segments=1 if max_documents == 1 else 2, num_padding=8,
    )  # fmt: skip
    batch = learner.placement.put_batch(batch)
    step, found = learner.compile_train_step(), []
    for _ in range(4):
      state, metrics = step(state, batch)
      found.append(float(metrics['loss']))
    return found

  got = losses('auto', max_documents)
  expected = losses('reference', None)
  # bfloat16 has 8 bits; a loss is a mean over 992 tokens.
  np.testing.assert_allclose(got, expected, rtol=5e-3)


def test_nothing_is_left_to_choose_on_this_gpu():
  experiment = dataclasses.replace(
    tiny_experiment.make(
      model=tiny_models.llama_like(
        vocab_size=64, head_width=16, scan_layers=True
      ),
      compute_dtype='bfloat16',
    ),
    execution=experiment_lib.ExecutionConfig(),
  )
  found, reasons = choices.make(experiment, jax.devices()[:1])
  assert found.execution.layers == 'apart'
  assert any('takes' in reason for reason in reasons)
