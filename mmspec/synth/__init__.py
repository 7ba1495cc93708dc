"""The synthetic corpus: images of shapes, signs and charts with questions and answers in MMSpec's six topics.

    sample("test", 0)           one Sample, made on the spot
    materialise("testmini")     a folder in MMSpec's layout, cached
    check(fact, answer)         whether an answer contains what it must

Every sample is a pure function of (split, index). Splits share no scene.
"""

from mmspec.synth.corpus import CORPUS_VERSION, SPLITS, Fact, Sample, check, sample, scene_of
from mmspec.synth.lexicon import TOPICS
from mmspec.synth.store import cache_folder, materialise

__all__ = [
    "CORPUS_VERSION",
    "SPLITS",
    "TOPICS",
    "Fact",
    "Sample",
    "cache_folder",
    "check",
    "materialise",
    "sample",
    "scene_of",
]
