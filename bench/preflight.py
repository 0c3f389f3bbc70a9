"""What a GPU machine has of what `bench/gpu.sh` needs: `python -m fastdlp.bench.preflight`. Imports only torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess

PACKAGES = {  # by the name that is imported: as it is installed, and what is left out without it
    "torch": ("torch", "everything"),
    "triton": ("triton", "the Triton kernels"),
    "numpy": ("numpy", "everything"),
    "safetensors": ("safetensors", "everything"),
    "typer": ("typer", "every command"),
    "rich": ("rich", "every command"),
    "matplotlib": ("matplotlib", "bench round, text and baselines"),
    "torchvision": ("torchvision", "what loads a model"),
    "open_clip": ("open_clip_torch", "bench round, profile, growth, and tests of towers, engine and training"),
    "sklearn": ("scikit-learn", "tests of training"),
    "scipy": ("scipy", "tests of training"),
    "peft": ("peft", "PEFT's rows"),
    "transformers": ("transformers", "PEFT's rows of bench round"),
    "pytest": ("pytest", "all tests"),
    "xdist": ("pytest-xdist", "nothing: tests run in one process"),
}
TOOLS = {"compute-sanitizer": "memcheck and racecheck", "ncu": "the hardware's counters", "nvidia-smi": "clocks"}
CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


def main() -> None:
    print(f"python {platform.python_version()}")
    for name, (package, without) in PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            print(f"MISSING {package}: without it not {without}")
        else:
            print(f"{package} {_version(package)}")
    for tool, without in TOOLS.items():
        print(f"{tool} {shutil.which(tool)}" if shutil.which(tool) else f"MISSING {tool}: without it not {without}")
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv"]
        print(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    _device()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _device() -> None:
    import torch

    if not torch.cuda.is_available():
        print("torch sees no CUDA GPU")
        return
    facts = torch.cuda.get_device_properties(0)
    print(
        f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.multi_processor_count} multiprocessors, "
        f"{facts.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    )


if __name__ == "__main__":
    main()
