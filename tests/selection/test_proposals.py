"""Which structures are tried: the best by distance, and simple rules' choices, whatever their distance."""

from types import SimpleNamespace

import torch

from tinyfusion_pl.selection.problem import Choice
from tinyfusion_pl.selection.trials import propose


def row(*kept):
    structure = torch.zeros(6, dtype=torch.bool)
    structure[list(kept)] = True
    return structure


def proposals(distances, *, keep, extra=(), choice=(0, 1)):
    """What is proposed of the structures with these distances, as tuples of kept units."""

    def means(samples, structures):
        return torch.tensor(
            [distances[tuple(each.nonzero().flatten().tolist())] for each in structures]
        )

    problem = SimpleNamespace(structures=SimpleNamespace(means=means), fixed=None)
    considered = torch.stack([row(*kept) for kept in distances if kept not in (*extra, choice)])
    given = Choice(row(*choice), considered=considered)
    found = propose(
        problem, given, num_drawn=0, num_scored=20, keep=keep, extra=[row(*kept) for kept in extra]
    )
    return [tuple(each.nonzero().flatten().tolist()) for each in found]


DISTANCES = {
    (0, 1): 3.0,
    (0, 2): 1.0,
    (0, 3): 2.0,
    (1, 2): 4.0,
    (4, 5): 9.0,
    (3, 5): 8.0,
    (2, 5): 7.0,
}


def test_the_best_by_distance_come_first():
    assert proposals(DISTANCES, keep=3) == [(0, 2), (0, 3), (0, 1)]


def test_a_simple_rules_choice_is_tried_whatever_its_distance():
    assert proposals(DISTANCES, keep=4, extra=[(4, 5)]) == [(0, 2), (0, 3), (0, 1), (4, 5)]


def test_simple_rules_take_half_of_the_places_at_most():
    assert proposals(DISTANCES, keep=4, extra=[(4, 5), (3, 5), (2, 5)]) == [
        (0, 2),
        (0, 3),
        (2, 5),
        (3, 5),
    ]


def test_a_simple_rules_choice_that_is_among_the_best_is_tried_once():
    assert proposals(DISTANCES, keep=4, extra=[(0, 2)]) == [(0, 2), (0, 3), (0, 1), (1, 2)]
