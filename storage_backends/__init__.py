"""Storage backends: bytes under keys, on a disk, in memory, in an object store. Knows nothing of OCI."""
