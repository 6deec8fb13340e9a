"""The app's migrations. Their DDL is that of `idempotent_bus.schema`."""
