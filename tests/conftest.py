"""Shapes in signatures are checked while the tests run, and caches are not the user's."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("hub_fixtures", "wheel_fixtures")
# every file whose signatures name shapes
SHAPED = ["data.pixels", "evaluate", "exporters.exported", "models", "optim.muon", "palette", "tasks"]
install_import_hook([f"sslvit.{name}" for name in SHAPED], "beartype.beartype")

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sslvit-tests-")  # of other processes that tests start, too
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], True)
