"""Metrics of generated images: FID, sFID, Inception score, precision, recall, accuracy, KID."""

from tinyfusion_pl.metrics import functional
from tinyfusion_pl.metrics.accuracy import LabelAccuracy
from tinyfusion_pl.metrics.base import FeatureMetric
from tinyfusion_pl.metrics.cifar import load_cifar_resnet
from tinyfusion_pl.metrics.digits import DigitsClassifier, load_digits_classifier
from tinyfusion_pl.metrics.features import FeatureNetwork, Features
from tinyfusion_pl.metrics.frechet import FrechetDistance
from tinyfusion_pl.metrics.generation import GenerationMetrics
from tinyfusion_pl.metrics.inception import InceptionFeatures
from tinyfusion_pl.metrics.inception_score import InceptionScore
from tinyfusion_pl.metrics.kernel import GaussianMMD, KernelInceptionDistance
from tinyfusion_pl.metrics.networks import ModuleFeatures, TimmFeatures
from tinyfusion_pl.metrics.precision_recall import PrecisionRecall
from tinyfusion_pl.metrics.reference import Reference, read_reference

__all__ = [
    "DigitsClassifier",
    "FeatureMetric",
    "FeatureNetwork",
    "Features",
    "FrechetDistance",
    "GaussianMMD",
    "GenerationMetrics",
    "InceptionFeatures",
    "InceptionScore",
    "KernelInceptionDistance",
    "LabelAccuracy",
    "ModuleFeatures",
    "PrecisionRecall",
    "Reference",
    "TimmFeatures",
    "functional",
    "load_cifar_resnet",
    "load_digits_classifier",
    "read_reference",
]
