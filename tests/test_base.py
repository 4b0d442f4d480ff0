"""A YAML that names a base changes that recipe, and what it does not say is the base's."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from sslvit.cli import main
from sslvit.settings.load import load_recipe, recipes_folder
from sslvit.settings.typed import read_value


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_changes_what_its_base_says_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, mine="base: mae/digits\noptim: {base_lr: 1.0e-3}\ndata: {view: {flip: 0.25}}\nseed: 3\n")
    found, recipe = load_recipe(tmp_path / "mine.yaml"), load_recipe("mae/digits")
    assert found.optim == replace(recipe.optim, base_lr=1e-3)
    assert found.data == replace(recipe.data, view=replace(recipe.data.view, flip=0.25))
    assert (found.seed, found.encoder, found.task, found.train) == (3, recipe.encoder, recipe.task, recipe.train)
    assert load_recipe(tmp_path / "mine.yaml", {"optim.base_lr": 2e-3}).optim.base_lr == 2e-3  # the last word
    write(tmp_path, same="base: mae/digits\n")
    assert load_recipe(tmp_path / "same.yaml") == recipe


def test_precedence_is_the_order_of_speech_over_several_bases(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="base: igpt/small_in1k\ntrain: {epochs: 10}\nencoder: {preset: igpt_medium, heads: 16}\ndata: {shards: a}\n",
        b="base: a.yaml\nencoder: {width: 512, preset: igpt_large}\ndata: {mixture: {b: 1}}\nseed: 1\n",
        c="base: b.yaml\ntask: dino\nencoder: {depth: 3}\ndata: {view: multi_crop}\n",
    )
    a, b = load_recipe(tmp_path / "a.yaml"), load_recipe(tmp_path / "b.yaml")
    assert (a.train.epochs, a.train.steps) == (10, None)  # not the base's million steps
    assert (a.encoder.width, a.encoder.heads) == (1024, 16)
    assert (b.encoder.width, b.encoder.depth, b.encoder.heads) == (512, 48, 16)
    assert (b.data.shards, b.data.mixture, b.train.epochs) == (None, {"b": 1}, 10)
    c = load_recipe(tmp_path / "c.yaml")
    assert (c.task.name, c.data.view.kind, c.encoder.depth, c.seed) == ("dino", "multi_crop", 3, 1)


def test_a_section_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    """YAML's own readers keep the later one alone, so the run would have the base's length."""
    write(
        tmp_path,
        twice="base: mae/digits\ntrain: {epochs: 3}\nseed: 1\ntrain: {log_every: 3}\n",
        inside="base: mae/digits\ntrain:\n  epochs: 3\n  epochs: 4\n",
        merged="base: mae/digits\nencoder: {<<: &small {width: 32, heads: 2}, width: 64}\n",
    )
    with pytest.raises(ValueError, match=r"twice.yaml: .*train stands there twice, again in line 4: put both together"):
        load_recipe(tmp_path / "twice.yaml")
    with pytest.raises(ValueError, match=r"epochs stands there twice, again in line 4"):
        load_recipe(tmp_path / "inside.yaml")
    encoder = load_recipe(tmp_path / "merged.yaml").encoder  # a merge key may be overridden
    assert (encoder.width, encoder.heads) == (64, 2)
    assert read_value("{a: 1, a: 2}") == "{a: 1, a: 2}"


def test_a_base_is_found_beside_the_file_and_keeps_its_palette(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "deep").mkdir()
    shutil.copy(recipes_folder() / "igpt" / "small_cifar10.yaml", tmp_path / "deep" / "parent.yaml")
    shutil.copy(recipes_folder() / "igpt" / "cifar10_palette.json", tmp_path / "deep")
    write(tmp_path, child="base: deep/parent.yaml\nseed: 5\n", named="base: igpt/small_cifar10\nseed: 5\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe(tmp_path / "child.yaml") == load_recipe("igpt/small_cifar10", {"seed": 5})
    assert load_recipe(tmp_path / "named.yaml") == load_recipe("igpt/small_cifar10", {"seed": 5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: other.yaml", "mine.yaml: base: other.yaml: no such file or recipe. Check the path"),
        ("base: mae/digit", "mine.yaml: base: mae/digit: no such file or recipe. Did you mean mae/digits"),
        ("base: [mae/digits]", "mine.yaml: base: ['mae/digits'] is no name of a recipe"),
        ("base: mine.yaml", "mine.yaml: base: mine.yaml leads back to where it began. Leave one base out."),
        ("base: ring.yaml", "ring.yaml: base: mine.yaml leads back to where it began. Leave one base out."),
        ("base: pipe.yaml", "pipe.yaml: data.allow_pipe is for you to give, not for a file"),
        ("base: mae/digits\ntrain: {stps: 3}", "train.stps: no such setting. Did you mean train.steps?"),
        ("base: mae/digits\ntrain:", "train: an empty section. Put settings below it, or leave it out."),
    ],
)
def test_what_a_base_cannot_be_is_one_line(capsys, tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, ring="base: mine.yaml", pipe="data: {allow_pipe: true}")
    write(tmp_path, mine=text)
    assert main(["plan", "--config", str(tmp_path / "mine.yaml"), "--images", "9"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_base_is_of_files_and_not_of_the_command_line(capsys) -> None:
    assert main(["plan", "--config", "mae/digits", "--images", "9", "--base", "dino/digits"]) == 1
    assert "The recipe that all other settings change is that of --config." in capsys.readouterr().err


def test_recipes_for_clusters_are_those_of_one_machine_elsewhere() -> None:
    for name, base in (("mae_vit_base_in1k", "mae/vit_base_in1k"), ("igpt_large_in1k", "igpt/large_in1k")):
        found, recipe = asdict(load_recipe(f"cluster/{name}")), asdict(load_recipe(base))
        said = yaml.safe_load((recipes_folder() / "cluster" / f"{name}.yaml").read_text())
        assert said.pop("base") == base
        for section, keys in said.items():
            assert {key: found[section].pop(key) for key in keys} == keys
            for key in keys:
                recipe[section].pop(key)
        assert found == recipe
