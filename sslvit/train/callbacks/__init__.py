"""The callbacks of a run in calling order, each with the reason for its place."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl

from sslvit.data.module import ShardDataModule
from sslvit.settings import RunSettings, SupervisedSettings
from sslvit.train.callbacks.checkpoints import Checkpoints
from sslvit.train.callbacks.health import Health, checked_every
from sslvit.train.callbacks.incidents import Incidents
from sslvit.train.callbacks.ledger import STEPS_BETWEEN_COUNTS, Ledger
from sslvit.train.callbacks.page import Page
from sslvit.train.callbacks.peers import Peers
from sslvit.train.callbacks.preemption import Preemption
from sslvit.train.callbacks.run_log import RunLog, work_of
from sslvit.train.callbacks.scoring import OnlineProbe, Validation
from sslvit.train.folder import RunFolder
from sslvit.train.forecast import mfu_per_throughput
from sslvit.train.hardware import trains_on_gpu
from sslvit.train.timing import Clock, WaitForData


def make_callbacks(
    settings: RunSettings, folder: RunFolder, data: ShardDataModule, clock: Clock, others: Sequence[pl.Callback] = ()
) -> list[pl.Callback]:
    """The callbacks of a run.

    Args:
        settings: Settings of the run.
        folder: The run's folder.
        data: The training data.
        clock: Measures where a step's time goes; it becomes the first callback.
        others: The user's callbacks.
    """
    run, train, index = data.run, settings.train, data.index
    waits_every = (train.log_every, train.checkpoint_every, STEPS_BETWEEN_COUNTS)
    peers = Peers(folder, waits_every, run.total_steps, train.timeout_seconds, index.fingerprint())
    scoring: list[pl.Callback] = []
    if settings.online.train is not None:
        scoring.append(OnlineProbe(settings, run.total_steps))
    if isinstance(settings.task, SupervisedSettings) and settings.task.val is not None:
        scoring.append(Validation(settings, settings.task, folder, index, run.total_steps))
    mfu = mfu_per_throughput(settings, index) if train.peak_tflops or trains_on_gpu(train) else None
    return [
        clock,  # first, so that the time of the other callbacks is not counted as the optimizer's
        peers,  # before any callback waits for the device: after the loss of a rank that wait never ends
        Ledger(
            folder, index, data.plan, settings.data.max_unreadable_fraction, settings.data.ledger
        ),  # may end the run
        Incidents(folder, index, train.skip_limit),  # may end the run, so before the step is recorded
        Health(
            folder, run, checked_every(run.total_steps, train.log_every)
        ),  # records measures for the line of metrics
        *scoring,  # record scores for the same line
        RunLog(folder, run, train.log_every, clock, mfu, work_of(settings, run)),  # writes the line
        Page(folder, train.log_every),  # shows the line
        *others,  # may stop the run, so before the checkpoint of its last step
        Checkpoints(folder, train, run.total_steps, peers),  # after everything that a checkpoint of this step stores
        Preemption(peers, folder, run.total_steps),  # after the checkpoint, since it leaves the run
        WaitForData(clock),  # last, since the wait for the next batch begins here
    ]
