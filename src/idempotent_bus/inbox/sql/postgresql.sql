-- The inbox on PostgreSQL, in the caller's transaction and isolation level.
--
-- Parameters: key (hex of a uuid), retention in microseconds, fingerprint, redrive. {now} is the clock, read when
-- evaluated. completed: 1 done, or being done by the transaction that wrote it; 0 attempts are counted, nothing else.

-- name: take
-- One row (attempts, the transaction's number) if the record is ours now, else none: it was completed before. Waits
-- only for {wait} for a transaction that holds it, in this statement alone: what the session had set comes back with
-- the row. (Without a row, or with an error, the transaction is over, and the setting was its own.)
WITH limits AS MATERIALIZED (
  SELECT earlier.wait, set_config('lock_timeout', '{wait}', true) AS set
  FROM (SELECT current_setting('lock_timeout') AS wait OFFSET 0) AS earlier)
INSERT INTO {inbox} AS r (record_key, kept_until, redrive, attempts, completed, fingerprint)
SELECT CAST(:key AS uuid), {now} + CAST(:retention AS bigint), CAST(:redrive AS bigint), 0, 1,
       CAST(:fingerprint AS bytea)
FROM limits
{again}
RETURNING r.attempts, CAST(pg_current_xact_id() AS text), (SELECT set_config('lock_timeout', wait, true) FROM limits);

-- name: take_many
-- The rows that are ours now, not completed yet; in the order of the keys, so that two windows which share some never
-- wait for each other in a circle. The wait is set by the caller, since the first row that comes back is not the last
-- that is inserted.
INSERT INTO {inbox} AS r (record_key, kept_until, redrive, attempts, completed, fingerprint)
SELECT a.record_key, {now} + CAST(:retention AS bigint), a.redrive, 0, 0, a.fingerprint
FROM unnest(CAST(:keys AS uuid[]), CAST(:redrives AS bigint[]), CAST(:fingerprints AS bytea[]))
       AS a (record_key, redrive, fingerprint)
ORDER BY a.record_key
{again}
RETURNING r.record_key, r.attempts, CAST(pg_current_xact_id() AS text);

-- name: take_one
-- One of a window, where `take_many` met somebody.
INSERT INTO {inbox} AS r (record_key, kept_until, redrive, attempts, completed, fingerprint)
VALUES (CAST(:key AS uuid), {now} + CAST(:retention AS bigint), CAST(:redrive AS bigint), 0, 0,
        CAST(:fingerprint AS bytea))
{again}
RETURNING r.attempts, CAST(pg_current_xact_id() AS text);

-- name: record
-- In a transaction of the user's, who says how long a statement waits there. One row is written, or none.
INSERT INTO {inbox} AS r (record_key, kept_until, redrive, attempts, completed, fingerprint)
VALUES (CAST(:key AS uuid), {now} + CAST(:retention AS bigint), 0, 0, 1, CAST(:fingerprint AS bytea))
{again};

-- name: again
-- A record that was only counted, or whose retention is over, is taken; an earlier result is not this run's.
ON CONFLICT (record_key) DO UPDATE SET
  completed = EXCLUDED.completed,
  fingerprint = EXCLUDED.fingerprint,
  result = NULL,
  attempts = CASE WHEN EXCLUDED.redrive > r.redrive OR r.kept_until <= {now} THEN 0 ELSE r.attempts END,
  redrive = CASE WHEN r.kept_until <= {now} THEN EXCLUDED.redrive ELSE greatest(r.redrive, EXCLUDED.redrive) END,
  kept_until = EXCLUDED.kept_until
WHERE r.completed = 0 OR r.kept_until <= {now}

-- name: count
-- One row (attempts), or none: completed in the meantime.
INSERT INTO {inbox} AS r (record_key, kept_until, redrive, attempts, completed, fingerprint)
VALUES (CAST(:key AS uuid), {now} + CAST(:retention AS bigint), CAST(:redrive AS bigint), CAST(:least AS integer), 0,
        CAST(:fingerprint AS bytea))
ON CONFLICT (record_key) DO UPDATE SET
  completed = 0,
  attempts = CASE WHEN EXCLUDED.redrive > r.redrive OR r.kept_until <= {now} THEN EXCLUDED.attempts
                  ELSE greatest(r.attempts + 1, EXCLUDED.attempts) END,
  redrive = CASE WHEN r.kept_until <= {now} THEN EXCLUDED.redrive ELSE greatest(r.redrive, EXCLUDED.redrive) END,
  kept_until = EXCLUDED.kept_until
WHERE r.completed = 0 OR r.kept_until <= {now}
RETURNING r.attempts;

-- name: seen
SELECT record_key, completed, fingerprint, result FROM {inbox} WHERE record_key = ANY (CAST(:keys AS uuid[]));

-- name: begin
UPDATE {inbox} SET completed = 1 WHERE record_key = CAST(:key AS uuid);

-- name: failed
UPDATE {inbox} SET attempts = CAST(:attempts AS integer) WHERE record_key = CAST(:key AS uuid);

-- name: store
UPDATE {inbox} SET result = CAST(:result AS bytea) WHERE record_key = CAST(:key AS uuid);

-- name: forget
DELETE FROM {inbox} WHERE record_key = CAST(:key AS uuid);

-- name: purge
-- What is in use is passed over, not waited for. The clock in a sub-select is read once, so that the index serves.
DELETE FROM {inbox}
WHERE record_key IN (
  SELECT record_key FROM {inbox} WHERE kept_until <= (SELECT {now})
  ORDER BY kept_until LIMIT :limit
  FOR UPDATE SKIP LOCKED)
AND kept_until <= (SELECT {now});

-- name: wait_briefly
SELECT wait FROM (SELECT current_setting('lock_timeout') AS wait OFFSET 0) AS earlier
WHERE set_config('lock_timeout', '{wait}', true) IS NOT NULL;

-- name: wait_as_before
SELECT set_config('lock_timeout', CAST(:wait AS text), true);
