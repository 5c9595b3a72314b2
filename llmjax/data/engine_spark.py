"""Curation on Apache Spark: units are mapped by its executors; duplicates are grouped, joined and connected there too.

The functions are those of the embedded engine. Where they choose, they choose by a document's `order`, so the result is
the same whatever the number of workers, the shape of the shuffles or the tasks that had to run twice. A master such as
`local[4,4]` runs four workers in this machine, four tries a task.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmjax.core.errors import RunError
from llmjax.data import dedup
from llmjax.data.shingles import jaccard
from llmjax.data.stage import Item, Result

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

DEFAULT_MASTER = "local[*,4]"  # a worker a core, four tries a task
CHECKPOINTS = "spark-checkpoints"
BUCKETS = 64  # groups of bands that are compared together
PAIR = "a long, b long"
DROPPED = "order long, kept long, jaccard double"


class SparkEngine:
    """A Spark session; a context manager that ends it."""

    def __init__(self, master: str = "", *, settings: dict[str, str] | None = None):
        self._scratch = Path(tempfile.mkdtemp(prefix="llmjax-spark-"))
        self._spark = _session(master or DEFAULT_MASTER, self._scratch, settings or {})

    def __enter__(self) -> SparkEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._spark.stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """`function` of each item, in the order of the items, one task each."""
        if not items:
            return iter(())
        return iter(self._spark.sparkContext.parallelize(items, len(items)).map(function).collect())

    def duplicates(self, signatures: Sequence[Path], *, threshold: float) -> pa.Table:
        """Documents to drop as (order, kept, jaccard), by order; jaccard is null for exact copies."""
        from pyspark.sql import functions as f

        # Beside the signatures, which every worker can reach.
        self._spark.sparkContext.setCheckpointDir(str(signatures[0].parent / CHECKPOINTS))
        exact = self._exact(signatures).persist()
        dropped = exact.select("order", "kept", f.lit(None).cast("double").alias("jaccard"))
        if threshold:
            near = self._near(signatures, exact, threshold).persist()
            root = near.select(f.col("order").alias("kept"), f.col("kept").alias("root"))
            followed = exact.join(root, "kept", "left").select(
                "order", f.coalesce("root", "kept").alias("kept"), f.lit(None).cast("double").alias("jaccard"))
            dropped = followed.union(near)
        table = dropped.orderBy("order").toArrow()
        shutil.rmtree(signatures[0].parent / CHECKPOINTS)
        return table

    def _exact(self, signatures: Sequence[Path]) -> DataFrame:
        """(order, kept) of each document whose `doc_id` an earlier one has."""
        from pyspark.sql import Window
        from pyspark.sql import functions as f

        ids = self._read(signatures, _columns("order", "doc_id"), "order long, doc_id string")
        first = ids.withColumn("kept", f.min("order").over(Window.partitionBy("doc_id")))
        return first.where("kept < order").select("order", "kept")

    def _near(self, signatures: Sequence[Path], exact: DataFrame, threshold: float) -> DataFrame:
        """(order, kept, jaccard) of each near duplicate: bands, pairs, the exact check, groups."""
        from pyspark.sql import functions as f

        bands = self._read(signatures, _bands, "number int, band long, order long")
        grouped = bands.join(exact, "order", "left_anti").groupBy("number", f.pmod("band", f.lit(BUCKETS)))
        pairs = grouped.applyInArrow(_bucket_pairs, PAIR).distinct()
        alike = self._with_signatures(pairs, signatures, ("a", "b")).mapInArrow(
            functools.partial(_verify, threshold=threshold), PAIR)
        groups = connected_components(alike.persist())
        compared = groups.select(f.col("order").alias("a"), f.col("kept").alias("b"))
        return self._with_signatures(compared, signatures, ("a", "b")).mapInArrow(_similarities, DROPPED)

    def _with_signatures(self, pairs: DataFrame, signatures: Sequence[Path], ends: Sequence[str]) -> DataFrame:
        """Pairs with the shingles and the sketch of each end; of other documents none are sent anywhere."""
        from pyspark.sql import functions as f

        wanted = pairs.select(f.explode(f.array(*ends)).alias("order")).distinct()
        schema = "order long, shingles binary, sketch binary"
        known = self._read(signatures, _columns("order", "shingles", "sketch"), schema).join(wanted, "order").persist()
        for end in ends:
            renamed = known.select(f.col("order").alias(end), *(
                f.col(name).alias(f"{name}_{end}") for name in ("shingles", "sketch")))
            pairs = pairs.join(renamed, end)
        return pairs

    def _read(self, signatures: Sequence[Path], extract: Callable[[pa.Table], pa.Table], schema: str) -> DataFrame:
        """What `extract` takes from each signature file, read where it is used."""
        rows = [(str(path),) for path in signatures]
        files = self._spark.createDataFrame(rows, "path string").repartition(len(rows))
        return files.mapInArrow(functools.partial(_extract, extract), schema)


def connected_components(pairs: DataFrame) -> DataFrame:
    """(order, kept): every document that an earlier one of its group stands for, from pairs (a, b).

    Alternating large-star and small-star (Kiveris et al., 2014): edges move towards the smallest member of each
    neighbourhood until every group is a star, in O(log^2 n) rounds of three shuffles. Nothing but edges is stored, and
    each round is written out, so a lost worker costs one round.
    """
    from pyspark.sql import functions as f

    edges, before = pairs.select("a", "b").where("a != b").distinct().checkpoint(), None
    while (summary := _summary(edges)) != before:
        before = summary
        edges = _small_star(_large_star(edges)).checkpoint()
    return edges.select(f.greatest("a", "b").alias("order"), f.least("a", "b").alias("kept"))


def _large_star(edges: DataFrame) -> DataFrame:
    """Every larger neighbour of a node is joined to the smallest of its neighbourhood."""
    from pyspark.sql import Window
    from pyspark.sql import functions as f

    both = edges.union(edges.select("b", "a"))
    low = f.least(f.min("b").over(Window.partitionBy("a")), "a")
    return both.withColumn("low", low).where("b > a").select(f.col("b").alias("a"), f.col("low").alias("b"))


def _small_star(edges: DataFrame) -> DataFrame:
    """Every smaller neighbour of a node, and the node in the place of the smallest, is joined to the smallest."""
    from pyspark.sql import Window
    from pyspark.sql import functions as f

    down = edges.select(f.greatest("a", "b").alias("a"), f.least("a", "b").alias("b")).where("a != b")
    lowest = down.withColumn("low", f.min("b").over(Window.partitionBy("a")))
    return lowest.select(f.expr("if(b = low, a, b)").alias("a"), f.col("low").alias("b")).distinct()


def _summary(edges: DataFrame) -> Any:
    """A fingerprint of a set of edges, the same in every order."""
    from pyspark.sql import functions as f

    return edges.agg(f.count("*"), f.sum(f.xxhash64("a", "b").cast("decimal(38,0)"))).first()


def _extract(extract: Callable[[pa.Table], pa.Table], batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    for batch in batches:
        for path in batch["path"].to_pylist():
            with pa.memory_map(path) as source, pa.ipc.open_file(source) as file:
                yield from extract(file.read_all()).to_batches()


def _columns(*names: str) -> Callable[[pa.Table], pa.Table]:
    return functools.partial(_select, names)


def _select(names: Sequence[str], table: pa.Table) -> pa.Table:
    """Columns of signatures in the types that Spark knows."""
    import pyarrow as pa

    columns = {name: table[name] for name in names}
    return pa.table({name: column if name in ("order", "doc_id") else column.cast(pa.binary())
                     for name, column in columns.items()})  # fmt: skip


def _bands(table: pa.Table) -> pa.Table:
    """A row for each band of each document that has words."""
    import pyarrow as pa

    column = table["bands"].combine_chunks()
    keys = column.flatten().to_numpy().reshape(len(column), -1)
    order = table["order"].to_numpy()
    number, row = (place.ravel() for place in np.meshgrid(np.arange(keys.shape[1]), np.arange(len(keys))))
    flat = keys.ravel()
    kept = flat != 0
    return pa.table({"number": pa.array(number[kept], pa.int32()), "band": flat[kept], "order": order[row[kept]]})


def _bucket_pairs(table: pa.Table) -> pa.Table:
    return dedup.bucket_pairs(table.select(["order", "band"]))


def _verify(batches: Iterable[pa.RecordBatch], *, threshold: float) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    for batch in batches:
        if batch.num_rows:
            yield from dedup.verify(_wide(pa.table(batch)), threshold=threshold).to_batches()


def _similarities(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    for batch in batches:
        if batch.num_rows:
            ends = zip(*(batch[f"shingles_{end}"].to_pylist() for end in "ab"), strict=True)
            found = [jaccard(np.frombuffer(a, "<u4"), np.frombuffer(b, "<u4")) for a, b in ends]
            yield pa.record_batch({"order": batch["a"], "kept": batch["b"], "jaccard": pa.array(found, pa.float64())})


def _wide(table: pa.Table) -> pa.Table:
    """Signatures in the types that the functions of `dedup` read."""
    import pyarrow as pa

    types = {"shingles": pa.large_binary(), "sketch": pa.binary(2 * dedup.SKETCH_SIZE)}
    for place, name in enumerate(table.column_names):
        if kind := types.get(name.split("_")[0]):
            table = table.set_column(place, name, table[name].cast(kind))
    return table


def _session(master: str, scratch: Path, settings: dict[str, str]) -> SparkSession:
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise RunError("--engine=spark needs Spark and Java 17: pip install 'llmjax[spark]'") from None
    if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        raise RunError("--engine=spark needs Java 17 or newer: install it, or set JAVA_HOME")
    # Executors start the interpreter that runs here, and find the same llmjax.
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    local = _LOCAL | {"spark.local.dir": str(scratch)} if master.startswith("local") else {}
    builder = SparkSession.builder.master(master).appName("llmjax data build")
    for name, value in (_SETTINGS | local | settings).items():
        builder = builder.config(name, value)
    spark = builder.config("spark.executorEnv.PYTHONPATH", os.environ["PYTHONPATH"]).getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark


_SETTINGS = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "10000",
}
# In one machine small shuffles in few pieces cost least.
_LOCAL = {
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.sql.shuffle.partitions": "4",
}
