"""The tests that want a GPU, with the environment that they need.

    python -m tests.gpu.run    # make test-gpu

Arguments are those of pytest.
"""

import os
import subprocess
import sys

from hardware import gpu_environment

# Slow tests compile for GPUs that are not here, and hide the one that is.
_ARGS = '-m', 'gpu and not slow', '-W', 'default', '--durations=10'


def main(args: list[str]) -> int:
  """Returns the exit status of pytest."""
  if problem := gpu_environment.missing():
    print(f'error: {problem}', file=sys.stderr)
    return 1
  return subprocess.run(
    [sys.executable, '-m', 'pytest', *_ARGS, *(args or ['tests'])],
    env=os.environ | gpu_environment.TESTS,
    check=False,
  ).returncode


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
