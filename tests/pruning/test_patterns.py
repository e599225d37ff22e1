import itertools

import pytest
import torch
from omegaconf import OmegaConf

from tinyfusion_pl.pruning import Pattern


@pytest.mark.parametrize(
    "pattern, depth, expected",
    [
        ("1:2", 6, [(0, 1, 2), (2, 1, 2), (4, 1, 2)]),
        ("2:4", 4, [(0, 2, 4)]),
        ("7:14", 28, [(0, 7, 14), (14, 7, 14)]),
        ("3:4+3:4+2:4", 12, [(0, 3, 4), (4, 3, 4), (8, 2, 4)]),
        ("1:1+1:3", 8, [(0, 1, 1), (1, 1, 3), (4, 1, 1), (5, 1, 3)]),
    ],
)
def test_groups_repeat_to_the_depth(pattern, depth, expected):
    assert [
        (g.start, g.num_kept, g.num_blocks) for g in Pattern.parse(pattern).groups(depth)
    ] == expected


def test_the_published_pattern_of_nineteen_layers_keeps_nineteen():
    assert Pattern.parse("3:4+3:4+2:4+3:4+2:4+3:4+3:4").num_kept(28) == 19


@pytest.mark.parametrize("pattern, count", [("1:2", 2), ("2:4", 6), ("1:4", 4), ("7:14", 3432)])
def test_all_candidates_are_enumerated_in_lexicographic_order(pattern, count):
    (group,) = Pattern.parse(pattern).groups(Pattern.parse(pattern).span)
    candidates = group.candidates()
    assert candidates.shape == (count, group.num_blocks)
    expected = list(itertools.combinations(range(group.num_blocks), group.num_kept))
    assert [tuple(row.nonzero().flatten().tolist()) for row in candidates] == expected


@pytest.mark.parametrize("number", [62, 124, 434, 1.5])
def test_a_number_is_refused_with_the_reason(number):
    with pytest.raises(ValueError, match="YAML reads an unquoted 1:2 as the number 62"):
        Pattern.parse(number)


def test_the_reason_is_true():
    assert OmegaConf.create("pattern: 1:2").pattern == 62
    assert OmegaConf.create("pattern: 7:14").pattern == 434
    assert OmegaConf.create('pattern: "1:2"').pattern == "1:2"


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("5:4", "keeps 5 of 4 blocks. Give N:M with 1 <= N <= M"),
        ("0:4", "keeps 0 of 4"),
        ("2:4,1:2", "not of the form"),
        ("half", "not of the form"),
        ("", "not of the form"),
        (None, "not NoneType"),
        ("10:20", "184756 candidates.*Use smaller groups, e.g. '5:10\\+5:10'"),
    ],
)
def test_bad_patterns_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        Pattern.parse(pattern)


@pytest.mark.parametrize("pattern", ["9:18", "10:20", "14:28", "20:24"])
def test_what_is_offered_instead_of_too_many_candidates_is_a_pattern_that_parses_and_fits(pattern):
    try:
        Pattern.parse(pattern)
    except ValueError as error:
        offered = Pattern.parse(str(error).split("e.g. '")[1].split("'")[0])
        kept, blocks = map(int, pattern.split(":"))
        assert offered.span == blocks and offered.num_kept(blocks) == kept


def test_a_pattern_that_does_not_divide_the_depth_names_those_that_do():
    with pytest.raises(
        ValueError, match=r"covers 5 blocks, which does not divide the depth 12.*\[2, 3, 4, 6, 12\]"
    ):
        Pattern.parse("2:5").groups(12)


def test_str_gives_the_pattern_back():
    assert str(Pattern.parse(" 1:2 + 2:4 ")) == "1:2+2:4"
    assert Pattern.parse(Pattern.parse("1:2")) == Pattern.parse("1:2")


def test_candidates_are_float():
    assert Pattern.parse("1:2").groups(2)[0].candidates().dtype == torch.float32
