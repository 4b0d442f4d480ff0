"""Damaged settings, run folders, checkpoints and encoders of our own and of others."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from children import in_child
from export_fixtures import saved
from material import ENCODER, Workshop
from mutations import damage_bytes, damage_json, damage_values, damage_yaml, odd_value
from targets import Payload, Reader, Shared, Target, copied, one_file

from sslvit.checkpoint import load_encoder
from sslvit.exporters import export_encoder
from sslvit.settings.bench import load_bench
from sslvit.settings.load import load_recipe, recipes_folder
from sslvit.train.folder import RunFolder
from sslvit.weight_files import read_torch_file


def open_recipes(folder: Path) -> Reader:
    names = ("mae/digits", "dino/digits", "igpt/digits", "finetune/small_images", "mae/vit_base_in1k")
    samples = [(recipes_folder() / f"{name}.yaml").read_bytes() for name in names]
    return one_file(folder, "recipe.yaml", samples, damage_yaml, load_recipe, named=False)


def open_benches(folder: Path) -> Reader:
    samples = [path.read_bytes() for path in sorted((recipes_folder() / "bench").glob("*.yaml"))]
    return one_file(folder, "bench.yaml", samples, damage_yaml, lambda path: load_bench(path, {}))


def prepare_run(workshop: Workshop) -> None:
    Shared.folders["run"] = workshop.whole_run("mae")[0].path


def open_run_files(folder: Path) -> Reader:
    run = RunFolder(copied("run", folder))
    files = {"config.yaml": (damage_yaml, run.read_config), "metrics.jsonl": (damage_bytes, run.read_metrics)}
    contents = {name: (run.path / name).read_bytes() for name in files}

    def read(name: str, content: bytes) -> None:
        (run.path / name).write_bytes(content)
        files[name][1]()

    def damaged(rng: random.Random) -> Payload:
        name = rng.choice(list(files))
        return name, files[name][0](contents[name], rng)

    return Reader(read, damaged, lambda: ("config.yaml", contents["config.yaml"]), "run")


def open_checkpoints(folder: Path) -> Reader:
    content = (Shared.folders["run"] / "checkpoints" / "last.ckpt").read_bytes()
    return one_file(folder, "last.ckpt", [content], damage_bytes, load_encoder)


def open_checkpoint_values(folder: Path) -> Reader:
    """Checkpoints that are whole, with other values in them than anybody would save."""
    content = torch.load(Shared.folders["run"] / "checkpoints" / "last.ckpt", weights_only=True)
    base = {"sslvit": content["sslvit"], "state_dict": dict(list(content["state_dict"].items())), "global_step": 3}

    def damaged(rng: random.Random) -> Payload:
        changed = damage_values(base, rng)
        if rng.random() < 0.2:
            changed = {**base, "shards": odd_value(rng, {"folder": "x", "ranks": 2})}
        return (changed,)

    def read(changed: Any) -> None:
        torch.save(changed, folder / "last.ckpt")
        load_encoder(folder / "last.ckpt")

    return Reader(read, damaged, lambda: (base,), "last.ckpt")


def prepare_encoder(workshop: Workshop) -> None:
    Shared.folders["encoder"] = workshop.encoder()


def open_encoders(folder: Path) -> Reader:
    encoder = copied("encoder", folder)
    content = (encoder / "encoder.json").read_bytes()

    def read(changed: bytes) -> None:
        (encoder / "encoder.json").write_bytes(changed)
        load_encoder(encoder)

    return Reader(read, lambda rng: (damage_json(content, rng),), lambda: (content,), "encoder")


def open_safetensors(folder: Path) -> Reader:
    content = (Shared.folders["encoder"] / "encoder.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")

    def damage(content: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return damage_bytes(content, rng)
        header = damage_json(content[8 : 8 + length], rng)
        return len(header).to_bytes(8, "little") + header + content[8 + length :]

    return one_file(folder, "weights.safetensors", [content], damage, read_torch_file)


def open_weight_arrays(folder: Path) -> Reader:
    buffer = io.BytesIO()
    np.savez(buffer, wte=np.zeros((4, 8), np.float32), wpe=np.ones((3, 8), np.float16))
    return one_file(folder, "weights.npz", [buffer.getvalue()], damage_bytes, read_torch_file)


def prepare_library(kind: str, name: str = "", **changes: Any) -> Callable[[Workshop], None]:
    """A folder in a library's format, of an encoder with changed settings where it has a name of its own."""
    name = name or kind

    def prepare(workshop: Workshop) -> None:
        out = workshop.folder / f"exported-{name}"
        if not out.exists():

            def make() -> None:
                saved(workshop.folder / f"for-{name}", **ENCODER | {"pooling": "class"} | changes)
                export_encoder(workshop.folder / f"for-{name}", out, kind, size="fixed")

            in_child(make, workshop.log)
        Shared.folders[name] = out

    return prepare


def open_library(kind: str) -> Callable[[Path], Reader]:
    def open_it(folder: Path) -> Reader:
        model = copied(kind, folder)
        files = [name for name in ("config.json", "preprocessor_config.json") if (model / name).exists()]
        contents = {name: (model / name).read_bytes() for name in files}

        def read(name: str, content: bytes) -> None:
            for other, value in (contents | {name: content}).items():
                (model / other).write_bytes(value)
            load_encoder(model)

        def damaged(rng: random.Random) -> Payload:
            name = rng.choice(files)
            return name, damage_json(contents[name], rng)

        return Reader(read, damaged, lambda: (files[0], contents[files[0]]), kind)

    return open_it


TARGETS = {
    "recipe": Target("YAML recipes", open_recipes),
    "bench": Target("YAML of a bench", open_benches),
    "run": Target("config.yaml and metrics.jsonl of a run", open_run_files, prepare_run),
    "checkpoint": Target("checkpoints", open_checkpoints, prepare_run),
    "values": Target("values in a checkpoint", open_checkpoint_values, prepare_run),
    "encoder": Target("encoder.json", open_encoders, prepare_encoder),
    "safetensors": Target("safetensors headers", open_safetensors, prepare_encoder),
    "weights": Target("weights as .npz", open_weight_arrays),
    "transformers": Target("folders of transformers", open_library("transformers"), prepare_library("transformers")),
    "timm": Target("folders of timm", open_library("timm"), prepare_library("timm")),
    "dinov3": Target(
        "folders of transformers' DINOv3ViT",
        open_library("dinov3"),
        prepare_library("transformers", "dinov3", pos_embed="rotary_2d_normalized", registers=2),
    ),
    "dinov3-timm": Target(
        "folders of timm's DINOv3",
        open_library("dinov3-timm"),
        prepare_library(
            "timm",
            "dinov3-timm",
            pos_embed="rotary_2d_normalized",
            key_bias=False,
            norm_eps=1e-5,
            registers=2,
            layer_scale=0.1,
        ),
    ),
}
