"""Print the oldest versions that setup.cfg allows of all that sslvit needs, as constraints for pip.

    python tools/oldest_pins.py > constraints.txt

Extras are left out: they are tested as pip finds them beside these.
"""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path


def oldest_pins(setup_cfg: Path) -> list[tuple[str, str]]:
    """Name and lower bound of each requirement that has one."""
    config = ConfigParser()
    config.read(setup_cfg)
    return re.findall(r"^([\w-]+)>=([\w.]+)", config["options"]["install_requires"], re.MULTILINE)


if __name__ == "__main__":
    for name, version in oldest_pins(Path(__file__).parents[1] / "setup.cfg"):
        print(f"{name}=={version}")
