"""The store: Redis or Valkey servers that hold a job's records, state and values.

`Connections` owns the connections of a process and knows when to ask again; `JobStore` speaks
for one job: the protocol's scripts on its metadata shard, its objects on the data shards.
"""

from wukong_async.store.connections import Connections
from wukong_async.store.job import JobStore, NewJob, lapsed_jobs
from wukong_async.store.s3 import Bucket
from wukong_async.store.values import MANIFEST, Place, block_name, commit_body, payload, place_of

__all__ = [
    "MANIFEST",
    "Bucket",
    "Connections",
    "JobStore",
    "NewJob",
    "Place",
    "block_name",
    "commit_body",
    "lapsed_jobs",
    "payload",
    "place_of",
]
