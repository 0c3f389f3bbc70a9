"""One plain safetensors file of a documented layout.

**Tensors** of an adapter, fp32: `{part}/A` [r, K] and `{part}/B` [N, r]. A part is `0.q`, `0.k`, `0.v`, `0.out`,
`0.fc1`, `0.fc2` for block 0 and so on, and `proj` for the tower's final projection, each as a linear y = xWᵀ with
W [N, K]. The adapted linear is y = xWᵀ + b + scale · (xAᵀ)Bᵀ.

**Metadata**, a JSON object of strings under the key `fastdlp`:

    format      "fastdlp-lora", or "fastdlp-weights" for methods that train no LoRA
    version     "1"
    scale       lora_alpha / rank
    rank        r
    gate        "folded": B has been multiplied by the SoRA gate, and where a method adds several branches in one
                forward they are stacked along the rank; A, B and scale are all there is to compute
    encoder     the adapted tower: "image" or "text"
    model       open_clip's name of the model, or glyph-clip. Tags trained with QuickGELU, OpenAI's among them, use
                it in fastdlp under any name; open_clip needs the name with -quickgelu, or force_quick_gelu=True
    pretrained  tag, file or `none`, as in --pretrained; "" for a model that has its own weights
    weights     sha256 fingerprint of the frozen model's weights, as fastdlp computes it
    method      of the run
    client      the client's number, or "global"

It needs neither fastdlp nor PEFT. To add it to open_clip's model:

    import json, open_clip, safetensors
    with safetensors.safe_open("adapter.safetensors", "pt") as file:
        about = json.loads(file.metadata()["fastdlp"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    net = open_clip.create_model(about["model"], pretrained=about["pretrained"])
    tower, projection = (net.visual, net.visual.proj) if about["encoder"] == "image" else (net, net.text_projection)
    for part in {name.partition("/")[0] for name in tensors}:
        block, _, linear = part.rpartition(".")
        weights = {"proj": projection.data.T}
        if block:
            state = tower.transformer.resblocks[int(block)].state_dict()
            weights = dict(zip("qkv", state["attn.in_proj_weight"].chunk(3))) | {"out": state["attn.out_proj.weight"]}
            weights |= {"fc1": state["mlp.c_fc.weight"], "fc2": state["mlp.c_proj.weight"]}
        weights[linear] += float(about["scale"]) * tensors[part + "/B"] @ tensors[part + "/A"]

**Methods that train no LoRA**: the tensors are the trained parameters by open_clip's names (`visual.conv1.weight`),
or by module and name where open_clip's model has no such module (`classifier/weight`); `scale`, `rank` and `gate`
are left out. Such a file is not read back as an adapter.
"""

from __future__ import annotations

from pathlib import Path

from fastdlp.adapters.serialization import load_tensors, save_tensors
from fastdlp.errors import FastdlpError
from fastdlp.export.adapter import LoRA
from fastdlp.export.trained import Trained

LORA, WEIGHTS, VERSION = "fastdlp-lora", "fastdlp-weights", "1"


def write_adapter(path: Path, adapter: LoRA) -> None:
    """Write an adapter. Raises FastdlpError where the operating system refuses."""
    own = {"format": LORA, "version": VERSION, "gate": "folded"}
    own |= {"rank": str(adapter.rank), "scale": repr(adapter.scale), "encoder": adapter.encoder}
    save_tensors(path, adapter.tensors, dict(adapter.about) | own)


def export_file(path: Path, trained: Trained) -> str:
    """Write an adapter or the weights of a method without LoRA; returns how to load the file.

    Raises:
        FastdlpError: another suffix than .safetensors, or the operating system refuses.
    """
    if path.suffix != ".safetensors":
        raise FastdlpError("--format safetensors writes a file: pass an --out that ends in .safetensors")
    if trained.adapter is None:
        save_tensors(path, trained.weights, trained.about | {"format": WEIGHTS, "version": VERSION})
        return f'safetensors.torch.load_file("{path}")'
    write_adapter(path, trained.adapter)
    return f'fastdlp.load_adapter("{path}")'


def read_adapter(path: Path) -> LoRA:
    """An adapter that `write_adapter` wrote.

    Raises:
        FastdlpError: missing, damaged, or not a file of `write_adapter`.
    """
    tensors, about = load_tensors(path)
    if about.get("format") == WEIGHTS:
        raise FastdlpError(f"{path} holds what {about.get('method')} trains, which is no LoRA and is not read back")
    if about.get("format") != LORA:
        raise FastdlpError(f"{path} is not an adapter of fastdlp export --format safetensors")
    if about.get("version") != VERSION:
        raise FastdlpError(f"{path} is of version {about.get('version')}, this fastdlp reads version {VERSION}")
    try:
        rank, scale = int(about["rank"]), float(about["scale"])
    except (KeyError, ValueError, TypeError):
        raise FastdlpError(f"{path}: rank and scale in its metadata are not numbers") from None
    origin = {name: text for name, text in about.items() if name not in ("format", "version", "gate", "rank", "scale")}
    return LoRA(about.get("encoder", ""), rank, scale, tensors, origin).check(path)
