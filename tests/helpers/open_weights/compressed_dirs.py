"""Matrices of compressed-tensors, packed here by plain loops."""

import numpy as np

from tests.helpers.open_weights import quantised_dirs


def config(form, **weights):
  """Returns a quantization_config of one group."""
  group = {'targets': ['Linear'], 'weights': weights}
  return {
    'quant_method': 'compressed-tensors',
    'format': form,
    'quantization_status': 'compressed',
    'config_groups': {'group_0': group},
    'ignore': ['lm_head'],
  }


CONFIG = config('pack-quantized', num_bits=4, strategy='group', group_size=16)
MXFP4_CONFIG = config(
  'mxfp4-pack-quantized',
  num_bits=4,
  type='float',
  strategy='group',
  group_size=16,
)
_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def int4(size, *, ordered=False):
  """Returns a quantiser to W4A16 with symmetric codes, perhaps in act-order."""

  def quantise(module, w_OI):
    made = quantised_dirs.Grouped(
      w_OI,
      4,
      size,
      seed=quantised_dirs.seed(module),
      ordered=ordered,
      symmetric=True,
    )
    parts = {
      'weight_packed': quantised_dirs.words(made.codes.T, 4),
      'weight_scale': np.ascontiguousarray(made.scales.T),
      'weight_shape': np.array(w_OI.shape, np.int64),
    }
    if ordered:
      parts['weight_g_idx'] = made.groups.astype(np.int32)
    return parts, made.floats()

  return quantise


def mxfp4(module, w_OI):
  """Quantises to random codes with powers of two as scales."""
  rng = np.random.default_rng(quantised_dirs.seed(module))
  outputs, inputs = w_OI.shape
  codes = rng.integers(0, 16, (outputs, inputs))
  exponents = rng.integers(120, 127, (outputs, inputs // 16)).astype(np.uint8)
  packed = np.zeros((outputs, inputs // 2), np.uint8)
  floats = np.zeros((outputs, inputs), np.float32)
  for o in range(outputs):
    for i in range(inputs):
      code = int(codes[o, i])
      packed[o, i // 2] |= code << (4 * (i % 2))
      number = _E2M1[code % 8] * (-1 if code >= 8 else 1)
      floats[o, i] = number * 2.0 ** (int(exponents[o, i // 16]) - 127)
  return {'weight_packed': packed, 'weight_scale': exponents}, floats
