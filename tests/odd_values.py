"""Copies of JSON content with one value replaced by each of many odd ones, or left out."""

import copy
import math
import random

ODD = [
    None, True, False, 0, 1, -1, 2**31, 10**6, 10**30, 0.5, 1e308, math.nan, -math.inf, "", "x", "../x", "\x1b[2Jx", "n" * 5000,
    [], [None], [[]], [-1], [10**6], [0] * 1000, {}, {"": None}, {"x": {"x": 1}},
]  # fmt: skip
LEFT_OUT = object()


def places(content, path=()):
    """Paths of all values in plain data, containers included; of a long list the first two."""
    yield path
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content[:2])
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(content, path, value):
    """`content` with `value` at `path`."""
    if not path:
        return value
    content = copy.deepcopy(content)
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is LEFT_OUT:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


def odd_copies(content, *, num=None, seed=0):
    """(place, odd value, the copy): all of them, or a sample of `num` that has each place."""
    every = [
        (path, value)
        for path in places(content)
        for value in [*ODD, LEFT_OUT]
        if path or value is not LEFT_OUT
    ]
    chosen = every
    if num is not None:
        rng = random.Random(seed)
        by_place = {}
        for path, value in every:
            by_place.setdefault(path, []).append((path, value))
        chosen = [rng.choice(found) for found in by_place.values()]
        chosen += rng.sample(every, max(0, min(num, len(every)) - len(chosen)))
    for path, value in chosen:
        yield ".".join(map(str, path)), value, replaced(content, path, value)
