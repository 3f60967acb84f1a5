"""Downloads REPOSITORY at REVISION into FOLDER, or of it what matches a PATTERN."""

import sys

from huggingface_hub import snapshot_download

repository, revision, folder, *patterns = sys.argv[1:]
snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=patterns or None)
