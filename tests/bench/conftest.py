"""Makes the fakes beside this file importable (tests are imported by `importlib`, without a path)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
