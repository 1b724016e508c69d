"""Replays an answer alone, and says whether the weights give the same answer.

    python -m inference.server.replay ID --records=FILE --model=DIR

ID is the `x-request-id` of an answer, or the id in its body. Its receipt was
written by `serve.py --port --receipts`. The replay computes every token of the
answer again from the weights in DIR (and in --adapter=DIR2, if an adapter
answered): one sequence, without prefix cache, pages,
batch, chunks, speculation or quantisation of the cache. It prints the first
token that differs and the largest difference, and a verdict in words:

    a training problem     the weights alone give this answer; exit status 0
    an inference problem   they do not, from token N on; exit status 1

Status 2: there is no receipt, DIR has other weights, or a flag is wrong.
"""

import pathlib
import sqlite3
import sys

from absl import app, flags, logging

# None of these imports JAX: --help and a wrong flag need not wait for it.
from checks import path_flags

TRAINING, PROBLEM, WRONG = 0, 1, 2  # exit statuses


def main(argv: list[str]) -> None:
  """Replays the choices of a request, and exits with the worst verdict."""
  values = flags.FLAGS
  if len(argv) != 2:
    _fail(
      f'got {argv[1:] or "no id"}, expected the id of one request; see python'
      ' -m inference.server.replay --help'
    )
  logging.set_verbosity(logging.ERROR)
  try:
    found = _receipts(argv[1], values.records, values.key_file)
    if values.choice is not None:
      found = [each for each in found if each.choice == values.choice]
    if not found:
      raise ValueError(
        f'{argv[1]}: got no receipt in {values.records}, expected one; was the'
        ' server started with --receipts, and did the answer finish?'
      )
    verdicts = _replayed(found, values.model, values.adapter, values.tolerance)
  except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
    _fail(str(error))
  else:
    sys.exit(PROBLEM if 'inference' in verdicts else TRAINING)


def _receipts(request_id: str, path: str, key_file: str | None):
  """Returns the receipts of a request; the records are only read."""
  from inference.server.receipts import receipts, sealing

  digits = receipts.digits(request_id)
  seal = None
  if key_file is not None:
    seal = sealing.read(key_file, flag='--key_file')
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f'--records: got {path}, which does not exist, expected the file of'
      ' serve.py --records'
    )
  try:
    connection = sqlite3.connect(
      f'{pathlib.Path(path).absolute().as_uri()}?mode=ro', uri=True
    )
    try:
      return receipts.find(connection, digits, seal)
    finally:
      connection.close()
  except sqlite3.Error as error:
    raise ValueError(
      f'--records: got {path}, which has no receipts ({error}), expected the'
      ' file of serve.py --records, with --receipts'
    ) from None


def _replayed(
  found, directory: str, adapter: str | None, tolerance: float | None
) -> list[str]:
  """Prints the replay of each receipt; returns the verdicts."""
  import jax

  from frozen import format as frozen_format
  from inference import full_forward
  from inference.server.receipts import comparison
  from text import tokenizer as tokenizer_lib

  _check_weights(found[0], directory)
  frozen = frozen_format.read(directory)  # all digests are verified
  tokenizer = tokenizer_lib.load(frozen.tokenizer_dir)
  dtype, numerics = frozen.manifest.dtype, found[0].numerics
  if tolerance is None:
    platform = jax.local_devices()[0].platform
    tolerance = full_forward.tolerance(dtype, platform=platform)
  forward = full_forward.FullForward(
    frozen.params,
    frozen.config,
    dtype=dtype,
    vocab_size=tokenizer.vocab_size,
    is_invariant=numerics['numerics'] == 'invariant',
    adapter=_adapter_of(found[0], adapter, frozen),
    stored=_stored_product(numerics, frozen.params, dtype),
  )
  verdicts = []
  for receipt in found:
    print(f'request   {receipt.request_id}, choice {receipt.choice}')
    print(f'version   {receipt.version}')
    if not receipt.token_ids:
      print(f'verdict   nothing to compare: {receipt.finish_reason}, no token')
      verdicts.append(
        comparison.INFERENCE if receipt.finish_reason == 'error' else
        comparison.EQUAL
      )  # fmt: skip
      continue
    result = comparison.compare(receipt, forward, tokenizer, tolerance)
    print('\n'.join(_report(receipt, result)))
    verdicts.append(result.verdict)
  return verdicts


def _stored_product(numerics, params, dtype):
  """Returns how the server multiplied by kernels in fewer bits."""
  import jax

  from models.linear import products

  was_native = numerics.get('products', '').startswith('native')
  setting = 'auto' if was_native else 'off'
  platform = jax.local_devices()[0].platform
  chosen = products.choose(setting, params, dtype, platform, is_invariant=True)
  return chosen.stored


def _check_weights(receipt, directory: str) -> None:
  from frozen import manifest as manifest_lib

  manifest = manifest_lib.read(pathlib.Path(directory))
  if manifest.weights_digest != receipt.digests['weights']:
    raise ValueError(
      f'--model: got {directory} with weights {manifest.weights_digest},'
      f' expected {receipt.digests["weights"]}, the weights of the answer'
    )


def _adapter_of(receipt, directory: str | None, frozen):
  """Returns the adapter that answered, as the engine padded it, or None."""
  digest = receipt.digests.get('adapter')
  if digest is None and directory is None:
    return None
  if digest is None or directory is None:
    raise ValueError(
      f'--adapter: got {directory or "none"}, expected'
      f' {f"the directory of the adapter {digest}" if digest else "none"}, as'
      ' the answer had'
    )
  from frozen import adapters as frozen_adapters
  from inference.engine import adapter_table

  adapter = frozen_adapters.read(directory, frozen)
  if adapter.manifest.adapter_digest != digest:
    raise ValueError(
      f'--adapter: got {directory} with digest'
      f' {adapter.manifest.adapter_digest}, expected {digest}, the adapter of'
      ' the answer'
    )
  return adapter_table.alone(
    adapter.tree,
    frozen.params,
    rank=int(receipt.numerics['adapter_rank']),
    dtype=frozen.manifest.dtype,
  )


def _report(receipt, result):
  """Yields the lines of a report."""
  from inference.server.receipts import comparison

  first, wrong, largest = (
    result.first_different,
    result.first_wrong,
    result.largest,
  )
  yield (
    f'tokens    {len(receipt.prompt_ids)} of the prompt,'
    f' {len(result.tokens)} new; ended by {receipt.finish_reason}'
  )
  yield f'differs   {"nowhere" if first is None else f"first {_shown(first)}"}'
  if first is not None:
    yield f'largest   {_shown(largest)}'
    yield f'tolerance {result.tolerance:g} nats, by rounding'
  if wrong is not None:
    yield f'wrong     first {_shown(wrong)}'
  yield f'verdict   {_VERDICTS[result.verdict]}'
  if result.verdict != comparison.INFERENCE:
    return
  hints = list(_hints(receipt))
  if hints:
    yield f'had part  {"; ".join(hints)}'


_VERDICTS = {
  'equal': (
    'a training problem, if the answer is wrong: the weights say it'
    ' themselves, bit for bit'
  ),
  'rounding': (
    'a training problem, if the answer is wrong: the weights say it'
    ' themselves; all differences are within rounding'
  ),
  'inference': (
    'an inference problem: alone, these weights say something else than the'
    ' server answered'
  ),
}


def _hints(receipt):
  """Yields the differences between the server's computation and the replay."""
  from models import kv_cache

  if receipt.num_cached:
    yield f'{receipt.num_cached} prompt tokens came from the prefix cache'
  if receipt.num_preemptions:
    yield f'it was preempted {receipt.num_preemptions} times'
  if (stored := receipt.numerics['kv_dtype']) in kv_cache.QUANTIZED:
    name = 'fp8' if stored == kv_cache.FP8_BITS else stored
    yield f'the KV cache was {name}'
  if parts := receipt.numerics.get('tensor_parts'):
    yield f'sums were those of a model in {parts} parts'
  if num_devices := receipt.numerics.get('tensor'):
    yield f'{num_devices} devices shared the model'
  if experts := receipt.numerics.get('experts'):
    yield f'{experts} groups of devices shared the experts'
  yield f'attention was {receipt.numerics["attention"]}'
  if products := receipt.numerics.get('products'):
    yield f'products were {products}'
  yield f'the device was {receipt.numerics["device"]}'


def _shown(token) -> str:
  """Returns a token as text."""
  text = (
    f'at new token {token.place} (id {token.recorded}): log-probability'
    f' {token.recorded_logprob:.9g} recorded, {token.replayed_logprob:.9g}'
    f' replayed, difference {token.difference:.3g}'
  )
  if token.replayed != token.recorded:
    text += f'; the replay takes id {token.replayed}'
    text += ', a near tie' if token.is_near else ''
  return text


def _fail(message: str) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(WRONG)


def _define_flags() -> None:
  path = path_flags.DEFINE_path
  path('records', None, 'File of serve.py --records.', required=True)
  path(
    'model',
    None,
    'Frozen directory with the weights that answered.',
    required=True,
  )
  path('adapter', None, 'Directory of the adapter that answered, if one did.')
  path('key_file', None, 'File of serve.py --receipts_key, if it had one.')
  flags.DEFINE_integer(
    'choice', None, 'Number of the choice to replay. If not given, all.'
  )
  flags.DEFINE_float(
    'tolerance',
    None,
    'Largest difference of a log-probability, in nats, that is rounding. If not'
    ' given, 0.01 for float32 on a CPU and 1 for bfloat16.',
    lower_bound=0.0,
  )


if __name__ == '__main__':
  _define_flags()
  app.run(main)
