"""After a signal to stop: a complete checkpoint at the next step boundary, and an exit that is not taken for a failure.

From the first step on, SIGTERM and SIGUSR1 only set a flag, so a second one changes nothing. A first Ctrl-C does the
same; a second one ends the process at once. After each step the ranks agree on whether to stop (peers.py), since only
one of them may have received the signal; then the checkpoint is written (checkpoints.py), and all leave together.
"""

from __future__ import annotations

import pytorch_lightning as pl

from sslvit.stopping import Interrupted, Preempted
from sslvit.train.callbacks.base import StepCallback, wait_for_checkpoint
from sslvit.train.callbacks.peers import Peers
from sslvit.train.folder import RunFolder


class Preemption(StepCallback):
    """Stops the run at the next step boundary after a signal.

    Args:
        peers: Knows whether any rank has received a signal.
        folder: The run's folder.
        total_steps: Number of optimizer steps in the run; after the last one there is nothing to stop.
    """

    def __init__(self, peers: Peers, folder: RunFolder, total_steps: int) -> None:
        self.peers, self.folder, self.total_steps = peers, folder, total_steps

    def on_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Leave when the step's checkpoint is on disk, once any rank has received a signal."""
        if not self.peers.is_stopping or self.step == self.total_steps:
            return
        wait_for_checkpoint(trainer)
        trainer.strategy.barrier()  # no rank leaves before the checkpoint is complete
        where = f"at step {self.step} of {self.total_steps}"
        resume_hint = f"the checkpoint is whole: {self.folder.resume_command}"
        if self.peers.is_interrupted:
            raise Interrupted(f"interrupted {where}; {resume_hint}")
        received = self.peers.received
        why = f"received {received}" if received else "another rank received a signal"
        raise Preempted(f"stopped {where}: {why}; {resume_hint}")
