"""Decoding with weights in fewer bits, beside floats and llama.cpp.

    python -m benchmarks.quantised_decode --llama_cpp=/path/to/python
    python -m benchmarks.quantised_decode --gguf=FILE.gguf --llama_cpp=...
    python -m benchmarks.quantised_decode --shape=1b --batches=1,8,32,64

Greedy requests that begin together are answered through the engine, at several
batch sizes; the rate counts the tokens after the last prompt. The sides take
turns. A side is a dtype of floats, a scheme of `frozen.quantize`, or a kind of
GGUF blocks. `bandwidth` is the rate at which the steps read all weights once,
and all keys and values, as a share of this machine's measured memory rate.

With `--llama_cpp`, an interpreter that has llama-cpp-python, each side of GGUF
blocks has llama.cpp beside it, on the same blocks and with as many threads as
cores. The ratio is the median over rounds; above 1, ours is faster. int8 is
compared with llama.cpp's Q8_0, and int4 with its Q4_0.

The model has random weights and the 110M shape of `benchmarks.decode_latency`,
or that of Llama-3.2-1B, which is one for a GPU or TPU. Sides in fewer bits
compute in float32 on a CPU and in bfloat16 on other devices. With `--gguf`, it
is the model of that file, with two sides: the kept blocks, and floats.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import decode_rate
from benchmarks.common import entry, random_model, timing
from checks import path_flags
from frozen import format as frozen_format
from hardware import peaks
from models import axes, layout, model_config
from models.linear.stored import (
  block_kinds,
  blocks as blocks_lib,
  round as rounding,
  tree as stored_tree,
)

_FLOATS = ('float32', 'bfloat16')
_PEER_OF = {'int8': 'Q8_0', 'int4': 'Q4_0'}
_WORKER = pathlib.Path(__file__).parent / 'peer' / 'llama_cpp_worker.py'


def stored_params(params: Any, name: str) -> Any:
  """Returns the params in the form of a side.

  Args:
    params: params in float32.
    name: a dtype, a scheme or a kind of blocks.
  """
  if name in _FLOATS:
    return jax.tree.map(lambda leaf: leaf.astype(name), params)

  def leaf(path, x):
    *_, kind = axes.names(path)
    if kind not in ('kernel', 'embedding'):
      return x
    w_IO = x.T if kind == 'embedding' else x
    if name in rounding.SCHEMES:
      return rounding.by_scheme(w_IO, name)
    import gguf  # here: the other sides do not need it

    data = gguf.quants.quantize(
      np.ascontiguousarray(np.asarray(w_IO).T),
      gguf.GGMLQuantizationType[name],
    )
    return blocks_lib.Blocks.make(jnp.asarray(data), kind=name)

  return jax.tree_util.tree_map_with_path(leaf, params)


def write_gguf(
  path: pathlib.Path, model: model_config.ModelConfig, params: Any, kind: str
) -> None:
  """Writes a random model, of one kind of blocks, for llama.cpp."""
  import gguf

  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_context_length(model.max_length)
  writer.add_embedding_length(model.model_width)
  writer.add_block_count(model.num_layers)
  writer.add_feed_forward_length(model.mlp_width)
  writer.add_head_count(model.num_heads)
  writer.add_head_count_kv(model.num_kv_heads)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_vocab_size(model.vocab_size)
  writer.add_tokenizer_model('llama')
  tokens = [f't{n}'.encode() for n in range(model.vocab_size)]
  writer.add_token_list(tokens)
  writer.add_token_scores([0.0] * model.vocab_size)
  writer.add_token_types([1] * model.vocab_size)
  names = {
    'attention/query': 'attn_q', 'attention/key': 'attn_k',
    'attention/value': 'attn_v', 'attention/out': 'attn_output',
    'mlp/gate': 'ffn_gate', 'mlp/up': 'ffn_up', 'mlp/down': 'ffn_down',
    'attention_norm': 'attn_norm', 'mlp_norm': 'ffn_norm',
  }  # fmt: skip

  def add(path, leaf):
    _, first, *others, _ = axes.names(path)
    if first.startswith('layer_'):
      part = names['/'.join(others)]
      name = f'blk.{first.removeprefix("layer_")}.{part}.weight'
    else:
      name = {'embed': 'token_embd', 'final_norm': 'output_norm'}[first]
      name += '.weight'
    if isinstance(leaf, blocks_lib.Blocks):
      writer.add_tensor(
        name, np.asarray(leaf.data), raw_dtype=gguf.GGMLQuantizationType[kind]
      )
    else:
      writer.add_tensor(name, np.asarray(leaf))

  jax.tree_util.tree_map_with_path(
    add, stored_params(params, kind), is_leaf=stored_tree.is_stored
  )
  for step in ('header', 'kv_data', 'tensors'):
    getattr(writer, f'write_{step}_to_file')()
  writer.close()


class LlamaCpp(contextlib.AbstractContextManager):
  """llama.cpp in another process, which has loaded a model.

  Args:
    python: an interpreter that has llama-cpp-python.
    spec: see `peer/llama_cpp_worker.py`.

  Raises:
    ValueError: the process does not start.
  """

  def __init__(self, python: str, spec: dict[str, Any]):
    self._process = subprocess.Popen(
      [python, str(_WORKER)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self._num_tokens = spec['batch'] * spec['new_tokens']
    self.version = self._ask(spec)['version']

  def tokens_per_s(self) -> float:
    """Answers the requests once; returns the rate after the last prompt."""
    return self._num_tokens / self._ask({})['seconds']

  def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    answer = ''
    with contextlib.suppress(BrokenPipeError):
      print(json.dumps(message), file=self._process.stdin, flush=True)
      answer = self._process.stdout.readline()
    if not answer:
      raise ValueError(
        '--llama_cpp: got no answer of the interpreter, expected one that has'
        ' llama-cpp-python; its own error is above'
      )
    return json.loads(answer)

  def __exit__(self, *_) -> None:
    self._process.communicate()  # closes its stdin, which ends its loop


def weight_bytes(params: Any) -> int:
  """Returns the bytes that a decode step reads of the weights."""
  tree = params['params']
  read = {key: x for key, x in tree.items() if key != 'embed'}
  if 'head' not in tree:
    read['embed'] = tree['embed']
  return sum(leaf.nbytes for leaf in jax.tree.leaves(read))


class _Ours:
  """One of our sides at one batch size."""

  def __init__(self, model, params, dtype, args, batch: int):
    self.side = decode_rate.Side(
      model, batch, new_tokens=args.new_tokens, dtype=dtype, params=params
    )
    context = decode_rate.PROMPT_TOKENS + args.new_tokens / 2
    heads = 2 * model.num_layers * model.num_kv_heads * model.head_width
    keys = batch * context * heads * jnp.dtype(dtype).itemsize
    self.step_bytes = weight_bytes(params) + keys
    self.products = self.side.engine.backend.products
    self.tokens_per_s = self.side.tokens_per_s


def _models(args: Any, scratch: pathlib.Path) -> Iterator[tuple[Any, ...]]:
  """Yields name, config, params, dtype and GGUF file ('': none) of sides."""
  if not args.gguf:
    model = decode_rate.model_of(args.shape)
    floats = random_model.params(model)
    for name in args.sides:
      kind = str(_PEER_OF.get(name, name))
      path = ''
      if args.llama_cpp and kind in block_kinds.KINDS:
        path = scratch / f'{kind}.gguf'
        if not path.exists():
          write_gguf(path, model, floats, kind)
      dtype = name if name in _FLOATS else _dtype()
      yield name, model, stored_params(floats, name), dtype, str(path)
    return
  for name, weights in (('kept', 'kept'), (_dtype(), 'float')):
    out = scratch / weights
    command = [sys.executable, '-m', 'frozen.huggingface', 'import']
    flags_of = [f'--source={args.gguf}', f'--weights={weights}', f'--out={out}']
    subprocess.run([*command, *flags_of], check=True, stdout=subprocess.DEVNULL)
    frozen = frozen_format.read(out)
    config = dataclasses.replace(frozen.config, scan_layers=False)
    params, _ = layout.unstack(frozen.params, frozen.config)
    yield name, config, params, _dtype(), args.gguf if name == 'kept' else ''


def _dtype() -> str:
  """Returns the dtype in which sides in fewer bits compute."""
  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


def _measure_batch(args: Any, models: list[Any], batch: int) -> dict[str, Any]:
  """Returns the figures of the sides at one batch size."""
  with contextlib.ExitStack() as stack:
    turns, step_bytes, products = {}, {}, {}
    for name, model, params, dtype, path in models:
      ours = _Ours(model, params, jnp.dtype(dtype), args, batch)
      turns[name] = ours.tokens_per_s
      step_bytes[name], products[name] = ours.step_bytes, ours.products
      peer = f'llama.cpp {pathlib.Path(path).stem}'
      if args.llama_cpp and path and peer not in turns:
        spec = {
          'path': path,
          'batch': batch,
          'prompt_tokens': decode_rate.PROMPT_TOKENS,
          'new_tokens': args.new_tokens,
        }
        turns[peer] = stack.enter_context(
          LlamaCpp(args.llama_cpp, spec)
        ).tokens_per_s
    turns['read'] = lambda: peaks.read_bytes_per_s(
      megabytes=128, seconds=0.2, device=jax.devices()[0]
    )
    # The first round fills caches. Each turn returns a rate here.
    rates = {
      name: found[1:]
      for name, found in timing.interleave(turns, args.rounds + 1).items()
    }
  reading = rates.pop('read')
  return {
    name: _figures(name, rates, batch, reading, step_bytes, products, models)
    for name in rates
  }


def _figures(name, rates, batch, reading, step_bytes, products, models):
  """Returns the figures of a side, or of llama.cpp."""
  found = {'tokens_per_s': statistics.median(rates[name])}
  if name not in step_bytes:
    return found
  steps = [rate / batch * step_bytes[name] for rate in rates[name]]
  found['bandwidth'] = timing.median_ratio(steps, reading)
  found['products'] = products[name]
  for floats in _FLOATS:
    if floats in rates:
      found[f'to_{floats}'] = timing.median_ratio(rates[name], rates[floats])
  path = next(path for side, *_, path in models if side == name)
  peer = f'llama.cpp {pathlib.Path(path).stem}'
  if path and peer in rates:
    found['to_peer'] = timing.median_ratio(rates[name], rates[peer])
  return found


def measure(args: Any) -> Iterator[entry.Result]:
  """Yields the figures, medians over rounds in which the sides take turns."""
  device = jax.devices()[0]
  batches = {}
  with tempfile.TemporaryDirectory() as directory:
    models = list(_models(args, pathlib.Path(directory)))
    for batch in map(int, args.batches):
      batches[batch] = _measure_batch(args, models, batch)
  yield {
    'benchmark': 'quantised_decode',
    'model': args.gguf or args.shape,
    'device': device.device_kind,
    'batches': batches,
  }


def report(result: entry.Result) -> str:
  """Returns the tables, one per batch size."""
  tables = []
  for batch, sides in result['batches'].items():
    heads = 'tokens/s', 'bandwidth', 'to float32', 'to bfloat16', 'to llama.cpp'
    rows: list[tuple[str, ...]] = [('', *heads)]
    for name, each in sides.items():
      rows.append(
        (
          name,
          f'{each["tokens_per_s"]:,.1f}',
          *[
            form.format(each[key]) if key in each else ''
            for key, form in (
              ('bandwidth', '{:.0%}'),
              ('to_float32', '{:.2f}'),
              ('to_bfloat16', '{:.2f}'),
              ('to_peer', '{:.2f}'),
            )
          ],
        )
      )
    title = f'Decoding {batch} sequences, {result["model"]}'
    tables.append(timing.table(title, rows))
  sides = next(iter(result['batches'].values()))
  products = {x['products'] for x in sides.values() if 'products' in x}
  return '\n'.join([*tables, f'products: {"; ".join(sorted(products))}'])


def main(argv: list[str]) -> None:
  """Measures and reports."""
  del argv
  entry.run(measure, report)


if __name__ == '__main__':
  entry.define_flags(rounds=3)
  flags.DEFINE_list(
    'sides',
    ['float32', 'bfloat16', 'int8', 'int4'],
    'Dtypes, schemes of frozen.quantize, kinds of GGUF blocks.',
  )
  flags.DEFINE_list('batches', ['1', '8', '32'], 'Sequences that run at once.')
  flags.DEFINE_enum('shape', '110m', ['110m', '1b'], 'Of random weights.')
  flags.DEFINE_integer('new_tokens', 64, 'Tokens of each answer.', 2)
  path_flags.DEFINE_path('gguf', '', 'A GGUF file, in place of random weights.')
  flags.DEFINE_string(
    'llama_cpp', '', 'A Python that has llama-cpp-python: the peer.'
  )
  app.run(main)
