"""Writes FOLDER/train.parquet and FOLDER/test.csv: the same rows each time."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

ROWS = 400_000
folder = Path(sys.argv[1])
numbers = np.random.default_rng(4)
table = pa.table(
    {
        "id": np.arange(ROWS),
        "score": numbers.random(ROWS, dtype=np.float32),
        # Wide, and nothing that compresses: a reader of another column shall not want it.
        "text": [hashlib.sha256(str(row).encode()).hexdigest() for row in range(ROWS)],
    }
)
pq.write_table(table, folder / "train.parquet", row_group_size=ROWS // 4)
pa.csv.write_csv(table.select(["id", "score"]), folder / "test.csv")
