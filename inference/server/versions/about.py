"""The versions of this program, its libraries and its device."""

import functools
import importlib.metadata
import platform
from typing import Any

import jax

from frozen import manifest as manifest_lib
from inference.server.records import database
from storage import code_commit


@functools.cache
def device() -> dict[str, Any]:
  """Returns the device of this process; its first use takes a while."""
  first = jax.local_devices()[0]
  return {
    'platform': first.platform,
    'device': first.device_kind,
    'num_devices': jax.local_device_count(),
  }


def version(device_elsewhere: dict[str, Any] | None = None) -> dict[str, Any]:
  """Returns the body of GET /version.

  Args:
    device_elsewhere: `device` of another process that has the engine; None: it
      is in this process.
  """
  commit = _commit()
  return {
    # The project has no releases: a version is a commit.
    'version': commit[:12],
    'commit': commit,
    'python': platform.python_version(),
    'jax': importlib.metadata.version('jax'),
    'jaxlib': importlib.metadata.version('jaxlib'),
    **(device_elsewhere or device()),
    'formats': {
      'frozen': manifest_lib.FORMAT_VERSION,
      'records': database.FORMAT,
    },
  }


@functools.cache
def _commit() -> str:
  return code_commit.find()
