"""`WukongClient`: what users of this package hold."""

from wukong_async.client.client import WukongClient
from wukong_async.client.job import Job

__all__ = ["Job", "WukongClient"]
