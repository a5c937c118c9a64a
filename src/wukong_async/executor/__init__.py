"""The executor: a local scheduler over the part of a graph that it walks into.

`Service` is what a warm sandbox keeps from one invocation to the next; `Incarnation` is one
invocation: a shell that carries out what the engine decides.
"""

from wukong_async.executor.service import Service

__all__ = ["Service"]
