"""Pages of HTML: one file each that loads nothing from anywhere.

A stranger's texts are not to be trusted: everything that a template is given is escaped, and the page's content
security policy runs nothing even so. It names the digests of the page's own style and script, and lets no other in.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from embedcache.output import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: object) -> str:
    """A page as text.

    Args:
        template: a file's name in `report/templates`.
        values: what it shows, by name; one that it asks for and is not given is an error.
    """
    return _environment().get_template(template).render(values)


def write_page(path: Path, page: str) -> None:
    """Writes a page whole or not at all; its owner alone may read it, since it may show patients.

    Raises:
        OutputError: it could not be written; what stood at the path stays.
    """
    data = page.encode("utf-8", errors="replace")  # half a surrogate pair is shown as '?'
    write_whole(path, lambda temporary: temporary.write_bytes(data), mode=0o600)


def policy_source(text: str) -> str:
    """What a content security policy calls a style or a script of exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("embedcache.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["policy_source"] = policy_source
    return environment
