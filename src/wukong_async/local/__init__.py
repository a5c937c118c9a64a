"""The embedded cluster: a real Valkey, and a loopback Lambda that runs AWS's runtime client.

Nothing here knows of graphs or jobs. A client sees three settings (`endpoint_url`,
`redis_endpoints`, `max_concurrency`) and otherwise does what it would do on AWS.
"""

from wukong_async.local.cluster import ClusterStats, LocalCluster
from wukong_async.local.faults import Faults
from wukong_async.local.function import EventInvokeConfig

__all__ = ["ClusterStats", "EventInvokeConfig", "Faults", "LocalCluster"]
