"""What a user's own tests need: time that passes only when told."""

from __future__ import annotations

from .clock import ManualClock

__all__ = ["ManualClock"]
