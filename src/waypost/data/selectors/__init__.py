"""Selectors: which documents are worth training on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from waypost.data.selectors.cld import Cld


@dataclass(frozen=True)
class Losses:
    """What T models, in an order that means something (a run's checkpoints, oldest first), make of documents."""

    documents: NDArray[np.float64]
    """(T, M) nats a token of each document."""
    reference: NDArray[np.float64]
    """(T, D) of each domain's reference documents, which are in no training set: the mean over them."""


@dataclass(frozen=True)
class Documents:
    """The M documents to choose from."""

    num_tokens: NDArray[np.int64]
    """(M,) tokens of each."""
    domains: NDArray[np.int64]
    """(M,) the domain of each, 0 to D - 1: its source."""
    num_models: int
    """T of the losses, known before any is computed."""
    losses: Callable[[], Losses]
    """Computed when it is called, by models that a selector knows nothing of, and dear: M documents through T models."""


class Selector(Protocol):
    """Says what each document is worth; who calls it keeps the best of every domain, to a number of tokens.

    Changes nothing that it is given, keeps no state, draws nothing. Scores compare within a domain alone.
    Invariants: one finite number a document; documents in another order get the same scores; a selector that needs other
    models than `num_models` says so (ConfigError) before it asks for their losses.
    """

    def score(self, documents: Documents) -> NDArray[np.float64]: ...


SELECTORS: Mapping[str, type[Selector]] = {"cld": Cld}


def best(scores: NDArray[np.float64], documents: Documents, keep: float) -> NDArray[np.bool_]:
    """(M,) which documents stay: of each domain the best scores, until `keep` of its tokens are reached; at least one. Of
    equal scores the first is the better."""
    chosen = np.zeros(len(scores), dtype=np.bool_)
    for domain in np.unique(documents.domains):
        mine = np.flatnonzero(documents.domains == domain)
        ranked = mine[np.argsort(-scores[mine], kind="stable")]
        before = np.cumsum(documents.num_tokens[ranked]) - documents.num_tokens[ranked]
        chosen[ranked[before < keep * documents.num_tokens[mine].sum()]] = True
    return chosen
