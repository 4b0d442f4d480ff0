"""Optional dependencies: what needs one that is not installed says so in a line, with the extra to install."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import sslvit
from sslvit.checkpoint import save_encoder
from sslvit.cli import main
from sslvit.environment import limited_steps, require_packages, typed_command
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("timm", "timm", "export encoder out --format timm"),
        ("timm", "timm", "demo --out out"),
        ("timm", "timm", "export timm:vit_tiny_patch16_224 out --format safetensors"),
        ("transformers", "transformers", "export encoder out --format transformers"),
        ("onnx", "onnx", "export encoder out --format onnx"),
        ("onnxscript", "onnx", "export encoder out --format onnx"),
        ("onnxruntime", "onnx", "export encoder out --format onnx"),
    ],
)
def test_what_needs_a_missing_package_names_the_extra(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    package: str,
    extra: str,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_encoder(ViTEncoder(EncoderSettings(image_size=8, patch=4, width=16, depth=1, heads=2)), "encoder")
    monkeypatch.setitem(sys.modules, package, None)
    assert main(command.split()) == 1
    message = capsys.readouterr().err.strip()
    assert re.fullmatch(
        rf"sslvit: error: .+: {package} is not installed. Run: pip install 'sslvit\[{extra}\]'", message
    )
    assert not Path("out").exists()


def test_a_package_that_is_too_old_is_refused_with_the_version_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    (needed,) = (line for line in metadata.requires("sslvit") if line.startswith("timm"))
    least = needed.partition(">=")[2].partition(";")[0].strip()
    require_packages("--format timm", "sslvit[timm]", "timm", "huggingface_hub")  # the last is not among them
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0.9" if name == "timm" else version(name))
    said = f"--format timm: needs timm>={least}, but 1.0.9 is installed. Run: pip install --upgrade 'sslvit[timm]'"
    with pytest.raises(ImportError, match=re.escape(said)):
        require_packages("--format timm", "sslvit[timm]", "timm")


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("/home/me/.venv/bin/sslvit", "sslvit"),
        (str(Path(sslvit.__file__).parent / "__main__.py"), "sslvit"),
        (str(Path(sslvit.__file__).parent / "cli.py"), "sslvit"),
        ("/home/me/sslvit/train.py", "/home/me/sslvit/train.py"),  # a script of somebody's own
    ],
)
def test_a_command_is_recorded_as_it_was_typed(program: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "pretrain", "--out", "my runs"])
    assert typed_command() == f"{name} pretrain --out 'my runs'"


def test_an_environment_variable_shortens_runs_and_heads_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert limited_steps(500, "this run") == 500
    monkeypatch.setenv("SSLVIT_MAX_STEPS", "3")
    assert limited_steps(2, "this run") == 2
    assert not capsys.readouterr().out
    assert limited_steps(5000, "this run") == 3
    assert capsys.readouterr().out == "warning: SSLVIT_MAX_STEPS=3: this run takes 3 steps instead of 5,000\n"
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("SSLVIT_MAX_STEPS", wrong)
        with pytest.raises(ValueError, match=f"SSLVIT_MAX_STEPS={wrong}: expected a number of steps"):
            limited_steps(2, "this run")


FAULTS = """
import resource
import sys

import pytorch_lightning as pl
import torch

from sslvit.run_plan import RunPlan
from sslvit.settings.load import load_recipe
from sslvit.tasks import make_task


class Faults(pl.Callback):
    def on_train_start(self, *_):
        faults = []
        for _ in range(4):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            tensors = [torch.ones(2**24) for _ in range(3)]  # 64 MiB each
            del tensors
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(faults[0], faults[-1])


settings = load_recipe("mae/digits", {"data.global_batch_size": 2, "train.steps": 1})
task = make_task(settings, RunPlan(1, 1, 2))
images = torch.zeros(2, 1, 14, 14)
trainer = pl.Trainer(
    accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[Faults()],
)
trainer.fit(task, torch.utils.data.DataLoader([(images, torch.zeros(2))], batch_size=None))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back that early")
def test_memory_that_a_step_frees_on_a_cpu_is_not_asked_for_anew_by_the_next_one() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    first, last = map(int, done.stdout.splitlines()[-1].split())
    assert first > 50  # 192 MiB, in pages of 4 KiB or of 2 MiB
    assert last < first / 10  # the second may ask for one more tensor, if something small lies between the first ones
