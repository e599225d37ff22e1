"""How good generated pictures are: Fréchet distance and Inception score over one feature network, and label accuracy.

FID: M. Heusel et al., GANs Trained by a Two Time-Scale Update Rule..., NeurIPS 2017, eq. (6). IS: T. Salimans et al.,
Improved Techniques for Training GANs, NeurIPS 2016, section 4. Both are torchmetrics'.
"""

import warnings

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.utilities.distributed import gather_all_tensors

from tinyfusion_pl.metrics.features import FeatureNetwork, Features, check_pictures


class GenerationMetrics(nn.Module):
    """FID, Inception score and accuracy of pictures, from one run of the feature network a batch.

    Statistics are kept in float64 and added up over all processes when `compute` is called, which every process must
    do; each process gives its own share of the pictures, of the reference too. Results depend on the pictures alone,
    neither on their batches nor on any random generator.

    Args:
        feature_network: Gives features and logits; frozen here, and kept in evaluation mode and full precision.
        num_splits: Parts, in shuffled order, over which the Inception score is averaged. 1: one score over all
            pictures. Published scores of 50,000 pictures use 10 splits, which bias it low where pictures are few.

    Example:
        >>> from tinyfusion_pl.data import DigitsDataModule
        >>> from tinyfusion_pl.metrics import GenerationMetrics, load_digits_classifier
        >>> pictures, labels = DigitsDataModule().reference_pictures()
        >>> metrics = GenerationMetrics(load_digits_classifier())
        >>> metrics.update_reference(pictures[:900])
        >>> metrics.update(pictures[900:], labels[900:])
        >>> {name: round(value, 1) for name, value in metrics.compute().items()}
        {'fid': 6.0, 'inception_score': 9.9, 'accuracy': 1.0}
    """

    def __init__(self, feature_network: FeatureNetwork, *, num_splits: int = 1) -> None:
        super().__init__()
        if num_splits < 1:
            raise ValueError(f"num_splits is {num_splits}. Give 1 or more.")
        self.feature_network = feature_network
        given = _Given(feature_network.num_features)
        self.fid = FrechetInceptionDistance(given, reset_real_features=False)  # sums in float64 by itself
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*InceptionScore.*buffer")  # ten or a thousand logits a picture
            self.inception_score = InceptionScore(given, splits=num_splits)
        self.accuracy = MeanMetric().set_dtype(torch.float64)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "GenerationMetrics":
        """Stays in evaluation mode, also as a part of a module that trains."""
        return super().train(False)

    def update_reference(self, pictures: Tensor) -> None:
        """Add real pictures, uint8 (N, C, H, W), to what generated ones are held against."""
        self.fid.update(self._features(pictures).features, real=True)

    def update(self, pictures: Tensor, labels: Tensor | None = None) -> None:
        """Add generated pictures, uint8 (N, C, H, W), and the classes (N,) they were asked to be.

        Leave `labels` out where the network's logits are not the classes of the data: there is no accuracy then.
        """
        features, logits = self._features(pictures)
        if labels is not None:
            labels = labels.to(logits.device)
            _check_labels(labels, logits)
            self.accuracy.update((logits.argmax(dim=1) == labels).double())
        self.fid.update(features, real=False)
        self.inception_score.update(logits)

    def compute(self) -> dict[str, float]:
        """`fid` (0 is best), `inception_score` (1 to the number of classes) and, given labels, `accuracy` (0 to 1)."""
        num_labelled = self._checked_counts()
        scores = self.inception_score
        if len(scores.features) > 1:  # one tensor a process: processes may have had different numbers of batches
            scores.features = [torch.cat(scores.features)]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"std\(\)")  # over one split; it is not given here
            torch.default_generator.manual_seed(0)  # the score shuffles
            results = {"fid": self.fid.compute().item(), "inception_score": scores.compute()[0].item()}
        if num_labelled:
            results["accuracy"] = self.accuracy.compute().item()
        return results

    def reset(self, *, reference: bool = False) -> None:
        """Forget the generated pictures, and with `reference` the real ones too."""
        self.fid.reset_real_features = reference
        for metric in (self.fid, self.inception_score, self.accuracy):
            metric.reset()

    @torch.no_grad()
    def _features(self, pictures: Tensor) -> Features:
        check_pictures(pictures)
        pictures = pictures.to(self.fid.device)
        with torch.autocast(pictures.device.type, enabled=False):
            features, logits = self.feature_network(pictures)
        return Features(features.double(), logits.double())

    def _checked_counts(self) -> int:
        """How many pictures of all processes have labels; `ValueError`, on each process alike, where pictures lack."""
        fid = self.fid
        counts = [fid.real_features_num_samples, fid.fake_features_num_samples, self.accuracy.weight.long()]
        counts = torch.stack(counts)  # (3,)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            counts = torch.stack(gather_all_tensors(counts)).sum(dim=0)
        num_real, num_generated, num_labelled = counts.tolist()
        needs = ("reference", num_real, "update_reference"), ("generated", num_generated, "update")
        for kind, num, method in needs:
            if num < 2:
                raise ValueError(
                    f"A Fréchet distance needs 2 or more {kind} pictures and has {num}: call {method}(pictures) first."
                )
        if num_labelled not in (0, num_generated):
            raise ValueError(
                f"{num_labelled} of {num_generated} generated pictures have labels. Give labels with all or with none."
            )
        return num_labelled


class _Given(nn.Module):
    """A torchmetrics feature extractor that is given the features themselves."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    num, num_classes = logits.shape
    if labels.shape != (num,):
        raise ValueError(f"{num} pictures need labels of shape ({num},); these are {tuple(labels.shape)}.")
    if num and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"Labels go from {labels.min()} to {labels.max()}, but the feature network names classes 0 to "
            f"{num_classes - 1}. Where its classes are not those of the data, leave the labels out."
        )
