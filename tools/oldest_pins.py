"""Print the oldest version of every package that setup.cfg allows, as constraints for pip: python tools/oldest_pins.py

Packages of the extras `docs` and `test` are left out: they are tools, and nothing that users install.
"""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

TOOLS = ("docs", "test", "all", "mlflow")  # extras


def oldest_pins(setup_cfg: Path) -> list[tuple[str, str]]:
    """Name and lower bound of each requirement that has one."""
    config = ConfigParser()
    config.read(setup_cfg)
    groups = [config["options"]["install_requires"]]
    groups += [text for name, text in config["options.extras_require"].items() if name not in TOOLS]
    return re.findall(r"^([\w-]+)>=([\w.]+)", "\n".join(groups), re.MULTILINE)


if __name__ == "__main__":
    for name, version in oldest_pins(Path(__file__).parents[1] / "setup.cfg"):
        print(f"{name}=={version}")
