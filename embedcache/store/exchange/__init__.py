"""Embeddings that other tools made, read into a store; and a store written out for other tools.

One module for each foreign format. What a module reads is looked over before it is believed: pickled objects, links to
other files and rows whose ids cannot be known are refused.
"""

from __future__ import annotations

from embedcache.store.exchange.exporting import EXPORT_KINDS, export_store
from embedcache.store.exchange.importing import IMPORT_KINDS, import_store

__all__ = ["EXPORT_KINDS", "IMPORT_KINDS", "export_store", "import_store"]
