"""A pretraining run, from settings to a folder with an encoder in it."""

from __future__ import annotations

import json
import logging
import signal
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from safetensors.torch import save_file

from sslvit import __version__
from sslvit.checkpoint import HEAD, load_encoder, save_encoder
from sslvit.data.examples import Examples
from sslvit.data.mixture import Plan
from sslvit.data.module import ShardDataModule
from sslvit.data.open import open_run_data
from sslvit.environment import cpu_cores, limited_steps
from sslvit.files import counted, in_millions, new_file
from sslvit.ranks import ending_groups
from sslvit.run_plan import RunPlan
from sslvit.settings import RunSettings
from sslvit.stopping import Interrupted, Preempted, RankLost, is_first_process, requeue, stopping_at_once
from sslvit.tasks import make_task
from sslvit.tasks.base import Task
from sslvit.train.compilation import compile_task, undo_compilation
from sslvit.train.fitting import fit_length, fit_micro_batch
from sslvit.train.folder import RunFolder
from sslvit.train.hardware import compile_mode, resolve_processes, tf32_beside_bf16
from sslvit.train.loggers import ended_on_failure, log_pictures, make_loggers
from sslvit.train.pictures import plot_pictures
from sslvit.train.prepare import (
    check_data,
    check_machine,
    describe_resolved,
    look_at_views,
    resolve_defaults,
    size_notice,
)
from sslvit.train.report import write_own_report
from sslvit.train.resume import check_resumed, keep_resolved, keep_start
from sslvit.train.strategies import is_peer_failure
from sslvit.train.timed_steps import fit_budget
from sslvit.train.trainer import make_trainer, silence_needless_warnings

logger = logging.getLogger(__name__)


def pretrain(
    settings: RunSettings,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
) -> RunFolder:
    """Pretrain an encoder, and write all results to settings.out.

    Args:
        settings: Settings of the run.
        resume: Continue from the folder's newest intact checkpoint, or from step 0 if the run ended before its first.
        overwrite: Delete an earlier run in the folder first.
        callbacks: Further callbacks, which act after the records of a step and before its checkpoint.
        loggers: Loggers in addition to those in the settings.

    Raises:
        ValueError: settings that cannot work together, or a folder that is in use; before any work is done.
        FileNotFoundError: no data.
    """
    folder, is_first = RunFolder(settings.out), is_first_process()
    try:
        held = folder.held(waits=resume) if is_first else nullcontext()
        with held, tf32_beside_bf16(settings.train), ending_groups():
            if is_first:
                folder.check(resume, overwrite)
            return _pretrain(settings, folder, is_first, resume and folder.goes_on, callbacks, loggers)
    except Interrupted as error:
        raise KeyboardInterrupt(str(error)) from None
    except Preempted as error:
        if is_first and settings.train.requeue and not error.is_requeued:
            requeue()
        error.is_requeued = True
        raise


def _pretrain(
    settings: RunSettings, folder: RunFolder, is_first: bool, goes_on: bool, callbacks: Sequence[pl.Callback],
    loggers: Sequence[Logger],
) -> RunFolder:  # fmt: skip
    settings = replace(settings, train=resolve_processes(settings.train))
    if goes_on:
        settings = keep_resolved(keep_start(settings, folder), folder)
    train = settings.train
    check_machine(settings)
    checkpoint = folder.newest_checkpoint() if goes_on else None
    start = load_encoder(settings.init) if settings.init and not goes_on else None
    index, plan = open_run_data(settings)
    if is_first:
        check_data(settings, index, plan)
    settings = look_at_views(settings, index)

    if train.threads:
        torch.set_num_threads(train.threads)
    requested, classes = settings, len(index.classes) if index.classes else None
    if train.budget is not None and train.steps is None:
        train, timed = fit_budget(settings, len(index), classes, plan.steps_per_epoch, plan.global_batch_size)
        length = timed.pace_text()
    else:
        train, length = fit_length(settings, len(index), classes, plan.steps_per_epoch, plan.global_batch_size)
    pl.seed_everything(settings.seed, verbose=False)  # after timing steps for a budget
    settings = shortened(replace(settings, train=train), plan)
    run = RunPlan.make(settings.train, plan.steps_per_epoch, plan.global_batch_size, settings.seed)
    settings = resolve_defaults(settings, folder if goes_on else None, index, run)
    run, memory = fit_micro_batch(run, settings, len(index), classes)
    is_supervised = settings.task.name == "supervised"
    data = ShardDataModule(index, settings.data, settings.encoder, plan, run, uses_labels=is_supervised)
    task = make_task(settings, run)
    if start is not None:
        task.start_from(start, str(settings.init))
    if train.precision == "float64":
        task.double()  # before a checkpoint is loaded, which would otherwise be rounded to float32
    if checkpoint is not None:
        check_resumed(folder, checkpoint, settings, data, task)
    if (mode := compile_mode(train)) is not None:
        compile_task(task, mode)
    trainer = make_trainer(settings, folder, data, callbacks)
    if is_first:
        folder.start(asdict(settings), goes_on)
        # loggers get all parameters at once, since MLflow accepts none twice
        task.save_hyperparameters(dict(task.hparams), logger=False)
        trainer.loggers = make_loggers(settings, folder, index, loggers)
        _announce(settings, data, task, trainer)
        size = (index.image_size[0], index.image_size[1]) if index.image_size else Examples.of(index).size
        for notice in (memory, size_notice(settings, index.location, size)):
            if notice:
                logger.info(notice)
        if resolved := describe_resolved(requested, settings, run, {"train.epochs": length, "train.steps": length}):
            logger.info(f"resolved for {len(index):,} images, {run.global_batch_size} a step: {'; '.join(resolved)}")

    started = time.perf_counter()
    with ended_on_failure(trainer), warnings.catch_warnings():
        silence_needless_warnings()
        try:
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            undo_compilation(task)
            task = task.gather_full_copy()  # on all ranks, since each may hold a shard of it
        except Preempted:
            if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
                trainer.strategy.launcher.kill(signal.SIGTERM)  # other ranks may still wait for the first step
            raise
        except RuntimeError as error:
            if not is_peer_failure(error, trainer.world_size):
                raise
            raise RankLost(
                f"stopped at step {trainer.global_step} of {run.total_steps}: another rank has ended, or did not "
                f"answer for {train.timeout_seconds:g} s (train.timeout_seconds). See what it said, and whether the "
                f"network stands{_resume_hint(folder)} ({str(error).splitlines()[0][:120]})"
            ) from error
        except SystemExit as error:  # raised by Lightning after Ctrl-C
            raise KeyboardInterrupt(
                f"interrupted at step {trainer.global_step} of {run.total_steps}, which is not kept"
                f"{_resume_hint(folder) or ': there is no checkpoint yet'}"
            ) from error
    if trainer.global_step != run.total_steps and not trainer.should_stop:
        raise RuntimeError(f"training ended at step {trainer.global_step} instead of {run.total_steps}.")
    if trainer.is_global_zero:
        if train.budget is not None and not goes_on:
            took = (time.perf_counter() - started) / 60
            logger.info(f"{trainer.global_step:,} steps took {took:.1f} minutes (train.budget {train.budget})")
        if trainer.global_step != run.total_steps:
            logger.info(f"a callback ended the run at step {trainer.global_step} of {run.total_steps}")
        with (
            stopping_at_once(f" after the last step, which is kept: {folder.resume_command} draws the figures"),
            ended_on_failure(trainer),
        ):
            _finish(settings, folder, data, task, trainer)
    return folder


def shortened(settings: RunSettings, plan: Plan) -> RunSettings:
    """The settings of a run, with its length limited by $SSLVIT_MAX_STEPS if that is set."""
    steps = RunPlan.make(settings.train, plan.steps_per_epoch, plan.global_batch_size, settings.seed).total_steps
    limited = limited_steps(steps, "this run")
    return settings if limited == steps else replace(settings, train=replace(settings.train, steps=limited))


def _resume_hint(folder: RunFolder) -> str:
    return f"; go on from its last checkpoint: {folder.resume_command}" if folder.checkpoint.exists() else ""


def _announce(settings: RunSettings, data: ShardDataModule, task: Task, trainer: pl.Trainer) -> None:
    parameters = sum(parameter.numel() for parameter in task.trained_encoder.parameters())
    run, dropped = data.run, data.plan.dropped_per_epoch
    logger.info(
        f"{settings.task.name}: encoder of {in_millions(parameters)} parameters on {len(data.index):,} images; "
        f"{run.total_steps:,} steps of {run.global_batch_size} images "
        f"({run.total_steps / run.steps_per_epoch:.1f} epochs, each dropping {dropped} images); "
        f"peak learning rate {task.peak_lr:.2e}; "
        f"{trainer.precision} on {trainer.world_size} x {trainer.strategy.root_device.type}; "
        f"run folder {settings.out}",
    )
    workers, cores = settings.data.workers or 0, cpu_cores()
    if workers > cores:
        logger.info(
            f"data.workers: {workers} loader processes on each rank, but this one may use "
            f"{counted(cores, 'CPU core')}. Lower it, or ask the scheduler for more cores."
        )
    if settings.encoder.backbone is not None:
        logger.info(
            f"encoder.backbone {settings.encoder.backbone}: all its weights move at one learning rate, and what "
            "encoder.* says of the vision transformer does not hold"
        )


def _finish(settings: RunSettings, folder: RunFolder, data: ShardDataModule, task: Task, trainer: pl.Trainer) -> None:
    """Save the encoder and the figures of a run after its last step."""
    task.eval()
    index = data.index
    provenance = {
        "sslvit": __version__, "task": settings.task.name, "step": trainer.global_step,
        "data": {"shards": index.location, "samples": len(index), "fingerprint": index.fingerprint()},
        "settings": asdict(settings),
    }  # fmt: skip
    if task.trained_encoder is not task.encoder:
        provenance["weights"] = "teacher"
    save_encoder(task.trained_encoder, folder.encoder, provenance)
    if extra := task.extra_weights():
        classes = {"classes": json.dumps(index.classes)}
        with new_file(folder.encoder / HEAD) as temporary:
            save_file({key: value.cpu().contiguous() for key, value in extra.items()}, temporary, classes)
    logger.info("drawing figures")
    plot_pictures(folder, task, data, trainer.strategy.root_device)
    log_pictures(trainer, folder.figures, trainer.global_step)
    is_whole = trainer.global_step == data.run.total_steps
    page = write_own_report(folder, "finished" if is_whole else "ended by a callback")
    one_page = f", everything on one page in {page}" if page else ""
    logger.info(f"encoder in {folder.encoder}, figures in {folder.figures}{one_page}")
