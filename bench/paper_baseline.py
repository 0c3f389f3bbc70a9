"""A FEDDLP round as its authors run it: both towers in each of a step's four forwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.bench.hugging_face import hugging_face_text_tower
from fastdlp.bench.peft_baseline import PeftRounds
from fastdlp.bench.problem import Problem
from fastdlp.engine.device import DTYPES


class PaperRounds(PeftRounds):
    """PEFT in its default form, with the class prompts through the frozen text tower, all tokens, in each forward."""

    def __init__(self, problem: Problem, precision: str, device: torch.device) -> None:
        super().__init__(problem, precision, device)
        self.ids = problem.ids.to(device)
        tower = hugging_face_text_tower(problem.clip).to(device, DTYPES[precision])
        self.text_tower = tower.requires_grad_(False)

    def _class_features(self) -> Tensor:
        return F.normalize(self.text_tower(input_ids=self.ids).text_embeds.float(), dim=-1)
