"""Lightning's Trainer for a run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.strategies import Strategy

from sslvit.data.module import ShardDataModule
from sslvit.settings import RunSettings, TrainSettings
from sslvit.train.callbacks import make_callbacks
from sslvit.train.checkpoint_io import AtomicCheckpointIO
from sslvit.train.folder import RunFolder
from sslvit.train.hardware import is_slurm_job, precision_of, trains_on_gpu
from sslvit.train.strategies import make_strategy
from sslvit.train.timing import Clock

PRECISIONS: dict[str, Any] = {"float32": "32-true", "bf16": "bf16-mixed", "float64": "64-true"}  # Lightning's names


def make_trainer(
    settings: RunSettings, folder: RunFolder, data: ShardDataModule, callbacks: Sequence[pl.Callback] = ()
) -> pl.Trainer:
    """The Trainer of one run: one pass of `total_steps` global batches, in our order, with our files."""
    train = settings.train
    plugins: list[Any] = [AtomicCheckpointIO(train)]
    clock = Clock()
    if is_slurm_job():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # callbacks/preemption.py saves and requeues
    for talkative in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.distributed"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        silence_needless_warnings()
        trainer = pl.Trainer(
            accelerator=train.accelerator,
            devices=train.devices or 1,
            num_nodes=train.nodes or 1,
            strategy=strategy_of(train, clock),
            precision=PRECISIONS[precision_of(train)],
            max_epochs=1,  # steps, not epochs: one loader covers the whole run, so a resume is always mid-epoch
            max_steps=data.run.total_steps,
            accumulate_grad_batches=data.run.accumulation_steps,
            log_every_n_steps=train.log_every,
            use_distributed_sampler=False,
            sync_batchnorm=trains_on_gpu(train),  # torch has it for GPUs only
            deterministic=train.deterministic or None,
            logger=False,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),  # only a user's own
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=plugins,
            callbacks=make_callbacks(settings, folder, data, clock, callbacks),
            default_root_dir=folder.path,
        )
    # On several GPUs, Lightning makes the host wait for the device before each micro-batch to learn of SIGTERM;
    # after the loss of a rank this wait never ends. callbacks/peers.py handles signals instead.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _do_nothing  # type: ignore[method-assign]
    return trainer


def _do_nothing() -> None:
    pass


def strategy_of(train: TrainSettings, clock: Clock) -> Strategy | str:
    """The strategy by which ranks share the work; "auto" for one process, which has nothing to share."""
    return make_strategy(train, clock) if train.ranks > 1 else "auto"


def silence_needless_warnings() -> None:
    """Ignore warnings of libraries that mean nothing here; to be called inside `warnings.catch_warnings`."""
    for text in (
        ".*dataloader is not resumable.*",  # it is: the position lies in the data module
        ".*does not have many workers.*",
        ".*DataLoader will create .* worker processes.*",  # more than there are cores, which the run reports itself
        ".*GPU available but not used.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*Total length of `list` across ranks is zero.*",  # no validation in the loop
        ".*overridden `on_before_batch_transfer`.*",  # our batches pass through it as they are
        ".*silently drop the pre-backward hook.*",  # of a view that is changed in place; none is
    ):
        warnings.filterwarnings("ignore", text)
