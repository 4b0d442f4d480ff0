"""The page of a run: written at its end, anew while it runs and by command; of several runs side by side."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from run_fixtures import TINY

import sslvit
from sslvit.cli import main
from sslvit.evaluate.scores import MeasureTable
from sslvit.pages.page import is_page
from sslvit.stopping import Interrupted, Preempted
from sslvit.train import report as module
from sslvit.train.callbacks import page as callback
from sslvit.train.callbacks.checkpoints import Checkpoints
from sslvit.train.folder import RunFolder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, a/ and b/, of other lengths and learning rates."""
    import numpy as np

    folder = tmp_path_factory.mktemp("report")
    images = np.random.default_rng(0).integers(0, 255, (30, 8, 8, 1)).astype(np.uint8)
    for name, changes in (("a", {}), ("b", {"train.steps": 4, "optim.base_lr": 1e-3})):
        sslvit.pretrain("mae/digits", images, folder / name, **TINY | changes)
    return folder


def test_a_finished_run_has_its_page(runs: Path) -> None:
    page = (runs / "a" / "report.html").read_text()
    assert is_page(runs / "a" / "report.html", "report")
    assert "<td>state</td><td>finished</td>" in page
    assert "<td>steps</td><td>7 of 7</td>" in page
    assert "<td>optim.base_lr</td><td>0.008</td><td>0.00015</td>" in page  # beside the default
    assert "optim.min_lr" not in page  # which is the default
    for part in ("What ran", "Settings", "Curves", "Where the time goes", "Data that was read", "Pictures"):
        assert f">{part}</a></li>" in page
        assert f">{part}</h2>" in page
    loss = RunFolder(runs / "a").history()["train/loss"]
    assert f"{loss[-1]:.6g}" in page
    assert page.count("data:image/png;base64") == len(list((runs / "a" / "figures").glob("*.png"))) - 1  # not loss.png
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_runs_are_plotted_together_and_their_differences_stand_out(
    runs: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    out = tmp_path / "both.html"
    assert main(["report", str(runs / "a"), str(runs / "b"), "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(out), "runs": [str(runs / "a"), str(runs / "b")]}
    page = out.read_text()
    assert '<tr class="changed"><td>optim.base_lr</td><td>0.008</td><td>0.001</td>' in page
    assert '<tr class="changed"><td>train.steps</td><td>7</td><td>4</td>' in page
    assert "<tr><td>encoder.width</td><td>16</td><td>16</td>" in page
    assert page.count("</svg>a</span>") > 4  # a line of each run in every chart
    assert page.count("</svg>b</span>") == page.count("</svg>a</span>")
    pairs = re.findall(r'<div class="beside">(.*?)</div>', page)
    assert pairs
    assert all(re.findall(r"<figcaption>(\w+):", pair) == ["a", "b"] for pair in pairs)  # one kind of picture each
    assert main(["report", str(runs / "a"), str(runs / "b"), "-o", str(out)]) == 0  # its own page is replaced


def test_scores_and_exports_in_the_folder_are_shown(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "a", tmp_path / "run")
    scores = {"rows": {"raw pixels": {"kNN": 40.0}, "encoder": {"kNN": 62.5}},
              "about": {"val": "shards/<b>val", "val_images": 24}}  # fmt: skip
    (run / "probe.json").write_text(json.dumps(scores))
    (run / "other.json").write_text('{"rows": [1, 2]}')
    (run / "broken.json").write_text("{")
    (run / "export").mkdir()
    (run / "export" / "verdict.json").write_text('{"format": "timm", "largest_difference": 1e-06}')
    page = sslvit.report(run)
    text = Path(page).read_text()
    assert '<td>encoder</td><td class="best">62.5</td>' in text
    assert "<td>raw pixels</td><td>40.0</td>" in text
    assert "on 24 images of shards/&lt;b&gt;val" in text
    assert "format timm; largest_difference 1e-06" in text
    assert "srcdoc=" in page._repr_html_()


def test_measures_are_shown_with_their_decimals_and_none_as_the_best(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "a", tmp_path / "run")
    rows = {"by counting": {"nats per pixel": 0.71236}, "iGPT": {"nats per pixel": 0.65111}}
    measured = MeasureTable(rows, "", 4, {"data": "shards/val", "images": 24})
    (run / "likelihood.json").write_text(json.dumps(measured.to_dict()))
    text = Path(sslvit.report(run)).read_text()
    assert "likelihood.json: measures on 24 images of shards/val" in text
    assert "<td>by counting</td><td>0.7124</td>" in text  # the larger is the worse
    assert "<td>iGPT</td><td>0.6511</td>" in text


def test_hostile_names_and_values_are_no_markup(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "b", tmp_path / "<script>alert(1)</script>")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("mae\n", "'</td><script>alert(2)</script>'\n", 1))
    health = {"verdict": "<script>alert(3)</script>", "messages": [{"message": "<img src=x onerror=alert(4)>"}, 5]}
    (run / "health.json").write_text(json.dumps(health))
    text = Path(sslvit.report(run)).read_text()
    assert text.count("<script>") == 1  # our own
    assert "<img src=x" not in text
    assert "alert(2)" in text
    assert "alert(3)" in text
    assert "alert(4)" in text


def test_what_went_wrong_is_said_below_the_facts(shards: Path, tmp_path: Path) -> None:
    changes = {"optim.base_lr": 1e30, "optim.warmup_epochs": 0, "train.skip_limit": 8, "train.steps": 12}
    with pytest.raises(RuntimeError, match="were not finite"):
        sslvit.pretrain("mae/digits", shards, tmp_path / "run", **TINY | changes)
    page = (tmp_path / "run" / "report.html").read_text()  # although the run has failed
    assert "<td>state</td><td>stopped</td>" in page
    (said,) = json.loads((tmp_path / "run" / "health.json").read_text())["messages"]
    assert html.escape(said["message"], quote=False) in page
    step = json.loads((tmp_path / "run" / "incident" / "incident.json").read_text())["step"]
    assert f"step {step} was not finite and was skipped; to see why: sslvit replay {tmp_path}/run/incident" in page


@pytest.mark.parametrize(("error", "has_page"), [(Interrupted, True), (Preempted, False), (RuntimeError, True)])
def test_a_run_that_ends_early_has_its_page_unless_time_is_short(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], has_page: bool
) -> None:
    def stop(*_: object) -> None:
        raise error("stopped")

    monkeypatch.setattr(Checkpoints, "on_step", stop)
    with pytest.raises(BaseException, match="stopped"):
        sslvit.pretrain("mae/digits", shards, tmp_path / "run", **TINY)
    assert (tmp_path / "run" / "report.html").exists() == has_page


def test_a_branch_says_where_it_comes_from(shards: Path, tmp_path: Path) -> None:
    run = sslvit.pretrain("mae/digits", shards, tmp_path / "a", **TINY)
    branch = sslvit.branch(run, tmp_path / "branch")
    sslvit.resume(branch, **{"train.steps": 9})
    sslvit.resume(branch, **{"train.steps": 10})
    page = (tmp_path / "branch" / "report.html").read_text()
    assert f"<td>branched from</td><td>{tmp_path}/a, step 7</td>" in page
    assert "<td>resumed</td><td>2 times</td>" in page
    assert "branched from" not in run.page.read_text()


def test_what_is_no_run_or_no_page_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine.html").write_text("<html>mine")
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([str(tmp_path / "empty")], "not a run folder"),
        ([str(runs / "a"), str(runs / "a" / ".." / "a")], "the same folder twice"),
        (
            [str(runs / "a"), "-o", str(tmp_path / "mine.html")],
            "no page that sslvit report wrote",
        ),
        ([str(runs / "a"), "-o", str(tmp_path / "page.pdf")], "Choose a name that ends in .html"),
    ):
        assert main(["report", *words]) == 1
        assert message in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<html>mine"


def test_the_page_is_written_while_the_run_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback, "SECONDS", 0.0)
    monkeypatch.setattr(callback, "MAX_FRACTION", 1e9)
    seen = []
    write = callback.write_own_report

    def note(folder: RunFolder) -> None:
        page = write(folder)
        assert page is not None
        seen.append(re.findall(r"<td>(?:state|steps)</td><td>([^<]+)</td>", page.read_text()))

    monkeypatch.setattr(callback, "write_own_report", note)
    sslvit.pretrain("mae/digits", shards, tmp_path / "run", **TINY | {"train.log_every": 2})
    assert seen == [["running", f"{step} of 7"] for step in (2, 4, 6)]  # after their lines
    assert "<td>state</td><td>finished</td>" in (tmp_path / "run" / "report.html").read_text()


def test_a_page_that_cannot_be_written_ends_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(callback, "SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_report", fails)
        run = sslvit.pretrain("mae/digits", shards, tmp_path / "run", **TINY)
    assert "report.html: not written (no room)" in capsys.readouterr().out
    assert (run.encoder / "encoder.json").exists()
    (tmp_path / "kept").mkdir()
    run.page.write_text("<p>notes of the user</p>")
    sslvit.resume(run, **{"train.steps": 8})
    assert run.page.read_text() == "<p>notes of the user</p>"
    assert "sslvit report did not write it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("best.json", '{"top1": 81.2}', None),
        ("scores.json", '{"top1": 81.2}', "A part of this page could not be made"),
        ("ledger.json", '{"samples_read": 5, "epochs_finished": null}', "5 images read, 0 epochs"),
        ("big.json", '{"rows": {"a": {"b": ' + "9" * 400 + "}}}", "A part of this page could not be made"),
        ("metrics.jsonl", '{"step": 1, "lr": {"a": 1}, "train/loss": [2]}\n', "cannot be read"),
        ("metrics.jsonl", '{"step": 1, "lr": {"a": 1}, "train/loss": null}\n', None),
        ("config.yaml", "", "cannot be read"),
    ],
)
def test_files_that_are_damaged_or_others_keep_no_page_from_being_written(
    runs: Path, tmp_path: Path, file: str, content: str, said: str | None
) -> None:
    run = shutil.copytree(runs / "b", tmp_path / "run")
    (run / file).write_text(content)
    page = Path(sslvit.report([run, runs / "a"], tmp_path / "page.html")).read_text()
    assert "<td>steps</td>" in page  # of the other one
    if said is None:
        assert "could not be made" not in page
        assert "cannot be read" not in page
    else:
        assert said in page


def test_links_and_foreign_scores_are_not_shown(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "b", tmp_path / "run")
    (tmp_path / "secret.json").write_text('{"rows": {"secret": {"kNN": 1.0}}}')
    (run / "linked.json").symlink_to(tmp_path / "secret.json")
    (run / "segment.json").write_text(
        '{"rows": {"encoder": {"mean IoU": 31.0}}, "about": {"val_images": 9, "val": "v"}}'
    )
    page = Path(sslvit.report(run)).read_text()
    assert "secret" not in page
    assert "segment.json: scores on 9 images of v" in page
    (run / "figures" / "views.png").unlink()
    (run / "figures" / "views.png").symlink_to(run / "config.yaml")
    assert "A part of this page could not be made" in Path(sslvit.report(run)).read_text()


PROBE = """
<script>
addEventListener("load", () => {
  const svg = document.querySelector("svg:not(.chip)"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + 0.97 * box.width, clientY: box.top + 9}));
  document.title = JSON.stringify({
    wide: document.documentElement.scrollWidth - innerWidth, said: document.querySelector("output").textContent,
    ground: getComputedStyle(document.body).backgroundColor, rows: document.querySelectorAll("tr").length,
  });
});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1100])
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_browser_shows_the_page_without_an_error_at_any_width(
    runs: Path, tmp_path: Path, width: int, is_dark: bool
) -> None:
    page = sslvit.report([runs / "a", runs / "b"], tmp_path / "page.html").path
    page.write_text(page.read_text() + PROBE)
    words = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
        "--enable-logging=stderr", f"--window-size={width},900", f"file://{page}",
        f"--blink-settings=preferredColorScheme={0 if is_dark else 1}",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found
    measured = json.loads(html.unescape(found[1]))
    assert measured["wide"] <= 0  # wide tables scroll by themselves
    losses = [RunFolder(runs / name).history()["train/loss"][-1] for name in "ab"]
    assert measured["said"] == f"step 7: a {losses[0]:.4g}"  # the other run has ended before
    assert measured["ground"] == ("rgb(13, 17, 23)" if is_dark else "rgb(255, 255, 255)")
    assert measured["rows"] > 30
