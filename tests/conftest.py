"""Shapes in signatures are checked while the tests run."""

from __future__ import annotations

import sys
from pathlib import Path

from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
install_import_hook(["sslvit.models", "sslvit.tasks", "sslvit.palette", "sslvit.evaluate"], "beartype.beartype")
