"""llama.cpp's turns of `benchmarks.quantised_decode`, in a separate Python.

It needs only llama-cpp-python (built from source) and numpy, so it runs with
any interpreter that has these. The first line of its input has `path`, `batch`,
`prompt_tokens` and `new_tokens`; each later line asks for one turn. An answer
has the seconds of the steps after the last prompt.
"""

import json
import os
import sys
import time

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np


def _fill(batch, tokens):
  """Writes each token: id, position, sequence, and whether it has logits."""
  batch.n_tokens = len(tokens)
  for i, (token, position, sequence, is_last) in enumerate(tokens):
    batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
    batch.seq_id[i][0], batch.logits[i] = sequence, is_last


def _decode(context, batch):
  if status := llama_cpp.llama_decode(context, batch):
    raise RuntimeError(f'llama_decode: got status {status}, expected 0')


def turn(context, batch, vocab_size: int, spec: dict) -> float:
  """Answers the requests greedily; returns the seconds of the decode steps."""
  llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
  size, length = spec['batch'], spec['prompt_tokens']
  for row in range(size):
    prompt = [3 + (row + i) % 100 for i in range(length)]
    _fill(
      batch,
      [(each, i, row, i == length - 1) for i, each in enumerate(prompt)],
    )
    _decode(context, batch)
  next_ids = [3] * size
  start = time.perf_counter()
  for step in range(spec['new_tokens']):
    _fill(
      batch, [(next_ids[row], length + step, row, True) for row in range(size)]
    )
    _decode(context, batch)
    for row in range(size):
      logits_V = np.ctypeslib.as_array(
        llama_cpp.llama_get_logits_ith(context, row), (vocab_size,)
      )
      next_ids[row] = int(logits_V.argmax())
  return time.perf_counter() - start


def main() -> None:
  """Loads the model of the first line; takes a turn for each later line."""
  spec = json.loads(sys.stdin.readline())
  llama_cpp.llama_log_set(_say_nothing, None)
  llama_cpp.llama_backend_init()
  model = llama_cpp.llama_model_load_from_file(
    spec['path'].encode(), llama_cpp.llama_model_default_params()
  )
  settings = llama_cpp.llama_context_default_params()
  size, length = spec['batch'], spec['prompt_tokens'] + spec['new_tokens']
  settings.n_ctx = size * -(-length // 256) * 256
  settings.n_seq_max = size
  # The number of cores as XLA counts them.
  threads = len(os.sched_getaffinity(0))
  settings.n_threads = settings.n_threads_batch = threads
  context = llama_cpp.llama_init_from_model(model, settings)
  batch = llama_cpp.llama_batch_init(max(size, spec['prompt_tokens']), 0, 1)
  vocab_size = llama_cpp.llama_vocab_n_tokens(
    llama_cpp.llama_model_get_vocab(model)
  )
  print(json.dumps({'version': llama_cpp.__version__}), flush=True)
  for _ in sys.stdin:
    seconds = turn(context, batch, vocab_size, spec)
    print(json.dumps({'seconds': seconds}), flush=True)


@llama_cpp.llama_log_callback
def _say_nothing(level, text, data):
  del level, text, data


if __name__ == '__main__':
  main()
