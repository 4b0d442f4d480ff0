"""Files that name paths outside of their folder, and the commands that meet those names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from bombs import tar_of
from damaged_data import prepare_packing
from material import Workshop
from targets import Shared

VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
       "patch_size": 2, "intermediate_size": 64, "layer_norm_eps": 1e-6, "num_channels": 3}  # fmt: skip


def merged(work: Path, out: str, workshop: Workshop) -> list[list]:
    """A report of a packing names its shard."""
    attempt_pack = [
        "shards",
        "pack",
        workshop.images(),
        "packed",
        "--shard-mb",
        "0.05",
        "--resize",
        "8",
        "--part",
        "1/1",
    ]

    prepare_packing(workshop)
    shutil.copytree(Shared.folders["unfinished"], work / "packed")
    for report in (work / "packed" / "packing").glob("shard-*.json"):
        content = json.loads(report.read_text())
        content["shard"]["name"] = out
        report.write_text(json.dumps(content))
    return [
        ["shards", "index", "packed", "--merge"],
        ["shards", "index", "packed", "--merge", "--overwrite"],
        attempt_pack,
    ]


def indexed(work: Path, out: str, workshop: Workshop) -> list[list]:
    """An index names its shards."""
    about = json.loads((work / "shards" / "index.json").read_text())
    next(iter(about["splits"].values()))["filenames"][0] = out
    (work / "shards" / "index.json").write_text(json.dumps(about))
    return [
        ["shards", "check", "shards"],
        ["shards", "pack", workshop.images(), "shards", "--overwrite", "--resize", "8"],
    ]


def in_tar(work: Path, out: str, workshop: Workshop) -> list[list]:
    """Members of a tar are named after places elsewhere, and linked to them."""
    (work / "theirs").mkdir()
    (work / "theirs" / "shard.tar").write_bytes(tar_of([out, f"{out}.png", "a.png"], link_to=out))
    return [["shards", "index", "theirs"], ["embed", "own", "theirs", "-o", "out.npz"]]


def exported(work: Path, out: str, workshop: Workshop) -> list[list]:
    """An earlier export says which files are its own."""
    (work / "export").mkdir()
    (work / "export" / "verdict.json").write_text(json.dumps({"passed": True, "files": [out, "../outside"]}))
    return [["export", "own", "export", "--format", "safetensors", "--overwrite"]]


def in_parts(work: Path, out: str, workshop: Workshop) -> list[list]:
    """A checkpoint says where its parts are; a folder of weights as well."""
    (work / "run" / "checkpoints").mkdir(parents=True)
    head = {"sslvit": {"encoder": {}, "prefix": "encoder."}, "state_dict": {}, "shards": {"folder": out, "ranks": 1}}
    torch.save(head, work / "run" / "checkpoints" / "last.ckpt")
    (work / "theirs").mkdir()
    (work / "theirs" / "config.json").write_text(json.dumps(VIT))
    index = {"weight_map": {"embeddings.cls_token": out}}
    (work / "theirs" / "model.safetensors.index.json").write_text(json.dumps(index))
    return [["import", "run", "out"], ["import", "theirs", "out"]]


PATHS: tuple[Callable, ...] = (merged, indexed, in_tar, exported, in_parts)
