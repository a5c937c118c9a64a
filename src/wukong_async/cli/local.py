"""`wukong local up`: one cluster in the foreground, for several clients."""

from __future__ import annotations

import signal
import sys

from wukong_async.local import LocalCluster

HOW_TO_CONNECT = """\
{cluster} is up. In other terminals of this machine:

{exports}
    python
    >>> from wukong_async import WukongClient
    >>> with WukongClient() as client: ...

or, without the variables:

    WukongClient({arguments})

Ctrl-C stops it.
"""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def up(workers: int | None) -> int:
    """Run a cluster until interrupted or terminated, be it while it starts."""
    cluster = LocalCluster(workers)
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        cluster.start()
        settings = cluster.settings
        print(
            HOW_TO_CONNECT.format(
                cluster=repr(cluster).strip("<>"),
                exports="".join(
                    f'    export DASK_WUKONG__{name.upper()}="{_shown(value)}"\n'
                    for name, value in settings.items()
                ),
                arguments=", ".join(f"{k}={_shown(v)!r}" for k, v in settings.items()),
            )
        )
        sys.stdout.flush()
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.close()
    print("stopped")
    return 0


def _interrupt(*_: object) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # A second one would leave the cluster half closed.
    raise KeyboardInterrupt


def _shown(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
