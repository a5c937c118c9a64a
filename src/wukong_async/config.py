"""Settings: one frozen, typed view on `dask.config` under `wukong.*`.

The only module that reads configuration. `Settings.load()` takes what Dask found in YAML
files, in `DASK_WUKONG__*` variables and in `dask.config.set`, then keyword overrides, and
answers with a value in which every field has its declared type; anything else raises
`ConfigError` and names the setting.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import dask.config
from dask.utils import parse_bytes, parse_timedelta

from wukong_async.errors import ConfigError

NAMESPACE = "wukong"
REDACTED = "***"
MOST = 10**9
"""Seconds (30 years) and counts: far below what Lua's numbers and timers can still hold."""
LARGEST = 512 * 1024 * 1024
"""Bytes of one argument of a command, as Redis and Valkey are set up by default."""

MOST_IN_BUCKET = 5 * 1024**4
"""Bytes of an object in S3."""


def _setting(
    default: object,
    doc: str,
    unit: str = "",
    *,
    least: int = 1,
    most: int | None = None,
    choices: Sequence[str] = (),
) -> typing.Any:
    most = most or (LARGEST if unit == "bytes" else MOST)
    limits = {"least": least, "most": most, "choices": choices}
    return field(default=default, metadata={"doc": doc, "unit": unit, **limits})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set. docs/configuration.md shows the same table.

    Times are seconds and accept Dask's notation (`"500ms"`, `"2 minutes"`); sizes are bytes
    and accept `"16 KiB"`.
    """

    function_name: str = _setting(
        "wukong-executor", "Lambda function that runs the executors (name, ARN or alias)."
    )
    region: str | None = _setting(
        None, "AWS region; default: the one of the AWS environment, else us-east-1."
    )
    endpoint_url: str | None = _setting(
        None, "Where the Lambda API answers; default: AWS. A local cluster sets it."
    )
    redis_endpoints: tuple[str, ...] = _setting(
        (),
        "Redis / Valkey servers: URLs (`redis://`, `rediss://`, `unix://`), `host:port` or"
        " (host, port) pairs. A job's metadata is on one of them, its objects on all.",
    )
    proxy_address: str | None = _setting(
        None, "Host of the proxy that fires wide fan-outs; default: no proxy."
    )
    proxy_port: int = _setting(8989, "Port of the proxy.", most=65535)
    proxy_secret: str | None = _setting(
        None, "Shared secret of the proxy and its peers; no proxy runs without one."
    )
    proxy_concurrency: int = _setting(
        128, "Invoke calls that a proxy has in flight, instead of `invoke_concurrency`."
    )
    use_local_proxy: bool = _setting(False, "A local cluster starts a proxy in its own loop.")
    max_task_fanout: int = _setting(
        10,
        "More invocations than this at once go through the proxy, where there is one; and an"
        " executor's first ones, however few: they would have a client of AWS loaded.",
        least=0,
    )
    invoke_concurrency: int = _setting(128, "Invoke calls in flight, and the size of their pool.")
    preload: bool = _setting(
        False,
        "A sandbox loads the AWS client when it starts, and not when it first invokes somebody,"
        " which takes a second then. For provisioned concurrency; a local cluster sets it.",
    )
    max_concurrency: int = _setting(
        1000, "Concurrency slots: most executors of one job that may run at the same time."
    )
    threads_per_executor: int | None = _setting(
        None,
        "Tasks that an executor runs at once, each in a thread; default: what the function is set"
        " up for, or else one per vCPU that its memory brings (1,769 MB each); a local cluster: 1.",
        most=256,
    )
    leaf_batch: int | None = _setting(
        None,
        "Tasks without inputs that each first executor is given; default: as many executors begin"
        " as the job is expected to be worth.",
    )
    hold: float | None = _setting(
        None,
        "How long a ready task waits before it is offered to another executor, and an output before"
        " it is written; default: what is worth it, by what has been measured. 0, with"
        " `leaf_batch` 1, is how the Wukong paper does it.",
        "seconds",
        least=0,
    )
    max_attempts: int = _setting(
        3, "Begins of an executor without progress before the job fails with ExecutorLost."
    )
    lease: float = _setting(
        10.0, "How long an executor may be silent before it is given up for dead.", "seconds"
    )
    grace: float = _setting(
        10.0, "How long an invocation may take to begin before it is sent again.", "seconds"
    )
    ttl: float = _setting(
        3600.0,
        "How long anything of a job outlives its client. More than twice the function's timeout.",
        "seconds",
    )
    job_timeout: float | None = _setting(
        None,
        "How long a job may run before it fails with JobTimeout; default: no limit.",
        "seconds",
    )
    result_ttl: float = _setting(
        3600.0,
        "How long a job's results are kept once it has ended and its client is gone.",
        "seconds",
    )
    store_timeout: float = _setting(
        30.0, "How long the store may be silent before StoreUnreachable is raised.", "seconds"
    )
    inline_limit: int = _setting(
        16 * 1024, "Values up to this size travel inside commits.", "bytes", least=0
    )
    part_size: int = _setting(
        16 * 1024 * 1024, "Larger values are stored in parts of this size.", "bytes"
    )
    s3_bucket: str | None = _setting(
        None, "S3 bucket for values above `s3_limit`; default: all values are in Redis / Valkey."
    )
    s3_prefix: str = _setting("wukong/", "What the names of objects in the bucket begin with.")
    s3_limit: int = _setting(
        64 * 1024 * 1024,
        "Values above this size are stored in `s3_bucket`.",
        "bytes",
        least=0,
        most=MOST_IN_BUCKET,
    )
    s3_endpoint_url: str | None = _setting(
        None, "Where S3 answers, for the client and for the function; default: AWS."
    )
    compression: str = _setting(
        "auto",
        "Large values: `auto` compresses where that saves time, which it never does over a unix"
        " socket; `lz4` wherever it makes them smaller; `none`. Takes the package `lz4`.",
        choices=("auto", "lz4", "none"),
    )
    block_tasks: int = _setting(256, "Most tasks in one block of a plan.")
    block_size: int = _setting(256 * 1024, "Blocks of a plan larger than this are cut.", "bytes")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = _coerce(spec.name, spec.type, getattr(self, spec.name), _unit(spec))
            object.__setattr__(self, spec.name, value)
        for spec in dataclasses.fields(self):
            least, most = spec.metadata["least"], spec.metadata["most"]
            value = getattr(self, spec.name)
            # Written so that nan is in no range.
            timed = spec.type == "float" or (spec.type == "float | None" and value is not None)
            if timed and not (0 < value <= MOST or value == least == 0):
                sign = "not negative" if least == 0 else "positive"
                raise ConfigError(
                    f"wukong.{spec.name} must be {sign} and at most {MOST} s, not {value}."
                )
            choices = spec.metadata["choices"]
            if choices and value not in choices:
                raise ConfigError(
                    f"wukong.{spec.name} must be one of {', '.join(choices)}, not {value!r}."
                )
            counted = spec.type == "int" or (spec.type == "int | None" and value is not None)
            if counted and value < least:
                raise ConfigError(f"wukong.{spec.name} must be at least {least}, not {value}.")
            if counted and value > most:
                raise ConfigError(f"wukong.{spec.name} must be at most {most}, not {value}.")
        if self.ttl < 2 * self.lease:
            raise ConfigError(
                f"wukong.ttl ({self.ttl:g} s) must be at least twice wukong.lease"
                f" ({self.lease:g} s): a running job would lose its data."
            )
        if self.use_local_proxy and self.proxy_address is not None:
            raise ConfigError(
                "wukong.use_local_proxy and wukong.proxy_address exclude each other: keep the"
                " first to start a proxy, the second to use one that runs already."
            )

    @classmethod
    def load(cls, overrides: Mapping[str, object] | None = None) -> Settings:
        """Settings from `dask.config`, with `overrides` on top.

        Raises
        ------
        ConfigError
            For a name that is no setting or a value of the wrong type.
        """
        configured = dask.config.get(NAMESPACE, None) or {}
        if not isinstance(configured, Mapping):
            raise ConfigError(f"The `{NAMESPACE}` section must be a mapping, not {configured!r}.")
        values: dict[str, typing.Any] = {}
        for source in (configured, overrides or {}):
            for name, value in source.items():
                values[_known(str(name))] = value
        return cls(**values)

    def replace(self, **changes: object) -> Settings:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **{_known(k): v for k, v in changes.items()})  # type: ignore[arg-type]

    def environment(self) -> dict[str, str]:
        """The `DASK_WUKONG__*` variables that give another process these settings."""
        return {
            f"DASK_WUKONG__{spec.name.upper()}": repr(_plain(getattr(self, spec.name)))
            for spec in dataclasses.fields(self)
            if getattr(self, spec.name) != spec.default
        }

    def __repr__(self) -> str:
        shown = []
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value == spec.default:
                continue
            if spec.name == "redis_endpoints":
                value = tuple(redact(url) for url in value)
            elif "secret" in spec.name:
                value = REDACTED
            shown.append(f"{spec.name}={value!r}")
        return f"Settings({', '.join(shown)})"


def is_nearby(url: str) -> bool:
    """Whether an endpoint is on this machine."""
    return url.startswith("unix:") or urlsplit(url).hostname in {"localhost", "127.0.0.1", "::1"}


def redact(url: str) -> str:
    """`url` without its password, even if it is malformed."""
    url = re.sub(r"(://[^:@]*:).*@", rf"\1{REDACTED}@", url)
    return re.sub(r"([?&]password=)[^&]*", rf"\1{REDACTED}", url)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _unit(spec: dataclasses.Field[object]) -> str:
    return str(spec.metadata["unit"])


def _known(name: str) -> str:
    canonical = name.replace("-", "_")
    names = [spec.name for spec in dataclasses.fields(Settings)]
    if canonical in names:
        return canonical
    close = difflib.get_close_matches(canonical, names, n=1)
    hint = f" Did you mean wukong.{close[0]}?" if close else f" Known: {', '.join(names)}."
    raise ConfigError(f"wukong.{name} is not a setting.{hint}")


def _coerce(name: str, annotation: object, value: object, unit: str) -> object:
    """`value` as the type that the annotation (a string) of setting `name` declares."""
    if value is None and "None" in str(annotation):
        return None
    match str(annotation).removesuffix(" | None"):
        case "str" if isinstance(value, str) and value:
            return value
        case "bool" if isinstance(value, bool):
            return value
        case "int" if unit == "bytes" and isinstance(value, str):
            return _parsed(name, value, parse_bytes)
        case "int" if isinstance(value, int) and not isinstance(value, bool):
            return value
        case "float" if isinstance(value, str):
            return _parsed(name, value, lambda text: float(parse_timedelta(text)))
        case "float" if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _parsed(name, value, float)
        case "tuple[str, ...]":
            return _endpoints(name, value)
    expected = str(annotation) + (f" ({unit})" if unit else "")
    shown = REDACTED if "secret" in name else repr(value)
    raise ConfigError(f"wukong.{name} must be {expected}, not {shown}.")


def _parsed(name: str, value: object, parse: typing.Callable[[typing.Any], object]) -> object:
    if isinstance(value, str) and not any(map(str.isdigit, value)):
        # Dask reads "" as 1 byte and "s" as 1 second.
        raise ConfigError(f"wukong.{name}: cannot read {value!r} (there is no number in it).")
    try:
        return parse(value)
    except (ValueError, KeyError, OverflowError) as error:
        raise ConfigError(f"wukong.{name}: cannot read {value!r} ({error}).") from None


def _endpoints(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, Sequence):
        raise ConfigError(f"wukong.{name} must be a list of endpoints, not {value!r}.")
    urls = tuple(_endpoint(name, item) for item in value)
    if len(set(urls)) != len(urls):
        raise ConfigError(f"wukong.{name} names the same endpoint twice.")
    return urls


def _endpoint(name: str, item: object) -> str:
    url = item
    if isinstance(url, (tuple, list)) and len(url) == 2:
        host, port = url
        url = f"[{host}]:{port}" if str(host).count(":") > 1 else f"{host}:{port}"
    if isinstance(url, str) and re.fullmatch(r"([\w.-]+|\[[\w:.%]+\]):\d+", url):
        url = f"redis://{url}"
    if not isinstance(url, str) or not re.match(r"(redis|rediss|unix)://", url):
        raise ConfigError(
            f"wukong.{name}: {redact(repr(item))} is neither a redis://, rediss:// or unix:// URL,"
            " nor host:port, nor a (host, port) pair. An IPv6 address in host:port has brackets."
        )
    try:
        _check_url(url)
    except Exception as error:  # redis-py's own are of many types.
        shown = redact(url)
        raise ConfigError(f"wukong.{name}: {shown!r} cannot be used: {error}") from None
    return url


def _check_url(url: str) -> None:
    from redis.asyncio import ConnectionPool

    parts = urlsplit(url)
    if parts.scheme == "unix":
        if parts.hostname or not parts.path:
            raise ValueError("the socket's path is missing or does not begin with a slash.")
    else:
        try:
            port = parts.port
        except ValueError:
            port = 0  # The error shows what may be a part of the password.
        if not parts.hostname or port == 0:
            raise ValueError(
                "the host is missing or the port is not one of 1 to 65535; special characters in"
                " a password are written as %XX."
            )
    # Unknown options are refused only when a connection is made; it connects later.
    ConnectionPool.from_url(url).make_connection()  # type: ignore[no-untyped-call]
