"""Filters for the log lines of libraries that repeat an error of ours."""

import logging
import sys

from absl import logging as absl_logging


def quiet() -> None:
  """Drops log lines about failed writes, which are raised as well.

  If many writes fail together, the first one is raised. Orbax logs its
  traceback, asyncio logs the others, and TensorStore reports each write that
  ends after the event loop was closed.
  """
  absl_logging.get_absl_logger().addFilter(
    lambda record: '/orbax/' not in record.pathname
  )
  logging.getLogger('asyncio').addFilter(
    lambda record: 'exception was never retrieved' not in record.getMessage()
  )
  hook = sys.unraisablehook

  def filtered(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      hook(unraisable)

  sys.unraisablehook = filtered
