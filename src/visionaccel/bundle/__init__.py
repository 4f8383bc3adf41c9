"""Bundles: folders that state everything needed to run an encoder's programs rightly, or to refuse."""

from visionaccel.bundle.manifest import MANIFEST, SCHEMA_VERSION, Manifest
from visionaccel.bundle.opening import Bundle, is_bundle, open_bundle

__all__ = ["MANIFEST", "SCHEMA_VERSION", "Bundle", "Manifest", "is_bundle", "open_bundle"]
