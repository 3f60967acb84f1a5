"""Load a model by its id and from a folder, and see that nothing can tell them apart: `hub_loader.py <id> <folder>`.

Run with transformers, safetensors and numpy, in an environment that has nothing of this project. PyTorch is not needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_download
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

SENTENCES = ["Push once; pull just the part you need.", "Der Rest bleibt, wo er ist."]


def main(identity: str, folder: Path) -> None:
    configurations = [AutoConfig.from_pretrained(place).to_dict() for place in (identity, folder)]
    for configuration in configurations:
        configuration.pop("_name_or_path", None)
    assert configurations[0] == configurations[1], configurations

    tokens = [AutoTokenizer.from_pretrained(place)(SENTENCES)["input_ids"] for place in (identity, folder)]
    assert tokens[0] == tokens[1], tokens

    weights = [
        load_file(path)
        for path in (hf_hub_download(identity, "model.safetensors"), folder / "model.safetensors")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    sys.stdout.write(f"{len(weights[0])} tensors are the same\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
