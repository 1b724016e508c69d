"""The exit codes of `train.py`, for users, supervisors and schedulers.

    0        complete
    1, 2     the user must change something: flags, experiment, workdir or
             data. argparse and the shell use these codes for wrong usage too
    3        a loss was not finite; every attempt would end in the same way
    4        the supervisor stopped: the run died at the same step repeatedly
    70       an unexpected exception, printed with its traceback (EX_SOFTWARE)
    75       try again, perhaps on another machine: another process of the run
             failed, the disk is full, another run holds the workdir, or the
             supervisor has used up its restarts (EX_TEMPFAIL)
    128 + n  ended by signal n. 143 and 130: SIGTERM and Ctrl-C asked the run
             to stop, and everything is saved

Codes 1 to 4 need a person: starting again repeats the failure. For codes from
64 up, the same command resumes from the last checkpoint, so a scheduler may
requeue the job:

    Slurm        in the batch script, after srun:
                   code=$?; [ $code -ge 64 ] && scontrol requeue $SLURM_JOB_ID
                 or RequeueExit=70,75,143 in slurm.conf. A preempted job is
                 requeued by itself if submitted with --requeue.
    Kubernetes   restartPolicy: Never, and two podFailurePolicy.rules with
                 onExitCodes.operator: In: action: FailJob for [1, 2, 3, 4],
                 action: Ignore for [75, 143], so that a preemption does not
                 count towards backoffLimit, and a crash (70, 137, 139) does.

70 and 75 come from sysexits.h. Shells use 128 + n for signals too.
"""

import signal

COMPLETE = 0
USER_ERROR = 1
USAGE = 2
NON_FINITE = 3
SAME_STEP = 4
CRASHED = 70
TRY_AGAIN = 75

# A supervisor does not restart the run: a user or a scheduler asked it to stop.
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
FINAL = (COMPLETE, USER_ERROR, USAGE, NON_FINITE, SAME_STEP, *STOPPED)


def of_returncode(returncode: int) -> int:
  """Returns the exit code of a shell for a return code of `subprocess`."""
  return 128 - returncode if returncode < 0 else returncode


def name(code: int) -> str:
  """Returns 'SIGKILL' for 137, 'exit code 70' for 70."""
  try:
    return signal.Signals(code - 128).name
  except ValueError:
    return f'exit code {code}'
