"""What a publish goes through: prepared once (`outgoing`), sent over a lane of its broker's kind, confirmed, resent.

| module | its one idea |
|---|---|
| `outgoing` | a message as it will be sent, serialised once |
| `lane` | a private connection that is thrown away after any doubt |
| `amqp`, `virtual` | the lanes over AMQP, over kombu's virtual transports, and over ours |
| `confirms` | which confirm belongs to which message |
| `resend` | what is known after each failed send, and what may be claimed at the end |
| `streaming` | many messages, with a window of confirms under way |
"""
