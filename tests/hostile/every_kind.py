"""All kinds of hostile input, by name."""

from hostile import bundle_kinds, image_kinds, model_kinds
from hostile.kinds import Kind

KINDS: dict[str, Kind] = {kind.name: kind for kind in (*image_kinds.KINDS, *bundle_kinds.KINDS, *model_kinds.KINDS)}
