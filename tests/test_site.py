"""The documentation site builds without a warning, holds every command and setting, and links to nothing missing."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sslvit.cli import COMMANDS
from sslvit.settings.describe import select_settings
from sslvit.settings.load import recipe_names

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    words = ["-E", "-W", "--keep-going", "-q", "-b", "html", "-d", str(out / "trees"), "docs", str(out / "html")]
    done = subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.mark.slow
def test_the_reference_is_read_off_the_code(site: Path) -> None:
    generated = site / "reference" / "generated"
    commands = (generated / "commands.html").read_text()
    assert all(f"sslvit {name}</" in html.unescape(commands) or f"sslvit {name}<a" in commands for name in COMMANDS)
    settings = html.unescape(re.sub(r"<[^>]+>", "", (generated / "settings.html").read_text()))
    assert all(key in settings for _, key, _, _ in select_settings(None))
    recipes = (generated / "recipes.html").read_text()
    assert all(name in recipes for name in recipe_names())
    functions = (site / "reference" / "python.html").read_text()
    for name in ("pretrain", "probe", "report", "load_encoder"):
        assert f'id="sslvit.{name}"' in functions


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    pages = {page: page.read_text() for page in site.rglob("*.html")}
    assert len(pages) > 25
    broken = []
    for page, text in pages.items():
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            if re.match(r"[a-z]+:|#|//", target):
                continue
            file, _, anchor = html.unescape(target).partition("#")
            found = (page.parent / file.partition("?")[0]).resolve() if file else page
            if not found.exists() or (anchor and found in pages and f'id="{anchor}"' not in pages[found]):
                broken.append((page.name, target))
    assert not broken


@pytest.mark.slow
def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not loaded, page
