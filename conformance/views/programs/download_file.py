"""Downloads the file PATH of REPOSITORY at REVISION and prints where it is."""

import sys

from huggingface_hub import hf_hub_download

repository, revision, path = sys.argv[1:]
print(hf_hub_download(repository, path, revision=revision))
