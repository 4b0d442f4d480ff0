"""A pretraining run, from settings to a folder with an encoder in it."""

from __future__ import annotations

import json
import logging
import signal
import warnings
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from safetensors.torch import save_file

from sslvit import __version__
from sslvit.checkpoint import HEAD, load_encoder, save_encoder
from sslvit.data.index import Index
from sslvit.data.module import ShardDataModule
from sslvit.data.open import open_data
from sslvit.data.plan import split_batch
from sslvit.files import new_file
from sslvit.settings import RunSettings, SupervisedSettings, TrainSettings
from sslvit.stopping import Preempted, RankLost, is_first_process, requeue, stopping_at_once
from sslvit.tasks import task_class
from sslvit.tasks.base import Task
from sslvit.train.callbacks import Ledger, RunLog
from sslvit.train.checkpoints import AtomicCheckpointIO, Checkpoints
from sslvit.train.folder import RunFolder
from sslvit.train.forecast import mfu_per_throughput
from sslvit.train.health import Health
from sslvit.train.incidents import Incidents
from sslvit.train.logs import log_pictures, make_loggers
from sslvit.train.online import OnlineProbe, Validation
from sslvit.train.pictures import draw_pictures
from sslvit.train.preemption import Preemption
from sslvit.train.prepare import check_data, check_machine, check_resumed, chosen, fit, keep_start
from sslvit.train.strategies import compile_blocks, is_peer_failure, make_strategy
from sslvit.train.timing import Clock, StepTimes, WaitForData

logger = logging.getLogger(__name__)


def pretrain(settings: RunSettings, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Pretrain an encoder and leave all that the run made in settings.out.

    Args:
        settings: what runs.
        resume: go on from the folder's newest whole checkpoint; at step 0 where the run ended before it wrote one.
        overwrite: delete an earlier run in the folder first.

    Raises:
        ValueError: settings that cannot work together, or a folder that is in use; before any work is done.
        FileNotFoundError: no data.
    """
    folder, is_first = RunFolder(settings.out), is_first_process()
    try:
        with folder.held(waits=resume) if is_first else nullcontext():
            if is_first:
                folder.check(resume, overwrite)
            return _pretrain(settings, folder, is_first, goes_on=resume and folder.goes_on)
    except Preempted as error:
        if is_first and settings.train.requeue and not error.is_requeued:
            requeue()
        error.is_requeued = True
        raise


def _pretrain(settings: RunSettings, folder: RunFolder, is_first: bool, goes_on: bool) -> RunFolder:
    train = settings.train
    if goes_on:
        settings = keep_start(settings, folder)
    check_machine(settings)
    index, plan = open_data(settings.data, settings.seed, train.devices * train.nodes)
    if is_first:
        check_data(settings, index, plan)
    checkpoint = folder.newest_checkpoint() if goes_on else None
    start = load_encoder(settings.init) if settings.init and not goes_on else None

    if train.threads:
        torch.set_num_threads(train.threads)
    pl.seed_everything(settings.seed, verbose=False)
    total_steps = train.steps or max(1, round(train.epochs * plan.steps_per_epoch))
    asked = settings
    settings = fit(settings, folder if goes_on else None, index, plan, total_steps)
    data = ShardDataModule(index, settings.data, settings.encoder, plan, total_steps, train.micro_batch_size)
    task: Task = task_class(settings.task.name)(
        settings.task, settings.encoder, settings.optim, total_steps=total_steps,
        steps_per_epoch=plan.steps_per_epoch, global_batch_size=plan.global_batch_size, seed=settings.seed,
    )  # fmt: skip
    if start is not None:
        task.start_from(start, settings.init)
    if train.precision == "float64":
        task.double()  # before a checkpoint is loaded, which would otherwise pass through float32
    if checkpoint is not None:
        check_resumed(folder, checkpoint, settings, data, task)
    if train.compile:
        compile_blocks(task)
    trainer = make_trainer(settings, folder, index, data)
    if is_first:
        folder.start(settings.as_dict(), goes_on)
        trainer.loggers = make_loggers(train, folder)
        _announce(settings, index, data, task, trainer)
        if picked := chosen(asked, settings, plan.steps_per_epoch):
            logger.info(f"chosen for {len(index):,} images, {plan.global_batch_size} a step: {'; '.join(picked)}")

    with warnings.catch_warnings():
        _silence_needless_warnings()
        try:
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            compile_blocks(task, undo=True)
            task = task.whole()  # together: each rank may hold a part of it
        except Preempted:
            if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
                trainer.strategy.launcher.kill(signal.SIGTERM)  # other ranks, which may still wait for the first step
            raise
        except RuntimeError as error:
            if not is_peer_failure(error, trainer.world_size):
                raise
            raise RankLost(
                f"stopped at step {trainer.global_step} of {total_steps}: another rank has ended, or did not answer "
                f"for {train.timeout_seconds:g} s (train.timeout_seconds). See what it said, and whether the network "
                f"stands{_resume_hint(folder)} ({str(error).splitlines()[0][:120]})"
            ) from error
        except SystemExit as error:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt(
                f"stopped at step {trainer.global_step} of {total_steps}{_resume_hint(folder)}"
            ) from error
    if trainer.global_step != total_steps:
        raise RuntimeError(f"training ended at step {trainer.global_step} instead of {total_steps}.")
    if trainer.is_global_zero:
        with stopping_at_once(" after the last step; --resume draws the figures"):
            _finish(settings, folder, index, data, task, trainer)
    return folder


def _resume_hint(folder: RunFolder) -> str:
    return "; go on from its last checkpoint with --resume" if folder.checkpoint.exists() else ""


def make_trainer(settings: RunSettings, folder: RunFolder, index: Index, data: ShardDataModule) -> pl.Trainer:
    """Lightning's Trainer for one run: one pass of `total_steps` global batches, our order, our files."""
    train = settings.train
    world = train.devices * train.nodes
    _, passes = split_batch(settings.data.global_batch_size, world, train.micro_batch_size)
    plugins: list[Any] = [AtomicCheckpointIO(train)]
    clock = Clock()
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # preemption.py saves and requeues
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        _silence_needless_warnings()
        return pl.Trainer(
            accelerator=train.accelerator,
            devices=train.devices,
            num_nodes=train.nodes,
            strategy=make_strategy(train, clock),
            precision=precision_of(train),
            max_epochs=1,  # steps, not epochs: one loader covers the whole run, so a resume is always mid-epoch
            max_steps=data.total_steps,
            accumulate_grad_batches=passes,
            use_distributed_sampler=False,
            sync_batchnorm=train.accelerator != "cpu" and torch.cuda.is_available(),  # torch has it for GPUs only
            deterministic=train.deterministic or None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=settings.optim.clip_grad,
            plugins=plugins,
            callbacks=[
                StepTimes(clock),
                Ledger(folder, index, data.plan, settings.data.max_unreadable_fraction, settings.data.ledger),
                Incidents(folder, index, train.skip_limit),
                Health(folder, data.total_steps, train.log_every),
                *scoring(settings, folder, index, data.total_steps),
                RunLog(
                    folder, data.plan, data.total_steps, train.log_every, clock, mfu_per_throughput(settings, index)
                ),
                Checkpoints(folder, train, data.total_steps),
                Preemption(folder, data.total_steps, train.timeout_seconds),
                WaitForData(clock),
            ],
            default_root_dir=folder.path,
        )


def scoring(settings: RunSettings, folder: RunFolder, index: Index, total_steps: int) -> list[pl.Callback]:
    """What looks at labeled images while the run trains."""
    callbacks: list[pl.Callback] = []
    if settings.online.train is not None:
        callbacks.append(OnlineProbe(settings, total_steps))
    if isinstance(settings.task, SupervisedSettings) and settings.task.val is not None:
        callbacks.append(Validation(settings, folder, index, total_steps))
    return callbacks


def precision_of(train: TrainSettings) -> str:
    """Lightning's name for the precision; auto is bf16 where the hardware computes in it."""
    names = {"float32": "32-true", "bf16": "bf16-mixed", "float64": "64-true"}
    if train.precision != "auto":
        return names[train.precision]
    if train.accelerator != "cpu" and torch.cuda.is_available():
        return names["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"]
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return names["bf16" if known.get("amx_bf16") or known.get("avx512_bf16") else "float32"]


def _announce(settings: RunSettings, index: Index, data: ShardDataModule, task: Task, trainer: pl.Trainer) -> None:
    parameters = sum(parameter.numel() for parameter in task.trained_encoder.parameters())
    plan = data.plan
    logger.info(
        f"{settings.task.name}: encoder of {parameters / 1e6:.1f} M parameters on {len(index):,} images; "
        f"{data.total_steps:,} steps of {plan.global_batch_size} images "
        f"({data.total_steps / plan.steps_per_epoch:.1f} epochs, each dropping {plan.dropped_per_epoch} images); "
        f"peak rate {task.peak_lr:.2e}; "
        f"{trainer.precision} on {trainer.world_size} x {trainer.strategy.root_device.type}; "
        f"run folder {settings.out}",
    )


def _finish(
    settings: RunSettings, folder: RunFolder, index: Index, data: ShardDataModule, task: Task,
    trainer: pl.Trainer,
) -> None:  # fmt: skip
    """Encoder and figures of a run that reached its last step."""
    task.eval()
    provenance = {
        "sslvit": __version__, "task": settings.task.name, "step": trainer.global_step,
        "data": {"shards": index.location, "samples": len(index), "fingerprint": index.fingerprint()},
        "settings": settings.as_dict(),
    }  # fmt: skip
    if task.trained_encoder is not task.encoder:
        provenance["weights"] = "teacher"
    save_encoder(task.trained_encoder, folder.encoder, provenance)
    if extra := task.extra_weights():
        classes = {"classes": json.dumps(index.classes)}
        with new_file(folder.encoder / HEAD) as part:
            save_file({key: value.cpu().contiguous() for key, value in extra.items()}, part, classes)
    draw_pictures(folder, task, data)
    log_pictures(trainer, folder.figures, trainer.global_step)
    logger.info(f"encoder in {folder.encoder}, figures in {folder.figures}")


def _silence_needless_warnings() -> None:
    for text in (
        ".*dataloader is not resumable.*",  # it is: the position lies in the data module
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have a `val_dataloader`.*",
        ".*silently drop the pre-backward hook.*",  # of a view that is changed in place; none is
    ):
        warnings.filterwarnings("ignore", text)
