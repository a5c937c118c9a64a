from __future__ import annotations

import dataclasses

import dask
import pytest

from tests.paths import ROOT
from wukong_async.config import Settings, redact
from wukong_async.errors import ConfigError


def test_the_original_s_names_and_defaults() -> None:
    settings = Settings()
    assert settings.proxy_port == 8989
    assert settings.max_task_fanout == 10
    assert not settings.use_local_proxy


def test_dask_config_is_read_and_overridden() -> None:
    with dask.config.set({"wukong.function-name": "f", "wukong.invoke_concurrency": 7}):
        settings = Settings.load({"invoke_concurrency": 8})
    assert settings.function_name == "f"
    assert settings.invoke_concurrency == 8


@pytest.mark.parametrize(
    "endpoints",
    [
        ["redis://a:6379", "redis://b:6380"],
        [("a", 6379), ("b", 6380)],
        "a:6379, b:6380",
        ["a:6379", ["b", 6380]],
    ],
)
def test_redis_endpoints_in_all_notations(endpoints: object) -> None:
    settings = Settings.load({"redis_endpoints": endpoints})
    assert settings.redis_endpoints == ("redis://a:6379", "redis://b:6380")


def test_times_and_sizes_in_dask_s_notation() -> None:
    settings = Settings.load({"lease": "1500ms", "inline_limit": "4 KiB"})
    assert settings.lease == 1.5
    assert settings.inline_limit == 4096


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"functoin_name": "f"}, "wukong.functoin_name is not a setting. Did you mean wukong.func"),
        ({"qwertz": 1}, "wukong.qwertz is not a setting. Known: function_name"),
        ({"proxy_port": "8989"}, "wukong.proxy_port must be int, not '8989'"),
        ({"use_local_proxy": 1}, "wukong.use_local_proxy must be bool, not 1"),
        ({"max_concurrency": True}, "wukong.max_concurrency must be int, not True"),
        ({"max_concurrency": 0}, "wukong.max_concurrency must be at least 1"),
        ({"lease": "soon"}, "wukong.lease: cannot read 'soon'"),
        ({"lease": -1}, "wukong.lease must be positive"),
        ({"inline_limit": "big"}, "wukong.inline_limit: cannot read 'big'"),
        ({"redis_endpoints": 6379}, "wukong.redis_endpoints must be a list of endpoints"),
        ({"redis_endpoints": ["nowhere"]}, "'nowhere' is neither a redis://"),
        ({"redis_endpoints": ["a:1", "a:1"]}, "names the same endpoint twice"),
        ({"function_name": ""}, "wukong.function_name must be str, not ''"),
        ({"ttl": 1, "lease": 1}, "wukong.ttl (1 s) must be at least twice wukong.lease"),
        ({"use_local_proxy": True, "proxy_address": "h"}, "exclude each other"),
    ],
)
def test_a_bad_setting_is_named(overrides: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load(overrides)
    assert says in str(caught.value)


def test_a_section_that_is_no_mapping_is_named() -> None:
    with dask.config.set({"wukong": 3}), pytest.raises(ConfigError, match="must be a mapping"):
        Settings.load()


def test_secrets_are_not_shown() -> None:
    settings = Settings(redis_endpoints=("redis://u:hunter2@h:1",), proxy_secret="hunter3")
    assert "hunter" not in repr(settings)
    assert redact("redis://u:hunter2@h:1") == "redis://u:***@h:1"


def test_every_setting_is_described_and_in_the_table() -> None:
    table = (ROOT / "docs" / "configuration.md").read_text()
    for spec in dataclasses.fields(Settings):
        assert spec.metadata["doc"]
        assert f"`{spec.name}`" in table, f"{spec.name} is missing in docs/configuration.md"


def test_a_secret_is_not_shown_in_an_error() -> None:
    with pytest.raises(ConfigError, match=r"wukong.proxy_secret must be str") as caught:
        Settings.load({"proxy_secret": 12345678})
    assert "1234" not in str(caught.value)
