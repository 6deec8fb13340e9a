"""`idempotent-redis://`, `idempotent-rediss://` and `idempotent-sentinel://`: see `transport`."""
