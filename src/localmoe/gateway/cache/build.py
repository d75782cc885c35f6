"""Puts a cache together as its settings say."""

from pathlib import Path

from localmoe.gateway.cache.config import CacheConfig
from localmoe.gateway.cache.disk import DiskLevel
from localmoe.gateway.cache.levels import Cache, SlowLevel
from localmoe.gateway.cache.memory import MemoryLevel


def make_cache(config: CacheConfig, *, directory: Path) -> Cache:
    """A cache that is not started.

    Args:
        directory: of the level on disk.
    """
    max_entry_bytes = config.max_entry_bytes
    slow_levels: list[SlowLevel] = []
    if config.redis_url is not None:
        from localmoe.gateway.cache.redis import RedisLevel  # its library is slow to load

        slow_levels.append(
            RedisLevel(
                config.redis_url,
                ttl_s=config.redis_ttl_s,
                timeout_s=config.redis_timeout_s,
                max_entry_bytes=max_entry_bytes,
            )
        )
    if config.disk_bytes:
        slow_levels.append(
            DiskLevel(
                directory, max_bytes=config.disk_bytes, ttl_s=config.disk_ttl_s, max_entry_bytes=max_entry_bytes
            )
        )
    memory = MemoryLevel(
        max_bytes=config.memory_bytes, max_entries=config.memory_entries, ttl_s=config.memory_ttl_s
    )
    return Cache(memory, slow_levels, max_entry_bytes=max_entry_bytes)
