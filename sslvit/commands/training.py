"""Commands for training: demo, pretrain, finetune, resume, plan, replay, recipes and settings."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sslvit.commands.files import report
from sslvit.commands.options import Options, Recipe, Reported, Resumable
from sslvit.settings import EncoderSettings
from sslvit.settings.choices import Arg
from sslvit.settings.data import one_source
from sslvit.settings.load import check_changes, load_recipe, takes_init
from sslvit.stopping import is_first_process

if TYPE_CHECKING:
    from sslvit.train.folder import RunFolder

NO_ENCODER = "none"  # instead of ENCODER


@dataclass(kw_only=True)
class DemoOptions(Recipe):
    """Run the whole workflow on real images, in minutes on a CPU.

    Settings of the recipes are given as --KEY VALUE, e.g. --train.epochs 10.

    Example: sslvit demo --out runs/demo
    """

    data: Literal["digits", "cifar10"] = "digits"
    """Data set."""
    archive: Annotated[str | None, Arg("FILE")] = None
    """Local archive of CIFAR-10; null for a download."""
    out: Annotated[str, Arg("FOLDER")] = "runs/demo"
    """Folder for all results."""
    seed: int = 0
    """Seed of all runs."""
    overwrite: bool = False
    """Replace an earlier demo."""


def run_demo(options: DemoOptions) -> None:
    """Run the demo."""
    from sslvit.settings.demo import check_demo

    if options.archive is not None and options.data != "cifar10":
        raise ValueError("--archive: is CIFAR-10's. Add --data cifar10.")
    check_demo(options.data, options.changes)
    from sslvit.reports.demo import demo

    demo(options.data, options.archive, options.out, options.overwrite, options.seed, options.changes)


@dataclass(kw_only=True)
class PretrainOptions(Resumable):
    """Pretrain an encoder with a recipe.

    Settings of the recipe are given as --KEY VALUE, e.g. --train.epochs 10; `sslvit settings` lists them all.

    Example: sslvit pretrain --config mae/vit_tiny_cifar10 --data shards/cifar10/train --out runs/mae --encoder.patch 4
    """

    config: Annotated[str, Arg("RECIPE")]
    """YAML file, or the name of a recipe, such as mae/digits."""
    data: Annotated[list[str] | None, Arg("SHARDS")] = None
    """Folder of images or shards, or several .tar files; null for the recipe's data.shards."""
    out: Annotated[str | None, Arg("FOLDER")] = None
    """Run folder; null for the recipe's."""
    init: Annotated[str | None, Arg("ENCODER")] = None
    """Encoder whose weights initialize the run; null for the recipe's."""


def check_recipe(config: str, changes: dict[str, Any]) -> None:
    """Validate a recipe and its changes before torch is imported."""
    (check_changes if takes_init(config, changes) else load_recipe)(config, changes)


def run_pretrain(options: PretrainOptions) -> None:
    """Pretrain."""
    check_recipe(options.config, options.changes)
    from sslvit.train.prepare import pretraining_settings
    from sslvit.train.run import pretrain

    data = one_source(options.data)
    settings = pretraining_settings(options.config, options.changes, data, options.out, options.init)
    report_run(options, pretrain(settings, options.resume, options.overwrite))


def report_run(options: Reported, folder: RunFolder) -> None:
    """Print the scores of a fine-tuning run; with --json, the content of any run folder."""
    # the process group of a run is gone here, so only the environment tells that this process is not the first
    if is_first_process() and (options.json or folder.scores.exists()):
        report(options, folder.scores_in_words() if folder.scores.exists() else "", folder.to_dict())


@dataclass(kw_only=True)
class FinetuneOptions(Resumable):
    """Fine-tune an encoder with labels, or train its architecture or a CNN from scratch.

    Settings of the recipe are given as --KEY VALUE, e.g. --train.epochs 10; `sslvit settings` lists them all.

    Example: sslvit finetune runs/mae --train shards/train --val shards/val --out runs/tuned --encoder.image_size 48
    """

    encoder: Annotated[str, Arg("ENCODER", position=1)]
    """Run folder, encoder folder, checkpoint file, or a network such as torchvision:resnet18; none for the recipe's
    own encoder from random weights.
    """
    train: Annotated[str, Arg("SHARDS")]
    """Labeled shards to train on."""
    val: Annotated[str, Arg("SHARDS")]
    """Labeled shards to score on."""
    out: Annotated[str, Arg("FOLDER")]
    """Run folder."""
    config: Annotated[str, Arg("RECIPE")] = "finetune/small_images"
    """YAML file, or the name of a recipe."""
    scratch: bool = False
    """Start from random weights in the architecture of ENCODER, as a baseline."""


def run_finetune(options: FinetuneOptions) -> None:
    """Fine-tune, and print the scores."""
    if "encoder" in options.changes:
        raise ValueError("--encoder: ENCODER is what is trained on; its settings are --encoder.KEY value.")
    check_changes(options.config, options.changes)
    from sslvit.api import finetune

    encoder = None if options.encoder == NO_ENCODER else options.encoder
    found = finetune(
        encoder, options.train, options.val, options.config, options.out, options.scratch, options.resume,
        options.overwrite, **options.changes,
    )  # fmt: skip
    report_run(options, found)


@dataclass(kw_only=True)
class ResumeOptions(Reported, Recipe):
    """Resume a stopped run with its own settings.

    Settings may change, e.g. --train.steps 2000. Changes are printed, and changes that a resumed run does not allow
    are refused.

    Example: sslvit resume runs/mae --train.steps 2000
    """

    run: Annotated[str, Arg("RUN", position=1)]
    """Run folder."""
    data: Annotated[list[str] | None, Arg("DATA")] = None
    """Shards or a folder of images, if the run's data has moved."""


def run_resume(options: ResumeOptions) -> None:
    """Resume a run, and print the scores of a fine-tuning run."""
    config = Path(options.run) / "config.yaml"
    if config.is_file():
        check_changes(config, options.changes)
    from sslvit.api import resume

    report_run(options, resume(options.run, data=options.data, **options.changes))


def wants_requeue(options: Options | None) -> bool:
    """Whether to requeue the job of a training command that was stopped before it read its settings."""
    if not isinstance(options, (PretrainOptions, FinetuneOptions, ResumeOptions)):
        return False
    config = Path(options.run) / "config.yaml" if isinstance(options, ResumeOptions) else options.config
    try:
        return load_recipe(config, options.changes, base=EncoderSettings()).train.requeue  # for any task
    except (ValueError, OSError):
        return bool(options.changes.get("train.requeue", True))


@dataclass(kw_only=True)
class PlanOptions(Reported, Recipe):
    """Compute parameters, FLOPs, memory, steps and hours of a run before it runs.

    Settings of the recipe are given as --KEY VALUE, e.g. --train.epochs 10; `sslvit settings` lists them all.

    The plan is for this machine unless --tflops, --memory-gib or train.accelerator specifies a GPU.

    Example: sslvit plan --config mae/own_images --data photos --measure
    """

    config: Annotated[str, Arg("RECIPE")]
    """YAML file, or the name of a recipe."""
    data: Annotated[list[str] | None, Arg("SHARDS")] = None
    """Folder of images or shards, or several .tar files; null for the recipe's data.shards."""
    images: int | None = None
    """Number of images, instead of --data."""
    classes: int | None = None
    """Number of classes of labeled images; together with --images."""
    tflops: float | None = None
    """Peak TFLOP/s of one device in the run's precision; null for this machine's, or those of some GPUs."""
    utilization: float = 0.35
    """Assumed fraction of the peak that is reached."""
    memory_gib: float | None = None
    """Memory in GiB of one GPU for which to plan; null for that of the GPUs of this machine."""
    measure: bool = False
    """Time some real steps on this machine."""


def run_plan(options: PlanOptions) -> None:
    """Compute the plan of a run, and print it."""
    check_recipe(options.config, options.changes)
    from sslvit.train.planning import plan

    found = plan(
        options.config, one_source(options.data), options.images, options.classes, options.tflops, options.utilization,
        options.memory_gib, options.measure, **options.changes,
    )  # fmt: skip
    report(options, found.text(), found.to_dict())


@dataclass(kw_only=True)
class ReplayOptions(Options):
    """Re-run a failed training step in float32 to find out where it fails.

    Example: sslvit replay runs/mae/incident
    """

    incident: Annotated[str, Arg("INCIDENT", position=1)]
    """Folder incident/ of a run that ended with a non-finite step."""


def run_replay(options: ReplayOptions) -> None:
    """Re-run a failed step, and print the findings."""
    from sslvit.train.replay import replay

    print("\n".join(replay(options.incident)))


@dataclass(kw_only=True)
class RecipesOptions(Reported):
    """List the recipes included in sslvit, with data, size, cost and score, or print one.

    Example: sslvit recipes mae/digits
    """

    name: Annotated[str | None, Arg("RECIPE", position=1, is_path=False)] = None
    """Name of the recipe to print as YAML; by default, all recipes are listed."""


def run_recipes(options: RecipesOptions) -> None:
    """Print all recipes, or one."""
    from sslvit.settings.recipes import recipe_text, recipes, summarize

    if options.name is not None:
        text = recipe_text(options.name)
        about = {} if options.name.startswith("bench/") else asdict(summarize(options.name))
        report(options, text.rstrip("\n"), about | {"name": options.name, "yaml": text})
        return
    found = recipes()
    report(options, found.text(), found.to_dict())


@dataclass(kw_only=True)
class SettingsOptions(Reported):
    """Explain all settings of recipes, those of a section, or a single one, with defaults and choices.

    Example: sslvit settings train
    """

    name: Annotated[str | None, Arg("KEY", position=1, is_path=False)] = None
    """Section, such as train or data.view, or setting, such as train.steps; by default, all settings."""


def run_settings(options: SettingsOptions) -> None:
    """Print settings with their meanings."""
    from sslvit.settings.describe import describe_settings, select_settings

    settings = select_settings(options.name)
    keys = [{"key": key, "default": default, "meaning": text} for _, key, default, text in settings]
    width = min(max(shutil.get_terminal_size((80, 24)).columns, 40), 120)
    report(options, describe_settings(settings, width), keys)
