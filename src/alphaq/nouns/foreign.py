"""What others define: an object of JSON or TOML whose keys are not ours to list, such as a config.json."""

from __future__ import annotations

from typing import Any

JsonObject = dict[str, Any]
