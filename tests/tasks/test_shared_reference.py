"""Features of the reference images are computed once."""

import pytest
import torch

from tinyfusion_pl.metrics import GenerationMetrics, Reference, load_digits_classifier
from tinyfusion_pl.tasks.shared_reference import set_shared_reference


def images(num, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num, 1, 8, 8), generator=generator, dtype=torch.uint8)


def results(folder, *, real, made_from=None, **share):
    metrics, num_calls = GenerationMetrics(load_digits_classifier()), []
    network = metrics.feature_network
    network.register_forward_hook(lambda *_: num_calls.append(1))
    reference = Reference(path=folder, images=real, num_images=len(real))
    options = {"rank": 0, "world_size": 1, "batch_size": 16} | share
    set_shared_reference(metrics, reference, folder, made_from or {"reference": "r"}, **options)
    calls = len(num_calls)
    metrics.update(images(40, seed=1), torch.arange(40) % 10)
    return metrics.compute(), calls


def test_results_with_kept_features_are_bit_equal(tmp_path):
    real = images(50, seed=0)
    (first, computed), (again, reused) = (results(tmp_path, real=real) for _ in range(2))
    assert computed == 4 and reused == 0
    assert again == first == results(None, real=real)[0]


@pytest.mark.parametrize("other", [{"made_from": {"reference": "s"}}, {"batch_size": 8}])
def test_features_of_something_else_are_not_taken(tmp_path, other):
    results(tmp_path, real=images(50, seed=0))
    real = images(50, seed=2)
    assert results(tmp_path, real=real, **other)[0] == results(None, real=real, **other)[0]


def test_damaged_features_are_computed_again(tmp_path, capfd):
    real = images(50, seed=0)
    wanted = results(tmp_path, real=real)[0]
    (file,) = tmp_path.glob("reference_*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert results(tmp_path, real=real) == (wanted, 4)
    assert "damaged" in capfd.readouterr().out
