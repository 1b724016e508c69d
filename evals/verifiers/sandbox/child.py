"""The first code of a confined process: reads its task, is confined, runs it.

The task is JSON in a file without a name, and is closed before any code of a
stranger runs. `runner.py` starts these processes.

    program    runs a text as a script: stdin and stdout are its own
    solution   runs a text, then answers calls of its functions
    tests      calls these functions, and writes the results
"""

import json
import os
import sys
import traceback

from evals.verifiers.sandbox import confinement, remote, values


def main(argv: list[str]) -> None:
  """Does the task of the file descriptor that the argument numbers."""
  with os.fdopen(int(argv[0]), 'rb') as file:
    task = json.load(file)
  # A name in the stranger's code must find no module of the repository.
  sys.path[:] = [*task['path'], *sys.path[1:]]
  sys.argv[:] = ['answer']
  try:
    confinement.apply(**task['confinement'])
  except OSError as error:
    values.send(task['status'], str(error))
    sys.exit(1)
  values.send(task['status'], '')
  os.close(task['status'])
  if task['role'] == 'program':
    _run(task['source'])
  elif task['role'] == 'solution':
    remote.serve(task['source'], *task['pipes'])
    os._exit(0)  # no code of the stranger at exit
  else:
    found = remote.test(task['tests'], task['entry_point'], *task['pipes'])
    values.send(task['results'], found)
    os._exit(0)


def _run(source: str) -> None:
  """Runs a script; an exception prints the stranger's part of its trace."""
  try:
    exec(compile(source, 'answer', 'exec'), {'__name__': '__main__'})
  except Exception as error:
    trace = error.__traceback__
    frames = [
      each
      for each in traceback.extract_tb(trace)
      if each.filename == 'answer' and each.name != '_run'
    ]
    for frame in frames[-3:]:
      print(f'line {frame.lineno}, in {frame.name}', file=sys.stderr)
    print(*traceback.format_exception_only(error), sep='', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
