"""The membership card story, played with real processes that are killed: what `idempotent-bus demo` runs.

A charge service publishes one message per payment; card services receive them and issue one card each. Confirms and
acks are lost, consumers are killed with SIGKILL at named steps. The same input is played without the library, with
a dedup store, and with the inbox. Cards go into a table without a unique constraint, so that a double shows.
"""
