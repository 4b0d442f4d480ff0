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
    commands = re.findall(r"^(?:\$ )?sslvit (?:pretrain|finetune|export|import|shards pack|palette|sample|embed)\b.*",
                          (ROOT / page).read_text(), re.MULTILINE)  # fmt: skip
    made = {word for line in commands for word in re.findall(r"(?:--out|-o) ([\w./-]+)", line)}
    made |= {line.split()[3] for line in commands if re.match(r"sslvit (export|import) \S+ [\w/]+", line)}
    made |= {line.split()[4] for line in commands if re.match(r"sslvit shards pack \S+ [\w/]+", line)}
    for path in made:
        done = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT)
        assert done.returncode == 0 or path.startswith("/"), f"{page}: {path}"
