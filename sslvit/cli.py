"""The `sslvit` command: what it understands. torch is imported only inside a command (commands/)."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any

import sslvit
from sslvit.commands import evaluation, in_and_out, packing, pixels, training
from sslvit.commands.arguments import UnknownCommand, read_options
from sslvit.environment import explain
from sslvit.files import explain_os_error, printable
from sslvit.stopping import TRY_AGAIN, Preempted, RankLost, finishing, is_first_process, requeue, stopping_at_once

MAX_MESSAGE = 1000  # characters
TRAINING = (["pretrain"], ["finetune"], ["resume"])


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors of the user's making are one line, without a traceback."""
    with finishing(is_process_ending=arguments is None):  # its exit code is decided; a scheduler is still to be asked
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    options = argparse.Namespace(function=None)
    when = " before the first step, so there is nothing to save yet" if arguments[:1] in TRAINING else ""
    try:
        with stopping_at_once(f"{when}: give the same command again"):
            options = read_options(make_parser(), arguments)
            code = options.function(options)
            sys.stdout.flush()
    except UnknownCommand as error:
        print(f"sslvit: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads our output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if "--traceback" in arguments:
            raise
        print(f"sslvit: error: {explain(error) or last_words(error)}", file=sys.stderr)
        return 1
    except (Preempted, RankLost) as error:
        print(f"sslvit: {error}", file=sys.stderr)
        is_early = isinstance(error, Preempted) and not error.is_requeued
        if is_early and is_first_process() and training.wants_requeue(options):
            requeue()
        return TRY_AGAIN
    except KeyboardInterrupt as error:
        print(f"sslvit: {error or 'interrupted'}", file=sys.stderr)
        return 130
    return code or 0


def last_words(error: BaseException) -> str:
    """The message in one line; alone where a loader process sent its whole traceback."""
    text = (explain_os_error(error) if isinstance(error, OSError) else None) or str(error).strip()
    if "Original Traceback" in text:
        text = re.sub(r"^[\w.]+: ", "", text.splitlines()[-1])
    return printable(" ".join(text.split()), MAX_MESSAGE) or type(error).__name__


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sslvit", description="Self-supervised pretraining for vision transformers.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"sslvit {sslvit.__version__}")
    words = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.set_defaults(commands=words.choices)

    def command(name: str, function, summary: str, **more: Any) -> argparse.ArgumentParser:
        sub = words.add_parser(
            name, help=summary, description=summary, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter, **more,
        )  # fmt: skip
        sub.set_defaults(function=function)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        return sub

    demo = command("demo", training.run_demo, "the whole journey on real images, minutes on a CPU")
    demo.add_argument("--data", default="digits", choices=["digits", "cifar10"])
    demo.add_argument("--archive", help="for cifar10: a local archive instead of a download")
    demo.add_argument("--out", default="runs/demo", help="folder for all of it (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo")
    demo.set_defaults(takes_settings=True)

    shards = command("shards", None, "make and inspect WebDataset shards")
    actions = shards.add_subparsers(dest="action", required=True, metavar="ACTION")
    shards.set_defaults(commands=actions.choices)

    def action(name: str, function, summary: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(function=function)
        sub.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS,
                         help="show where an error came from")  # fmt: skip
        sub.add_argument("--workers", type=int, help="processes (default: one per core)")
        return sub

    pack = action("pack", packing.run_pack, "images -> shards + index")
    pack.add_argument(
        "source", metavar="SRC",
        help="images in class folders, or side by side without labels; a list (.csv, .tsv, .jsonl) with a column path "
        "and perhaps label; an array (.npy, .npz); an IDX file",
    )  # fmt: skip
    pack.add_argument("destination", metavar="DST")
    pack.add_argument("--holdout", type=float, default=0.0, metavar="SHARE",
                      help="put the last SHARE of each class into DST/val, the rest into DST/train")  # fmt: skip
    pack.add_argument("--shard-mb", type=float, default=256, help="size of a shard (default: %(default)s)")
    pack.add_argument("--resize", type=int, metavar="SIDE", help="shrink the shorter side of larger images to SIDE")
    pack.add_argument("--encode", default="keep", help="keep (default), jpg, png or webp")
    pack.add_argument("--quality", type=int, default=92, help="of jpg and webp (default: %(default)s)")
    pack.add_argument("--label-column", metavar="NAME", help="of a list: the column of labels (default: by its name)")
    pack.add_argument("--labels", metavar="KEY", help="of an .npz: the array of labels, or a file of them")
    pack.add_argument("--images", metavar="KEY", help="of an .npz: the array of images")
    pack.add_argument("--layout", help="of an array: nhw, nhwc or nchw (default: as its shape tells)")
    pack.add_argument("--convert",
                      help="values of an array that are not 8 or 16 bits: unit (0 to 1), signed (-1 to 1), byte (0 to "
                      "255) or deep (0 to 65,535)")  # fmt: skip
    add_orientation(pack)
    pack.add_argument("--decode", action="store_true",
                      help="decode every image to find damage inside (default: header and end of each)")  # fmt: skip
    pack.add_argument("--max-pixels", type=int, default=100_000_000, metavar="N",
                      help="leave out larger images (default: %(default)s)")  # fmt: skip
    pack.add_argument("--part", metavar="I/N", help="write the I-th of N parts only, as one machine of several")
    pack.add_argument("--overwrite", action="store_true")
    index = action("index", packing.run_index, "index shards that others wrote, or join the parts of a packing")
    index.add_argument("folder", metavar="SHARDS")
    index.add_argument("--labels", metavar="FIELD", help="members that hold class numbers or names (default: cls)")
    index.add_argument("--image", metavar="FIELD", help="the image of a key that has several, such as left.jpg")
    add_orientation(index)
    index.add_argument("--merge", action="store_true", help="join what shards pack --part wrote")
    index.add_argument("--overwrite", action="store_true", help="with --merge: replace shards that are already there")
    check = action(
        "check", packing.run_check, "verify checksums and decode everything; exit code 1 if something is wrong"
    )
    check.add_argument("folder", metavar="SHARDS")
    info = action("info", packing.run_info, "what is in shards, and what a job on them needs")
    info.add_argument("folder", metavar="SHARDS")
    info.add_argument(
        "--global-batch-size", type=int, metavar="B", help="images per optimizer step (default: up to 4096)"
    )

    palette = command("palette", packing.run_palette, "few colors for pixel sequences, fitted on images")
    palette.add_argument("shards", metavar="SHARDS", help="shards, or a folder of images")
    palette.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="the palette as JSON, FILE.png beside it"
    )
    palette.add_argument("--colors", type=int, metavar="N", help="how many (default: 512; 8 for gray images)")
    palette.add_argument("--image-size", type=int, default=32, metavar="SIDE",
                         help="that the encoder will see (default: %(default)s)")  # fmt: skip
    palette.add_argument("--seed", type=int, default=0)

    pretrain = command(
        "pretrain", training.run_pretrain, "pretrain an encoder by a recipe",
        epilog="Every setting of the recipe can be given as --key value, e.g. --train.epochs 10.\n"
               "All of them: sslvit settings",
    )  # fmt: skip
    pretrain.add_argument("--config", required=True, help="a YAML file or a recipe's name, such as mae/digits")
    pretrain.add_argument("--data", nargs="+", help="folder of images or shards (data.shards), or several .tar files")
    pretrain.add_argument("--out", help="run folder")
    pretrain.add_argument("--init", metavar="ENCODER", help="start from these weights")
    pretrain.add_argument("--resume", action="store_true", help="go on from the folder's last checkpoint")
    pretrain.add_argument("--overwrite", action="store_true", help="delete an earlier run in the folder first")
    pretrain.set_defaults(takes_settings=True)

    again = command(
        "resume", training.run_resume, "go on with a run that has stopped, by its own settings",
        epilog="Settings may become others, e.g. --train.steps 2000; these are printed, and what cannot is refused.",
    )  # fmt: skip
    again.add_argument("run", metavar="RUN", help="run folder")
    again.set_defaults(takes_settings=True)

    finetune = command(
        "finetune", training.run_finetune, "train an encoder on with labels, or the same from scratch",
        epilog="Every setting of the recipe can be given as --key value, e.g. --encoder.image_size 48.\n"
               "All of them: sslvit settings",
    )  # fmt: skip
    finetune.add_argument("encoder", metavar="ENCODER", help="run folder, encoder folder or checkpoint file")
    finetune.add_argument("--train", required=True, metavar="SHARDS", help="labeled shards to train on")
    finetune.add_argument("--val", required=True, metavar="SHARDS", help="labeled shards to report")
    finetune.add_argument("--config", default="finetune/small_images", help="a recipe (default: %(default)s)")
    finetune.add_argument("--out", required=True, help="run folder")
    finetune.add_argument("--scratch", action="store_true", help="start from random weights: the baseline")
    finetune.add_argument("--resume", action="store_true", help="go on from the folder's last checkpoint")
    finetune.add_argument("--overwrite", action="store_true", help="delete an earlier run in the folder first")
    finetune.set_defaults(takes_settings=True)

    plan = command("plan", training.run_plan, "parameters, FLOPs, memory, steps and hours of a run, before it runs")
    plan.add_argument("--config", required=True, help="a recipe's name or YAML file")
    plan.add_argument("--data", metavar="SHARDS", nargs="+", help="the images (default: the recipe's)")
    plan.add_argument("--images", type=int, help="how many there are, instead of --data")
    plan.add_argument("--classes", type=int, help="of labeled images, beside --images")
    plan.add_argument("--tflops", type=float, help="of one device, in the run's precision (default: some GPUs)")
    plan.add_argument("--utilization", type=float, default=0.35,
                      help="share of them that is used: an assumption (default: %(default)s)")  # fmt: skip
    plan.add_argument("--figure", metavar="FILE.png", help="draw rate, weight decay and the task's own schedules")
    plan.set_defaults(takes_settings=True)

    replay = command(
        "replay", training.run_replay, "take the step of an incident again in float32: where does it fail?"
    )
    replay.add_argument("incident", metavar="INCIDENT", help="incident/ of a run that ended so")

    settings = command("settings", training.run_settings, "all settings of a recipe, with their defaults and meaning")
    settings.add_argument("--recipes", action="store_true", help="instead, the recipes that come with sslvit")

    probe = command("probe", evaluation.run_probe, "score a frozen encoder: linear probe and kNN, with baselines")
    add_probe(probe)
    probe.add_argument(
        "--protocol", default="logreg", choices=["logreg", "mae", "dino", "dinov2", "igpt"],
        help="of the linear probe (default: %(default)s); its settings by --protocol.KEY VALUE",
    )  # fmt: skip
    probe.add_argument("--labels-per-class", type=int, metavar="N", help="also fit on N labels per class")
    probe.add_argument("--labels-percent", type=float, metavar="P", help="also fit on P %% of each class's labels")
    probe.add_argument("--draws", type=int, default=5, help="random choices of those labels (default: %(default)s)")
    probe.add_argument("--layers", metavar="all|1,4,8", help="score these blocks side by side, and draw them")
    probe.add_argument("--figure", metavar="FILE", help="with --layers: the PNG (default: in the run's figures)")
    probe.set_defaults(takes_settings=True)
    knn = command("knn", evaluation.run_knn, "score a frozen encoder by its nearest neighbors alone")
    add_probe(knn)

    health = command("health", evaluation.run_health, "what features are worth without labels: rank, spread, alignment")
    health.add_argument("encoder", metavar="ENCODER")
    health.add_argument("data", metavar="SHARDS", help="images, with labels or without")
    health.add_argument("--images", type=int, default=5000, help="evenly spread (default: %(default)s)")
    health.add_argument("--layer", type=int, help="block whose output is measured (default: the encoder's choice)")
    health.add_argument("--pooling", choices=["class", "mean", "class+mean", "attention"])
    add_crop(health)
    add_unreadable(health)
    health.add_argument("--batch", type=int, default=256, help="images per forward pass (default: %(default)s)")
    health.add_argument("--workers", type=int, default=0, help="loader processes (default: %(default)s)")
    health.add_argument("--seed", type=int, default=0)
    add_device(health)
    health.add_argument("-o", "--output", metavar="FILE", help="also write the table as JSON")
    add_layout(health)

    embed = command("embed", evaluation.run_embed, "features of images as arrays in one .npz file")
    embed.add_argument("encoder", metavar="ENCODER")
    embed.add_argument("data", metavar="IMAGES", help="shards or a folder, with labels or without")
    embed.add_argument("-o", "--output", metavar="FILE", required=True, help="ends in .npz")
    embed.add_argument("--layer", type=int, help="block whose output is taken (default: the encoder's choice)")
    embed.add_argument("--blocks", type=int, default=1, help="blocks up to it, side by side (default: %(default)s)")
    embed.add_argument("--pooling", choices=["class", "mean", "class+mean", "attention"])
    add_crop(embed)
    add_unreadable(embed)
    embed.add_argument("--batch", type=int, default=256, help="images per forward pass (default: %(default)s)")
    embed.add_argument("--workers", type=int, default=0, help="loader processes (default: %(default)s)")
    add_device(embed)
    add_layout(embed)

    segment = command("segment", evaluation.run_segment, "score patch tokens by linear segmentation: mean IoU")
    segment.add_argument("encoder", metavar="ENCODER")
    segment.add_argument("--train", required=True, metavar="FOLDER", help="with images/NAME.jpg and masks/NAME.png")
    segment.add_argument("--val", required=True, metavar="FOLDER", help="the same, to report")
    add_crop(segment)
    segment.add_argument("--batch", type=int, default=16, help="images per forward pass (default: %(default)s)")
    segment.add_argument("--no-baselines", action="store_true", help="leave out raw pixels and the untrained encoder")
    segment.add_argument("--seed", type=int, default=0)
    add_device(segment)
    segment.add_argument("--figure", metavar="FILE", help="draw images, masks and guesses as PNG")
    segment.add_argument("-o", "--output", metavar="FILE", help="also write the table as JSON")
    add_layout(segment)

    show = command("show", evaluation.run_show, "draw what an encoder does with images")
    show.add_argument("what", choices=["attention", "distance", "field"],
                      help="of the class token; of each head; which pixels reach a patch")  # fmt: skip
    show.add_argument("encoder", metavar="ENCODER")
    show.add_argument("data", metavar="SHARDS", help="shards or a folder of images")
    show.add_argument("--images", type=int, default=8, help="evenly spread (default: %(default)s)")
    show.add_argument("-o", "--output", metavar="FILE", help="PNG (default: WHAT.png, below ENCODER/figures)")
    add_crop(show)
    add_layout(show)

    bench = command(
        "bench", evaluation.run_bench, "encoders x protocols x data sets -> one table; goes on where it stopped"
    )
    bench.add_argument("config", metavar="CONFIG", help="a YAML such as configs/bench/cifar10.yaml")
    bench.add_argument("--out", help="folder for all of it (default: the YAML's)")
    bench.add_argument("--device", choices=["auto", "cpu", "cuda"], help="(default: the YAML's)")

    sample = command("sample", pixels.run_sample, "draw images from a model of pixels, or complete given ones")
    sample.add_argument("run", metavar="RUN", help="run folder or checkpoint of an iGPT run, or a released file")
    sample.add_argument("--complete", metavar="IMAGES", help="shards or a folder of images to complete")
    sample.add_argument("--given", type=float, metavar="SHARE",
                        help="share of each image that is given, from the top (default: 0.5)")  # fmt: skip
    sample.add_argument("--draws", type=int, metavar="N", help="completions of each (default: 3)")
    sample.add_argument("--count", type=int, metavar="N", help="images (default: 16, or 8 to complete)")
    sample.add_argument("--temperature", type=float, default=1.0, help="0 for the likeliest (default: %(default)s)")
    sample.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest colors only")
    sample.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="draw from the fewest colors that have probability P (default: all)")  # fmt: skip
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--batch", type=int, default=32, help="images side by side (default: %(default)s)")
    sample.add_argument("-o", "--output", metavar="FILE", help="PNG (default: below RUN/figures)")
    add_device(sample)
    add_released(sample)

    likelihood = command(
        "likelihood", pixels.run_likelihood, "nats per pixel of an iGPT run, beside what counting gives"
    )
    likelihood.add_argument("run", metavar="RUN", help="run folder or checkpoint of an iGPT run, or a released file")
    likelihood.add_argument("--train", required=True, metavar="SHARDS", help="images that colors are counted on")
    likelihood.add_argument("--val", required=True, metavar="SHARDS", help="images that are scored")
    add_unreadable(likelihood)
    likelihood.add_argument("--batch", type=int, default=16, help="images per forward pass (default: %(default)s)")
    likelihood.add_argument("-o", "--output", metavar="FILE", help="also write the table as JSON")
    add_device(likelihood)
    add_released(likelihood)

    export = command("export", in_and_out.run_export, "write an encoder for another library, and compare there")
    export.add_argument("encoder", metavar="ENCODER")
    export.add_argument("out", metavar="OUT")
    formats = ["timm", "transformers", "onnx", "torch", "safetensors"]
    export.add_argument("--format", required=True, choices=formats, help="torch: a program of torch.export")
    export.add_argument("--outputs", choices=["tokens", "features", "logits"], default="features",
                        help="the encoder alone, pooled, or a classifier's (default: %(default)s)")  # fmt: skip
    export.add_argument("--size", choices=["fixed", "dynamic"],
                        help="image sizes that it takes (default: dynamic for timm and transformers where they stretch "
                             "positions as this encoder does; otherwise fixed)")  # fmt: skip
    export.add_argument("--scores", metavar="FILE", nargs="*", default=[], help="scores for the card, by probe -o")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export there")
    add_layout(export)

    take = command("import", in_and_out.run_import, "released weights -> an encoder folder")
    take.add_argument("checkpoint", metavar="CHECKPOINT")
    take.add_argument("out", metavar="OUT")
    add_layout(take)
    return parser


def add_probe(parser: argparse.ArgumentParser) -> None:
    """What `probe` and `knn` have in common."""
    parser.add_argument("encoder", metavar="ENCODER", help="run folder, encoder folder or checkpoint file")
    parser.add_argument("--train", required=True, metavar="SHARDS", help="labeled shards to fit on")
    parser.add_argument("--val", required=True, metavar="SHARDS", help="labeled shards to report")
    parser.add_argument("--layer", type=int, help="block whose output is probed (default: the encoder's choice)")
    parser.add_argument("--blocks", type=int, default=1, help="blocks up to it, side by side (default: %(default)s)")
    parser.add_argument("--pooling", choices=["class", "mean", "class+mean", "attention"])
    parser.add_argument("--neighbors", type=int, nargs="*", default=[10, 20, 100, 200], metavar="K",
                        help="each k of the vote (default: 10 20 100 200)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.07, help="of the vote (default: %(default)s)")
    add_crop(parser)
    add_unreadable(parser)
    parser.add_argument("--batch", type=int, default=256, help="images per forward pass (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: %(default)s)")
    parser.add_argument("--no-baselines", action="store_true", help="leave out raw pixels and the untrained encoder")
    parser.add_argument("--seeds", type=int, default=1, help="draw all chance so often anew (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", metavar="FOLDER", default="~/.cache/sslvit-features",
                        help="keeps features; none for no such folder (default: %(default)s)")  # fmt: skip
    add_device(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the table as JSON")
    add_layout(parser)


def add_crop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--crop-fraction", type=float, metavar="SHARE",
        help="of the center crop's sides that is seen, 224 of 256: 0.875 (default: the encoder's own)",
    )  # fmt: skip


def add_unreadable(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-unreadable-fraction", type=float, default=0.01, metavar="SHARE",
                        help="of images that may be unreadable and are left out (default: %(default)s)")  # fmt: skip


def add_orientation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--orientation", choices=["upright", "stored"],
        help="turn images as EXIF says when they are read, or take them as stored (default: upright)",
    )  # fmt: skip


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def add_layout(parser: argparse.ArgumentParser) -> None:
    layouts = ["mae", "dino", "dinov2", "timm", "transformers", "openai_igpt"]
    parser.add_argument("--layout", choices=layouts, help="of a released file (default: recognized by its names)")
    parser.add_argument("--weights", metavar="NAME", help="which network of a file with several: student, model_ema")
    add_released(parser)


def add_released(parser: argparse.ArgumentParser) -> None:
    """What a released file does not say."""
    parser.add_argument("--heads", type=int, help="attention heads of a released file, which does not say them")
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="that a released file was trained at"
    )
    parser.add_argument("--palette", metavar="FILE", help="colors of a released iGPT, which its file does not hold")


if __name__ == "__main__":
    sys.exit(main())
