"""`manage.py relay` and `manage.py purge`."""
