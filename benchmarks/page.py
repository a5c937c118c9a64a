"""A document as a page of HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any


def page(document: Mapping[str, Any]) -> str:
    """The page."""
    text = html.escape(json.dumps(document, indent=2))
    return f"<!doctype html>\n<title>{document['command']}</title>\n<pre>{text}</pre>\n"
