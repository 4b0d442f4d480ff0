"""The `sslvit` command: parse, import one function, call it, print. torch is imported only inside a command."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

import sslvit
from sslvit.environment import explain


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors of the user's making are one line, without a traceback."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        if rest and not getattr(options, "takes_settings", False):
            raise ValueError(f"{rest[0]}: no such option. See: sslvit {options.command} --help")
        options.changes = read_changes(rest)
        code = options.function(options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if getattr(options, "traceback", False):
            raise
        print(f"sslvit: error: {explain(error) or last_words(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"sslvit: {error or 'interrupted'}", file=sys.stderr)
        return 130
    return code or 0


def last_words(error: BaseException) -> str:
    """The message alone where a loader process sent its whole traceback."""
    text = str(error).strip()
    return re.sub(r"^[\w.]+: ", "", text.splitlines()[-1]) if "Original Traceback" in text else text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sslvit", description="Self-supervised pretraining for vision transformers.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"sslvit {sslvit.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function, summary: str, **more: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter, **more,
        )  # fmt: skip
        sub.set_defaults(function=function)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        return sub

    demo = command("demo", run_demo, "the whole journey on real images, minutes on a CPU")
    demo.add_argument("--data", default="digits", choices=["digits", "cifar10"])
    demo.add_argument("--archive", help="for cifar10: a local archive instead of a download")
    demo.add_argument("--out", default="runs/demo", help="folder for all of it (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo")
    demo.set_defaults(takes_settings=True)

    shards = command("shards", None, "make and inspect WebDataset shards")
    actions = shards.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, function, summary: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(function=function)
        sub.add_argument("--workers", type=int, help="processes (default: one per core)")
        return sub

    pack = action("pack", run_pack, "images -> shards + index")
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
    pack.add_argument("--part", metavar="I/N", help="write the I-th of N parts only, as one machine of several")
    pack.add_argument("--overwrite", action="store_true")
    index = action("index", run_index, "index shards that others wrote, or join the parts of a packing")
    index.add_argument("folder", metavar="SHARDS")
    index.add_argument("--merge", action="store_true", help="join what shards pack --part wrote")
    index.add_argument("--overwrite", action="store_true", help="with --merge: replace shards that are already there")
    check = action("check", run_check, "verify checksums and decode everything; exit code 1 if something is wrong")
    check.add_argument("folder", metavar="SHARDS")
    info = action("info", run_info, "what is in shards, and what a job on them needs")
    info.add_argument("folder", metavar="SHARDS")
    info.add_argument("--global-batch", type=int, metavar="B", help="images per optimiser step (default: up to 4096)")

    palette = command("palette", run_palette, "few colours for pixel sequences, fitted on images; also drawn")
    palette.add_argument("shards", metavar="SHARDS", help="shards, or a folder of images")
    palette.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="the palette as JSON, FILE.png beside it"
    )
    palette.add_argument("--colours", type=int, metavar="N", help="how many (default: 512; 8 for grey images)")
    palette.add_argument("--image-size", type=int, default=32, metavar="SIDE",
                         help="that the encoder will see (default: %(default)s)")  # fmt: skip
    palette.add_argument("--seed", type=int, default=0)

    pretrain = command(
        "pretrain", run_pretrain, "pretrain an encoder by a recipe",
        epilog="Every setting of the recipe can be given as --key value, e.g. --train.epochs 10.\n"
               "All of them: sslvit settings",
    )  # fmt: skip
    pretrain.add_argument("--config", required=True, help="a YAML file or a recipe's name, such as mae/digits")
    pretrain.add_argument("--data", help="folder of images or shards (data.shards)")
    pretrain.add_argument("--out", help="run folder")
    pretrain.add_argument("--init", metavar="ENCODER", help="start from these weights")
    pretrain.add_argument("--resume", action="store_true", help="go on from the folder's last checkpoint")
    pretrain.add_argument("--overwrite", action="store_true", help="delete an earlier run in the folder first")
    pretrain.set_defaults(takes_settings=True)

    command("settings", run_settings, "all settings of a recipe, with their defaults and meaning")

    probe = command("probe", run_probe, "score a frozen encoder: linear probe and kNN beside their baselines")
    probe.add_argument("encoder", metavar="ENCODER", help="run folder, encoder folder or checkpoint file")
    probe.add_argument("--train", required=True, metavar="SHARDS", help="labelled shards to fit on")
    probe.add_argument("--val", required=True, metavar="SHARDS", help="labelled shards to report")
    probe.add_argument("--labels-per-class", type=int, metavar="N", help="also fit on N labels per class")
    probe.add_argument("--layer", type=int, help="block whose output is probed (default: the encoder's choice)")
    probe.add_argument("--layers", metavar="all|1,4,8", help="score these blocks side by side, and draw them")
    probe.add_argument("--figure", metavar="FILE", help="with --layers: the PNG (default: in the run's figures)")
    probe.add_argument("--pooling", choices=["class", "mean", "attention"])
    probe.add_argument("--neighbours", type=int, default=20, metavar="K")
    probe.add_argument("--batch", type=int, default=256, help="images per forward pass (default: %(default)s)")
    probe.add_argument("--workers", type=int, default=0)
    probe.add_argument("--no-baselines", action="store_true", help="leave out raw pixels and the untrained encoder")
    probe.add_argument("--seed", type=int, default=0)
    add_device(probe)
    probe.add_argument("-o", "--output", metavar="FILE", help="also write the table as JSON")
    add_layout(probe)

    sample = command("sample", run_sample, "draw images from a model of pixels, or complete given ones")
    sample.add_argument("run", metavar="RUN", help="run folder or checkpoint of an iGPT run, or a released file")
    sample.add_argument("--complete", metavar="IMAGES", help="shards or a folder of images to complete")
    sample.add_argument("--given", type=float, metavar="SHARE",
                        help="share of each image that is given, from the top (default: 0.5)")  # fmt: skip
    sample.add_argument("--draws", type=int, metavar="N", help="completions of each (default: 3)")
    sample.add_argument("--count", type=int, metavar="N", help="images (default: 16, or 8 to complete)")
    sample.add_argument("--temperature", type=float, default=1.0, help="0 for the likeliest (default: %(default)s)")
    sample.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest colours only")
    sample.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="draw from the fewest colours that have probability P (default: all)")  # fmt: skip
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--batch", type=int, default=32, help="images side by side (default: %(default)s)")
    sample.add_argument("-o", "--output", metavar="FILE", help="PNG (default: below RUN/figures)")
    add_device(sample)
    add_released(sample)

    likelihood = command("likelihood", run_likelihood, "nats per pixel of an iGPT run, beside what counting gives")
    likelihood.add_argument("run", metavar="RUN", help="run folder or checkpoint of an iGPT run, or a released file")
    likelihood.add_argument("--train", required=True, metavar="SHARDS", help="images that colours are counted on")
    likelihood.add_argument("--val", required=True, metavar="SHARDS", help="images that are scored")
    likelihood.add_argument("--batch", type=int, default=16, help="images per forward pass (default: %(default)s)")
    likelihood.add_argument("-o", "--output", metavar="FILE", help="also write the table as JSON")
    add_device(likelihood)
    add_released(likelihood)

    export = command("export", run_export, "write an encoder for another library, reopen it there and compare")
    export.add_argument("encoder", metavar="ENCODER")
    export.add_argument("out", metavar="OUT")
    export.add_argument("--format", required=True, choices=["timm", "safetensors"])
    export.add_argument("--overwrite", action="store_true")

    take = command("import", run_import, "released weights -> an encoder folder")
    take.add_argument("checkpoint", metavar="CHECKPOINT")
    take.add_argument("out", metavar="OUT")
    add_layout(take)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def add_layout(parser: argparse.ArgumentParser) -> None:
    layouts = ["mae", "dino", "dinov2", "timm", "openai_igpt"]
    parser.add_argument("--layout", choices=layouts, help="of a released file (default: recognised by its names)")
    add_released(parser)


def add_released(parser: argparse.ArgumentParser) -> None:
    """What a released file does not say."""
    parser.add_argument("--heads", type=int, help="attention heads of a released file, which does not say them")
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="that a released file was trained at"
    )
    parser.add_argument("--palette", metavar="FILE", help="colours of a released iGPT, which its file does not hold")


def read_changes(rest: list[str]) -> dict[str, Any]:
    """--encoder.width 192 --train.steps=5 -> {"encoder.width": 192, "train.steps": 5}."""
    changes: dict[str, Any] = {}
    words = iter(rest)
    for word in words:
        match = re.fullmatch(r"--([a-z_]+(?:\.[a-z_]+)*)(?:=(.*))?", word, re.DOTALL)
        if not match:
            raise ValueError(f"{word}: expected --key value, as in --train.epochs 10.")
        key, value = match.groups()
        if value is None:
            value = next(words, None)
        if value is None:
            raise ValueError(f"--{key}: no value given.")
        changes[key] = read_value(value)
    return changes


def read_value(text: str) -> Any:
    """A value as YAML reads it, and 1e-3 as a number too, which YAML takes for text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value, re.IGNORECASE):
        return float(value)
    return value


def run_demo(options: argparse.Namespace) -> None:
    from sslvit.report.demo import demo

    demo(options.data, options.archive, options.out, options.overwrite, options.seed, options.changes)


def run_pack(options: argparse.Namespace) -> None:
    from sslvit.data.pack import pack_source
    from sslvit.data.store import PackSettings

    settings = PackSettings(options.shard_mb, options.resize, options.encode, options.quality)
    indices = pack_source(
        options.source, options.destination, settings, options.holdout, options.overwrite, options.workers,
        options.part,
    )  # fmt: skip
    for index in indices:
        show_shards(index)


def run_index(options: argparse.Namespace) -> None:
    from sslvit.data.pack import finish_packing
    from sslvit.data.scan import index_shards

    folder = Path(options.folder)
    if not options.merge:
        show_shards(index_shards(folder, options.workers))
        return
    parts = [folder / name for name in ("train", "val") if (folder / name / "packing").is_dir()]
    for part in parts or [folder]:
        show_shards(finish_packing(part, options.overwrite))


def run_check(options: argparse.Namespace) -> int:
    from sslvit.data.inspect import check_shards

    index = find_shards(options.folder)
    found = check_shards(index, options.workers)
    print(found.text(index))
    return 0 if found.is_whole else 1


def run_info(options: argparse.Namespace) -> None:
    show_shards(find_shards(options.folder), options.global_batch)


def find_shards(name: str):
    """Shards with an index, a pattern or an address; nothing is packed or indexed in a folder of the user's."""
    from sslvit.data.index import load_index
    from sslvit.data.open import open_shards

    return load_index(name) if "{" not in name and "://" not in name else open_shards(name, "")


def show_shards(index, global_batch: int | None = None) -> None:
    from sslvit.data.inspect import describe_shards

    print(describe_shards(index, global_batch))


def run_palette(options: argparse.Namespace) -> None:
    from sslvit.data.open import open_shards
    from sslvit.data.pixels import make_palette

    index = open_shards(options.shards, f"{options.shards.rstrip('/')}-shards")
    made = make_palette(index, options.output, options.colours, options.image_size, options.seed)
    error, uniform = made["mean_squared_error"], made["mean_squared_error_uniform"]
    print(
        f"{options.output}: {len(made['colours'])} colours fitted on {made['pixels']:,} pixels; "
        f"mean squared error {error:.2e} of values in [-1, 1], {error**0.5 * 127.5:.1f} of 255 on average "
        f"{f' (uniform palette: {uniform:.2e}, {uniform**0.5 * 127.5:.1f})' if uniform is not None else ''}\n"
        f"use it with --encoder.palette {options.output}; drawn in {Path(options.output).with_suffix('.png')}"
    )


def run_pretrain(options: argparse.Namespace) -> None:
    from sslvit.api import pretrain

    pretrain(
        options.config, options.data, options.out, options.init, options.resume, options.overwrite,
        **options.changes,
    )  # fmt: skip


def run_settings(options: argparse.Namespace) -> None:
    from sslvit.settings.load import describe_settings

    print(describe_settings())


def unsaid(options: argparse.Namespace) -> dict[str, Any]:
    """Settings that a released file does not say, where they are given."""
    from sslvit.settings.palette import UNIFORM, read_palette

    given = {"image_size": options.image_size} if options.image_size else {}
    if options.palette:
        given["palette"] = UNIFORM if options.palette == UNIFORM else read_palette(options.palette)
    return given


def run_probe(options: argparse.Namespace) -> None:
    from sslvit.settings import ProbeSettings

    settings = ProbeSettings(
        options.train, options.val, options.labels_per_class, layer=options.layer, pooling=options.pooling,
        neighbours=options.neighbours, batch=options.batch, workers=options.workers, baselines=not options.no_baselines,
        seed=options.seed,
        device=options.device,
    )  # fmt: skip
    figure = options.figure
    if options.layers and figure is None:
        folder = Path(options.encoder) / "figures"
        figure = folder / "layers.png" if folder.is_dir() else Path("layers.png")
    if options.figure and not options.layers:
        raise ValueError("--figure is for --layers.")
    if options.layers and options.layer:
        raise ValueError("--layer and --layers exclude each other: one block for the table, or several side by side?")
    check_new(options.output)
    check_new_picture(figure)
    from sslvit.checkpoint import load_encoder
    from sslvit.evaluate.layers import draw_layers, layer_numbers, probe_layers
    from sslvit.evaluate.probe import probe

    encoder = load_encoder(options.encoder, options.layout, options.heads, **unsaid(options))
    if options.layers:
        numbers = layer_numbers(options.layers, encoder.settings.depth)
        curve = probe_layers(encoder, settings, numbers)
        print(f"\n{curve.text()}")
        if options.output:
            Path(options.output).write_text(json.dumps(curve.as_dict(), indent=1) + "\n")
        print(draw_layers(curve, numbers, figure))
        return
    table = probe({"encoder": encoder}, settings)
    about = table.about
    print(f"\nRight answers in percent on {about['val_images']:,} images of {about['val']}")
    print(f"(fitted on {about['train_images']:,} of {about['train']};")
    print(f" {about['features']['encoder']}; {about['linear']})\n\n{table.text()}")
    if options.output:
        Path(options.output).write_text(json.dumps(table.as_dict(), indent=1) + "\n")


def check_new(path: str | Path | None) -> None:
    """Refuse, before any work, a file that could not be written or would replace another."""
    if path is None:
        return
    if Path(path).exists():
        raise ValueError(f"{path}: already exists. Choose another file.")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist. Make it first.")
    if not os.access(Path(path).parent, os.W_OK):
        raise ValueError(f"{path}: its folder cannot be written to. Choose another.")


def check_new_picture(path: str | Path | None) -> None:
    """check_new for a picture."""
    if path is not None and Path(path).suffix != ".png":
        raise ValueError(f"{path}: a picture is written as PNG. Choose a name that ends in .png.")
    check_new(path)


def run_sample(options: argparse.Namespace) -> None:
    from sslvit.settings.sample import SampleSettings

    settings = SampleSettings(options.temperature, options.top_k, options.top_p, options.seed, options.batch)
    for key in ("count", "draws"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ValueError(f"--{key} {value}: must be 1 or more.")
    out = options.output
    if out is None:
        if not Path(options.run).exists():
            raise FileNotFoundError(f"{options.run}: no such file or folder. Give the folder of an iGPT run.")
        if not Path(options.run).is_dir():
            raise ValueError(f"{options.run}: not a run folder, so say where the picture goes: -o FILE.png")
        out = Path(options.run) / "figures" / ("completions.png" if options.complete else "samples.png")
    if Path(out).parent.is_dir() or options.output:
        check_new_picture(out)
    if not options.complete and (options.draws, options.given) != (None, None):
        raise ValueError("--draws and --given are for --complete IMAGES.")
    from sslvit.report.samples import draw_completions, draw_samples

    task = load_task(options)
    if options.complete:
        count, draws = options.count or 8, options.draws or 3
        given = 0.5 if options.given is None else options.given
        draw_completions(task, options.complete, out, count, given, draws, settings)
    else:
        draw_samples(task, out, options.count or 16, settings)
    print(out)


def run_likelihood(options: argparse.Namespace) -> None:
    check_new(options.output)
    from sslvit.data.open import open_shards
    from sslvit.evaluate.likelihood import likelihood
    from sslvit.evaluate.probe import format_table

    task = load_task(options)
    train, val = (open_shards(source, f"{source.rstrip('/')}-shards") for source in (options.train, options.val))
    rows = likelihood(task, train, val, options.batch)
    print(f"\n{len(val):,} images of {val.location}; counted on {len(train):,} of {train.location}\n")
    print(format_table(rows, decimals=4))
    if options.output:
        Path(options.output).write_text(json.dumps(rows, indent=1) + "\n")


def load_task(options: argparse.Namespace):
    """An iGPT with its output matrix, on the device asked for."""
    from sslvit.environment import pick_device
    from sslvit.tasks.igpt import load_igpt

    return load_igpt(options.run, options.heads, **unsaid(options)).to(pick_device(options.device))


def run_export(options: argparse.Namespace) -> None:
    from sslvit.export import export_encoder

    verdict = export_encoder(options.encoder, options.out, options.format, options.overwrite)
    print(
        f"{options.out}: reopened in {options.format} and compared; largest difference "
        f"{verdict['largest_difference']:.1e} (allowed {verdict['tolerance']:.0e})"
    )


def run_import(options: argparse.Namespace) -> None:
    from sslvit.checkpoint import load_encoder, save_encoder

    if Path(options.out).exists():
        raise ValueError(f"{options.out}: already exists. Choose another folder.")
    encoder = load_encoder(options.checkpoint, options.layout, options.heads, **unsaid(options))
    save_encoder(encoder, options.out, {"imported_from": Path(options.checkpoint).name})
    print(f"encoder in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
