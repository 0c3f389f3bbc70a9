"""Export of trained adapters to other programs, import of external ones, and evaluation of finished runs.

adapter           `LoRA`: one plain adapter of one tower, gates and branches folded in
trained           a finished run's adapters or weights, read from its folder
peft_format       `--format peft`: a folder that PEFT loads onto transformers' CLIPModel, and back
file_format       `--format safetensors`: one file with a documented layout, and back
open_clip_format  `--format open_clip`: the frozen model with the trained part in its weights
api               `export_adapter` and `load_adapter`
evaluate          a run's clients scored with their own adapters or an external one
"""
