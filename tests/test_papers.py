"""What stands beside the code: links that work on a package index, and folders that git leaves alone."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_links_of_the_readme_work_where_only_the_readme_is() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    base = f"{config['metadata']['url']}/blob/main/"
    links = dict(re.findall(r"^\[([^]]+)\]: (\S+)$", README, re.MULTILINE))
    assert len(links) > 10
    text = re.sub(r"```.*?```|`[^`]*`", "", README, flags=re.DOTALL)
    assert set(re.findall(r"\[([^]]+)\](?!:)", text)) == set(links)
    assert "](" not in text
    for link in links.values():
        assert link.startswith(base), link
        assert (ROOT / link.removeprefix(base).partition("#")[0]).is_file(), link


@pytest.mark.parametrize("page", ["README.md", *sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("docs/*.md"))])
def test_git_leaves_alone_what_documented_commands_make(page: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    text = (ROOT / page).read_text()
    commands = re.findall(r"^(?:\$ )?(?:sslvit|python tools/\S+) .*", text, re.MULTILINE)
    options = r"(?:--out|--output|--write|--figure|--html|--csv|-o|-d|--target) ([\w./-]+)"
    made = {word for line in commands for word in re.findall(options, line)}
    made |= set(re.findall(r"(?:\b(?:out|output|write|figure)=|\.save\w*\()\"([\w./-]+)\"", text))
    made |= {line.split()[3] for line in commands if re.match(r"sslvit (export|import) \S+ [\w/]+", line)}
    made |= {line.split()[4] for line in commands if re.match(r"sslvit shards pack \S+ [\w/]+", line)}
    for path in made:
        done = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT)
        assert done.returncode == 0 or path.startswith("/"), f"{page}: {path}"
