"""Enough threads for the collectives of several CPU devices.

    cpu_threads.provide(os.environ)    # before jax opens a device

XLA:CPU (jaxlib 0.10 to 0.12) runs independent collectives of a program at once,
and each keeps a thread until all devices have come. It makes one thread per
device, or per core if there are more. As soon as some devices wait in one
collective and the others in another, no thread is left that could bring a
device on. XLA then ends the process: after 40 s by default. A data-parallel
mixture of experts on 8 devices and 2 cores did so within 60 steps, in each of
five tries; with 4 or 8 threads per device, not in 1,400 steps.
"""

from collections.abc import MutableMapping
import os
import re

# XLA takes the number of cores from it, if it is set.
VARIABLE = 'NPROC'
_PER_DEVICE = 8
_DEVICES = re.compile(r'--xla_force_host_platform_device_count=(\d+)')


def provide(
  environment: MutableMapping[str, str], *, has_peers: bool = False
) -> None:
  """Sets VARIABLE where XLA_FLAGS ask for several CPU devices.

  A value that the user set stays.

  Args:
    has_peers: whether other processes take part in the collectives.
  """
  found = _DEVICES.findall(environment.get('XLA_FLAGS', ''))
  num_devices = int(found[-1]) if found else 1  # of a repeated flag, the last
  if num_devices > 1 or has_peers:
    threads = max(os.cpu_count() or 1, _PER_DEVICE * num_devices)
    environment.setdefault(VARIABLE, str(threads))
