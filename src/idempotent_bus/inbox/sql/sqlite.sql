-- The inbox on SQLite, in the caller's transaction. See postgresql.sql for what each statement means. One writer at a
-- time, so a statement that has begun meets nobody; how long it waits to begin is the busy timeout's matter.

-- name: take
INSERT INTO {inbox} AS r (record_key, kept_until, redrive, attempts, completed, fingerprint)
VALUES (:key, {now} + :retention, :redrive, 0, 1, :fingerprint)
{again}
RETURNING attempts, '';

-- name: take_one
INSERT INTO {inbox} AS r (record_key, kept_until, redrive, attempts, completed, fingerprint)
VALUES (:key, {now} + :retention, :redrive, 0, 0, :fingerprint)
{again}
RETURNING attempts, '';

-- name: take_new
-- As take_one, of a record that is not there yet; else nothing is done.
INSERT INTO {inbox} (record_key, kept_until, redrive, attempts, completed, fingerprint)
VALUES (:key, {now} + :retention, :redrive, 0, 0, :fingerprint)
ON CONFLICT DO NOTHING;

-- name: record
INSERT INTO {inbox} AS r (record_key, kept_until, redrive, attempts, completed, fingerprint)
VALUES (:key, {now} + :retention, 0, 0, 1, :fingerprint)
{again};

-- name: again
ON CONFLICT (record_key) DO UPDATE SET
  completed = excluded.completed,
  fingerprint = excluded.fingerprint,
  result = NULL,
  attempts = CASE WHEN excluded.redrive > r.redrive OR r.kept_until <= {now} THEN 0 ELSE r.attempts END,
  redrive = CASE WHEN r.kept_until <= {now} THEN excluded.redrive ELSE max(r.redrive, excluded.redrive) END,
  kept_until = excluded.kept_until
WHERE r.completed = 0 OR r.kept_until <= {now}

-- name: count
INSERT INTO {inbox} AS r (record_key, kept_until, redrive, attempts, completed, fingerprint)
VALUES (:key, {now} + :retention, :redrive, :least, 0, :fingerprint)
ON CONFLICT (record_key) DO UPDATE SET
  completed = 0,
  attempts = CASE WHEN excluded.redrive > r.redrive OR r.kept_until <= {now} THEN excluded.attempts
                  ELSE max(r.attempts + 1, excluded.attempts) END,
  redrive = CASE WHEN r.kept_until <= {now} THEN excluded.redrive ELSE max(r.redrive, excluded.redrive) END,
  kept_until = excluded.kept_until
WHERE r.completed = 0 OR r.kept_until <= {now}
RETURNING attempts;

-- name: seen
SELECT record_key, completed, fingerprint, result FROM {inbox} WHERE record_key = :key;

-- name: begin
UPDATE {inbox} SET completed = 1 WHERE record_key = :key;

-- name: failed
UPDATE {inbox} SET attempts = :attempts WHERE record_key = :key;

-- name: store
UPDATE {inbox} SET result = :result WHERE record_key = :key;

-- name: forget
DELETE FROM {inbox} WHERE record_key = :key;

-- name: purge
DELETE FROM {inbox}
WHERE record_key IN (SELECT record_key FROM {inbox} WHERE kept_until <= {now} ORDER BY kept_until LIMIT :limit);
