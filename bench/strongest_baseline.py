"""PEFT with everything that its users can turn on: adapters in the weights' dtype, a fused AdamW, a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdlp.bench.peft_baseline import PeftRounds
from fastdlp.bench.problem import Problem

WARM_UP = 3  # steps on a side stream before the capture, as PyTorch's documentation has it


class StrongestRounds(PeftRounds):
    """The step of `PeftRounds`, on a GPU captured once as a CUDA graph and replayed for every batch."""

    def __init__(self, problem: Problem, precision: str, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        super().__init__(problem, precision, device, cast=True, adamw={"fused": True, "capturable": on_gpu})
        if on_gpu:
            self._capture()

    def train(self, client: int, step: int) -> dict[str, Tensor]:
        if self.device.type != "cuda":
            return super().train(client, step)
        self._batch[0].copy_(self.pixels[client, step])
        self._batch[1].copy_(self.labels[client, step])
        self._graph.replay()
        return {name: loss.clone() for name, loss in self._losses.items()}

    def _capture(self) -> None:
        """Whole-network capture. Adapters and moments move in it; every client's own are copied in before its turn."""
        self._batch = self.pixels[0, 0].clone(), self.labels[0, 0].clone()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._step(*self._batch)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):  # gradients are dropped within, so backward makes them in the graph's pool
            self._losses = self._step(*self._batch)
