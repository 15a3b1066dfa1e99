"""Random labels with probabilities that are better than chance."""

import numpy as np


def two_labels(n=150, seed=0, digits=None):
    """Return truth `(N,)` and probabilities of label 1 `(N,)`; few digits give many ties."""
    random = np.random.default_rng(seed)
    truth = random.integers(2, size=n)
    p = 1 / (1 + np.exp(-random.normal(1.2 * truth - 0.4, 1.3)))
    return truth, p if digits is None else np.round(p, digits)


def three_labels(n=150, seed=0):
    """Return truth `(N,)` and probabilities `(N, 3)`."""
    random = np.random.default_rng(seed)
    truth = random.integers(3, size=n)
    p = random.dirichlet(np.ones(3), n) + 0.5 * np.eye(3)[truth]
    return truth, p / p.sum(axis=1, keepdims=True)


def two_models(n=120, seed=0, labels=2, better=1.0):
    """Return truth `(N,)` and the probabilities `(N, K)` of two models; the first is better than the second."""
    random = np.random.default_rng(seed)
    truth = random.integers(labels, size=n)
    shared = random.normal(0, 1, (n, labels))
    both = []
    for skill in (0.4 + better, 0.4):
        logits = skill * np.eye(labels)[truth] + shared + random.normal(0, 0.7, (n, labels))
        both.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    return truth, *both
