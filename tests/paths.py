"""Where things are."""

from __future__ import annotations

from pathlib import Path

import wukong_async

ROOT = Path(wukong_async.__file__).parents[2]
