"""What a person types, and the one line they get when it is wrong."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shtab
import torch
from PIL import Image
from safetensors.torch import save_file
from shard_fixtures import image_folder

import sslvit
from sslvit.cli import COMMANDS, SPIN_COUNT, main, make_parser, read_command
from sslvit.commands.arguments import read_changes
from sslvit.environment import explain
from sslvit.evaluate.probe import in_words
from sslvit.messages import messages_of
from sslvit.settings import TASK_SETTINGS, EncoderSettings
from sslvit.settings.bench import load_bench
from sslvit.settings.describe import describe_settings, explained_settings
from sslvit.settings.load import load_recipe, recipe_names, recipes_folder, takes_init
from sslvit.settings.recipes import FIELDS, NOT_MEASURED, in_brief, read_header, recipes
from sslvit.tasks import TASKS


def failing(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(list(words)) == 1
    error = capsys.readouterr().err
    assert error.startswith("sslvit: error: ")
    assert error.count("\n") == 1, "an error is one line"
    return error


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(tmp_path / "photos" / label / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder.wdith", "3"], "encoder.wdith: no such setting. Did you mean encoder.width?"),
        (["--mask_ratio=0.5"], "Did you mean task.mask_ratio?"),
        (["--train.max_step", "3"], "train.max_step: no such setting"),
        (["--train.steps", "many"], "train.steps: expected int or null, got 'many'"),
        (["--encoder.tokens", "pach"], "not one of patch, conv_stem"),
        (["--encoder.image_size", "13"], "13 x 13 pixels cannot be cut into patches of 2"),
        (["--encoder.preset", "vit_tny"], "not one of vit_tiny"),
        (["--task.name", "may"], "task.name: 'may' is not one of mae"),
        (["--task.mask_ratio", "1.5"], "must be in (0, 1)"),
        (["--train.steps"], "--train.steps: no value given"),
        (["oops"], "is no .tar file. Give one folder"),
        (["--train.epochs", "0"], "train.epochs: 0"),
        (["--train.epochs", ".nan"], "train.epochs: nan"),
        (["--encoder.patch", "0"], "encoder.patch: 0 must be positive"),
        (["--encoder.heads", "0"], "encoder.heads: 0 must be positive"),
        (["--encoder.drop_path", "1"], "encoder.drop_path: 1.0"),
        (["--task.decoder_heads", "0"], "task.decoder_heads: 0"),
        (["--task.decoder_width", "30"], "multiple of 4, not 30"),
        (["--optim.betas", "[0.9]"], "optim.betas: [0.9]"),
        (["--data.view.kind", "multi_crop"], "multi_crop is not for mae. Use crop or square or center or canvas"),
        (["--data.view.kind", "crops"], "data.view.kind: 'crops' is not one of augment, crop, square, center"),
        (["--data.view.kind", "crop", "--data.view.side", "[0.5, 1]"], "data.view.side: no such setting"),
        (["--data.view.side", "[0.9, 0.5]"], "data.view.side: [0.9, 0.5] must be [smallest, largest]"),
        (["--data.lanes", "0"], "data.lanes: 0 must be positive"),
        (["--data.resolutions", "[]"], "data.resolutions: [] must be a list of sides"),
        (["--train.accelerator", "gpu"], "train.accelerator: gpu, but torch sees none"),
        (["--task", "[1]"], "task.name: [1] is not one of"),
        (["--encoder.preset", "[a]"], "encoder.preset: ['a'] is not one of"),
        (["--seed", "-1"], "seed: -1 must be 0 or more"),
        (["--encoder.palette", "my.json"], "my.json is not a file. Make one with: sslvit palette SHARDS -o my.json"),
        (
            ["--encoder.palette", "[[0, a]]"],
            "encoder.palette: expected str or list[list[float]], got [[0, 'a']]",
        ),
    ],
)
def test_a_wrong_setting_is_named_before_data_is_touched(
    capsys, tmp_path: Path, words: list[str], message: str
) -> None:
    error = failing(capsys, "pretrain", "--config", "mae/digits", "--data", str(tmp_path / "none"), *words)
    assert message in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--optim.lr", "1e-3"],
            "optim.lr: no such setting. Did you mean optim.base_lr (the learning rate at a batch size of 256)?",
        ),
        (["--lr", "1e-3"], "lr: no such setting. Did you mean optim.base_lr"),
        (["--batch-size", "4"], "batch-size: no such setting. Did you mean data.global_batch_size?"),
        (["--data.global-batch", "4"], "data.global-batch: no such setting. Did you mean data.global_batch_size?"),
        (["--overwite"], "--overwite: no such option. Did you mean --overwrite?"),
        (["--task.out_dim", "9"], "task.out_dim: no such setting. task.out_dim is a setting of task.name dino."),
        (["--data.view.local_crops", "9"], "data.view.local_crops is a setting of data.view.kind multi_crop."),
        (["--out_dim", "9"], "out_dim: no such setting. task.out_dim is a setting of task.name dino."),
        (["--local_crops_number", "4"], "data.view.local_crops is a setting of data.view.kind multi_crop."),
        (["--accum-iter", "4"], "Did you mean train.micro_batch_size (images per forward pass; as many passes as make"),
        (["--train.device", "cuda"], "train.device: no such setting. Did you mean train.accelerator?"),
        (["--gradient_clip_val", "1"], "Did you mean optim.clip_grad?"),
        (["--optim.optimizer", "muon"], "optim.optimizer: no such setting. Did you mean optim.name?"),
        (["--opt", "muon"], "Did you mean optim.name?"),
        (["--output_dir", "x"], "Did you mean out?"),
        (["--epochs", "5"], "Did you mean train.epochs?"),
        (["--train.compile", "true"], "true is not one of auto, none, default, reduce-overhead. Did you mean default?"),
        (["--train.precision", "fp32"], "Did you mean float32?"),
        (["--train.precision", "bf16-mixed"], "Did you mean bf16?"),
        (["--train.precision", "32"], "Did you mean float32?"),
        (["--train.accelerator", "cuda"], "Did you mean gpu?"),
        (["--encoder.mlp", "swiglue"], "Did you mean swiglu?"),
        (["--task.name", "dinov"], "Did you mean dino?"),
        (["--encoder.patch", "5"], "Set encoder.image_size to 15, or encoder.patch to another side."),
        (["--train.compile", "--train.steps", "3"], "--train.compile: no value given"),
        (["--train.steps", "1" + 50 * "0"], "train.steps: 1000"),
    ],
)
def test_what_other_libraries_call_a_setting_names_ours(capsys, tmp_path: Path, words: list[str], message: str) -> None:
    error = failing(capsys, "pretrain", "--config", "mae/digits", "--data", str(tmp_path / "none"), *words)
    assert message in error


def test_what_runs_in_one_process_is_refused_under_torchrun(
    capsys, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["shards", "pack", str(photos), str(tmp_path / "out")]
    monkeypatch.setenv("WORLD_SIZE", "2")  # as Kubernetes sets it, too, for jobs that are not torchrun's
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(words) == 1
    assert capsys.readouterr().err == "sslvit: error: shards pack: runs in one process. Start it without torchrun.\n"
    assert not (tmp_path / "out").exists()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert main(words) == 0


def test_a_misspelled_command_names_the_nearest(capsys) -> None:
    for words, meant in ((["pretran"], "pretrain"), (["shards", "pakc", "a", "b"], "pack")):
        assert main(words) == 2
        assert f"no such command. Did you mean {meant}?" in capsys.readouterr().err


def test_settings_may_stand_before_positional_arguments(capsys, tmp_path: Path) -> None:
    given = ["--train", "a", "--val", "b", "--out", str(tmp_path / "c")]
    for setting in (
        ["--encoder.image_size", "48"],
        ["--encoder.image_size=48"],
        ["--seed", "3"],
        ["--encoder.interpolate_offset", "-1"],
    ):
        assert "runs/nothing" in failing(capsys, "finetune", *setting, "runs/nothing", *given)
        assert "runs/nothing" in failing(capsys, "finetune", "runs/nothing", *setting, *given)
    assert "--lr: no value given" in failing(capsys, "finetune", "runs/nothing", *given, "--lr")


def test_a_traceback_can_be_asked_for_everywhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["shards", "info", str(tmp_path / "none"), "--traceback"])


def test_whoever_reads_only_the_head_of_the_output_causes_no_error() -> None:
    command = f"{sys.executable} -m sslvit.cli settings | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(sslvit.__file__).parents[1])
    assert done.stdout.startswith("task.name (mae)")
    assert done.stderr == ""


def test_a_wrong_recipe_names_the_nearest(capsys, tmp_path: Path) -> None:
    assert "Did you mean mae/digits" in failing(capsys, "pretrain", "--config", "mae/digit")
    error = failing(capsys, "pretrain", "--config", str(tmp_path / "nofile.yaml"))
    assert "nofile.yaml: no such file or recipe" in error
    assert "take one that comes with sslvit: sslvit recipes" in error
    assert "a folder, not a YAML file. Give a file" in failing(capsys, "pretrain", "--config", str(tmp_path))
    (tmp_path / "bad.yaml").write_text("encoder: [")
    assert "bad.yaml: not readable as YAML" in failing(capsys, "pretrain", "--config", str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    assert "expected keys and values" in failing(capsys, "pretrain", "--config", str(tmp_path / "list.yaml"))
    (tmp_path / "empty.yaml").write_text("data:\n")
    for more in ([], ["--data", "shards"]):
        error = failing(capsys, "pretrain", "--config", str(tmp_path / "empty.yaml"), *more)
        assert "data: an empty section. Put settings below it, or leave it out." in error


def test_recipes_are_listed_with_task_size_cost_and_score(capsys) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line and not line.startswith(("recipe ", " ", "benches"))]
    assert names == [*recipe_names(), *recipe_names("bench")]
    assert {"mae/digits", "dino/digits", "igpt/digits", "bench/cifar10"} <= set(names)
    number = next(number for number, line in enumerate(lines) if line.startswith("dino/vit_small_in1k_300"))
    assert lines[number].split(maxsplit=2)[1:] == ["dino", "ViT-S/16, 22 M    62 h on 16 GPUs (published)"]
    assert lines[number + 1] == "    ImageNet-1k at 224 x 224; score: kNN 73.3, linear 76.0 (published)"
    assert main(["recipes", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["benches"].keys() == set(recipe_names("bench"))
    (found,) = (one for one in content["recipes"] if one["name"] == "mae/digits")
    assert (found["task"], found["hours"]) == ("mae", "0.03 (measured here)")
    assert recipes().text().splitlines()[3] in lines


def test_one_recipe_is_printed_as_it_is(capsys) -> None:
    for name in ("mae/digits", "bench/cifar10"):
        text = (recipes_folder() / f"{name}.yaml").read_text()
        assert main(["recipes", name]) == 0
        assert capsys.readouterr().out == text
        assert main(["recipes", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["yaml"] == text
    assert "Did you mean mae/digits? All: sslvit recipes" in failing(capsys, "recipes", "mae/digit")


def test_what_a_recipes_header_says_of_its_encoder_is_so() -> None:
    for recipe in recipes().recipes:
        if recipe.task == "supervised" or takes_init(recipe.name):
            assert recipe.encoder.startswith("as given")
            continue
        with torch.device("meta"):
            encoder = sslvit.ViTEncoder(load_recipe(recipe.name).encoder)
        millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
        counted = f"{millions:,.0f}" if millions > 10 else f"{millions:.1f}"
        assert in_brief(recipe.encoder).split(", ", 1)[-1] == f"{counted} M", recipe.name


def test_a_header_is_read_line_by_line() -> None:
    title, fields = read_header(
        "# A title: with a colon.\n#   sslvit pretrain --config x\n# Data: photographs (many)\n# Score: 3 (published,\n"
        "#   elsewhere); more.\n# A remark.\n#   sslvit probe\ntask: mae\n# Hours: 9\n"
    )
    assert title == "A title: with a colon."
    assert fields == {"Data": "photographs (many)", "Score": "3 (published, elsewhere); more"}


LONG = 3600 * "x"


@pytest.mark.parametrize(
    "text",
    [
        f"out: [{LONG}]",
        f"{LONG}: 1",
        f"task: {LONG}",
        f"task: {{name: {LONG}}}",
        f"task: {{{LONG}: 1}}",
        f"encoder: {{preset: {LONG}}}",
        f"encoder: {{tokens: {LONG}}}",
        f"encoder: {{palette: {LONG}}}",
        f"encoder: {{image_size: {[16] * 1000}}}",
        f"encoder: {{std: {[0] * 1000}, channels: 1000}}",
        f"data: {{view: {{kind: crop, scale: {[1] * 1000}}}}}",
        f"data: {{resolutions: {[-1] * 1000}}}",
        f"data: {{mixture: {{{LONG}: a}}}}",
        f"optim: {{betas: {[0.5] * 1000}}}",
        f"train: {{steps: 1{LONG.replace('x', '0')}}}",
        f"train: {{epochs: {{a: {LONG}}}}}",
        f"{LONG} {LONG}: [",
        'task: {name: "\\e[31mred\\nsslvit: all is well"}',
        '"\\e[31mred\\nsslvit: all is well": 1',
        "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nout: [*c, *c]",
        "out: &a [*a]",
        100_000 * "[",
    ],
    ids=range(22),
)
def test_a_message_never_echoes_a_whole_value(capsys, tmp_path: Path, text: str) -> None:
    (tmp_path / "long.yaml").write_text(text)
    error = failing(capsys, "pretrain", "--config", str(tmp_path / "long.yaml"))
    assert len(error) < 400 + len(str(tmp_path)), error
    assert error[:-1].isprintable()


def test_aliases_that_stand_for_a_billion_values_are_refused(capsys, tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]" for n in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    error = failing(capsys, "pretrain", "--config", str(tmp_path / "bomb.yaml"))
    assert "holds more values than settings ever have" in error


def test_home_and_variables_are_expanded_wherever_a_path_is_meant(tmp_path: Path, monkeypatch) -> None:
    home = str(tmp_path)
    monkeypatch.setenv("HOME", home)
    (tmp_path / "p.json").write_text('{"colors": [[-1.0], [1.0]]}')
    (tmp_path / "own.yaml").write_text(
        "data: {mixture: {~/a: 1, $HOME/b: 3}, cache: $HOME/c}\nout: ~/run\ninit: ~/start\n"
        "online: {train: ~/t, val: $HOME/v}\n"
        "encoder: {channels: 1, tokens: pixel, patch: 1, image_size: 8, class_token: false, pooling: mean, "
        "palette: ~/p.json}\n"
    )
    settings = load_recipe("~/own.yaml")
    assert settings.data.mixture == {f"{home}/a": 1, f"{home}/b": 3}
    assert (settings.data.cache, settings.out, settings.init) == (f"{home}/c", f"{home}/run", f"{home}/start")
    assert (settings.online.train, settings.online.val) == (f"{home}/t", f"{home}/v")
    assert settings.encoder.palette == [[-1.0], [1.0]]
    given = {"data.shards": "~/s", "task.name": "supervised", "task.val": "$HOME/v"}
    settings = load_recipe("mae/digits", given)
    assert (settings.data.shards, settings.task.val) == (f"{home}/s", f"{home}/v")
    assert load_recipe("mae/digits", {"data.shards": "pipe:cat ~/x"}).data.shards == "pipe:cat ~/x"
    (tmp_path / "bench.yaml").write_text(
        "data: {d: {train: ~/t, val: $HOME/v}}\nencoders: {e: ~/e}\ncolumns: {k: knn}\nout: ~/tables\n"
    )
    bench = load_bench("~/bench.yaml", {})
    assert (bench.data["d"].train, bench.data["d"].val) == (f"{home}/t", f"{home}/v")
    assert (bench.encoders, bench.out) == ({"e": [f"{home}/e"]}, f"{home}/tables")


def test_home_is_expanded_in_options_that_no_shell_expands(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/none" in failing(capsys, "pretrain", "--config", "mae/digits", "--data=~/none")
    assert f"{tmp_path}/none" in failing(capsys, "shards", "info", "$HOME/none")
    assert f"{tmp_path}/none" in failing(capsys, "export", "~/none", "o", "--format", "timm")


def test_home_is_expanded_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    images = image_folder(tmp_path / "images", count=4)
    sslvit.save_encoder(sslvit.load_encoder("zoo:digits/dino"), "~/encoder")
    encoder = sslvit.load_encoder("~/encoder")
    sslvit.embed(encoder, "~/images", "~/features.npz")
    sslvit.show("neighbors", encoder, "~/images", "~/picture.png", images=2)
    sslvit.export("~/encoder", "~/export", "safetensors")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"encoder", "features.npz", "picture.png", "export"} <= names, images


def test_what_is_given_last_wins_over_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("mae/digits", {"encoder.preset": "vit_small"})
    assert (recipe.encoder.width, recipe.encoder.depth, recipe.encoder.heads) == (384, 12, 6)
    assert (recipe.encoder.image_size, recipe.encoder.channels) == ([14, 14], 1)  # not of the preset
    assert load_recipe("mae/digits", {"encoder.preset": "vit_small", "encoder.width": 96}).encoder.width == 96
    assert load_recipe("igpt/small_in1k", {"encoder.preset": "igpt_medium"}).encoder.width == 1024
    assert load_recipe("igpt/small_in1k", {"train.epochs": 10}).train.steps is None
    assert load_recipe("igpt/small_in1k", {"train.epochs": 10, "train.steps": 7}).train.steps == 7
    (tmp_path / "mixed.yaml").write_text("data: {mixture: {a: 1, b: 2}}")
    assert load_recipe(tmp_path / "mixed.yaml", {"data.shards": "c"}).data.mixture is None


def test_a_bench_is_named_with_its_folder_or_without(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()  # of images, say
    (tmp_path / "other").mkdir()
    for name in ("bench/cifar10", "cifar10", "cifar10.yaml"):
        assert load_bench(name, {}).name == "cifar10"
    assert "other: a folder, not a YAML file. Give a file in it, or one that comes with sslvit" in failing(
        capsys, "bench", "other"
    )
    assert "no such file or bench. Did you mean bench/cifar10" in failing(capsys, "bench", "cifra10")
    (tmp_path / "cifar10_cpu").write_text("data: [")
    assert "cifar10_cpu: not readable as YAML" in failing(capsys, "bench", "cifar10_cpu")  # a file comes first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["palette", "PHOTOS", "-o", "p.txt"], "p.txt: a palette is written as JSON"),
        (["palette", "PHOTOS", "-o", "p.json", "--image-size", "0"], "--image-size 0: must be 1 or more"),
        (["palette", "PHOTOS", "-o", "p.json", "--seed", "-1"], "--seed -1: must be from 0"),
        (["palette", "PHOTOS", "-o", "p.json"], "--colors 512: these images have only 6 different ones"),
        (["palette", "none", "-o", "p.json"], "none is not a folder"),
        (["sample", "PHOTOS"], "no checkpoints/last.ckpt there"),
        (["sample", "PHOTOS", "-o", "x.jpg"], "x.jpg: a picture is written as PNG"),
        (["sample", "PHOTOS", "--given", "0.5"], "--draws and --given are for --complete"),
        (["probe", "x", "--train", "a", "--val", "b", "--figure", "f.png"], "--figure is for --layers"),
        (
            ["probe", "x", "--train", "a", "--val", "b", "--layers", "all", "--figure", "f"],
            "f: a picture is written as PNG",
        ),
        (["probe", "x", "--train", "a", "--val", "b", "--batch", "0"], "--batch 0: must be 1 or more"),
        (["likelihood", "none.ckpt", "--train", "a", "--val", "b"], "none.ckpt: no such file"),
    ],
)
def test_what_the_commands_of_pixels_refuse(
    capsys, photos: Path, words: list[str], message: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(photos.rglob("*"))
    assert message in failing(capsys, *(str(photos) if word == "PHOTOS" else word for word in words))
    assert set(photos.rglob("*")) == before  # nothing is made in a folder that is no run


def test_a_palettes_name_is_refused_before_images_are_packed(capsys, photos: Path) -> None:
    for words in (["-o", "p.txt"], ["-o", "p.json", "--colors", "1"]):
        failing(capsys, "palette", str(photos), *words)
        assert [path.name for path in photos.parent.iterdir()] == ["photos"]


def test_results_are_printed_with_the_digits_that_somebody_reads() -> None:
    held_out = "top-1 accuracy on held-out training images"
    assert in_words(held_out, 67.5925925925926) == f"{held_out} 67.6 %"
    assert in_words("effective_rate", 0.010416666666666666) == "effective rate 0.01042"
    assert in_words("batch", 1024) == "batch 1024"


def test_options_of_other_commands_are_refused(capsys, photos: Path) -> None:
    assert "--hold: no such option" in failing(capsys, "shards", "pack", str(photos), "out", "--hold", "0.1")


def test_numbers_and_arrays_of_numpy_and_torch_are_settings() -> None:
    changes = {
        "train.steps": np.int64(5), "encoder.mean": np.full(3, 0.25), "encoder.std": torch.full((3,), 0.5),
        "data.resolutions": [np.int32(16), torch.tensor(32)], "optim.min_lr": np.float64(1e-6),
        "data.resolution_fractions": (0.5, 0.5), "train.requeue": np.bool_(False),
    }  # fmt: skip
    found = load_recipe("mae/small_cpu", changes)
    plain = load_recipe("mae/small_cpu", {
        "train.steps": 5, "encoder.mean": [0.25] * 3, "encoder.std": [0.5] * 3, "data.resolutions": [16, 32],
        "optim.min_lr": 1e-6, "data.resolution_fractions": [0.5, 0.5], "train.requeue": False,
    })  # fmt: skip
    assert repr(found) == repr(plain)
    with pytest.raises(ValueError, match="train.steps: expected int or null, got np.float64"):
        load_recipe("mae/small_cpu", {"train.steps": np.float64(2.5)})


def test_values_are_read_as_yaml_reads_them() -> None:
    changes = read_changes(["--optim.base_lr", "1e-3", "--data.view.scale=[0.2, 1]", "--out", "x", "--init=null"])
    assert changes == {"optim.base_lr": "1e-3", "data.view.scale": [0.2, 1], "out": "x", "init": None}
    assert read_changes(["--optim.min_lr", "-1"]) == {"optim.min_lr": -1}


@pytest.mark.parametrize(
    "name",
    [
        str(p.relative_to(recipes_folder()))
        for p in sorted(recipes_folder().rglob("*.yaml"))
        if p.parent.name != "bench"
    ],
)
def test_every_recipe_loads_and_opens_with_its_command_hardware_and_score(name: str) -> None:
    settings = load_recipe(name, base=EncoderSettings() if takes_init(name) else None)
    assert settings.encoder.grid
    text = (recipes_folder() / name).read_text()
    assert "#   sslvit " in text or "#   sbatch " in text, f"{name} does not say its command"
    _, fields = read_header(text)
    assert list(fields) == list(FIELDS), f"{name} does not say what each recipe says"
    for claim in ("Hours", "Score"):
        is_sourced = any(word in fields[claim] for word in ("(published, ", "(measured here"))
        assert is_sourced or fields[claim].startswith(NOT_MEASURED), f"{name}: {fields[claim]}"


def test_paper_recipes_have_the_papers_numbers() -> None:
    """MAE, appendix A.1, table 8."""
    recipe = load_recipe("mae/vit_base_in1k")
    assert (recipe.encoder.width, recipe.encoder.depth, recipe.encoder.patch) == (768, 12, 16)
    assert (recipe.task.decoder_width, recipe.task.decoder_depth, recipe.task.decoder_heads) == (512, 8, 16)
    assert (recipe.task.mask_ratio, recipe.task.target) == (0.75, "normalized")
    assert recipe.optim.peak_lr(recipe.data.global_batch_size) == pytest.approx(2.4e-3)
    assert (recipe.optim.betas, recipe.optim.weight_decay, recipe.optim.warmup_epochs) == ([0.9, 0.95], 0.05, 40)
    assert (recipe.data.view.scale, recipe.data.view.flip) == ([0.2, 1.0], 0.5)


def test_igpt_recipes_have_the_papers_numbers() -> None:
    """iGPT, section 3.3 and the appendix on training."""
    for size, parameters in (("small", (512, 24, 8)), ("medium", (1024, 36, 8)), ("large", (1536, 48, 16))):
        recipe = load_recipe(f"igpt/{size}_in1k")
        assert (recipe.encoder.width, recipe.encoder.depth, recipe.encoder.heads) == parameters
        assert (recipe.encoder.image_size, recipe.encoder.causal, recipe.encoder.bias) == ([32, 32], True, False)
        assert (recipe.train.steps, recipe.data.global_batch_size, recipe.optim.warmup_epochs) == (1_000_000, 128, 1)
        assert (recipe.optim.betas, recipe.optim.weight_decay, recipe.encoder.dropout) == ([0.9, 0.95], 0, 0)
        assert (recipe.data.view.resize, recipe.data.view.crop) == ([256, 384], 224)
    assert load_recipe("igpt/small_in1k").optim.peak_lr(128) == pytest.approx(3e-3)


def test_settings_explain_every_key() -> None:
    text = describe_settings(explained_settings(), 100)
    for key in (
        "task.mask_ratio (0.75): Fraction",
        "data.view.kind (crop): ",
        "data.view.local_crops (8): ",
        "encoder.mean (null): ",
        "seed (0): ",
        "base (null): Recipe, or YAML file beside this one",
    ):
        assert key in text
    assert all(line == "" or ": " in line or line.startswith("    ") for line in text.splitlines())
    assert max(map(len, text.splitlines())) <= 100
    assert "One of mae, dino, igpt, supervised; the keys below are those of" in text
    assert "One of gelu, gelu_tanh, quick_gelu, swiglu." in " ".join(text.split())


def test_settings_of_a_section_or_one_of_them_are_explained_alone(capsys, monkeypatch) -> None:
    def shown(*words: str) -> list[str]:
        assert main(["settings", *words]) == 0
        return capsys.readouterr().out.splitlines()

    keys = [line.split()[0] for line in shown("train") if line and not line.startswith(" ")]
    assert {key.partition(".")[0] for key in keys} == {"train"}
    assert {"train.epochs", "train.steps", "train.deterministic"} <= set(keys)
    assert shown("data.view")[0].startswith("data.view.kind (augment): ")
    for name in ("train.log_every", "log_every", "train.log-every"):
        assert shown(name) == ["train.log_every (20): Steps between two lines of metrics.jsonl."]
    text = " ".join(" ".join(shown("mask_ratio")).split())
    assert text == (
        "task.mask_ratio (0.75): Fraction of patches hidden from the encoder. A setting of task.name mae. "
        "task.mask_ratio (0.15): Fraction of pixels that the bert objective masks. A setting of task.name igpt."
    )
    assert "One of cpu" not in shown("train.precision")[0]
    assert [one["key"] for one in json.loads("\n".join(shown("seed", "--json")))] == ["seed"]
    for wide, columns in ((60, "60"), (80, "")):
        monkeypatch.setenv("COLUMNS", columns)
        assert 0.9 * wide < max(map(len, shown())) <= wide
    hints = {
        "trian": "Did you mean train?",
        "lr": "Did you mean optim.base_lr",
        "train.stps": "Did you mean train.steps?",
    }
    for wrong, hint in {**hints, "qqq": "All: sslvit settings"}.items():
        assert f"{wrong}: no such setting or section. {hint}" in failing(capsys, "settings", wrong)


def test_every_task_has_settings_and_a_class() -> None:
    assert TASKS.keys() == TASK_SETTINGS.keys()
    for name, settings in TASK_SETTINGS.items():
        assert settings().name == name


def test_several_tars_as_a_shell_gives_them_are_one_data_set(capsys, photos: Path, tmp_path: Path) -> None:
    assert main(["shards", "pack", str(photos), str(tmp_path / "s"), "--shard-mb", "0.01"]) == 0
    tars = sorted(map(str, (tmp_path / "s").glob("*.tar")))
    assert len(tars) > 1
    words = ["plan", "--config", "mae/digits", "--data.global_batch_size", "2"]
    assert main([*words, "--data", *tars]) == 0
    assert "12 images" in capsys.readouterr().out
    assert "no .tar file. Give one folder" in failing(capsys, *words, "--data", str(photos), str(tmp_path / "s"))
    assert "braces and commas" in failing(capsys, *words, "--data", "a{.tar", "b.tar")


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to write to file </torch_7_1_0>: No space left on device (28), unable to mmap 1024 bytes",
    ],
)
def test_a_small_dev_shm_is_named_with_its_remedy(text: str) -> None:
    assert "--data.workers 0" in explain(RuntimeError(text))


def test_pack_info_and_index(capsys, photos: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    assert main(["shards", "pack", str(photos), str(shards), "--holdout", "0.34"]) == 0
    out = capsys.readouterr().out
    assert f"{shards / 'train'}: 8 images (8x8, 3 channels, 2 classes)" in out
    assert f"{shards / 'val'}: 4 images" in out
    assert main(["shards", "pack", str(photos), str(shards), "--holdout", "0.34"]) == 0
    assert "the same images are packed there already; --overwrite packs them again" in capsys.readouterr().out
    assert "already holds shards" in failing(capsys, "shards", "pack", str(photos), str(shards), "--holdout", "0.5")
    assert main(["shards", "info", str(shards / "val")]) == 0
    (shards / "val" / "index.json").unlink()
    for action in ("check", "info", "index"):  # shards without an index are indexed, as pretrain does
        assert main(["shards", action, str(shards / "val")]) == 0
        assert "4 images" in capsys.readouterr().out
        (shards / "val" / "index.json").unlink()
    assert "no images there" in failing(capsys, "shards", "pack", str(tmp_path / "shards"), str(tmp_path / "x"))


def test_import_then_probe_files_that_are_not_there(capsys, tmp_path: Path) -> None:
    encoder = sslvit.ViTEncoder(sslvit.EncoderSettings(16, patch=4, width=64, depth=1, heads=1))
    save_file(encoder.state_dict(), tmp_path / "vit.safetensors")
    assert main(["import", str(tmp_path / "vit.safetensors"), str(tmp_path / "e")]) == 0
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(sslvit.load_encoder(tmp_path / "e").features(images), encoder.eval().features(images))
    assert "already exists" in failing(capsys, "import", str(tmp_path / "vit.safetensors"), str(tmp_path / "e"))
    none = str(tmp_path / "none")
    assert "none is not a folder" in failing(capsys, "probe", str(tmp_path / "e"), "--train", none, "--val", none)
    assert "no such file or folder" in failing(capsys, "export", none, str(tmp_path / "o"), "--format", "timm")


@pytest.mark.parametrize(
    "text",
    ["No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')",
     "Cannot find a working triton installation. Either the package is not installed or it is too old.",
     "Failed to find C compiler. Please specify via CC environment variable"],
)  # fmt: skip
def test_compilation_without_a_compiler_is_named_with_its_remedy(text: str) -> None:
    assert "--train.compile none" in explain(RuntimeError(text))


def test_torch_and_torchvision_that_do_not_fit_are_explained() -> None:
    assert "Install both from the same index" in explain(RuntimeError("operator torchvision::nms does not exist"))
    assert explain(ValueError("something else")) is None


def test_what_is_said_later_wins_and_a_preset_counts_where_it_stands(tmp_path: Path) -> None:
    def width_and_depth(**changes: object) -> tuple[int, int]:
        encoder = load_recipe("mae/digits", {f"encoder.{key}": value for key, value in changes.items()}).encoder
        return encoder.width, encoder.depth

    assert width_and_depth(preset="vit_large") == (1024, 24)
    assert width_and_depth(preset="vit_large", width=96, heads=1) == (96, 24)
    assert width_and_depth(depth=3, width=96, preset="vit_large") == (1024, 24)
    command = ["pretrain", "--config", "mae/digits", "--encoder.depth", "3", "--encoder.preset", "vit_tiny"]
    assert list(read_command([*command, "--encoder.depth", "5"])[1].changes) == ["encoder.preset", "encoder.depth"]
    (tmp_path / "a.yaml").write_text("encoder: {depth: 5, preset: vit_tiny}")  # within a section it comes first
    assert (load_recipe(tmp_path / "a.yaml").encoder.width, load_recipe(tmp_path / "a.yaml").encoder.depth) == (192, 5)
    (tmp_path / "b.yaml").write_text("train: {steps: 5}\ndata: {mixture: {a: 1, b: 2}}")
    recipe = load_recipe(tmp_path / "b.yaml", {"data.shards": "x", "train.steps": 7, "train.epochs": 2})
    assert (recipe.data.shards, recipe.data.mixture, recipe.train.steps) == ("x", None, None)
    assert load_recipe("mae/digits", {"data.shards": "x", "data.mixture": {"a": 1}}).data.shards is None
    (tmp_path / "c.yaml").write_text("data: {shards: x, mixture: {a: 1}}")
    with pytest.raises(ValueError, match="data.shards and data.mixture exclude each other"):
        load_recipe(tmp_path / "c.yaml")


def test_a_whole_section_is_merged_with_the_recipes_at_every_depth() -> None:
    recipe = load_recipe("mae/digits")
    changed = load_recipe("mae/digits", {"optim": {"base_lr": 1e-3}, "data": {"view": {"flip": 0.25}, "workers": 0}})
    assert changed.optim == replace(recipe.optim, base_lr=1e-3)
    assert changed.data == replace(recipe.data, view=replace(recipe.data.view, flip=0.25), workers=0)
    assert load_recipe("mae/digits", {"task": "dino"}).task == TASK_SETTINGS["dino"]()
    assert load_recipe("mae/digits", {"task": {"decoder_depth": 1, "name": "mae"}}).task.mask_ratio == 0.6


def test_a_folder_of_another_package_hides_no_recipes(tmp_path: Path) -> None:
    package = Path(sslvit.__file__).parent
    (tmp_path / "sslvit").mkdir()
    for file in package.iterdir():
        (tmp_path / "sslvit" / file.name).symlink_to(file)
    (tmp_path / "sslvit" / "configs").symlink_to(recipes_folder())  # as it is installed
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "theirs.yaml").write_text("a: 1")
    command = [sys.executable, "-m", "sslvit.cli", "recipes"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""})
    assert "mae/digits" in done.stdout
    assert "theirs" not in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_explains_its_options_and_ends_with_an_example(capsys, name: str) -> None:
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    text = capsys.readouterr().out
    last = text.rstrip().splitlines()[-1]
    assert last.startswith(f"Example: sslvit {name}")
    _, options = read_command(shlex.split(last.removeprefix("Example: sslvit ")))  # refuses what is not well formed
    if hasattr(options, "changes") and name not in ("bench", "finetune", "resume", "demo", "sweep", "show"):
        load_recipe(options.config, options.changes)
    for action in make_parser(name).get_default("parsers")[name]._actions:
        assert action.help, f"{name}: {action.dest}"
        assert action.dest == "help" or action.help[0].isupper(), action.help


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_can_complete_commands_and_options(shell: str) -> None:
    script = shtab.complete(make_parser(), shell)
    assert "pretrain" in script
    assert "neighbors" in script
    if shell == "bash":
        assert "--labels-per-class" in script


def test_every_setting_has_a_sentence_of_its_own() -> None:
    for _, key, _, text in explained_settings():
        assert text[0].isupper(), key
        assert text.endswith("."), key
        assert not text.lower().startswith(("of ", "that ", "which ")), key


def test_json_is_all_that_is_printed_and_quiet_leaves_out_messages(capsys, photos: Path, tmp_path: Path) -> None:
    assert main(["shards", "pack", str(photos), str(tmp_path / "s"), "--quiet"]) == 0
    capsys.readouterr()
    (tmp_path / "s" / "index.json").unlink()
    for words, key in ((["info"], "images"), (["check"], "is_whole")):
        assert main(["shards", *words, str(tmp_path / "s"), "--json"]) == 0
        assert key in json.loads(capsys.readouterr().out)
    plan = ["plan", "--config", "mae/digits", "--images", "100", "--data.global_batch_size", "4"]
    assert main([*plan, "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["run"]["global_batch_size"] == 4
    assert main([*plan, "--quiet"]) == 0
    assert "parameters" in capsys.readouterr().out  # the result is no message
    assert main(["settings", "--json"]) == 0
    assert {"key", "default", "meaning"} == json.loads(capsys.readouterr().out)[0].keys()


def test_what_is_written_is_named_in_one_json_document(capsys, photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = sslvit.ViTEncoder(sslvit.EncoderSettings(16, patch=4, width=64, depth=1, heads=1))
    save_file(encoder.state_dict(), tmp_path / "vit.safetensors")

    def content(*words: str) -> dict:
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert content("import", "vit.safetensors", "e") == {"encoder": "e"}
    assert content("show", "attention", "e", str(photos), "-o", "a.png") == {"figure": "a.png"}
    assert content("show", "distance", "e", str(photos), "-o", "d.png") == {"figure": "d.png", "numbers": "d.json"}
    found = content("palette", str(photos), "-o", "p.json", "--colors", "4")
    assert (found["file"], found["figure"], len(found["colors"])) == ("p.json", "p.png", 4)
    packed = content("shards", "pack", str(photos), "s")
    assert content("shards", "index", "s")["s"]["images"] == packed["s"]["images"] > 0
    assert content("show", "neighbors", "e", "s", "-o", "n.png") == {"figure": "n.png"}
    assert content("embed", "e", "s", "-o", "f.npz")["path"] == "f.npz"


def test_messages_go_where_the_options_say(capsys) -> None:
    logger = logging.getLogger("sslvit.somewhere")
    for is_quiet, is_json, out, err in ((0, 0, "a\nwarning: b\n", ""), (1, 0, "warning: b\n", ""), (0, 1, "", "a\n")):
        with messages_of(bool(is_quiet), bool(is_json)):
            logger.info("a")
            logger.warning("b")
        found = capsys.readouterr()
        assert found.out == out
        assert found.err.startswith(err)
    logger.info("a")
    assert capsys.readouterr().out == "a\n"


def test_settings_of_a_bench_are_read_as_those_of_a_recipe(capsys) -> None:
    bench = load_bench("bench/cifar10", {"seeds": 3, "scratch.changes": {"train.steps": 5}, "device": "cpu"})
    assert (bench.seeds, bench.scratch.changes, bench.device) == (3, {"train.steps": 5}, "cpu")
    assert "seed: expected int, got 'many'" in failing(capsys, "bench", "bench/cifar10", "--seed", "many")
    assert "--draws: expected int or null, got 'x'" in failing(capsys, "sample", "run", "--draws", "x")
    assert "--device: 'gpu' is not one of auto, cpu, cuda" in failing(capsys, "sample", "run", "--device", "gpu")


def test_the_package_runs_as_a_module() -> None:
    words = [sys.executable, "-m", "sslvit", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(sslvit.__file__).parents[1])
    assert (done.returncode, done.stdout) == (0, f"sslvit {sslvit.__version__}\n")


@pytest.mark.parametrize(
    ("key", "meant"),
    [("encoder.positions", "encoder.pos_embed"), ("encoder.initialisation", "encoder.init"),
     ("optim.rate", "optim.base_lr"), ("optim.peak_lr", "optim.base_lr"), ("encoder.cnn", "encoder.hybrid_backbone")],
)  # fmt: skip
def test_names_that_are_usual_elsewhere_lead_to_ours(key: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: no such setting. Did you mean {meant}"):
        load_recipe("mae/digits", {key: 1})


def test_a_precision_of_a_probe_is_understood_as_that_of_a_run(capsys: pytest.CaptureFixture) -> None:
    assert main(["probe", "e", "--train", "a", "--val", "b", "--precision", "fp32"]) == 1
    assert "--precision: 'fp32' is not one of float32, bf16. Did you mean float32?" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "# nothing yet\n", "---\n"])
def test_a_recipe_that_says_nothing_is_not_a_run_of_defaults(tmp_path: Path, content: str) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"mine\.yaml: says nothing\. Put settings into it: sslvit settings"):
        load_recipe(tmp_path / "mine.yaml")


def test_ctrl_c_while_modules_are_loaded_is_one_line(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    from sslvit.__main__ import main as start

    class Stop:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "sslvit.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "sslvit.cli")
    monkeypatch.setattr(sys, "meta_path", [Stop(), *sys.meta_path])
    assert start() == 130
    assert capsys.readouterr().err == "sslvit: interrupted; nothing was begun\n"


def test_a_bench_is_no_recipe_and_says_its_command() -> None:
    with pytest.raises(ValueError, match="bench/cifar10.?: a bench, and no recipe. Run it: sslvit bench cifar10"):
        load_recipe("bench/cifar10")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_that_wait_give_their_core_away_unless_the_user_decides(
    variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what follows is undone
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["recipes", "mae/digits"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected
