-- The outbox on PostgreSQL, MariaDB, MySQL and SQLite. Times are microseconds; {now} is the database's clock.
--
-- State: 0 free, 1 ordered, 2 dead. A row is claimed while its lease_ends lies ahead; a claim changes no indexed column.
-- A row that was sent is deleted at once: measured against marking it and purging later, see
-- tests/benchmarks/reports/outbox.md.

-- name: add
INSERT INTO {outbox}
  (inner_msg_id, order_key, made_at, due_at, lease_ends, attempts, state,
   exchange, routing_key, content_type, content_encoding, headers, options, body)
VALUES
  (:inner_msg_id, :order_key, {now}, {now} + :delay, 0, 0, :state,
   :exchange, :routing_key, :content_type, :content_encoding, :headers, :options, :body)
{if_new};

-- name: add_plain
-- The common one: no order, no delay, JSON, and an id that was made a moment ago, so that no row can have it. What all
-- of these have alike is written out: a parameter costs more than a column.
INSERT INTO {outbox}
  (inner_msg_id, made_at, due_at, lease_ends, attempts, state,
   exchange, routing_key, content_type, content_encoding, headers, options, body)
VALUES
  (:inner_msg_id, {now}, {now}, 0, 0, 0,
   :exchange, :routing_key, 'application/json', 'utf-8', '{}', :options, :body)
{notify};

-- name: if_new_postgresql
ON CONFLICT (inner_msg_id) DO NOTHING {notify_postgresql}

-- name: if_new_sqlite
ON CONFLICT (inner_msg_id) DO NOTHING RETURNING id

-- name: if_new_mysql
-- No clause: INSERT IGNORE would bend values that do not fit, and an error ends no transaction here.

-- name: notify_postgresql
-- A NOTIFY makes all commits of the database that have one wait for each other, so there is one only where a relay
-- sleeps: it then holds the lock, and the shared one cannot be had. Who gets that keeps it until its commit is visible,
-- and the relay does not sleep before.
RETURNING CASE WHEN pg_try_advisory_xact_lock_shared({lock}) THEN '' ELSE CAST(pg_notify('{channel}', '') AS text) END

-- name: notify_sqlite
-- Nobody listens.

-- name: notify_mysql
-- Nobody listens.

-- name: clock
SELECT {now};

-- name: clock_postgresql
-- Statements are planned each time for what the table is now: a plan from the time when it was empty would read it all.
SELECT {now}, set_config('plan_cache_mode', 'force_custom_plan', true);

-- name: due
SELECT id, length(body), due_at FROM {outbox} {due_index}
WHERE state = 0 AND due_at <= :now AND due_at >= :floor AND lease_ends <= :now
ORDER BY due_at, id LIMIT :limit {lock_rows};

-- name: heads
-- Rows in the order of their keys, from the first row of the first key after the cursor on.
SELECT id, order_key, state, due_at, lease_ends, length(body) FROM {outbox} {order_index}
WHERE order_key > :cursor ORDER BY order_key, id LIMIT :limit;

-- name: lock_heads
-- By number alone: given a state too, PostgreSQL may prefer the index on that, and read all there is in it.
SELECT id, state, due_at, lease_ends FROM {outbox} WHERE id IN :ids {lock_rows};

-- name: take
-- An owner who is still there died, or stalled for a whole lease: that counts, since the row may have been the reason.
UPDATE {outbox}
SET attempts = attempts + CASE WHEN owner IS NULL THEN 0 ELSE 1 END, owner = :owner, lease_ends = {now} + :lease
WHERE id IN :ids AND state <> 2 AND lease_ends <= :now;

-- name: taken
SELECT id, inner_msg_id, order_key, attempts, exchange, routing_key, content_type, content_encoding, headers, options,
       body
FROM {outbox} WHERE id IN :ids AND owner = :owner ORDER BY id;

-- name: sent
-- Whoever holds it by now: it was confirmed.
DELETE FROM {outbox} WHERE id IN :ids;

-- name: sent_before
-- The same on another connection than the claim's. After a failover that lost rows a number may be a new message's.
DELETE FROM {outbox} WHERE id = :id AND inner_msg_id = :message;

-- name: release
-- Not sent: it is due as it was.
UPDATE {outbox} SET owner = NULL, lease_ends = 0 WHERE id IN :ids AND owner = :owner;

-- name: postpone
-- Sent, perhaps; whether that counts is not known yet.
UPDATE {outbox} SET owner = NULL, lease_ends = 0, due_at = {now} + :later, last_error = :error
WHERE id = :id AND owner = :owner;

-- name: fail
UPDATE {outbox}
SET owner = NULL, lease_ends = 0, due_at = {now} + :later, last_error = :error,
    state = CASE WHEN attempts + 1 >= :most THEN 2 ELSE state END, attempts = attempts + 1
WHERE id = :id AND owner = :owner;

-- name: count
-- Rows whose outcome was unknown, and after which the broker took others.
UPDATE {outbox}
SET state = CASE WHEN attempts + 1 >= :most THEN 2 ELSE state END, attempts = attempts + 1
WHERE id IN :ids AND state <> 2;

-- name: redrive
UPDATE {outbox}
SET state = CASE WHEN order_key IS NULL THEN 0 ELSE 1 END, attempts = 0, due_at = {now}, owner = NULL, lease_ends = 0
WHERE id IN :ids AND state = 2;

-- name: discard
DELETE FROM {outbox} WHERE id IN :ids AND state = 2;

-- name: dead
SELECT id, inner_msg_id, exchange, routing_key, attempts, made_at, last_error FROM {outbox} {due_index}
WHERE state = 2 AND id > :after ORDER BY id LIMIT :limit;

-- name: backlog
SELECT state, count(*), min(made_at), sum(CASE WHEN due_at > :now THEN 1 ELSE 0 END),
       sum(CASE WHEN attempts > 0 THEN 1 ELSE 0 END)
FROM {outbox} GROUP BY state;
