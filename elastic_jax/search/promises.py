"""What the modes promise, and the divergence that stands for it until tasks have been measured."""

import math

PROMISES = {"L": 0.01, "M": 0.015, "S": 0.02}
"""Mode -> largest loss of quality: 1 - mean accuracy / mean accuracy of the original."""

_SHARE = 0.5
"""Part of a promise that a plan may use up by estimate: accuracy and perplexity are not the same thing."""


def largest_kl(mode: str) -> float:
    """Nats of KL, of each role, that a mode may have on held-out text.

    KL to the original on text that it wrote is the rise of log-perplexity there; half of the promise is taken as the
    limit of that rise. An estimate: only tasks can certify a promise.
    """
    return math.log1p(_SHARE * PROMISES[mode])
