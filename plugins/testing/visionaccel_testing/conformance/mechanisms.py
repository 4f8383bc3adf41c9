"""Level 2, on towers of every family: a backend computes each mechanism that a tower is described with.

The other checks use one tower, because what they find does not depend on the mathematics. A family's tower in
`TINY_TOWERS` has every mechanism of its released ones: kinds of norms, activations and biases, learned positions and
how they are interpolated, the merger, deepstack levels and their order, windows, frames in a patch, and how attention
weights are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from visionaccel.errors import BackendUnavailableError, ConfigurationError
from visionaccel_testing.checkpoints import TINY_TOWERS
from visionaccel_testing.conformance.check import Check, NotApplicableError
from visionaccel_testing.conformance.kit import Kit, encoded, grids_of, listed, patches_for


@contextmanager
def _not_applicable_for(family: str, refusal: type[ConfigurationError]) -> Iterator[None]:
    """Turn a refusal of a family's tower into its reason why the check does not apply."""
    try:
        yield
    except refusal as error:
        raise NotApplicableError(f"it does not accept a tower of family {family}: {error.message}") from error


def _tower(family: str, kit: Kit) -> None:
    """Compare a tower of a family with the reference, on calls that show faults in frames, windows and neighbours."""
    with _not_applicable_for(family, ConfigurationError):
        subject = kit.subject_of(f"tower-{family}", family=family)
    with _not_applicable_for(family, BackendUnavailableError):
        encoder = subject.open()
    with encoder:
        exact = kit.reference_of(subject.checkpoint)
        for grids in grids_of(encoder):
            patches = patches_for(grids, kit.seed, encoder.tower.patch_width)
            found, wanted = encoded(encoder, patches, grids), kit.expected(patches, grids, exact)
            kit.compare(found, wanted, f"a tower of family {family}, grids {listed(grids)}", encoder)


MECHANISMS = tuple(
    Check(
        level=2,
        name=f"L2-tower-{family}",
        title=f"Every token of a tower of family `{family}` is as close to the reference as its precision promises",
        run=partial(_tower, family),
    )
    for family in TINY_TOWERS
)
"""A check for each family."""
