"""A run of fastdlp is the plain algorithm: every round replayed with `literal.py` from the run's own trace.

What is taken from the run: what is trained as it is at the start, and which samples were in which batch. Everything
else, from the weights' file and the images to losses, tensors before and after aggregation and accuracies, is computed
again. `literal_replay.py` says how close the two have to be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.literal import PROTOCOLS, Federation
from tests.literal_mutants import (
    AlphaInFedDAT,
    AlphaTwice,
    Apart,
    BackwardEpoch,
    ClippedEach,
    ClippedGates,
    ClippedTogether,
    CopyOfFirstRound,
    EveryoneCounts,
    ForgetfulOptimizer,
    FreshTeacher,
    FrozenBias,
    FrozenEmbedding,
    FrozenEncoder,
    FrozenNorms,
    GlobalFirst,
    GoesOn,
    KeptMoments,
    LastClient,
    LiveCopy,
    LocalTeacher,
    MatricesDecay,
    NoCopy,
    NoDistillation,
    NoDownload,
    NoGate,
    NormalizedFeatures,
    NormalizedFirst,
    NoSoftmax,
    NoTanh,
    NoTSquared,
    OneAfterTheOther,
    OneAxisKD,
    OneAxisTask,
    ScaledThreshold,
    ScoredAlone,
    ScoredAsTrained,
    ScoredAtStart,
    ScoredWithoutGlobal,
    ScoredWithoutLocal,
    SoftmaxOverSamples,
    ThresholdEachRound,
    TrainedCopy,
    TrainedTemperature,
    Unweighted,
    WeightedByBatches,
    WeightsAlone,
)
from tests.literal_replay import BROKEN, LOSS, NORM, Case, Workshop, make_case, pooled, read_lines, replay_round, trace


@pytest.fixture(scope="module")
def workshop(shared: Path) -> Iterator[Workshop]:
    """With caches in a folder of its own, and one thread: these models are too small for more."""
    root = shared / "replay"
    root.mkdir(exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDLP_CACHE", str(root / "cache"))
        yield Workshop(root)
    torch.set_num_threads(threads)


# -- the run is the algorithm --------------------------------------------------------------------------------------

# Each switch alone, on one protocol with the other's value. Squash and captions: on images that are not square, with a
# template that is not the plain caption.
SWITCHES: dict[str, tuple[Any, Any]] = {
    "task_loss": ("cross-entropy", "contrastive"),
    "kd_direction": ("student-teacher", "teacher-student"),
    "kd_temperature": (1.0, 3.0),
    "kd_logits": ("class", "batch"),
    "clip_norm": (0.0, 1.0),
    "threshold": ("soft", "reference"),
    "transform": ("model", "squash"),
    "caption": ("dataset", "plain"),
    "teacher": ("fresh", "pre-update"),
}
TEMPLATE = "a blurry photo of {}, a kind"


def switched(switch: str, protocol: str) -> Case:
    """A case with one switch against its protocol; a clip norm that always bites."""
    paper, reference = SWITCHES[switch]
    encoder = "image" if protocol == "paper" or switch == "transform" else "text"
    value = reference if protocol == "paper" or switch == "teacher" else paper
    if (switch, protocol) == ("clip_norm", "paper"):
        value = 0.05
    return make_case("tiny", protocol=protocol, encoder=encoder, template=TEMPLATE, **{switch: value})


def unswitched(switch: str, protocol: str) -> dict[str, Any]:
    """The literal setting that `switched` departs from."""
    name = "resize" if switch == "transform" else switch
    return {name: ({"teacher": "fresh"} | PROTOCOLS[protocol])[name]}


CASES = {
    **{
        f"{model}-{encoder}-{protocol}": make_case(model, encoder=encoder, protocol=protocol)
        for model in ("glyph-clip", "tiny", "odd")
        for encoder in ("image", "text")
        for protocol in ("paper", "reference")
    },
    **{
        f"{method}-{encoder}-{protocol}": make_case(model, method=method, encoder=encoder, protocol=protocol)
        for method in ("local", "flora")
        for model, encoder, protocol in (("glyph-clip", "image", "paper"), ("tiny", "text", "reference"))
    },
    **{f"{protocol}-but-{switch}": switched(switch, protocol) for switch in SWITCHES for protocol in PROTOCOLS},
    "epochs": make_case(local_epochs=2, teacher="pre-update"),
    "epochs-text-reference": make_case("tiny", local_epochs=3, rounds=2, protocol="reference", encoder="text"),
    "small-micro-batch": make_case("tiny", micro_batch=3),
    "small-micro-batch-reference": make_case("tiny", micro_batch=5, protocol="reference"),
    "gates-come-back": make_case("tiny", gate_lr=0.04, xi=0.03, weight_decay=0.3, rounds=4),
    "gates-come-back-reference": make_case("tiny", gate_lr=0.04, xi=0.03, protocol="reference", encoder="text"),
    "ranks": make_case("tiny", rank_local=3, rank_global=5, lora_alpha=4.0, alpha=2.0, encoder="text", batch_size=7),
    "no-alpha": make_case("tiny", alpha=0.0, xi=0.0, batch_size=100),
    # the other methods
    "sora-image": make_case("tiny", method="local-sora"),
    "sora-text-comeback": make_case("tiny", method="local-sora", encoder="text", gate_lr=0.04, xi=0.03, rank_local=3),
    "sora-glyph": make_case("glyph-clip", method="local-sora", rounds=2),
    **{
        f"{method}-{model}-{encoder}-{protocol}": make_case(model, method=method, encoder=encoder, protocol=protocol)
        for method in ("feddat", "combined", "fedclip")
        for model, encoder, protocol in (
            ("tiny", "image", "paper"),
            ("tiny", "image", "reference"),
            ("tiny", "text", "paper"),
            ("odd", "text", "reference"),
        )
    },
    "feddat-ranks": make_case("tiny", method="feddat", rank_local=3, rank_global=5, kd_temperature=2.0, local_epochs=2),
    "feddat-direction": make_case("tiny", method="feddat", kd_direction="teacher-student", micro_batch=3),
    "feddat-glyph": make_case("glyph-clip", method="feddat", rounds=2),
    "combined-comeback": make_case("tiny", method="combined", gate_lr=0.04, xi=0.03, weight_decay=0.3),
    "combined-ranks": make_case("tiny", method="combined", rank_local=3, rank_global=5, lora_alpha=4.0, clip_norm=0.05),
    "fedclip-fast": make_case("tiny", method="fedclip", encoder="text", lr=0.03),
    "fedclip-glyph": make_case("glyph-clip", method="fedclip", weight_decay=0.1, clip_norm=0.05, rounds=2),
    "fedclip-small-micro-batch": make_case("tiny", method="fedclip", micro_batch=3),
    "fedaa-image": make_case("tiny", method="fedaa", lr=None),
    "fedaa-text-reference": make_case("tiny", method="fedaa", lr=None, encoder="text", protocol="reference"),
    "fedaa-adamw": make_case("tiny", method="fedaa", optimizer="adamw", weight_decay=0.3, local_epochs=2),
    "flora-adam": make_case("tiny", method="flora", optimizer="adam", eps=1e-6, weight_decay=0.1, encoder="text"),
    "feddlp-adam": make_case("tiny", method="feddlp", optimizer="adam", eps=1e-5, weight_decay=0.1),
    "fedlc-tiny": make_case("tiny", method="fedlc", lr=0.03, template=TEMPLATE),
    "fedlc-odd-reference": make_case("odd", method="fedlc", protocol="reference", weight_decay=0.1),
    "fedvmlc-tiny": make_case("tiny", method="fedvmlc"),
    "fedvmlc-small-micro-batch": make_case("tiny", method="fedvmlc", micro_batch=3, rounds=2),
    "fedvmlc-odd-reference": make_case("odd", method="fedvmlc", protocol="reference", weight_decay=0.3, local_epochs=2),
    **{
        f"fedfft-{model}-{encoder}-{protocol}": make_case(model, method="fedfft", encoder=encoder, protocol=protocol)
        for model, encoder, protocol in (
            ("tiny", "image", "paper"),
            ("tiny", "text", "paper"),
            ("tiny", "both", "paper"),
            ("tiny", "both", "reference"),
            ("odd", "image", "reference"),
            ("odd", "text", "reference"),
        )
    },
    "fedfft-many-steps": make_case("odd", method="fedfft", encoder="text", lr=3e-3, local_epochs=3, batch_size=8),
    "fedfft-decay": make_case("odd", method="fedfft", encoder="both", weight_decay=0.3, local_epochs=2),
    "fedfft-glyph": make_case("glyph-clip", method="fedfft", encoder="both", lr=1e-4, rounds=2),
}


# Every method with every encoder, both protocols, every model, and what else a loop may do once; the others are slow.
QUICK = [
    *("tiny-image-paper", "tiny-text-reference", "odd-image-reference", "odd-text-paper"),
    *("local-text-reference", "flora-image-paper", "flora-adam", "sora-image"),
    *("feddat-tiny-image-paper", "feddat-odd-text-reference", "combined-tiny-text-paper", "combined-comeback"),
    *("fedclip-tiny-image-reference", "fedclip-fast", "fedaa-image", "fedaa-text-reference", "fedlc-tiny"),
    *("fedvmlc-tiny", "fedfft-tiny-text-paper", "fedfft-tiny-both-reference", "fedfft-odd-image-reference"),
    *("epochs-text-reference", "small-micro-batch", "gates-come-back", "ranks"),
]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n not in QUICK)])
def test_run_is_the_literal_algorithm(workshop: Workshop, name: str) -> None:
    case = CASES[name]
    run = workshop.run(case)
    federation = workshop.federation(case)
    federation.load(trace(run, 0))
    lines, summary = read_lines(run / "metrics.jsonl"), json.loads((run / "summary.json").read_text())
    tests = [len(client.test) for client in federation.clients]
    sizes = [len(client.train) for client in federation.clients]
    assert [line["round"] for line in lines] == list(range(1, case.options["rounds"] + 1))
    assert summary["zero_shot"] == pytest.approx(sum(federation.zero_shot()) / sum(tests))

    accuracies, corrects = [], []
    for line in lines:
        distance, losses = replay_round(workshop, case, federation, line["round"])
        assert distance.worst() <= 1, distance

        for client, mine in zip(line["clients"], losses):
            theirs = {name: x for name, x in client["losses"].items() if x is not None}
            assert theirs == pytest.approx(mine, **LOSS)
        assert line["losses"] == pytest.approx(pooled(losses, sizes), **LOSS)

        correct = federation.score()
        assert [client["correct"] for client in line["clients"]] == correct
        assert [client["n"] for client in line["clients"]] == tests
        assert [client["gates_zero"] for client in line["clients"]] == federation.gates_zero()
        accuracies.append(sum(correct) / sum(tests))
        corrects.append(correct)
        assert line["accuracy"] == pytest.approx(accuracies[-1])

    assert summary["accuracy_last"] == pytest.approx(accuracies[-1])
    assert summary["accuracy_best_test"] == pytest.approx(max(accuracies))
    best = case.options.get("protocol") == "reference"
    reported = accuracies.index(max(accuracies)) if best else -1
    assert summary["accuracy"] == pytest.approx(accuracies[reported])
    assert [client["correct"] for client in summary["per_client"]] == corrects[reported]
    assert summary["uploaded_parameters"] == sum(t.numel() for n, t in federation.tensors().items() if "server" in n)


@pytest.mark.parametrize("name", ["glyph-clip-image-paper", "epochs", "epochs-text-reference", "ranks"])
def test_batches_are_epochs(workshop: Workshop, name: str) -> None:
    """Each epoch holds each of a client's samples once, in full batches and a rest, in an order of its own."""
    case = CASES[name]
    lines = read_lines(workshop.run(case) / "trace/batches.jsonl")
    size, epochs = case.options["batch_size"], case.options.get("local_epochs", 1)
    for client, member in workshop.members[case.data].items():
        orders = []
        for number in range(1, case.options["rounds"] + 1):
            mine = [line for line in lines if line["client"] == int(client) and line["round"] == number]
            steps = math.ceil(len(member["train"]) / size)
            assert [line["step"] for line in mine] == list(range(steps * epochs))
            for epoch in range(epochs):
                batches = [line["samples"] for line in mine[epoch * steps : (epoch + 1) * steps]]
                assert all(len(batch) == size for batch in batches[:-1])
                orders.append([sample for batch in batches for sample in batch])
                assert sorted(orders[-1]) == sorted(member["train"])
        if len(member["train"]) > 1:
            assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize(
    "name",
    ["glyph-clip-image-paper", "glyph-clip-text-paper", "flora-image-paper", "ranks"]
    + ["sora-glyph", "feddat-ranks", "combined-ranks"],
)
def test_start(workshop: Workshop, name: str) -> None:
    """A ~ N(0, 1/r), B = 0, g ~ N(0, 1); the global adapter equal everywhere, local ones apart."""
    case = CASES[name]
    start, settings = trace(workshop.run(case), 0), case.settings()
    assert all(not t.any() for n, t in start.items() if n.endswith("/B"))
    for branch, rank in (("local", settings.rank_local), ("global", settings.rank_global)):
        matrices = [t.flatten() for n, t in start.items() if f"/{branch}/" in n and n.endswith("/A") and n[0] == "c"]
        if matrices:
            assert float(torch.cat(matrices).std()) == pytest.approx(rank**-0.5, rel=0.05)
    gates = [t for n, t in start.items() if n.endswith("/gate")]
    if gates:
        assert float(torch.cat(gates).std()) == pytest.approx(1, rel=0.15)
    for name, tensor in start.items():
        if name.startswith("server/"):
            assert all(torch.equal(tensor, start[name.replace("server", f"c{client}")]) for client in range(4))
        elif name.startswith("c0/local") and not name.endswith("/B"):
            assert not torch.equal(tensor, start[name.replace("c0", "c1")])


@pytest.mark.parametrize("name", ["fedclip-tiny-image-paper", "fedaa-image", "fedlc-tiny", "fedvmlc-tiny"])
def test_start_of_heads(workshop: Workshop, name: str) -> None:
    """Attention heads start as identities, classifiers uniform within ±1/sqrt(d), bias too, both equal everywhere."""
    case = CASES[name]
    start = trace(workshop.run(case), 0)
    server = {n.removeprefix("server/global/"): t for n, t in start.items() if n.startswith("server/")}
    for n, tensor in start.items():
        assert torch.equal(tensor, server[n.split("/", 2)[2]])
    if case.options["method"] in ("fedclip", "fedaa"):
        assert all(torch.equal(server[f"{fc}/weight"], torch.eye(40)) for fc in ("fc1", "fc2"))
        assert all(torch.equal(server[f"{fc}/bias"], torch.zeros(40)) for fc in ("fc1", "fc2"))
    else:
        weight, bias = server["classifier/weight"], server["classifier/bias"]
        assert weight.shape == (4, 40)
        assert bias.shape == (4,)
        bound = 40**-0.5
        assert 0.9 * bound < weight.abs().max() <= bound
        assert 0 < bias.abs().max() <= bound
        assert float(weight.mean()) == pytest.approx(0, abs=0.3 * bound)
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.2)


@pytest.mark.parametrize("name", ["fedvmlc-tiny", "fedfft-tiny-image-paper", "fedfft-tiny-both-paper"])
def test_start_of_whole_encoders(workshop: Workshop, name: str) -> None:
    """The weights' file, to the bit."""
    case = CASES[name]
    file = workshop.clip(case.model)[0].state_dict()
    start = {n.removeprefix("server/global/"): t for n, t in trace(workshop.run(case), 0).items()}
    encoder = {n: t for n, t in start.items() if not n.startswith("classifier/")}
    assert "visual.proj" in encoder
    assert all(torch.equal(tensor, file[n]) for n, tensor in encoder.items())


# -- and no other algorithm ------------------------------------------------------------------------------------------

PAPER, REFERENCE = CASES["tiny-image-paper"], CASES["tiny-image-reference"]
TEXT, COMEBACK = CASES["tiny-text-reference"], CASES["gates-come-back"]
FEDDAT, COMBINED = CASES["feddat-tiny-image-paper"], CASES["combined-tiny-image-paper"]
FEDCLIP, FEDVMLC, FEDFFT = CASES["fedclip-tiny-image-paper"], CASES["fedvmlc-tiny"], CASES["fedfft-tiny-both-paper"]
MUTANTS: dict[str, tuple[Case, type[Federation], dict[str, Any]]] = {
    # every switch: the value it is switched from
    **{
        f"{protocol}-but-{switch}": (switched(switch, protocol), Federation, unswitched(switch, protocol))
        for switch in SWITCHES
        for protocol in PROTOCOLS
    },
    "kd-direction": (PAPER, Federation, {"kd_direction": "teacher-student"}),
    "teacher-pre-update": (PAPER, Federation, {"teacher": "pre-update"}),
    "no-gate": (PAPER, NoGate, {}),
    "scale": (PAPER, Federation, {"lora_alpha": 15.0}),
    "alpha": (PAPER, Federation, {"alpha": 0.4}),
    "alpha-twice": (PAPER, AlphaTwice, {}),
    "global-first": (PAPER, GlobalFirst, {}),
    "backward-epoch": (PAPER, BackwardEpoch, {}),
    "eps": (PAPER, Federation, {"eps": 1e-7}),
    "forgetful-optimizer": (PAPER, ForgetfulOptimizer, {}),
    "unweighted": (PAPER, Unweighted, {}),
    "weighted-by-batches": (PAPER, WeightedByBatches, {}),
    "everyone-counts": (PAPER, EveryoneCounts, {}),
    "no-download": (PAPER, NoDownload, {}),
    "xi": (PAPER, Federation, {"xi": 0.009}),
    "threshold-scaled": (PAPER, ScaledThreshold, {}),
    "threshold-each-round": (PAPER, ThresholdEachRound, {}),
    "no-clipping": (REFERENCE, Federation, {"clip_norm": 0.0}),
    "gates-clipped": (CASES["glyph-clip-text-reference"], ClippedGates, {}),
    "clipped-each": (REFERENCE, ClippedEach, {}),
    "no-t-squared": (REFERENCE, NoTSquared, {}),
    "one-axis-kd": (TEXT, OneAxisKD, {}),
    "one-axis-task": (TEXT, OneAxisTask, {}),
    "gate-lr": (COMEBACK, Federation, {"gate_lr": 1e-3}),
    "weight-decay": (COMEBACK, Federation, {"weight_decay": 0.0}),
    # the other methods
    "sora-no-gate": (CASES["sora-image"], NoGate, {}),
    "sora-no-threshold": (CASES["sora-image"], Federation, {"xi": 0.0}),
    "sora-threshold-each-round": (CASES["sora-image"], ThresholdEachRound, {}),
    "sora-gate-lr": (CASES["sora-text-comeback"], Federation, {"gate_lr": 1e-3}),
    "feddat-no-copy": (FEDDAT, NoCopy, {}),
    "feddat-copy-of-first-round": (FEDDAT, CopyOfFirstRound, {}),
    "feddat-live-copy": (FEDDAT, LiveCopy, {}),
    "feddat-trained-copy": (FEDDAT, TrainedCopy, {}),
    "feddat-alpha": (FEDDAT, AlphaInFedDAT, {}),
    "feddat-no-distillation": (FEDDAT, NoDistillation, {}),
    "feddat-fresh-teacher": (FEDDAT, FreshTeacher, {}),
    "feddat-local-teacher": (FEDDAT, LocalTeacher, {}),
    "feddat-kd-direction": (CASES["feddat-direction"], Federation, {"kd_direction": "student-teacher"}),
    "feddat-kd-temperature": (CASES["feddat-ranks"], Federation, {"kd_temperature": 1.0}),
    "feddat-kd-logits": (CASES["feddat-odd-text-reference"], Federation, {"kd_logits": "class"}),
    "feddat-no-clipping": (CASES["feddat-tiny-image-reference"], Federation, {"clip_norm": 0.0}),
    "feddat-no-download": (FEDDAT, NoDownload, {}),
    "feddat-scale": (FEDDAT, Federation, {"lora_alpha": 15.0}),
    "combined-apart": (COMBINED, Apart, {}),
    "combined-one-after-the-other": (COMBINED, OneAfterTheOther, {}),
    "combined-no-gate": (COMBINED, NoGate, {}),
    "combined-xi": (COMBINED, Federation, {"xi": 0.009}),
    "combined-gate-lr": (CASES["combined-comeback"], Federation, {"gate_lr": 1e-3}),
    "combined-clipped-together": (CASES["combined-ranks"], ClippedTogether, {}),
    "combined-no-clipping": (CASES["combined-tiny-image-reference"], Federation, {"clip_norm": 0.0}),
    "combined-no-download": (COMBINED, NoDownload, {}),
    "fedclip-no-softmax": (FEDCLIP, NoSoftmax, {}),
    "fedclip-softmax-over-samples": (FEDCLIP, SoftmaxOverSamples, {}),
    "fedclip-no-tanh": (FEDCLIP, NoTanh, {}),
    "fedclip-normalized-first": (FEDCLIP, NormalizedFirst, {}),
    "fedclip-weights-alone": (FEDCLIP, WeightsAlone, {}),
    "fedclip-forgetful-optimizer": (FEDCLIP, ForgetfulOptimizer, {}),
    "fedclip-unweighted": (FEDCLIP, Unweighted, {}),
    "fedclip-cross-entropy": (CASES["fedclip-odd-text-reference"], Federation, {"task_loss": "cross-entropy"}),
    "fedclip-clipped-each": (CASES["fedclip-glyph"], ClippedEach, {}),
    "fedclip-no-clipping": (CASES["fedclip-glyph"], Federation, {"clip_norm": 0.0}),
    "fedclip-adam": (CASES["fedclip-glyph"], Federation, {"optimizer": "adam"}),
    "fedaa-decoupled": (CASES["fedaa-image"], Federation, {"optimizer": "adamw"}),
    "fedaa-eps": (CASES["fedaa-text-reference"], Federation, {"eps": 1e-8}),
    "fedaa-no-decay": (CASES["fedaa-image"], Federation, {"weight_decay": 0.0}),
    "fedaa-forgetful-optimizer": (CASES["fedaa-image"], ForgetfulOptimizer, {}),
    "adam-decoupled": (CASES["flora-adam"], Federation, {"optimizer": "adamw"}),
    "fedlc-normalized": (CASES["fedlc-tiny"], NormalizedFeatures, {}),
    "fedlc-frozen-bias": (CASES["fedlc-tiny"], FrozenBias, {}),
    "fedlc-forgetful-optimizer": (CASES["fedlc-tiny"], ForgetfulOptimizer, {}),
    "fedlc-no-clipping": (CASES["fedlc-odd-reference"], Federation, {"clip_norm": 0.0}),
    "fedvmlc-kept-moments": (FEDVMLC, KeptMoments, {}),
    "fedvmlc-frozen-encoder": (FEDVMLC, FrozenEncoder, {}),
    "fedvmlc-normalized": (FEDVMLC, NormalizedFeatures, {}),
    "fedvmlc-last-client": (FEDVMLC, LastClient, {}),
    "fedvmlc-goes-on": (FEDVMLC, GoesOn, {}),
    "fedvmlc-unweighted": (FEDVMLC, Unweighted, {}),
    "fedvmlc-clipped-each": (CASES["fedvmlc-odd-reference"], ClippedEach, {}),
    "fedfft-kept-moments": (FEDFFT, KeptMoments, {}),
    "fedfft-trained-temperature": (CASES["fedfft-many-steps"], TrainedTemperature, {}),
    "fedfft-frozen-embedding": (FEDFFT, FrozenEmbedding, {}),
    "fedfft-frozen-norms": (FEDFFT, FrozenNorms, {}),
    "fedfft-goes-on": (FEDFFT, GoesOn, {}),
    "fedfft-backward-epoch": (FEDFFT, BackwardEpoch, {}),
    "fedfft-matrices-decay": (CASES["fedfft-decay"], MatricesDecay, {}),
    "fedfft-no-decay": (CASES["fedfft-decay"], Federation, {"weight_decay": 0.0}),
    "fedfft-no-clipping": (CASES["fedfft-tiny-both-reference"], Federation, {"clip_norm": 0.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_another_algorithm_is_detected(workshop: Workshop, name: str) -> None:
    """The bounds are not empty: a literal loop with one thing wrong misses them by far."""
    case, kind, changes = MUTANTS[name]
    federation = workshop.federation(case, kind, **changes)
    federation.load(trace(workshop.run(case), 0))
    distances = (replay_round(workshop, case, federation, number)[0] for number in range(1, case.options["rounds"] + 1))
    assert any(distance.norm * NORM / BROKEN > 1 for distance in distances)


SCORED: dict[str, tuple[Case, type[Federation]]] = {
    "feddat-as-trained": (FEDDAT, ScoredAsTrained),
    "feddat-without-global": (FEDDAT, ScoredWithoutGlobal),
    "feddat-without-local": (FEDDAT, ScoredWithoutLocal),
    "combined-without-global": (COMBINED, ScoredWithoutGlobal),
    "combined-without-local": (COMBINED, ScoredWithoutLocal),
    "fedclip-at-start": (CASES["fedclip-fast"], ScoredAtStart),
    "fedclip-alone": (CASES["fedclip-fast"], ScoredAlone),
    "fedlc-at-start": (CASES["fedlc-tiny"], ScoredAtStart),
    "fedlc-alone": (CASES["fedlc-tiny"], ScoredAlone),
    "fedvmlc-alone": (FEDVMLC, ScoredAlone),
    "fedfft-alone": (FEDFFT, ScoredAlone),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORED)
def test_another_score_is_detected(workshop: Workshop, name: str) -> None:
    """Correct counts show which model clients are scored with."""
    case, kind = SCORED[name]
    federation = workshop.federation(case, kind)
    run = workshop.run(case)
    federation.load(trace(run, 0))
    theirs, mine = [], []
    for line in read_lines(run / "metrics.jsonl"):
        replay_round(workshop, case, federation, line["round"])
        theirs.append([client["correct"] for client in line["clients"]])
        mine.append(federation.score())
    assert mine != theirs
