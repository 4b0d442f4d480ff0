"""A pretraining run, from settings to a folder with an encoder in it."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import replace

import pytorch_lightning as pl
import torch

from sslvit import __version__
from sslvit.checkpoint import (
    load_encoder,
    read_torch_file,
    save_encoder,
    settings_difference,
    settings_from,
)
from sslvit.data.decode import MODES
from sslvit.data.index import Index
from sslvit.data.module import ShardDataModule
from sslvit.data.open import check_present, open_data
from sslvit.data.plan import Plan, slices
from sslvit.data.stream import StreamIndex
from sslvit.optim import decay_groups
from sslvit.settings import EncoderSettings, PretrainSettings, TrainSettings
from sslvit.settings.load import by_dotted_key
from sslvit.settings.views import MultiCropSettings
from sslvit.tasks import task_class
from sslvit.tasks.base import PretextTask
from sslvit.train.callbacks import Checkpoints, Ledger, RunLog, WholeCheckpoint
from sslvit.train.folder import RunFolder
from sslvit.train.health import Health
from sslvit.train.pictures import draw_pictures


def pretrain(settings: PretrainSettings, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Pretrain an encoder and leave all that the run made in settings.out.

    Args:
        settings: what runs.
        resume: go on from the folder's last checkpoint.
        overwrite: delete an earlier run in the folder first.

    Raises:
        ValueError: settings that cannot work together, or a folder that is in use; before any work is done.
        FileNotFoundError: no data.
    """
    folder = RunFolder(settings.out)
    is_first = _is_first_process()
    if is_first:
        folder.check(resume, overwrite)
    train = settings.train
    _check_machine(settings)
    index, plan = open_data(settings.data, f"{settings.out.rstrip('/')}-shards", settings.seed)
    if is_first:
        _check_data(settings, index, plan)
    start = None
    if settings.init and not resume:
        start = load_encoder(settings.init)
        _check_same(start.settings, settings.encoder, settings.init)

    if train.threads:
        torch.set_num_threads(train.threads)
    pl.seed_everything(settings.seed, verbose=False)
    total_steps = train.steps or max(1, round(train.epochs * plan.steps_per_epoch))
    asked = settings
    settings = fit(settings, folder if resume else None, len(index), plan, total_steps)
    data = ShardDataModule(index, settings.data, settings.encoder, plan, total_steps, train.micro_batch)
    task: PretextTask = task_class(settings.task.name)(
        settings.task, settings.encoder, settings.optim, total_steps=total_steps,
        steps_per_epoch=plan.steps_per_epoch, global_batch=plan.global_batch, seed=settings.seed,
    )  # fmt: skip
    if start is not None:
        task.start_from(start.state_dict(), settings.init)
    if train.precision == "float64":
        task.double()  # before a checkpoint is loaded, which would otherwise pass through float32
    if resume:
        _check_resumed(folder, settings, data, task)
    trainer = make_trainer(settings, folder, index, data)
    if is_first:
        folder.start(settings.as_dict(), resume)
        _announce(settings, index, data, task, trainer)
        if chosen := _chosen(asked, settings):
            print(f"chosen for {len(index):,} images, {plan.global_batch} a step: {', '.join(chosen)}", flush=True)

    with warnings.catch_warnings():
        _silence_needless_warnings()
        try:
            trainer.fit(task, datamodule=data, ckpt_path=folder.checkpoint if resume else None, weights_only=True)
        except SystemExit as error:  # Lightning's answer to Ctrl-C
            saved = "; go on from its last checkpoint with --resume" if folder.checkpoint.exists() else ""
            raise KeyboardInterrupt(f"stopped at step {trainer.global_step} of {total_steps}{saved}") from error
    if trainer.global_step != total_steps:
        raise RuntimeError(f"training ended at step {trainer.global_step} instead of {total_steps}.")
    if trainer.is_global_zero:
        _finish(settings, folder, index, data, task, trainer)
    return folder


def make_trainer(settings: PretrainSettings, folder: RunFolder, index: Index, data: ShardDataModule) -> pl.Trainer:
    """Lightning's Trainer for one run: one pass of `total_steps` global batches, our order, our files."""
    train = settings.train
    world = train.devices * train.nodes
    _, passes = slices(settings.data.global_batch, world, train.micro_batch)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        _silence_needless_warnings()
        return pl.Trainer(
            accelerator=train.accelerator,
            devices=train.devices,
            num_nodes=train.nodes,
            strategy="ddp" if world > 1 else "auto",
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
            gradient_clip_val=settings.optim.clip,
            plugins=[WholeCheckpoint()],
            callbacks=[
                Ledger(folder, index, data.plan, settings.data.bad_limit, settings.data.ledger),
                Health(folder, data.total_steps, train.log_every),
                RunLog(folder, data.plan, data.total_steps, train.log_every),
                Checkpoints(folder, data.total_steps, train.checkpoint_every),
            ],
            default_root_dir=folder.path,
        )


def precision_of(train: TrainSettings) -> str:
    """Lightning's name for the precision; auto is bf16 where the hardware computes in it."""
    names = {"float32": "32-true", "bf16": "bf16-mixed", "float64": "64-true"}
    if train.precision != "auto":
        return names[train.precision]
    if train.accelerator != "cpu" and torch.cuda.is_available():
        return names["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"]
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return names["bf16" if known.get("amx_bf16") or known.get("avx512_bf16") else "float32"]


def _announce(
    settings: PretrainSettings, index: Index, data: ShardDataModule, task: PretextTask, trainer: pl.Trainer
) -> None:
    parameters = sum(parameter.numel() for parameter in task.trained_encoder.parameters())
    plan = data.plan
    print(
        f"{settings.task.name}: encoder of {parameters / 1e6:.1f} M parameters on {len(index):,} images; "
        f"{data.total_steps:,} steps of {plan.global_batch} images "
        f"({data.total_steps / plan.steps_per_epoch:.1f} epochs, each dropping {plan.dropped_per_epoch} images); "
        f"peak rate {task.peak_rate:.2e}; "
        f"{trainer.precision} on {trainer.world_size} x {trainer.strategy.root_device.type}; "
        f"run folder {settings.out}",
        flush=True,
    )


def _finish(
    settings: PretrainSettings, folder: RunFolder, index: Index, data: ShardDataModule, task: PretextTask,
    trainer: pl.Trainer,
) -> None:  # fmt: skip
    """Encoder and figures of a run that reached its last step."""
    task.eval()
    provenance = {
        "sslvit": __version__, "task": settings.task.name, "step": trainer.global_step,
        "data": {"shards": index.location, "samples": len(index), "fingerprint": index.fingerprint()},
        "settings": settings.as_dict(),
    }  # fmt: skip
    save_encoder(task.trained_encoder, folder.encoder, provenance)
    draw_pictures(folder, task, data)
    print(f"encoder in {folder.encoder}, figures in {folder.figures}")


def _check_machine(settings: PretrainSettings) -> None:
    """Refuse what cannot run here, before data is touched."""
    train = settings.train
    slices(settings.data.global_batch, train.devices * train.nodes, train.micro_batch)
    kinds = task_class(settings.task.name).view_kinds
    if settings.data.view.kind not in kinds:
        raise ValueError(
            f"data.view.kind: {settings.data.view.kind} is not for {settings.task.name}. Use {' or '.join(kinds)}."
        )
    if train.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("train.accelerator: gpu, but torch sees none here. Use auto or cpu.")


def _check_data(settings: PretrainSettings, index: Index, plan: Plan) -> None:
    """Refuse data that this run cannot read, before step 0."""
    data, encoder = settings.data, settings.encoder
    if index.channels != encoder.channels and not {index.channels, encoder.channels} <= set(MODES):
        raise ValueError(
            f"encoder.channels: {encoder.channels}, but the images of {index.location} have {index.channels}. "
            f"Images are converted between {', '.join(map(str, MODES))} channels only."
        )
    sides = {"data.resolutions": data.resolutions or []}
    if isinstance(data.view, MultiCropSettings) and data.view.local_crops:
        sides["data.view.local_size"] = [data.view.local_size]
    for key, wanted in sides.items():
        for side in wanted:
            if side % encoder.patch:
                raise ValueError(f"{key}: {side} is not a multiple of encoder.patch ({encoder.patch}).")
    if data.ledger and isinstance(index, StreamIndex):
        raise ValueError("data.ledger: a stream cannot promise each sample once. Pack it into shards, or leave it off.")
    check_present(index, data.bad_limit)
    largest = max(shard.bytes for shard in index.shards) if index.is_remote else 0
    needed = plan.shards_at_once(0, plan.global_batch // settings.train.nodes) * largest / 2**30
    if needed > data.cache_gb:
        raise ValueError(
            f"data.cache_gb: {data.cache_gb:g} GB cannot hold the shards that each machine reads side by side "
            f"({needed:.1f} GB). Raise it, or set data.lanes or data.window_shards lower."
        )


def fit(
    settings: PretrainSettings, earlier: RunFolder | None, images: int, plan: Plan, total_steps: int
) -> PretrainSettings:
    """The same settings with what was left open chosen for the job; a resumed run keeps what it chose before.

    Args:
        settings: as given.
        earlier: the folder of the run that goes on, if one does.
        images: in the data set.
        plan: the order of the data.
        total_steps: of the run.
    """
    task = settings.task.fitted(images, plan.global_batch, total_steps)
    optim = settings.optim.fitted(plan.steps_per_epoch, total_steps)
    fitted = replace(settings, task=task, optim=optim)
    if earlier is not None:
        before, asked = by_dotted_key(earlier.read_config()), by_dotted_key(settings.as_dict())
        for name, part in (("task", task), ("optim", optim)):
            was_open = {key: before.get(f"{name}.{key}") for key in vars(part) if asked[f"{name}.{key}"] is None}
            kept = {key: value for key, value in was_open.items() if value is not None and vars(part)[key] is not None}
            fitted = replace(fitted, **{name: replace(part, **kept)})
    return fitted


def _chosen(asked: PretrainSettings, settings: PretrainSettings) -> list[str]:
    """What was left open and is chosen now, as "task.out_dim 256"."""
    before, after = by_dotted_key(asked.as_dict()), by_dotted_key(settings.as_dict())
    return [f"{key} {after[key]:.4g}" for key in after if before[key] is None and after[key] is not None]


def _check_resumed(folder: RunFolder, settings: PretrainSettings, data: ShardDataModule, task: PretextTask) -> None:
    """A resumed run must train the same encoder on the same data in the same order; other changes are said."""
    content = read_torch_file(folder.checkpoint)
    try:
        trained, position = content["sslvit"]["encoder"], content[ShardDataModule.__qualname__]
        shapes = {key: value.shape for key, value in content["state_dict"].items()}
        moved = [len(group["params"]) for group in content["optimizer_states"][0]["param_groups"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"--resume: {folder.path} is not a run of sslvit that can go on ({error}).") from error
    _check_same(settings_from(trained, folder.checkpoint), settings.encoder, str(folder.checkpoint))
    data.load_state_dict(position)
    if data.start_step > data.total_steps:
        raise ValueError(f"--resume: {folder.path} is at step {data.start_step} already, past {data.total_steps}.")
    old, new = by_dotted_key(folder.read_config()), by_dotted_key(settings.as_dict())
    changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in new if old.get(key) != new.get(key)]
    same_shapes = shapes == {key: value.shape for key, value in task.state_dict().items()}
    if not same_shapes or moved != [len(group["params"]) for group in decay_groups(task, 0.0)]:
        guilty = [change for change in changed if change.startswith("task.")] or changed or ["another task"]
        raise ValueError(
            f"--resume: the weights in {folder.checkpoint} do not fit these settings ({'; '.join(guilty)}). "
            "Restore them, or start a new run from its encoder with --init."
        )
    if changed:
        print(f"resuming with changes: {'; '.join(changed)}")


def _check_same(there: EncoderSettings, here: EncoderSettings, source: str) -> None:
    different = settings_difference(there, here)
    if different:
        raise ValueError(f"{source}: an encoder of another architecture (there and here {'; '.join(different)}).")


def _is_first_process() -> bool:
    """Whether this process may touch the run folder: rank zero under every launcher that Lightning knows."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
    return all(rank == "0" for rank in ranks)


def _silence_needless_warnings() -> None:
    for text in (
        ".*dataloader is not resumable.*",  # it is: the position lies in the data module
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have a `val_dataloader`.*",
    ):
        warnings.filterwarnings("ignore", text)
