"""Connects to Ray, which is an extra: only the functions that use it import it."""

import os

_OBJECT_STORE = 100_000_000  # bytes of a new local cluster; little data passes through


def start_ray(address="local", num_cpus=2):
    """The module `ray`, connected, and whether this call connected it.

    Its usage statistics are switched off.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: no cluster at this address, or a new one does not start.
    """
    ray = import_ray()
    if ray.is_initialized():
        return ray, False
    options = {"log_to_driver": False, "logging_level": "warning"}
    if address == "local":
        options |= {
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE,
        }
    else:
        ours = {name: os.environ[name] for name in os.environ if name[:4] == "EHI_"}
        options["runtime_env"] = {"env_vars": ours}
    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises many types, even Exception
        raise ConnectionError(f"no Ray at {address!r}: {error}") from error
    return ray, True


def import_ray():
    """The module `ray`, or an ImportError that says how to get it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise ImportError(
            "Ray is not installed: pip install 'ehi[ray]' installs it"
        ) from None
    return ray
