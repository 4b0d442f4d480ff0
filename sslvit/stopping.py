"""Ways in which a run ends before its last step, and the exit codes that tell a scheduler which one it was."""

from __future__ import annotations

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


class Preempted(Exception):
    """A run was told to stop, wrote a checkpoint and can go on with --resume."""


class RankLost(Exception):
    """Another rank no longer answers: its machine has stopped, or the network has. The run can go on with --resume."""
