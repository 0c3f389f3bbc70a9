"""The federated split of one data set: which client holds which samples, and for what.

Every sample is assigned to exactly one client, and within a client to training or test. `hold_out` then moves training
samples to validation, and `keep_shots` drops training samples. A partition has random streams of its own, so that it
depends on its arguments alone. `fastdlp.data.partition_file` writes it as sample ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError

SCHEMES = ("dirichlet", "iid", "pathological")
_MAX_DRAWS = 100
_VALIDATION, _SHOTS = 1, 2  # random streams of a partition seed; draws of the split itself are [seed, draw]


@dataclass(frozen=True, eq=False)
class Partition:
    """A federated split.

    Attributes:
        train, test: per client, int64 sample indices in ascending order.
        scheme: one of SCHEMES, or the one that a file names.
        beta: concentration of the Dirichlet distribution; None in other schemes.
        classes_per_client: of "pathological"; None in other schemes.
        seed: of the random streams.
        draws: number of splits drawn; more than 1 only with `empty_clients="redraw"`.
        test_fraction: fraction of each client's samples that is test.
        dataset, fingerprint: of the data; "" if not given.
        val: as train and test; [] without validation.
    """

    train: list[np.ndarray]
    test: list[np.ndarray]
    scheme: str
    beta: float | None
    classes_per_client: int | None
    seed: int
    test_fraction: float
    draws: int = 1
    dataset: str = ""
    fingerprint: str = ""
    val: list[np.ndarray] = field(default_factory=list)

    @property
    def clients(self) -> int:
        """Number of clients, empty ones included."""
        return len(self.train)

    @property
    def empty(self) -> list[int]:
        """The clients without a training sample, which are left out of training."""
        return [client for client, samples in enumerate(self.train) if not len(samples)]


def make_partition(labels: np.ndarray, config: TrainConfig, dataset: str = "", fingerprint: str = "") -> Partition:
    """Assign the samples to clients, then split those of each client into training and test.

    Schemes: "dirichlet": per class, the clients' proportions ~ Dirichlet(beta), small is uneven; "iid": at random,
    sizes that differ by one at most; "pathological": classes_per_client classes each, a class split evenly among its
    clients. The fraction of test samples is rounded down, at least one of two or more samples, none of one sample.

    Args:
        labels: int [n], the class of each sample.
        config: its `PARTITION_OPTIONS`, with one of SCHEMES as partition. Equal options give equal partitions. With
            `empty_clients` "redraw" at most 100 splits are drawn.
        dataset, fingerprint: of the data, recorded in the partition.

    Raises:
        FastdlpError: more clients or classes than there are, or empty clients that `empty_clients` does not allow.
    """
    scheme, clients = config.partition, config.clients
    _check_sizes(labels, config)
    for draw in range(_MAX_DRAWS):
        rng = _generator(config.partition_seed, draw)
        if scheme == "dirichlet":
            parts = _assign_dirichlet(rng, labels, clients, config.beta)
        elif scheme == "iid":
            parts = np.array_split(rng.permutation(len(labels)), clients)
        else:
            parts = _assign_classes(rng, labels, clients, config.classes_per_client)
        splits = [_split(rng, part, config.test_fraction) for part in parts]
        partition = Partition(
            train=[train for train, _ in splits],
            test=[test for _, test in splits],
            scheme=scheme,
            beta=float(config.beta) if scheme == "dirichlet" else None,
            classes_per_client=config.classes_per_client if scheme == "pathological" else None,
            seed=config.partition_seed,
            test_fraction=config.test_fraction,
            draws=draw + 1,
            dataset=dataset,
            fingerprint=fingerprint,
        )
        if not partition.empty or config.empty_clients == "keep":
            return partition
        if config.empty_clients == "refuse":
            raise FastdlpError(
                f"clients without a training sample: {', '.join(map(str, partition.empty))}; use fewer clients, a "
                "larger beta or another seed, or keep or redraw empty clients"
            )
    raise FastdlpError(
        f"each of {_MAX_DRAWS} draws left a client without a training sample: use fewer clients or a larger "
        "beta, or keep empty clients"
    )


def counts(partition: Partition, labels: np.ndarray, classes: int | None = None) -> np.ndarray:
    """Samples per client and class: int64 [clients, classes, 2]; last axis: training (with validation) and test.

    `labels` is int [n]; `classes` defaults to the largest label plus one.
    """
    labels = np.asarray(labels)
    classes = classes if classes is not None else int(labels.max()) + 1
    train = [np.concatenate(both) for both in zip(partition.train, partition.val)] or partition.train
    sides = [[np.bincount(labels[samples], minlength=classes) for samples in side] for side in (train, partition.test)]
    return np.stack([np.stack(side) for side in sides], axis=-1).astype(np.int64)


def hold_out(partition: Partition, fraction: float) -> Partition:
    """Move a fraction of each client's training samples to validation, rounded down, at least one of two or more.

    Raises:
        FastdlpError: the partition has validation samples already.
    """
    if partition.val:
        raise FastdlpError("the partition file names validation samples: leave out --val-fraction")
    splits = [
        _split(_generator(partition.seed, _VALIDATION, client, 2**20), samples, fraction)
        for client, samples in enumerate(partition.train)
    ]
    return replace(partition, train=[train for train, _ in splits], val=[val for _, val in splits])


def keep_shots(partition: Partition, labels: np.ndarray, shots: int) -> Partition:
    """Keep `shots` training samples of each class, drawn from those of all clients; all of them where there are fewer.

    A client keeps those of its samples that are drawn, so the skew between clients stays and some may hold none.
    `labels` is int [n].
    """
    pool = np.concatenate(partition.train)
    kept = []
    for label in np.unique(labels[pool]):
        samples = np.sort(pool[labels[pool] == label])
        kept.append(_generator(partition.seed, _SHOTS, int(label), 2**20).permutation(samples)[:shots])
    drawn = np.concatenate(kept)
    return replace(partition, train=[samples[np.isin(samples, drawn)] for samples in partition.train])


def _assign_dirichlet(rng: np.random.Generator, labels: np.ndarray, clients: int, beta: float) -> list[np.ndarray]:
    """Shuffle the samples of each class and split them by Dirichlet proportions; int64 [m] per client."""
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        samples = rng.permutation(np.flatnonzero(labels == label))
        proportions = dirichlet_proportions(rng, clients, beta)
        # Rounded, not rounded down, or the last client would get a sample of nearly every class.
        cuts = np.minimum(np.rint(np.cumsum(proportions)[:-1] * len(samples)).astype(np.int64), len(samples))
        for part, piece in zip(parts, np.split(samples, cuts)):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def dirichlet_proportions(rng: np.random.Generator, clients: int, beta: float) -> np.ndarray:
    """One draw of Dirichlet(beta, ..., beta): float64 [clients], sum 1, for every positive beta.

    Gamma variates are normalized as logarithms: at a small beta the variates themselves all underflow to 0. Below 1,
    Gamma(beta) = Gamma(beta + 1) U^(1/beta), whose logarithm is finite after multiplication by beta; the maximum is
    subtracted there. The limit is one client with proportion 1.
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


def _assign_classes(
    rng: np.random.Generator, labels: np.ndarray, clients: int, classes_per_client: int
) -> list[np.ndarray]:
    """Assign `classes_per_client` classes to each client and split a class evenly among its clients; int64 [m] each.

    Classes are taken from a shuffled pool of all classes, to which a new permutation is added when it holds none that
    the client lacks. So the numbers of clients of two classes differ by one at most.
    """
    classes = np.unique(labels)
    pool: list[int] = []
    assigned: dict[int, list[int]] = {label: [] for label in classes.tolist()}
    for client in range(clients):
        for _ in range(classes_per_client):
            new = [label for label in pool if client not in assigned[label]]
            if not new:
                pool += rng.permutation(classes).tolist()
                new = [label for label in pool if client not in assigned[label]]
            pool.remove(new[0])
            assigned[new[0]].append(client)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label, members in assigned.items():
        samples = rng.permutation(np.flatnonzero(labels == label))
        for client, piece in zip(members, np.array_split(samples, len(members))):
            parts[client].append(piece)
    return [np.concatenate(part) for part in parts]


def _generator(*seeds: int) -> np.random.Generator:
    """A random stream of its own for every combination of seeds."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seeds)))


def _check_sizes(labels: np.ndarray, config: TrainConfig) -> None:
    """Raise FastdlpError where the data have too few samples for the clients, or too few or many classes."""
    clients, each = config.clients, config.classes_per_client
    if clients > len(labels):
        raise FastdlpError(f"{clients} clients for {len(labels)} samples: use 1 to {len(labels)}")
    if config.partition != "pathological":
        return
    classes = len(np.unique(labels))
    if each > classes:
        raise FastdlpError(f"{each} classes per client, of {classes}: use 1 to {classes}")
    if clients * each < classes:
        raise FastdlpError(
            f"{clients} clients with {each} classes each hold at most {clients * each} of the {classes} classes: use "
            f"at least {-(-classes // clients)} classes per client or {-(-classes // each)} clients"
        )


def _split(rng: np.random.Generator, part: np.ndarray, test_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Training and test (or validation) indices of one client, each sorted."""
    shuffled = rng.permutation(np.sort(part)).astype(np.int64)
    tests = max(int(len(part) * test_fraction), 1) if len(part) >= 2 else 0
    return np.sort(shuffled[tests:]), np.sort(shuffled[:tests])
