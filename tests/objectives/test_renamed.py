"""Names of the previous release still work, with a warning."""

import pytest

from tinyfusion_pl import distill, objectives


@pytest.mark.parametrize(
    ("package", "old", "new"),
    [
        (objectives, "PictureSampler", "ImageSampler"),
        (objectives, "labels_of", "get_labels"),
        (objectives, "noise_of", "sample_noise"),
        (distill, "intervals_of", "get_intervals"),
    ],
)
def test_a_former_name_warns_and_gives_the_new_object(package, old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated; use .*{new}"):
        assert getattr(package, old) is getattr(package, new)


@pytest.mark.parametrize("package", [objectives, distill])
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(package, "nothing")  # noqa: B009
