"""`WukongClient`: what users of this package hold."""

from wukong_async.client.client import WukongClient

__all__ = ["WukongClient"]
