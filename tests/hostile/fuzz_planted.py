"""Fuzzes a reader that raises what none may, to see that it is found."""

from hostile.fuzzing import fuzz
from hostile.planted import FILE, KINDS
from hostile.seeds import IMAGES

if __name__ == "__main__":
    fuzz(IMAGES, FILE, KINDS["foreign"].read, lambda _: [{FILE: b"go"}])
