"""Sending many invocations at once: by oneself, or in one frame to the proxy that fires them.

What clients and executors have in common, and what they and the proxy say to each other.
"""

from wukong_async.fanout.client import Fired, ProxyBusy, ProxyClient
from wukong_async.fanout.fanout import Fanout
from wukong_async.fanout.frames import FrameError

__all__ = ["Fanout", "Fired", "FrameError", "ProxyBusy", "ProxyClient"]
