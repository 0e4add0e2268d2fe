"""Oracles of explained variance: scikit-learn's PCA, and the eigenvalues of the Gram matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg

from refimpl.registry import oracle
from tests.oracles import library


def _paired(blocks: Any, pairing: str) -> Any:
    joined = np.concatenate(blocks, axis=1 if pairing == "columns" else 0)
    if 0 in joined.shape:
        raise NotImplementedError("no entries")
    return joined


@oracle("transformer.redundancy")
def sklearn_pca(*blocks: Any, method: str = "pca", pairing: str = "columns") -> Any:
    """The ratios of a fitted `PCA`, which centers; in full."""
    x = _paired(blocks, pairing)
    if method == "svd" or len(x) < 2 or np.ptp(x, axis=0).max() == 0:
        raise NotImplementedError("sklearn centers, and wants two rows that differ")
    model = library("sklearn.decomposition").PCA(svd_solver="full").fit(x)
    return np.concatenate([[0.0], np.cumsum(model.explained_variance_ratio_)])


@oracle("transformer.redundancy")
def eigenvalues_of_the_gram_matrix(*blocks: Any, method: str = "pca", pairing: str = "columns") -> Any:
    """Eigenvalues of ``XᵀX``, of the covariance for "pca", largest first; numpy.cov centers."""
    x = _paired(blocks, pairing)
    if method == "pca" and (len(x) < 2 or np.ptp(x, axis=0).max() == 0):
        raise NotImplementedError("nothing varies")
    gram = np.atleast_2d(np.cov(x.T)) if method == "pca" else x.T @ x
    values = scipy.linalg.eigvalsh(gram)[::-1][: min(x.shape)]
    return np.concatenate([[0.0], np.cumsum(values) / np.trace(gram)])
