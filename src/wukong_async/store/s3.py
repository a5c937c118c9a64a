"""Objects in S3: values that are too large for the memory of a server.

aiobotocore is loaded when the first of them is met. What S3 answers for the moment only is asked
again by botocore (standard mode); then it is a store that does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from wukong_async import wire
from wukong_async.errors import BucketError, StoreUnreachable
from wukong_async.store import bulk

log = logging.getLogger("wukong.store")

SCHEME = "s3"
PART = 16 * 1024 * 1024
"""Bytes of one request. Larger objects are written in parts, and read in ranges, of this size."""
AT_ONCE = 4
"""Requests with bodies in flight: a body that is written is in memory twice."""
ATTEMPTS = 6
"""Tries of one request, the first included."""
MOST_DELETED = 1000
"""Objects of one DeleteObjects."""
PATIENCE = 20.0
"""Seconds that a deletion may take: it is only in the way of others, who cannot wait for ever."""
CANNOT = (BucketError, StoreUnreachable, TimeoutError)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
GONE = ("NoSuchKey", "404", "InvalidRange")


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where objects are. Its URL is all that others need to know, credentials excepted."""

    name: str
    prefix: str
    region: str
    endpoint: str = ""
    """Default: AWS."""

    @property
    def url(self) -> str:
        """As it stands in pointers."""
        query = urlencode({"prefix": self.prefix, "region": self.region, "endpoint": self.endpoint})
        return f"{SCHEME}://{quote(self.name)}?{query}"

    @classmethod
    def from_url(cls, url: str) -> Self:
        """The inverse of `url`."""
        parts = urlsplit(url)
        return cls(unquote(parts.netloc), **dict(parse_qsl(parts.query, keep_blank_values=True)))


def elsewhere(url: str, name: str) -> str:
    """The name under which a job knows an object that it has in a bucket."""
    return f"{url}#{name}"


def is_elsewhere(name: str) -> bool:
    """Whether an object is in a bucket, by its name."""
    return name.startswith(f"{SCHEME}://")


class Buckets:
    """The clients of a process for S3, made when they are needed."""

    def __init__(self) -> None:
        self._clients: dict[tuple[str, str], Any] = {}
        self._making = asyncio.Lock()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._stack = contextlib.AsyncExitStack()

    async def aclose(self) -> None:
        """Close the clients."""
        self._clients.clear()
        await self._stack.aclose()

    async def put(self, bucket: Bucket, key: str, segments: wire.Segments) -> None:
        """Write an object.

        Raises
        ------
        BucketError, StoreUnreachable
        """
        where = {"Bucket": bucket.name, "Key": key}
        async with self._client(bucket) as client:
            if wire.size(segments) <= PART:
                async with self._slots:
                    await client.put_object(**where, Body=wire.join(segments))
            else:
                await self._put_parts(client, where, segments)

    async def get(self, bucket: Bucket, key: str, size: int) -> memoryview | None:
        """Read an object of this size; None if it is not there, or another."""
        memory = bulk.room(size)
        async with self._client(bucket) as client:
            ranges = [(start, min(start + PART, size)) for start in range(0, size, PART)]
            read = (
                self._get_range(client, bucket.name, key, size, start, memory[start:end])
                for start, end in ranges
            )
            there = await _all(read)
        return memory if all(there) else None

    async def delete(self, bucket: Bucket, keys: Sequence[str]) -> None:
        """Delete objects. What cannot be deleted is left to the bucket's lifecycle rule."""
        for start in range(0, len(keys), MOST_DELETED):
            some = keys[start : start + MOST_DELETED]
            which = {"Objects": [{"Key": key} for key in some], "Quiet": True}
            try:
                async with asyncio.timeout(PATIENCE), self._client(bucket) as client:
                    answer = await client.delete_objects(Bucket=bucket.name, Delete=which)
            except CANNOT as error:
                log.warning("%d objects stay in s3://%s: %s", len(some), bucket.name, error)
                continue
            for refused in answer.get("Errors", ()):
                log.warning("s3://%s/%s stays: %s", bucket.name, refused["Key"], refused)

    async def sweep(self, bucket: Bucket, prefix: str, stay: Collection[str] = ()) -> None:
        """Delete what begins so, but for some; what cannot be deleted as in `delete`."""
        found: list[str] = []
        try:
            async with asyncio.timeout(PATIENCE), self._client(bucket) as client:
                pages = client.get_paginator("list_objects_v2")
                async for page in pages.paginate(Bucket=bucket.name, Prefix=prefix):
                    found += (each["Key"] for each in page.get("Contents", ()))
        except CANNOT as error:
            log.warning("s3://%s/%s cannot be cleaned up: %s", bucket.name, prefix, error)
        await self.delete(bucket, [key for key in found if key not in stay])

    # ------------------------------------------------------------------------------------------

    async def _put_parts(self, client: Any, where: dict[str, str], segments: wire.Segments) -> None:
        upload = (await client.create_multipart_upload(**where))["UploadId"]

        async def put(number: int, part: wire.Segments) -> dict[str, Any]:
            async with self._slots:
                answer = await client.upload_part(
                    **where, UploadId=upload, PartNumber=number, Body=wire.join(part)
                )
            return {"ETag": answer["ETag"], "PartNumber": number}

        try:
            parts = await _all(put(n, part) for n, part in enumerate(wire.split(segments, PART), 1))
            await client.complete_multipart_upload(
                **where, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except BaseException:
            with contextlib.suppress(Exception):
                await client.abort_multipart_upload(**where, UploadId=upload)
            raise

    async def _get_range(
        self, client: Any, bucket: str, key: str, size: int, start: int, target: memoryview
    ) -> bool:
        from botocore.exceptions import ClientError

        end = start + len(target)
        async with self._slots:
            try:
                answer = await client.get_object(
                    Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}"
                )
            except ClientError as error:
                if error.response["Error"]["Code"] in GONE:
                    return False
                raise
            async with answer["Body"] as body:
                if answer["ContentRange"] != f"bytes {start}-{end - 1}/{size}":
                    return False
                filled = 0
                while chunk := await body.read(bulk.AT_ONCE):
                    target[filled : filled + len(chunk)] = chunk
                    filled += len(chunk)
        return filled == len(target)

    @contextlib.asynccontextmanager
    async def _client(self, bucket: Bucket) -> AsyncIterator[Any]:
        """A client for a bucket; what it raises in the body becomes an error of the store."""
        # Half a second of imports that an executor does not need to pay for, off the loop.
        await asyncio.to_thread(import_module, "aiobotocore.session")
        import botocore.exceptions as boto
        from aiohttp import ClientError as HttpError

        where = f"The bucket {bucket.name!r} (wukong.s3_bucket)"
        try:
            yield await self._made(bucket)
        except boto.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500:
                raise StoreUnreachable(f"{where} does not answer: {error}") from error
            raise BucketError(
                f"{where} cannot be used: {error} Does it exist, and may the client and the"
                " function put, get, delete and list objects there?"
            ) from error
        except (boto.ConnectionError, boto.HTTPClientError, HttpError, OSError) as error:
            raise StoreUnreachable(f"{where} does not answer: {error}") from error
        except (boto.BotoCoreError, ValueError) as error:  # No credentials; a name that cannot be.
            raise BucketError(f"{where} cannot be used: {error}") from error

    async def _made(self, bucket: Bucket) -> Any:
        kind = (bucket.region, bucket.endpoint)
        async with self._making:
            if kind not in self._clients:
                from aiobotocore.config import AioConfig
                from aiobotocore.session import get_session

                loopback = urlsplit(bucket.endpoint).hostname in LOOPBACK
                config = AioConfig(
                    # A proxy of the environment cannot reach what listens on this machine alone.
                    proxies={} if loopback else None,
                    retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                    connect_timeout=10,
                    read_timeout=60,
                    # The connection sees to it that nothing is changed, and sums cost time.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    s3={"addressing_style": "path"} if bucket.endpoint else None,
                )
                make = get_session().create_client(
                    SCHEME,
                    region_name=bucket.region,
                    endpoint_url=bucket.endpoint or None,
                    config=config,
                )
                self._clients[kind] = await self._stack.enter_async_context(make)
        return self._clients[kind]


async def _all(work: Iterable[Any]) -> list[Any]:
    """What comes of coroutines that run at once; the first error ends the others."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
