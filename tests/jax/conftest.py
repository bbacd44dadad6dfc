"""Eight devices on one CPU: asked for when tests are collected, before any test can have started JAX."""

import os

FLAG = "--xla_force_host_platform_device_count=8"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()

import jax  # noqa: E402 - the flag is read when JAX first looks for devices


def pytest_sessionstart() -> None:
    """Say what is wrong where it can be seen, rather than in every test that needs a mesh."""
    assert jax.device_count() == 8, f"JAX has {jax.device_count()} devices: it was started before {FLAG} was set"
