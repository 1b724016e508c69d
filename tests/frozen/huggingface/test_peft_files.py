"""Adapters against peft: the function, the merge, and the files both ways.

Skipped where peft is not installed (requirements-peer.txt); CI installs it.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen import adapters as adapters_lib, format as frozen_format, manifest
from frozen.huggingface import importing, peft_files
from models import transformer
from models.layers import adapters
from tests.helpers import frozen_dirs
from tests.helpers.open_weights import open_weights

_WHY = 'the peer is not installed: pip install -r requirements-peer.txt'
torch = pytest.importorskip('torch', reason=_WHY)
transformers = pytest.importorskip('transformers', reason=_WHY)
peft = pytest.importorskip('peft', reason=_WHY)

pytestmark = [
  # peft asks transformers for what its next version calls otherwise.
  pytest.mark.filterwarnings('ignore:.*is_gradient_checkp.*:FutureWarning'),
  # Of a test that adapts a tied table, to see it refused.
  pytest.mark.filterwarnings('ignore:.*a tied layer is part:UserWarning'),
]

# Of logits of up to about 10, in float32, relative to the largest.
TOLERANCE = 1e-5
# One of each kind of tensor map: alone, joined, by head, Conv1D, latent.
FAMILIES = ['llama', 'gpt2', 'gpt_neox', 'phi3', 'deepseek_v2', 'gemma2']
OPTIONS = {
  'plain': {},
  'rslora': {'use_rslora': True},
  'dora': {'use_dora': True},
  'patterns': {
    'rank_pattern': {'.*0.*': 2},
    'alpha_pattern': {'.*1.*': 5},
  },
}


@pytest.fixture(autouse=True)
def _quiet():
  transformers.logging.set_verbosity_error()
  num_threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(num_threads)


def _tokens(seed=0):
  return np.random.default_rng(seed).integers(0, 61, (2, 24))


def _theirs(model):
  with torch.inference_mode():
    return model(torch.tensor(_tokens())).logits.numpy()


def _logits(config, variables):
  model = transformer.Transformer(config)
  return np.asarray(jax.jit(model.apply)(variables, jnp.asarray(_tokens()))[0])


def _assert_close(got, expected):
  bound = TOLERANCE * np.abs(expected).max()
  np.testing.assert_allclose(got, expected, atol=bound, rtol=0)


def _base(name, directory):
  """Returns a reference model, and its weights as a frozen directory has."""
  theirs = open_weights.build(name)
  open_weights.save(theirs, directory)
  source = importing.open_source(directory)
  params = jax.tree.map(jnp.asarray, importing.load_params(source, 'float32'))
  family = theirs.config.model_type
  signed = manifest.sign(
    **dataclasses.asdict(
      frozen_dirs.provenance(origin={'family': family}, lineage={})
    ),
    model=source.config.to_dict(),
    dtype='float32',
    quantization={'kind': 'none'},
    num_params=0,
    weights_digest=frozen_format.weights_digest(params),
    files={},
  )
  return theirs, frozen_format.Frozen(
    directory=directory,
    manifest=signed,
    config=source.config,
    shapes=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
    ),
    generation={},
    chat_template='',
    params=params,
  )


def _targets(theirs):
  """Returns all linear layers that peft can adapt, but heads."""
  kinds = torch.nn.Linear, transformers.pytorch_utils.Conv1D
  # peft takes the MLPs of a model with experts for its experts.
  skipped = 'mlp' if hasattr(theirs.config, 'n_routed_experts') else 'head'
  return [
    name
    for name, module in theirs.named_modules()
    if isinstance(module, kinds)
    and skipped not in name
    and not name.endswith(('lm_head', 'embed_out'))
  ]


def _adapted(theirs, **options):
  """Returns a model of peft with random adapters."""
  torch.manual_seed(0)
  config = peft.LoraConfig(
    **{
      'r': 3,
      'lora_alpha': 7,
      'target_modules': _targets(theirs),
      'init_lora_weights': False,
      'fan_in_fan_out': theirs.config.model_type == 'gpt2',
      **options,
    }
  )
  model = peft.get_peft_model(theirs, config)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if 'magnitude' in name:  # peft sets it to the norm of the merged columns
        p.mul_(1 + 0.2 * torch.rand(p.shape))
  return model.eval()


def _effective(files, frozen):
  """Returns the adapters as a model reads them."""
  tree = {}
  for path, layer in files.layers.items():
    entry = {adapters.A: jnp.asarray(layer.a), adapters.B: jnp.asarray(layer.b)}
    tree[path] = {**entry, adapters.B: entry[adapters.B] * layer.scale}
    if files.dora:
      leaves = frozen_format.leaves_by_path(frozen.params['params'])
      tree[path][adapters.GAIN] = adapters_lib.gain_of(
        leaves[f'{path}/kernel'], layer
      )
  return adapters.nested(tree)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('name', FAMILIES)
def test_an_adapter_of_peft_computes_the_same_here(name, options, tmp_path):
  theirs, frozen = _base(name, tmp_path / 'base')
  plain = _theirs(theirs)
  model = _adapted(theirs, **OPTIONS[options])
  model.save_pretrained(tmp_path / 'adapter')
  expected = _theirs(model)
  assert np.abs(expected - plain).max() > 0.05
  files = peft_files.read(tmp_path / 'adapter', frozen)
  tree = _effective(files, frozen)
  variables = {**frozen.params, adapters.COLLECTION: tree}
  _assert_close(_logits(frozen.config, variables), expected)
  merged = adapters_lib.merge(frozen.params, tree)
  _assert_close(_logits(frozen.config, merged), expected)
  _assert_close(_theirs(model.merge_and_unload()), expected)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize('options', ['plain', 'rslora', 'dora'])
@pytest.mark.parametrize('name', FAMILIES)
def test_peft_computes_the_same_with_an_adapter_from_here(
  name, options, tmp_path
):
  theirs, frozen = _base(name, tmp_path / 'base')
  files = _own(frozen, **OPTIONS[options])
  (tmp_path / 'adapter').mkdir()
  peft_files.write(tmp_path / 'adapter', files, frozen)
  variables = {**frozen.params, adapters.COLLECTION: _effective(files, frozen)}
  model = peft.PeftModel.from_pretrained(theirs, tmp_path / 'adapter').eval()
  _assert_close(_theirs(model), _logits(frozen.config, variables))
  # Written once more, the files are the same.
  again = peft_files.read(tmp_path / 'adapter', frozen)
  (tmp_path / 'again').mkdir()
  peft_files.write(tmp_path / 'again', again, frozen)
  for file in (peft_files.CONFIG, peft_files.WEIGHTS):
    first, second = (tmp_path / d / file for d in ('adapter', 'again'))
    assert first.read_bytes() == second.read_bytes(), file


def _own(frozen, use_rslora=False, use_dora=False):
  """Returns random adapters of every linear layer, of several ranks."""
  rng = np.random.default_rng(0)
  layers = {}
  leaves = frozen_format.leaves_by_path(frozen.params['params'])
  for path, kernel in sorted(leaves.items()):
    owner = path.removesuffix('/kernel')
    if owner == path or (frozen.config.num_experts and 'attention' not in path):
      continue
    rank = 2 if owner.endswith(('query', 'up')) else 3
    alpha = 7.0 if owner.endswith('key') else 4.0
    layers[owner] = peft_files.Layer(
      rng.normal(0, 0.2, (kernel.shape[0], rank)).astype(np.float32),
      rng.normal(0, 0.2, (rank, kernel.shape[1])).astype(np.float32),
      alpha,
      alpha / (rank**0.5 if use_rslora else rank),
      rng.uniform(0.5, 2, kernel.shape[1]).astype(np.float32)
      if use_dora
      else None,
    )
  return peft_files.Files(layers, use_rslora, use_dora)


@pytest.fixture(name='saved', scope='module')
def _saved(tmp_path_factory):
  """A directory of peft, and its base."""
  directory = tmp_path_factory.mktemp('saved')
  theirs, frozen = _base('llama', directory / 'base')
  _adapted(theirs).save_pretrained(directory / 'adapter')
  return directory / 'adapter', frozen


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('peft_type', 'IA3', 'got peft_type .IA3., expected LORA'),
    ('bias', 'all', "got bias = 'all', expected 'none'"),
    ('modules_to_save', ['lm_head'], 'got modules_to_save = .*merge the adap'),
    ('init_lora_weights', 'pissa_niter_4', 'it changes the weights of the bas'),
    ('layer_replication', [[0, 2]], 'got layer_replication = '),
    ('use_qalora', True, 'got use_qalora = True, expected False'),
    (
      'use_dora',
      True,
      'got lora_A, lora_B of .* expected lora_A, lora_B, lora_',
    ),
  ],
)
def test_what_is_not_computed_is_refused_by_name(
  saved, tmp_path, field, value, expected
):
  source, frozen = saved
  for file in (peft_files.CONFIG, peft_files.WEIGHTS):
    (tmp_path / file).write_bytes((source / file).read_bytes())
  config = json.loads((tmp_path / peft_files.CONFIG).read_text())
  config[field] = value
  (tmp_path / peft_files.CONFIG).write_text(json.dumps(config))
  with pytest.raises(ValueError, match=expected):
    peft_files.read(tmp_path, frozen)


@pytest.mark.parametrize(
  ('targets', 'options', 'expected'),
  [
    (['embed_tokens'], {}, 'tables of tokens and layers that were trained'),
    (['lm_head'], {}, 'got an adapter of .lm_head., expected a linear layer'),
  ],
)
def test_a_table_of_tokens_is_refused(tmp_path, targets, options, expected):
  theirs, frozen = _base('llama', tmp_path / 'base')
  model = _adapted(theirs, target_modules=targets, **options)
  model.save_pretrained(tmp_path / 'adapter', save_embedding_layers=False)
  with pytest.raises(ValueError, match=expected):
    peft_files.read(tmp_path / 'adapter', frozen)


def test_an_adapter_of_another_shape_is_refused(tmp_path, saved):
  _, frozen = saved
  wide = open_weights.build('llama', intermediate_size=48)
  _adapted(wide).save_pretrained(tmp_path)
  with pytest.raises(ValueError, match='expected 40 x 32; take the frozen'):
    peft_files.read(tmp_path, frozen)


def test_a_directory_without_an_adapter_is_refused(tmp_path, saved):
  with pytest.raises(FileNotFoundError, match='got no such file, expected ada'):
    peft_files.read(tmp_path, saved[1])
