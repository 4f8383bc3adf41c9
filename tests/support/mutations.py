"""Ways to spoil documents and bytes: strategies for the tests of broken bundles and of hostile input."""

import copy
import hashlib
import json

from hypothesis import strategies as st

from visionaccel.bundle import MANIFEST


def sealed(stated):
    """The document with a right digest; what is no object has none."""
    if not isinstance(stated, dict):
        return stated
    body = {name: value for name, value in stated.items() if name != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return {**body, "digest": "sha256:" + hashlib.sha256(text.encode()).hexdigest()}


ODD_NUMBERS = st.sampled_from([0, -1, 2, 2**31, 2**40, 2**53, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 1.0, -0.0])
ODD_TEXTS = st.sampled_from(
    [
        "", "\0", "\ud800", "..", "../x", "/etc/passwd", ".", "a\\b", "C:", MANIFEST, "x" * 300, "y" * 5000, "é",
        "sha256:" + "0" * 64, "float16", "fixed", "dynamic", "bucket", "raster", "checkpoint", "patches", "owner/name",
    ]
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), ODD_NUMBERS, ODD_TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
DEPTHS = st.sampled_from([1, 2, 50, 150, 190, 196, 197, 198, 199, 200, 250, 500])


def places(node):
    """Every value of a document, as its container and its key."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from places(value)


def nested(value, depth):
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def mutations(draw, original):
    """The document after one to three changes at any places of it."""
    root = {"": copy.deepcopy(original)}
    for _ in range(draw(st.integers(1, 3))):
        every = list(places(root))
        if not every:
            break

        def place(every=every):
            return every[draw(st.integers(0, len(every) - 1))]

        container, key = place()
        value = container[key]
        change = draw(st.sampled_from(["replace", "delete", "repeat", "swap", "copy", "add", "nudge", "nest"]))
        if change == "delete" and container is not root:
            del container[key]
        elif change == "repeat" and isinstance(container, list):
            container.insert(key, copy.deepcopy(value))
        elif change == "repeat":
            container[draw(st.text(max_size=5) | st.sampled_from(list(container)))] = copy.deepcopy(value)
        elif change in ("swap", "copy"):
            other, name = place()
            theirs, ours = copy.deepcopy(other[name]), copy.deepcopy(value)
            container[key] = theirs
            if change == "swap":
                other[name] = ours
        elif change == "add" and isinstance(value, dict):
            value[draw(st.text(max_size=5))] = draw(VALUES)
        elif change == "add" and isinstance(value, list):
            value.append(draw(VALUES))
        elif change == "nudge" and isinstance(value, int):
            container[key] = draw(st.sampled_from([value - 1, value + 1, value + 4, value * 2, value * 2**20, -value]))
        elif change == "nudge" and isinstance(value, str):
            cut = draw(st.integers(0, len(value)))
            ways = [value[:cut], value[cut:], value[:cut] + "\n" + value[cut:], value * 2]
            container[key] = draw(st.sampled_from(ways))
        elif change == "nest":
            container[key] = nested(value, draw(DEPTHS))
        else:
            container[key] = draw(VALUES)
    return root[""]


def damage(most):
    """Ways to damage some bytes: cut them, or overwrite, insert, repeat or remove a few."""
    place, few = st.integers(0, most), st.binary(min_size=1, max_size=4)
    return st.one_of(
        st.tuples(st.just("cut"), place, few),
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("overwrite"), place, few),
        st.tuples(st.just("insert"), place, few | st.sampled_from([b"[" * 2000, b'{"a":' * 2000, b"9" * 5000])),
        st.tuples(st.just("repeat"), place, st.integers(1, 200)),
        st.tuples(st.just("remove"), place, st.integers(1, 200)),
    )


def damaged(data, how, place, what):
    place %= max(1, len(data))
    if how == "flip" and not data:
        return data
    match how:
        case "cut":
            return data[:place]
        case "flip":
            return data[:place] + bytes([data[place] ^ 1 << what]) + data[place + 1 :]
        case "overwrite":
            return data[:place] + what + data[place + len(what) :]
        case "insert":
            return data[:place] + what + data[place:]
        case "repeat":
            return data[: place + what] + data[place:]
        case "remove":
            return data[:place] + data[place + what :]
