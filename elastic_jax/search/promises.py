"""What the modes promise, and the divergence that stands for it until tasks have been measured."""

import math

PROMISES = {"L": 0.01, "M": 0.015, "S": 0.02}
"""Mode -> largest loss of quality: 1 - mean accuracy / mean accuracy of the original."""

_PERPLEXITY = {"L": 0.003, "M": 0.0075, "S": 0.013}
"""Mode -> how much perplexity may rise on text that the original wrote: well within the promise, since accuracy and
perplexity are not the same thing, and the more so the less a mode may lose."""


def largest_kl(mode: str) -> float:
    """Nats of KL, of each role, that a mode may have on held-out text.

    KL to the original on text that it wrote is the rise of log-perplexity there. An estimate: only tasks can certify a
    promise.
    """
    return math.log1p(_PERPLEXITY[mode])
