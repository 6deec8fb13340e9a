"""What lies between a committed row of the outbox and the broker.

| module | its one idea |
|---|---|
| `words` | states of a row, and the name under which a relay is woken |
| `outbox.sql` | the statements, for all three kinds of database |
| `rows` | the outbox's table: every statement a method |
| `walk` | from key to key through the rows that are sent in order |
| `claiming` | which rows a relay takes, so that several share the work |
| `wakeup` | sleep until there is something to do |
| `sending` | a batch of rows through the producer, and what came of each |
"""
