"""Loads the model SOURCE, a folder or the id of a repository, and prints what it is made of.

Two sources that print the same have the same configuration, give the same tokens and hold the same tensors.
"""

import hashlib
import json
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

SENTENCES = ["Push once; pull just the part you need.", "Der Rest bleibt, wo er ist."]

source, *revision = sys.argv[1:]
chosen = {"revision": revision[0]} if revision else {}
configuration = AutoConfig.from_pretrained(source, **chosen).to_dict()
del configuration["_name_or_path"]
tokens = AutoTokenizer.from_pretrained(source, **chosen)(SENTENCES)["input_ids"]
is_folder = Path(source).is_dir()
weights = (
    f"{source}/model.safetensors" if is_folder else hf_hub_download(source, "model.safetensors", **chosen)
)
tensors = {
    name: [str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()]
    for name, array in load_file(weights).items()
}
json.dump({"configuration": configuration, "tokens": tokens, "tensors": tensors}, sys.stdout, sort_keys=True)
