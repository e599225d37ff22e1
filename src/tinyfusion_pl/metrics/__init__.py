"""Quality of generated pictures: FID, Inception score and accuracy over a feature network of one's choice."""

from tinyfusion_pl.metrics.digits import DigitsClassifier, load_digits_classifier
from tinyfusion_pl.metrics.features import FeatureNetwork, Features
from tinyfusion_pl.metrics.generation import GenerationMetrics
from tinyfusion_pl.metrics.inception import InceptionFeatures

__all__ = [
    "DigitsClassifier",
    "FeatureNetwork",
    "Features",
    "GenerationMetrics",
    "InceptionFeatures",
    "load_digits_classifier",
]
