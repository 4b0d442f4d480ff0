"""The functions of `import sslvit`: shown, typed, documented; what they give back, and errors in Python's words."""

from __future__ import annotations

import ast
import inspect
import io
import json
import shutil
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from run_fixtures import TINY, TINY_IGPT
from shard_fixtures import image_folder, labeled_shards

import sslvit
from sslvit import shards as shards_module
from sslvit.checkpoint import save_encoder
from sslvit.cli import COMMANDS, main
from sslvit.commands.arguments import options_class
from sslvit.messages import FLAGS, in_python
from sslvit.models import ViTEncoder
from sslvit.results import Result, html_table
from sslvit.settings import EncoderSettings
from sslvit.settings.choices import alternatives, hints_of
from sslvit.settings.keywords import KNNKeywords, PackKeywords, ProbeKeywords, SampleKeywords
from sslvit.settings.pack import PackSettings, SourceOptions
from sslvit.settings.probe import KNNSettings, ProbeSettings
from sslvit.settings.sample import SampleSettings
from sslvit.tasks.base import Task
from sslvit.tasks.released import load_mae
from sslvit.train.folder import RunFolder

FUNCTIONS = (
    "bench", "check", "compare", "embed", "export", "finetune", "fit_palette", "health", "knn", "likelihood",
    "load_encoder", "pack", "plan", "pretrain", "probe", "recipes", "report", "resume", "runs", "sample",
    "segment", "show", "sweep",
)  # fmt: skip
SMALL = {"image_size": 8, "patch": 4, "width": 16, "depth": 2, "heads": 2, "channels": 1, "mean": [0.5], "std": [0.3]}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labeled shards in train/ and val/, and two encoders."""
    folder = labeled_shards(tmp_path_factory.mktemp("api"))
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        save_encoder(ViTEncoder(EncoderSettings(**SMALL)), folder / name)
    return folder


# ---- what there is -------------------------------------------------------------------------------------------


def test_the_names_of_the_package_are_listed_for_people_and_for_type_checkers() -> None:
    assert set(sslvit.__all__) == set(sslvit._LAZY)
    assert set(FUNCTIONS) <= set(dir(sslvit))
    tree = ast.parse(Path(sslvit.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.name: node.module for node in block.body for alias in typing.cast(ast.ImportFrom, node).names}
    assert {name: module or "sslvit" for name, module in sslvit._LAZY.items()} == imported


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_typed_and_its_docstring_says_all(name: str) -> None:
    import sslvit.evaluation  # that no submodule hides a function

    function = getattr(sslvit, name)
    signature, text = inspect.signature(function), inspect.getdoc(function) or ""
    assert signature.return_annotation is not inspect.Signature.empty
    for part in ("Returns:", "Example:") if signature.parameters else ("Example:",):
        assert part in text or (name == "load_encoder" and part == "Returns:"), part
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Signature.empty
        assert f"    {parameter.name}: " in text, parameter.name
    example = text.partition("Example:\n")[2]
    assert len(example.splitlines()) == 2
    compile(inspect.cleandoc(example), name, "exec")


@pytest.mark.parametrize(
    ("keywords", "kinds", "positional"),
    [
        (ProbeKeywords, [ProbeSettings], {"train", "val"}),
        (KNNKeywords, [KNNSettings], {"train", "val"}),
        (SampleKeywords, [SampleSettings], set()),
        (PackKeywords, [PackSettings, SourceOptions], set()),
    ],
)
def test_keywords_are_the_fields_of_the_settings(keywords: Any, kinds: list[Any], positional: set[str]) -> None:
    names = {field.name for kind in kinds for field in fields(kind)}
    assert set(typing.get_type_hints(keywords)) == names - positional


RENAMED = {"shards pack": "pack", "shards check": "check", "palette": "fit_palette"}
BOTH = (
    "probe", "knn", "compare", "health", "embed", "sample", "likelihood", "pretrain", "resume", "finetune", "export",
    "show", "shards pack", "shards check", "segment", "palette", "report", "plan", "sweep", "branch", "runs",
)  # fmt: skip


@pytest.mark.parametrize("command", BOTH)
def test_a_default_is_the_same_from_python_and_from_the_command_line(command: str) -> None:
    options = {field.name: field for field in fields(options_class(COMMANDS[command]))}
    compared = 0
    for name, parameter in inspect.signature(getattr(sslvit, RENAMED.get(command, command))).parameters.items():
        if name not in options or parameter.default is inspect.Parameter.empty:
            continue
        field = options[name]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if default is not MISSING:  # what a command asks for and Python may leave out
            assert (list(parameter.default) if isinstance(default, list) else parameter.default) == default, name
            compared += 1
    assert compared or command in ("probe", "knn", "compare", "sample", "runs", "resume", "shards pack", "report")


def test_keywords_are_the_options_of_the_command() -> None:
    of_file = {"heads", "image_size", "palette", "layout", "weights"}  # load_encoder takes these
    of_screen = {"quiet", "traceback", "json", "output", "changes", "plugin", "list", "slurm", "csv"}
    for command in BOTH:
        function = getattr(sslvit, RENAMED.get(command, command))
        known = set(inspect.signature(function).parameters)
        hint = typing.get_type_hints(inspect.unwrap(function)).get("settings")
        known |= set(typing.get_type_hints(typing.get_args(hint)[0])) if hint else set()
        options = set(hints_of(options_class(COMMANDS[command]))) - of_file - of_screen
        assert options <= known, command


# ---- what they give back -------------------------------------------------------------------------------------


def test_a_table_is_what_the_command_prints(here: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--train", str(here / "train"), "--val", str(here / "val"), "--neighbors", "3"]
    for name in ("probe", "knn"):
        assert main([name, str(here / "one"), *words]) == 0
        printed = capsys.readouterr().out
        table = getattr(sslvit, name)(here / "one", here / "train", here / "val", neighbors=[3])
        assert printed.endswith(f"\n{table}\n")
        capsys.readouterr()
        assert main([name, str(here / "one"), *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == table.to_dict()
        assert f"<td>{table.rows['encoder']['kNN, k = 3']:.1f}</td>" in table._repr_html_()


def test_an_encoder_is_a_path_or_an_object(here: Path) -> None:
    encoder = sslvit.load_encoder(here / "one")
    by_path, by_object = (
        sslvit.knn(one, str(here / "train"), here / "val", neighbors=[3], cache=None) for one in (here / "one", encoder)
    )
    assert by_path.to_dict() == by_object.to_dict()
    narrow = sslvit.health(encoder, here / "val", crop_fraction=0.5)
    assert "0.5" in narrow.heading or "50" in narrow.heading
    assert narrow.rows["encoder"] != sslvit.health(encoder, here / "val").rows["encoder"]
    assert encoder.settings.crop_fraction == 1.0  # the caller's own is as it was


def test_encoders_are_compared_in_one_table(here: Path, tmp_path: Path) -> None:
    both = {"first": here / "one", "second": sslvit.load_encoder(here / "two")}
    table = sslvit.compare(both, here / "train", here / "val", protocol=None, neighbors=[3])
    assert list(table.rows) == ["raw pixels", "first, second untrained", "first", "second"]
    alone = sslvit.knn(here / "two", here / "train", here / "val", neighbors=[3], baselines=False)
    assert table.rows["second"] == alone.rows["encoder"]
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(6):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)).save(flat / f"{number}.png")
    measures = sslvit.compare([here / "one", here / "two"], flat)
    assert list(measures.rows)[2:] == [str(here / "one"), str(here / "two")]
    assert measures.rows[str(here / "two")] == sslvit.health(here / "two", flat).rows["encoder"]


def test_runs_name_their_rows_and_no_encoder_of_a_list_is_left_out(here: Path) -> None:
    """Objects of one architecture print alike, so rows named after their text would be one."""
    data, given = (here / "train", here / "val"), {"protocol": None, "neighbors": [3], "baselines": False}
    one, two = here / "one", RunFolder(here / "two")
    assert list(sslvit.compare([one, two], *data, **given).rows) == [str(one), str(two.path)]
    assert list(sslvit.compare(str(one), *data, **given).rows) == [str(one)]
    with pytest.raises(ValueError, match="a module has no name for its row. Give a dict"):
        sslvit.compare([sslvit.load_encoder(one), sslvit.load_encoder(two)], *data, **given)
    with pytest.raises(ValueError, match="the same one twice"):
        sslvit.compare([one, str(one)], *data, **given)
    with pytest.raises(ValueError, match="none given"):
        sslvit.compare([], *data, **given)
    with pytest.raises(ValueError, match="encoders: raw pixels is the name of the baseline's row"):
        sslvit.compare({"raw pixels": one}, *data)


def test_a_network_where_its_path_is_needed_is_refused_with_the_remedy(here: Path, tmp_path: Path) -> None:
    encoder, data = sslvit.load_encoder(here / "one"), (here / "train", here / "val")
    with pytest.raises(ValueError, match=r"encoder: \w+ is a network.* sslvit.save_encoder\(encoder, FOLDER\)"):
        sslvit.export(encoder, tmp_path / "out", "timm")
    with pytest.raises(ValueError, match="is a network"):
        sslvit.finetune(encoder, *data, out=tmp_path / "run")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "run").exists()


def test_the_command_prints_what_the_function_returns(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    words = ["--train", "train", "--val", "val", "--neighbors", "3", "--labels-per-class", "4", "--cache", "none"]
    assert main(["compare", *words[:4], "one", "two", *words[4:], "-o", str(tmp_path / "table.json")]) == 0
    given = {"neighbors": [3], "labels_per_class": 4, "cache": None}
    table = sslvit.compare(["one", "two"], "train", "val", **given)
    assert str(table) in capsys.readouterr().out
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert list(rows)[-2:] == ["one", "two"]
    assert rows == json.loads(json.dumps(table.to_dict()["rows"]))
    for one in table.differences:
        assert (one.row, one.against) == ("two", "one")
        assert one.points == pytest.approx(rows["two"][one.column] - rows["one"][one.column])
    assert [one.column for one in table.differences] == list(rows["one"])
    assert "\ntwo against one, image by image: " in str(table)
    assert main(["compare", "one", "one", *words]) == 1
    assert "the same one twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", *words])
    assert "ENCODER" in capsys.readouterr().err


def test_features_are_arrays_and_a_file(here: Path, tmp_path: Path) -> None:
    found = sslvit.embed(here / "one", here / "val", tmp_path / "out.npz")
    assert found.features.shape == (21, 16)
    assert found.path == tmp_path / "out.npz"
    assert found.to_dict() == {
        "path": str(found.path), "images": 21, "width": 16, "classes": ["a", "b", "c"], "image_size": [8, 8]
    }  # fmt: skip
    assert "21 x 16" in found._repr_html_()
    assert np.array_equal(np.load(found.path)["features"], found.features)


def test_a_run_shows_itself_and_stands_for_its_path(here: Path, tmp_path: Path) -> None:
    run = sslvit.pretrain("mae/digits", here / "train", tmp_path / "run", **TINY, **{"encoder.channels": 1})
    found = run.to_dict()
    assert found["metrics"]["step"] == 7
    assert found["encoder"] == str(tmp_path / "run" / "encoder")
    assert "step 7" in repr(run)
    assert "step" in run._repr_html_()
    lines, history = run.read_metrics(), run.history()
    assert history["train/loss"].tolist() == [line["train/loss"] for line in lines]
    with run.metrics.open("a") as file:
        file.write('{"step": 8, "own/number": 0.5}\n')
    assert np.isnan(run.history()["train/loss"][-1])
    assert np.isnan(run.history()["own/number"][:-1]).all()
    assert run.history()["own/number"][-1] == 0.5
    assert sslvit.load_encoder(run).settings.width == 16
    assert sslvit.resume(run, **{"train.steps": 9}).to_dict()["metrics"]["step"] == 9
    made = sslvit.export(run, tmp_path / "out", "safetensors")
    assert made.to_dict() == json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert "reopened in safetensors" in str(made)


def test_samples_are_arrays_and_a_picture(here: Path, tmp_path: Path) -> None:
    run = sslvit.pretrain("igpt/digits", here / "train", tmp_path / "run", **TINY_IGPT | {"train.steps": 2})
    made = sslvit.sample(run, tmp_path / "drawn.png", count=3, seed=1)
    assert made.images.shape == (3, 1, 8, 8)
    assert made.path == tmp_path / "drawn.png"
    assert made.path.exists()
    completed = sslvit.sample(run, complete=here / "val", count=2, draws=2)
    assert completed.images.shape == (4, 1, 8, 8)
    assert np.array_equal(completed.images[1], completed.rows[2][0])  # the second completion of the first image
    nats = sslvit.likelihood(run, here / "train", here / "val").rows
    assert nats["iGPT"]["nats per pixel"] > 0


def test_packing_says_what_is_in_the_shards(tmp_path: Path) -> None:
    packed = sslvit.pack(image_folder(tmp_path / "photos"), tmp_path / "shards", holdout=0.2, workers=1)
    assert [len(index) for index in packed.indices] == [16, 4]
    assert list(packed.to_dict()) == [str(tmp_path / "shards" / name) for name in ("train", "val")]
    assert "16 images" in repr(packed)


def test_recipes_are_listed() -> None:
    assert "mae/digits" in repr(sslvit.recipes())
    names = {one["name"] for one in sslvit.recipes().to_dict()["recipes"]}
    assert names >= {"mae/digits", "dino/digits", "igpt/digits"}


def test_a_table_in_a_notebook_runs_no_code() -> None:
    assert html_table(["<b>"], [["<script>alert(1)</script>"]]) == (
        "<table>\n<thead><tr><th>&lt;b&gt;</th></tr></thead>\n"
        "<tbody>\n<tr><td>&lt;script&gt;alert(1)&lt;/script&gt;</td></tr>\n</tbody>\n</table>"
    )

    class Named(Result):
        def text(self) -> str:
            return "named"

        def to_dict(self) -> dict[str, Any]:
            return {"<i>": "&"}

    assert "<td>&lt;i&gt;</td><td>&amp;</td>" in Named()._repr_html_()
    assert repr(Named()) == "named"


# ---- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--labels-per-class 5: class cat has only 3.", "labels_per_class=5: class cat has only 3."),
        ("--train /a/b.c: 3 images are too few", 'train="/a/b.c": 3 images are too few'),
        ("--resume and --overwrite exclude each other: go", "resume=True and overwrite=True exclude each other: go"),
        ("Pass --resume to go on, or choose another --out.", "Pass resume=True to go on, or choose another out=."),
        ("--private: is of a model. Name it with --push.", "private=True: is of a model. Name it with push=."),
        ("Use --format onnx, torch or safetensors.", 'Use format="onnx", torch or safetensors.'),
        ("raise --protocol.lr (or --protocol.batch)", "raise protocol.lr (or protocol.batch)"),
        ("pass --data.allow_pipe true.", 'pass **{"data.allow_pipe": True}.'),
        ("mix several: --data.mixture '{A: 1, B: 1}'", 'mix several: **{"data.mixture": {A: 1, B: 1}}'),
        ("Give --image-size HEIGHT WIDTH.", "Give image_size=[HEIGHT, WIDTH]."),
        ("raise the limit (--max-unreadable-fraction).", "raise the limit (max_unreadable_fraction=)."),
        ("say where the picture goes: -o FILE.png", "say where the picture goes: output=FILE.png"),
        ("--layers 1,9: expected all", "layers=1,9: expected all"),
        ("All recipes: sslvit settings --recipes", "All recipes: sslvit settings --recipes"),
        ("a--b and /x/--y are paths", "a--b and /x/--y are paths"),
        (
            "To go on with it: sslvit resume runs/a.b --data x. Or pass --overwrite.",
            "To go on with it: sslvit resume runs/a.b --data x. Or pass overwrite=True.",
        ),
    ],
)  # fmt: skip
def test_options_are_written_as_arguments(text: str, expected: str) -> None:
    assert in_python(text) == expected
    assert in_python(expected) == expected


def test_every_option_without_a_value_is_known_as_one() -> None:
    kinds = [options_class(function) for function in COMMANDS.values()]
    switches = {
        name.replace("_", "-")
        for kind in kinds
        for name, hint in hints_of(kind).items()
        if alternatives(hint) == (bool,)
    }
    assert {"resume", "overwrite", "scratch"} <= FLAGS
    assert switches >= FLAGS


def test_the_same_error_speaks_to_python_and_to_the_command_line(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"^labels_per_class=50: class a has only 10 training images\.$"):
        sslvit.probe(here / "one", here / "train", here / "val", labels_per_class=50)
    words = ["--train", str(here / "train"), "--val", str(here / "val"), "--labels-per-class", "50"]
    assert main(["probe", str(here / "one"), *words]) == 1
    assert "--labels-per-class 50: class a has only 10" in capsys.readouterr().err
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"already exists.* pass overwrite=True to start anew, or .* another out=\.$"):
        sslvit.pretrain("mae/digits", here / "train", tmp_path / "run", **TINY)
    with pytest.raises(FileNotFoundError, match=r'^config="mae/digts": no such file or recipe'):
        sslvit.pretrain("mae/digts", here / "train")
    with pytest.raises(ValueError, match=r"^data= and data\.shards exclude each other"):
        sslvit.pretrain("mae/digits", "x", **{"data.shards": "y"})
    with pytest.raises(ValueError, match="labels_per_clas: no such setting. Did you mean labels_per_class"):
        sslvit.probe(here / "one", here / "train", here / "val", labels_per_clas=5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"given= are for complete=IMAGES\."):
        sslvit.sample(here, given=0.5)


# ---- training beside Lightning's own callbacks and loggers ---------------------------------------------------


class StopAt(pl.Callback):
    """Ends the run after a step, as an early stopping does."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        self.seen += 1
        if trainer.global_step == self.step:
            trainer.should_stop = True


def test_stock_callbacks_and_loggers_reach_the_trainer(here: Path, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="train/loss", save_top_k=1, every_n_train_steps=2)
    csv = CSVLogger(tmp_path, "csv")
    changes = TINY | {"encoder.channels": 1}
    patience = EarlyStopping("train/loss", patience=100, check_on_train_epoch_end=True)
    run = sslvit.pretrain(
        "mae/digits", here / "train", tmp_path / "run", callbacks=[best, patience], loggers=[csv], **changes
    )
    assert len(list((tmp_path / "best").glob("*.ckpt"))) == 1
    assert patience.best_score < 100
    lines = (Path(csv.log_dir) / "metrics.csv").read_text().splitlines()
    assert "train/loss" in lines[0]
    assert (Path(csv.log_dir) / "hparams.yaml").read_text().count("peak_tflops") == 1
    plain = sslvit.pretrain("mae/digits", here / "train", tmp_path / "plain", **changes)
    one, other = (sslvit.load_encoder(folder).state_dict() for folder in (run, plain))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_callback_may_end_a_run_which_can_go_on(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = TINY | {"encoder.channels": 1}
    stop = StopAt(4)
    run = sslvit.pretrain("mae/digits", here / "train", tmp_path / "run", callbacks=[stop], **changes)
    assert "a callback ended the run at step 4 of 7" in capsys.readouterr().out
    assert run.to_dict()["metrics"]["step"] == 4
    assert (run.encoder / "encoder.json").exists()
    whole = sslvit.pretrain("mae/digits", here / "train", tmp_path / "whole", **changes)
    counted = StopAt(-1)
    sslvit.resume(run, callbacks=[counted])
    assert counted.seen == 3
    one, other = (sslvit.load_encoder(folder).state_dict() for folder in (run, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert issubclass(Task, pl.LightningModule)


def test_a_picture_is_shown_saved_once_and_made_of_pixels_in_memory_too(here: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8), np.uint8)
    encoder = sslvit.load_encoder(here / "one")
    picture = sslvit.show("distance", encoder, images, images=2)
    assert Image.open(io.BytesIO(picture._repr_png_())).format == "PNG"
    assert np.array(picture.numbers["trained"]["entropy_nats"]).shape == (2, 2)
    assert picture.to_dict()["figure"] is None
    assert picture.save(tmp_path / "a.png").read_bytes() == picture.png
    assert str(picture) == repr(picture) == str(tmp_path / "a.png")
    with pytest.raises(ValueError, match="already exists"):
        picture.save(tmp_path / "a.png")
    kept = sslvit.show("neighbors", here / "one", here / "val", tmp_path / "n.png", images=2, among=5)
    assert kept.path == tmp_path / "n.png"
    assert kept.path.read_bytes() == kept.png
    with pytest.raises(ValueError, match="what: .atention. is not one of .*Did you mean attention"):
        sslvit.show("atention", encoder, images)
    with pytest.raises(ValueError, match="among= is for show neighbors"):
        sslvit.show("field", encoder, images, among=5)


# ---- benches, shards and palettes ----------------------------------------------------------------------------


def test_a_bench_takes_paths_and_gives_its_tables(here: Path, tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(
        "data: {}\nencoders: {}\ncolumns: {kNN: {kind: knn, neighbors: 3}, linear: linear}\nbaselines: [pixels]\n"
    )
    split = {"train": here / "train", "val": here / "val"}
    given: dict[str, Any] = {"data": {"toy": split}, "out": tmp_path / "bench", "device": "cpu"}
    made = sslvit.bench(tmp_path / "toy.yaml", encoders={"both": [here / "one", here / "two"]}, **given)
    rows = made.tables["toy"]
    assert list(rows) == ["raw pixels", "both"]
    for column, scores in (("kNN", "kNN, k = 3"), ("linear", "linear, all labels")):
        alone = [
            sslvit.probe(here / name, here / "train", here / "val", neighbors=[3], device="cpu").scores["encoder"]
            for name in ("one", "two")
        ]
        assert rows["both"][column] == [one[scores][0] for one in alone]
    assert {file.name for file in made.files} == {"report.html", "table.md", "table.csv", "table.json"}
    assert [cell["values"] for cell in made.to_dict()["cells"] if cell["row"] == "both"] == list(rows["both"].values())
    assert "<td>toy</td><td>both</td>" in made._repr_html_()
    assert f"  {tmp_path / 'bench' / 'table.md'}" in repr(made).splitlines()
    with pytest.raises(FileNotFoundError, match=r"encoders.lost"):
        sslvit.bench(tmp_path / "toy.yaml", encoders={"lost": tmp_path / "none"}, **given)


def test_shards_are_checked_and_near_duplicates_named(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = sslvit.check(here / "train", workers=1)
    assert checked.is_whole
    assert checked.near_duplicates is None
    assert checked.to_dict()["images"] == sum(checked.found.modes.values()) > 0
    with pytest.raises(ValueError, match="against=, write= and figure= are for near_duplicates=ENCODER"):
        sslvit.check(here / "train", write=tmp_path / "keep.txt")
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "check_shards", None)  # which would take hours first
        with pytest.raises(ValueError, match="threshold=95: must be in"):
            sslvit.check(here / "train", near_duplicates=here / "one", threshold=95.0)
    copied = sslvit.check(
        here / "train", near_duplicates=here / "one", against=here / "train", write=tmp_path / "keep.txt", workers=1
    )
    assert copied.near_duplicates is not None
    assert copied.kept == 0
    assert (tmp_path / "keep.txt").read_text() == ""
    assert sum(len(inside) for inside, _ in copied.near_duplicates.leaks) == checked.to_dict()["images"]
    assert "groups across both sets" in copied._repr_html_()
    broken = tmp_path / "broken"
    shutil.copytree(here / "train", broken)
    shard = next(broken.glob("*.tar"))
    shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x00PNG", 1))
    assert not sslvit.check(broken, workers=1).is_whole


def test_a_palette_is_fitted_on_an_array_and_used(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    made = sslvit.fit_palette(images, tmp_path / "palette.json", colors=5, image_size=8)
    assert len(made.colors) == 5
    assert made.figure.is_file()
    assert sslvit.load_recipe("igpt/own_images", {"encoder.palette": str(made.path)}).encoder.palette == made.colors
    assert made.to_dict()["pixels"] == 12 * 64
    assert "5 colors fitted on 768 pixels" in repr(made)
    with pytest.raises(ValueError, match="already exists"):
        sslvit.fit_palette(images, tmp_path / "palette.json", colors=5)


def test_patches_and_reconstructions_are_shown(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images, encoder = np.random.default_rng(0).integers(0, 256, (4, 8, 8)).astype(np.uint8), here / "one"
    pictures = {what: sslvit.show(what, encoder, images, images=2).png for what in ("pca", "similarity")}
    assert pictures["similarity"] != sslvit.show("similarity", encoder, images, images=2, patch=(0, 1)).png
    assert pictures["similarity"] == sslvit.show("similarity", encoder, images, images=2, patch="1,1").png  # the middle
    with pytest.raises(ValueError, match="patch=5,0: images have 2 x 2 patches"):
        sslvit.show("similarity", encoder, images, patch="5,0")
    for wrong in ("5", "a,b", "1,2,3"):
        with pytest.raises(ValueError, match=f'patch="?{wrong}"?: expected a row and a column'):
            sslvit.show("similarity", encoder, images, patch=wrong)
    with pytest.raises(ValueError, match="patch= is for show similarity"):
        sslvit.show("pca", encoder, images, patch="1,1")
    with pytest.raises(ValueError, match="holds an encoder alone, without MAE's decoder"):
        sslvit.show("reconstruct", encoder, images)
    with pytest.raises(ValueError, match="takes the folder of a run of MAE"):
        sslvit.show("reconstruct", sslvit.load_encoder(encoder), images)
    run = sslvit.pretrain("mae/digits", images[..., None], tmp_path / "run", **TINY | {"data.global_batch_size": 4})
    drawn = sslvit.show("reconstruct", run, images, images=2)
    assert drawn.png == (sslvit.show("reconstruct", tmp_path / "run", images, images=2).png)
    assert sslvit.show("reconstruct", run, images, images=2, size=16).png != drawn.png
    model = load_mae(run.path)
    assert not model.training  # nothing is dropped
    assert sslvit.show("reconstruct", model, images, images=2).png == drawn.png
    assert main(["show", "reconstruct", str(tmp_path / "run"), str(here / "val"), "--heads", "2", "-o", "x.png"]) == 1
    assert "takes a run and no --heads" in capsys.readouterr().err
    words = ["show", "reconstruct", str(tmp_path / "run"), str(here / "val"), "-o", str(tmp_path / "r.png"), "--images"]
    assert main([*words, "2", "--size", "16"]) == 0
    assert (tmp_path / "r.png").stat().st_size > 1000
