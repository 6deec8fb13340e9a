"""`idempotent-sqla+sqlite:///...`, `+postgresql+psycopg://...`, `+mysql+pymysql://...`: see `transport`."""
