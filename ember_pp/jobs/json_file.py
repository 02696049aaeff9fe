"""What a job leaves behind as JSON: a file that is there is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ember_pp.errors import ConfigError


def write_json(key: str, path: Path, plain: Mapping[str, Any]) -> None:
    """Write ``plain``; the folder must be there.

    Args:
        key: the setting that named the file.
        path: replaced if it is there.
        plain: what JSON has types for.

    Raises:
        ConfigError: it cannot be written; names ``key``.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}") from None
