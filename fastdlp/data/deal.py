"""How samples are dealt to clients, given their labels and a random stream."""

from __future__ import annotations

import numpy as np


def deal_dirichlet(rng: np.random.Generator, labels: np.ndarray, clients: int, beta: float) -> list[np.ndarray]:
    """Per class, shuffle its samples and cut them by the cumulated proportions; int64 [m] per client."""
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        samples = rng.permutation(np.flatnonzero(labels == label))
        shares = dirichlet_shares(rng, clients, beta)
        # Rounded, not rounded down, or the last client would get a sample of nearly every class.
        cuts = np.minimum(np.rint(np.cumsum(shares)[:-1] * len(samples)).astype(np.int64), len(samples))
        for part, piece in zip(parts, np.split(samples, cuts)):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def dirichlet_shares(rng: np.random.Generator, clients: int, beta: float) -> np.ndarray:
    """One draw of Dirichlet(beta, ..., beta): float64 [clients], sum 1, for every positive beta.

    Normalized gamma variates, as logarithms, because at a small beta the variates themselves all underflow
    and zero would be divided by zero. Below 1, Gamma(beta) = Gamma(beta + 1) U^(1/beta); its logarithm is
    compared after multiplication by beta, where it is finite: the limit is one client with everything.
    """
    if beta >= 1:
        logs = np.log(rng.standard_gamma(beta, clients))
        logs -= logs.max()
    else:
        scaled = beta * np.log(rng.standard_gamma(beta + 1, clients)) - rng.standard_exponential(clients)
        with np.errstate(over="ignore"):
            logs = (scaled - scaled.max()) / beta
    weights = np.exp(logs)
    return weights / weights.sum()


def deal_classes(rng: np.random.Generator, labels: np.ndarray, clients: int, hand: int) -> list[np.ndarray]:
    """`hand` classes to each client, a class's samples shared evenly by its holders; int64 [m] per client.

    Classes are dealt like cards: a fresh shuffled deck when one runs out, never a class twice to one client.
    So each class comes to as many clients as any other, give or take one.
    """
    classes = np.unique(labels)
    deck: list[int] = []
    holders: dict[int, list[int]] = {label: [] for label in classes.tolist()}
    for client in range(clients):
        for _ in range(hand):
            fresh = [label for label in deck if client not in holders[label]]
            if not fresh:
                deck += rng.permutation(classes).tolist()
                fresh = [label for label in deck if client not in holders[label]]
            deck.remove(fresh[0])
            holders[fresh[0]].append(client)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label, owners in holders.items():
        samples = rng.permutation(np.flatnonzero(labels == label))
        for client, piece in zip(owners, np.array_split(samples, len(owners))):
            parts[client].append(piece)
    return [np.concatenate(part) for part in parts]
