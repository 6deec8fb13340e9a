"""The transactional lower half: the record is inserted in the same transaction as the handler's writes.

Effect and record commit together or not at all (I3), so a copy finds either both or neither: one effect, exactly (I2).

base.py: `Inbox`, and `record` for transactions of your own. consumer.py: the decorator. running.py: one message in one
transaction. window.py, points.py: a window of them in one commit. transaction.py: the transaction, watched over.
records.py: the records in SQL.
"""

from .base import Inbox
from .consumer import transactional_consumer

__all__ = ["Inbox", "transactional_consumer"]
