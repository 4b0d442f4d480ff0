"""The matrix: every row and column, gone on with where it stopped, refused before any work."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sslvit.checkpoint import save_encoder
from sslvit.cli import main
from sslvit.data.array_images import array_samples
from sslvit.data.pack import pack
from sslvit.environment import MAX_STEPS
from sslvit.evaluate import scores
from sslvit.figures import plot_bars
from sslvit.locks import lock_folder
from sslvit.models import ViTEncoder
from sslvit.reports import bench as module
from sslvit.settings import EncoderSettings
from sslvit.settings.bench import load_bench
from sslvit.settings.load import recipes_folder

SHORT = {
    "config": "finetune/small_images", "data.global_batch_size": 16, "data.workers": 0, "train.steps": 4,
    "train.log_every": 2, "train.precision": "float32", "data.view.operations": 0,
}  # fmt: skip


def make(seed: int, **changes) -> ViTEncoder:
    torch.manual_seed(seed)
    small = {"image_size": 8, "patch": 4, "width": 16, "depth": 2, "heads": 2}
    return ViTEncoder(EncoderSettings(**small | changes))


@pytest.fixture
def files(tmp_path: Path) -> dict:
    source = np.random.default_rng(0)
    for name, count in (("train", 48), ("val", 24)):
        labels = np.arange(count) % 2
        images = source.integers(0, 150, (count, 8, 8, 3)) + labels[:, None, None, None] * 50
        pack(array_samples(images.astype(np.uint8), labels), tmp_path / name, ["dark", "light"])
    for i in range(3):
        save_encoder(make(i, **{"pooling": "mean"} if i == 2 else {}), tmp_path / f"e{i}")
    return {
        "data": {"toy": {"train": str(tmp_path / "train"), "val": str(tmp_path / "val")}},
        "encoders": {"A": [str(tmp_path / "e0"), str(tmp_path / "e1")], "B": str(tmp_path / "e2")},
        "columns": {
            "linear": "linear",
            "dinov2": {"protocol": {"name": "dinov2", "iterations": 3, "batch": 16, "lrs": [0.1, 1.0]}},
            "kNN": {"kind": "knn", "neighbors": 3},
            "few": {"kind": "few", "labels_per_class": 4, "draws": 3},
            "fine-tuned": {"kind": "finetune", **SHORT},
        },
        "out": str(tmp_path / "bench"), "device": "cpu",
    }  # fmt: skip


def write(files: dict, tmp_path: Path, **changes) -> str:
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(files | changes))
    return str(tmp_path / "bench.yaml")


def test_one_command_fills_the_table_and_goes_on_where_it_stopped(
    files: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    measured = []
    probed = module.BenchRun.probe

    def stop_after_three(self, *arguments):
        if len(measured) == 3:
            raise KeyboardInterrupt("stopped")
        measured.append(arguments)
        return probed(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module.BenchRun, "probe", stop_after_three)
        assert main(["bench", write(files, tmp_path)]) == 130
    done = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "bench" / "cells").iterdir()}
    assert len(done) == 3
    assert main(["bench", write(files, tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all((tmp_path / "bench" / "cells" / name).stat().st_mtime_ns == time for name, time in done.items())
    rows = [
        "raw pixels",
        "A untrained",
        "A from scratch with labels",
        "B untrained",
        "B from scratch with labels",
        "A",
        "B",
    ]
    content = json.loads((tmp_path / "bench" / "table.json").read_text())
    found = {(cell["row"], cell["column"]): cell for cell in content["cells"]}
    assert list(dict.fromkeys(row for row, _ in found)) == rows
    assert {row for row, column in found if column == "fine-tuned"} == set(rows[1:])
    assert all(len([c for r, c in found if r == row]) == (4 if row == "raw pixels" else 5) for row in rows)
    assert [len(found["A", column]["values"]) for column in files["columns"]] == [2] * 5  # two runs
    assert len(found["B", "few"]["values"]) == 3  # three draws
    for cell in content["cells"]:  # two runs or three draws may agree to the last image
        assert (cell["interval"] is not None) == (len(set(cell["values"])) > 1)
    assert any(found["A", column]["interval"] is not None for column in files["columns"])
    assert found["B", "linear"]["interval"] is None
    untrained, scratch = (found[f"B {kind}", "fine-tuned"] for kind in ("untrained", "from scratch with labels"))
    assert untrained["values"] == scratch["values"]  # from scratch, both
    markdown = (tmp_path / "bench" / "table.md").read_text()
    assert "| raw pixels |" in markdown
    assert "The reported images select nothing" in markdown
    with open(tmp_path / "bench" / "table.csv") as file:
        assert len(list(csv.DictReader(file))) == len(content["cells"])
    assert "<table>" in (tmp_path / "bench" / "report.html").read_text()
    assert "A from scratch with labels" in said
    capsys.readouterr()
    assert main(["bench", write(files, tmp_path)]) == 0  # nothing is measured again
    assert "toy: " not in capsys.readouterr().out
    fine_tuned = set((tmp_path / "bench" / "finetune").iterdir())
    assert main(["bench", write(files, tmp_path, seed=1)]) == 0
    assert "toy: B untrained: linear" in capsys.readouterr().out
    assert set((tmp_path / "bench" / "finetune").iterdir()) > fine_tuned  # a run of its own for another seed


def cells_of(tmp_path: Path) -> dict[tuple[str, str], dict]:
    content = json.loads((tmp_path / "bench" / "table.json").read_text())
    return {(cell["row"], cell["column"]): cell for cell in content["cells"]}


def test_other_data_recipes_or_weights_are_measured_anew(
    files: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = recipes_folder() / "finetune" / "small_images.yaml"
    (tmp_path / "own.yaml").write_text(recipe.read_text())
    tuned = {"kind": "finetune", **SHORT, "config": str(tmp_path / "own.yaml")}
    files |= {"encoders": {"B": files["encoders"]["B"]}, "columns": {"fine-tuned": tuned}, "baselines": ["pixels"]}

    def key() -> str:
        assert main(["bench", write(files, tmp_path)]) == 0
        said = capsys.readouterr().out
        cell = cells_of(tmp_path)["B", "fine-tuned"]
        assert cell["seconds"] > 0
        return cell["key"], "toy: training with labels" in said

    first, was_made = key()
    assert was_made
    assert key() == (first, False)
    (tmp_path / "own.yaml").write_text(recipe.read_text().replace("layer_decay: 0.75", "layer_decay: 0.5"))
    second, was_made = key()
    assert was_made
    assert second != first
    swapped = {"train": files["data"]["toy"]["val"], "val": files["data"]["toy"]["train"]}
    files["data"] = {"toy": swapped}
    third, was_made = key()
    assert was_made
    assert third not in (first, second)
    save_encoder(make(9, pooling="mean"), tmp_path / "e2")
    assert key()[0] not in (first, second, third)


def test_shards_that_are_indexed_with_other_labels_are_measured_anew(
    files: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tuned = files["columns"]["fine-tuned"]
    files |= {"encoders": {"B": files["encoders"]["B"]}, "baselines": []}
    files["columns"] = {"kNN": files["columns"]["kNN"], "fine-tuned": tuned}
    source = np.random.default_rng(0)
    for name, count in (("train", 48), ("val", 24)):
        folder = tmp_path / "two labels" / name
        folder.mkdir(parents=True)
        with tarfile.open(folder / "0.tar", "w") as tar:
            for number in range(count):
                label, bright = number % 2, source.integers(0, 150, (8, 8, 3)) + number % 2 * 100
                image = io.BytesIO()
                Image.fromarray(bright.astype(np.uint8)).save(image, "PNG")
                fields = {"png": image.getvalue(), "cls": b"%d" % label, "other": b"%d" % (number // 2 % 2)}
                for field, content in fields.items():
                    member = tarfile.TarInfo(f"{number:03}.{field}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        files["data"]["toy"][name] = str(folder)
    found = []
    for field in ("cls", "other"):
        for name in ("train", "val"):
            assert main(["shards", "index", files["data"]["toy"][name], "--labels", field]) == 0
        capsys.readouterr()
        assert main(["bench", write(files, tmp_path)]) == 0
        assert "toy: training with labels" in capsys.readouterr().out
        found.append(cells_of(tmp_path)["B", "kNN"]["values"])
    assert found[0][0] > 90 > 70 > found[1][0]


def test_a_fine_tuning_that_was_cut_off_is_finished_before_it_counts(
    files: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sslvit.train import run as runs

    tuned = {"kind": "finetune", **SHORT, "train.checkpoint_every": 2}
    files |= {"encoders": {"B": files["encoders"]["B"]}, "columns": {"fine-tuned": tuned}, "baselines": []}

    def stop(*_) -> None:
        raise KeyboardInterrupt("stopped")  # scores.json is there, the encoder is not

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_finish", stop)
        assert main(["bench", write(files, tmp_path)]) == 130
    (folder,) = (tmp_path / "bench" / "finetune").iterdir()
    assert (folder / "scores.json").exists()
    assert main(["bench", write(files, tmp_path)]) == 0
    assert (folder / "encoder" / "encoder.json").exists()
    assert (folder / "encoder" / "head.safetensors").exists()


def test_scores_of_shortened_heads_do_not_stand_for_whole_ones(
    files: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever tries a bench with SSLVIT_MAX_STEPS gets its scores measured afterwards."""
    columns, cells = {"dinov2": files["columns"]["dinov2"]}, tmp_path / "bench" / "cells"
    monkeypatch.setenv(MAX_STEPS, "1")
    assert main(["bench", write(files, tmp_path, columns=columns, baselines=[])]) == 0
    tried = {path.name for path in cells.iterdir()}
    monkeypatch.delenv(MAX_STEPS)
    assert main(["bench", write(files, tmp_path, columns=columns, baselines=[])]) == 0
    assert len({path.name for path in cells.iterdir()} - tried) == len(tried) == 3


def test_a_papers_choice_is_said_and_not_made(files: dict, tmp_path: Path) -> None:
    files |= {"columns": {"dinov2": files["columns"]["dinov2"]}, "baselines": ["pixels"]}
    assert main(["bench", write(files, tmp_path)]) == 0
    text = (tmp_path / "bench" / "table.md").read_text()
    assert "dinov2: the paper selected on the images that it reports (the best of the heads); not so here" in text
    cell = cells_of(tmp_path)["B", "dinov2"]
    assert cell["about"]["score by the paper's choice, selected on the reported images"] >= cell["mean"]


def test_two_benches_do_not_share_a_folder(files: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files |= {"columns": {"kNN": files["columns"]["kNN"]}, "baselines": ["pixels"]}
    assert main(["bench", write(files, tmp_path)]) == 0
    (tmp_path / "other.yaml").write_text((tmp_path / "bench.yaml").read_text())
    capsys.readouterr()
    assert main(["bench", str(tmp_path / "other.yaml")]) == 1
    assert "holds the tables of another bench (bench)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoders": {"A": []}}, "encoders.A: expected an encoder"),
        ({"encoders": {"raw pixels": "x"}}, "encoders: 'raw pixels' is no name for a table"),
        ({"encoders": {3: "x"}}, "encoders: 3 is no name for a table"),
        ({"columns": {"a|b": "linear"}}, "is no name for a table"),
        ({"seed": "a"}, "seed: expected int, got 'a'"),
        ({"workers": -1}, "--workers -1: must be 0 or more"),
        ({"device": "gpu"}, "device: 'gpu' is not one of auto, cpu, cuda"),
        ({"columns": {"x": {"kind": "finetune", "seed": 3}}}, "columns.x.seed: cannot stand here. The bench sets it"),
        (
            {"columns": {"x": {"kind": "finetune", "train": {"steps": 3}}}},
            "columns.x.train: cannot stand here. Give its",
        ),
        ({"encoders": {"A": ["{tmp}/e0", "{tmp}/e2"]}}, "encoders.A: its runs are of different architectures"),
        ({"columns": {"x": {"kind": "knn", "neighbors": 99}}}, "--neighbors 99: there are only 48 training images"),
        (
            {"columns": {"x": {"kind": "finetune", "data.global_batch_size": 128}}},
            "columns.x: data.global_batch_size 128, but there are 48 training images",
        ),
        ({"columns": {"x": {"protocol": {"name": "dino", "blocks": 3}}}}, "--blocks 3: there are only 2 blocks"),
        ({"colums": {}}, "colums: no such setting. Did you mean columns?"),
        ({"encoders": {}}, "encoders: expected at least one name"),
        ({"encoders": {"A": 3}}, "encoders.A: expected an encoder"),
        ({"columns": {"x": {"kind": "few"}}}, "columns.x: few labels need labels_per_class or labels_percent"),
        ({"columns": {"x": {"kind": "magic"}}}, "columns.x.kind: 'magic' is not one of linear, few, knn"),
        ({"columns": {"x": {"protocol": "best"}}}, "columns.x.protocol.name: 'best' is not one of logreg"),
        ({"columns": {"x": {"protocol": {"name": "mae", "epoch": 1}}}}, "columns.x.protocol.epoch: no such setting"),
        (
            {"columns": {"x": {"neighbour": 3}}},
            "columns.x.neighbour: no such setting. Did you mean columns.x.neighbors?",
        ),
        ({"data": {"toy": {"train": "a"}}}, "data.toy.val: missing"),
        ({"baselines": ["none"]}, "baselines: none is not one of pixels, untrained, scratch"),
        ({"columns": {"x": {"kind": "finetune", "train.step": 3}}}, "columns.x: train.step: no such setting"),
        (
            {"columns": {"x": {"kind": "finetune", "config": "mae/digits"}}},
            "columns.x.config: mae/digits does not train",
        ),
        ({"columns": {"x": {"layer": 7}}}, "--layer 7: this encoder has blocks 1 to 2"),
        ({"seeds": 0}, "--seeds 0: must be 1 or more"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(
    files: dict, tmp_path: Path, changes: dict, message: str, capsys: pytest.CaptureFixture
) -> None:
    import re

    changes = json.loads(json.dumps(changes).replace("{tmp}", str(tmp_path))) if "{tmp}" in str(changes) else changes
    assert main(["bench", write(files, tmp_path, **changes)]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "bench").exists()


def test_a_folder_of_something_else_is_left_alone(files: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "thesis.tex").write_text("x")
    assert main(["bench", write(files, tmp_path)]) == 1
    assert "in use, and not by a bench" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "bench").iterdir()] == ["thesis.tex"]


def test_a_bench_that_runs_elsewhere_is_left_as_it_is(
    files: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files |= {"columns": {"kNN": files["columns"]["kNN"]}, "baselines": []}
    assert main(["bench", write(files, tmp_path)]) == 0
    folder = tmp_path / "bench"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with lock_folder(folder, "test"):
        assert main(["bench", write(files, tmp_path), "--seed", "1"]) == 1
        assert {
            path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"
        } == before
    assert f"{folder}: another process is at work there. Wait until it has ended" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff", "[" * 100_000], ids=["cut", "list", "bytes", "deep"])
def test_damaged_files_of_a_bench_are_named_or_made_anew(
    files: dict, tmp_path: Path, content: str, capsys: pytest.CaptureFixture
) -> None:
    files |= {"columns": {"kNN": files["columns"]["kNN"]}, "baselines": []}
    assert main(["bench", write(files, tmp_path)]) == 0
    (cell, *_), mark = sorted((tmp_path / "bench" / "cells").iterdir()), tmp_path / "bench" / "bench.json"
    sound = cell.read_bytes()
    for file in (cell, mark):
        file.write_bytes(content.encode(errors="surrogateescape"))
    capsys.readouterr()
    assert main(["bench", write(files, tmp_path)]) == 1
    said = capsys.readouterr().err.strip()
    assert said.endswith(
        f'{mark}: damaged. Write {{"name": "bench"}} into it to resume this bench, or choose another --out.'
    )
    assert "\n" not in said
    mark.write_text('{"name": "bench"}')
    assert main(["bench", write(files, tmp_path)]) == 0
    assert json.loads(cell.read_text())["values"] == json.loads(sound)["values"]


@pytest.mark.parametrize("path", sorted((recipes_folder() / "bench").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_benches_load(path: Path) -> None:
    assert load_bench(path, {}).columns
    assert "#   sslvit bench " in path.read_text()


def test_names_are_text_in_every_table_and_picture(
    files: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:  # fmt: skip
    data, first, other, column = "$x_$", "<img src=x onerror=alert(1)>", "=1+1; 2", "@SUM(1+1)\x1b[31m"
    encoders = {first: files["encoders"]["B"], other: files["encoders"]["B"]}
    assert main(["bench", write(files, tmp_path, data={data: files["data"]["toy"]}, encoders=encoders, baselines=[],
                                columns={column: {"kind": "knn", "neighbors": 3}})]) == 0  # fmt: skip
    said, folder = capsys.readouterr().out, tmp_path / "bench"
    assert "\x1b" not in said
    assert f"{data}: {first}: @SUM(1+1)\\x1b[31m" in said
    with open(folder / "table.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(line["data"], line["row"], line["column"]) for line in lines] == [
        (data, first, f"'{column}"), (data, f"'{other}", f"'{column}")
    ]  # fmt: skip
    assert all(float(line["mean"]) >= 0 for line in lines)
    assert f'"\'{other}"' in (folder / "table.csv").read_text()  # in quotes, so that a semicolon begins no cell
    for file in ("table.md", "report.html"):
        text = (folder / file).read_text()
        assert "<img src=x" not in text
        assert "&lt;img src=x onerror=alert(1)&gt;" in text
        assert "\x1b" not in text
    assert "## \\$x\\_\\$" in (folder / "table.md").read_text()
    assert (folder / f"{data}.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("$x_$", "\\$x\\_\\$"), ("vit_tiny", "vit_tiny"), ("<script>", "&lt;script&gt;"), ("a|b", "a\\|b"),
        ("two\nlines", "two\\\\x0alines"), ("[x](http://y)", "\\[x\\](http://y)"), ("`x`", "\\`x\\`"),
        ("# x", "\\# x"), ("- x", "&#45; x"), ("1. x", "&#49;. x"), ("&lt;", "&amp;lt;"), ("\x1b[31m", "\\\\x1b\\[31m"),
        ("\udcff", "\\\\xff"), ("63.2 ± 1.4", "63.2 ± 1.4"),
    ],
)  # fmt: skip
def test_a_name_in_markdown_is_that_name(name: str, expected: str) -> None:
    assert scores.markdown_text(name) == expected
    table = scores.markdown_table({name: {name: [1.0]}})
    assert all(line.replace("\\|", "").count("|") == 3 for line in table.split("\n"))


@pytest.mark.parametrize("cell", ["=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "-x", "=cmd|' /C'!A0"])
def test_a_formula_in_a_spreadsheet_is_text(cell: str) -> None:
    assert scores.spreadsheet_cell(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["-1", "+1.5", "-1e-3", "vit", "1=1", "", -1.0, None, 3])
def test_numbers_and_words_stay_as_they_are_in_a_spreadsheet(cell: object) -> None:
    assert scores.spreadsheet_cell(cell) == cell


def test_names_in_a_terminals_table_are_one_line_each() -> None:
    table = scores.format_table({"a\nb": {"\x1b[2J": [1.0]}, "c": {"\x1b[2J": [2.0]}})
    assert table.count("\n") == 2
    assert "\x1b" not in table
    assert len({len(line) for line in table.split("\n")}) == 1


def test_the_page_says_how_each_score_was_made_in_words(files: dict, tmp_path: Path) -> None:
    files |= {"columns": {"few": files["columns"]["few"]}, "baselines": ["pixels"]}
    assert main(["bench", write(files, tmp_path)]) == 0
    page = (tmp_path / "bench" / "report.html").read_text()
    assert "None" not in page
    assert "<td>raw pixels</td><td>few</td>" in page
    assert "labels per class 4" in page
    assert not re.search(r"\d\.\d{8}", re.sub(r"data:[^\"]+", "", page))
    best = re.findall(r'<td>([^<]+)</td><td class="best">', page)
    content = json.loads((tmp_path / "bench" / "table.json").read_text())
    means = {cell["row"]: cell["mean"] for cell in content["cells"]}
    assert set(best) == {row for row, value in means.items() if value == max(means.values())}


def test_bars_have_their_intervals(tmp_path: Path) -> None:
    groups = {"a": {"x": 50.0}, "b": {"x": 40.0}}
    plain = plot_bars(tmp_path / "plain.png", groups, "%").read_bytes()
    assert plot_bars(tmp_path / "none.png", groups, "%", halves={"a": {"x": None}}).read_bytes() == plain
    assert plot_bars(tmp_path / "with.png", groups, "%", halves={"a": {"x": 5.0}}).read_bytes() != plain


def test_columns_from_python_are_those_of_the_file(files: dict, tmp_path: Path) -> None:
    path = write(files, tmp_path)
    columns = {"ft": {"kind": "finetune", "train.steps": 3}, "near": "knn"}
    settings = load_bench(path, {"columns": columns, "scratch": {"train.steps": 2}})
    assert list(settings.columns) == ["ft", "near"]
    assert settings.columns["ft"].changes == {"train.steps": 3}
    assert settings.columns["near"].kind == "knn"
    assert settings.scratch.changes == {"train.steps": 2}
    assert load_bench(path, {"columns.ft": {"kind": "finetune", "changes": {"train.steps": 4}}}).columns[
        "ft"
    ].changes == {"train.steps": 4}
    for wrong, message in (
        ({"columns": {"ft": {"kind": "finetune", "changes": {"seed": 3}}}}, "columns.ft.seed: cannot stand here"),
        ({"columns": {"l": {"kind": "linear", "whiten": True}}}, "whiten: is for kind knn, not linear"),
    ):
        with pytest.raises(ValueError, match=message):
            load_bench(path, wrong)


def test_a_column_that_whitens_has_cells_of_its_own(files: dict, tmp_path: Path) -> None:
    files |= {"columns": {"kNN": files["columns"]["kNN"]}, "baselines": []}
    assert main(["bench", write(files, tmp_path)]) == 0
    before = len(list((tmp_path / "bench" / "cells").iterdir()))
    assert main(["bench", write(files, tmp_path, columns={"kNN": files["columns"]["kNN"] | {"whiten": True}})]) == 0
    assert len(list((tmp_path / "bench" / "cells").iterdir())) == 2 * before
