"""idempotent-bus: in a system that must not lose messages, nothing is ever done twice."""

from __future__ import annotations

from .transports import register as _register

_register()
