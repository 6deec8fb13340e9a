-- The inbox on MariaDB and MySQL, in the caller's transaction. See postgresql.sql for what each statement means.
--
-- There is no INSERT that says whether it was refused in a way that every client setting shows alike, so it is a plain
-- one: a duplicate is error 1062, which ends that statement, not the transaction, and leaves the row locked for reading.
-- {briefly} limits the wait for this statement alone, where the server can.

-- name: take
{briefly}
INSERT INTO {inbox} (record_key, kept_until, redrive, attempts, completed, fingerprint)
VALUES (:key, {now} + :retention, :redrive, 0, 1, :fingerprint);

-- name: take_one
{briefly}
INSERT INTO {inbox} (record_key, kept_until, redrive, attempts, completed, fingerprint)
VALUES (:key, {now} + :retention, :redrive, 0, 0, :fingerprint);

-- name: record
INSERT INTO {inbox} (record_key, kept_until, redrive, attempts, completed, fingerprint)
VALUES (:key, {now} + :retention, 0, 0, 1, :fingerprint);

-- name: take_again
-- After a duplicate. Assignments are made from left to right, each seeing the ones before.
{briefly}
{record_again};

-- name: record_again
UPDATE {inbox} SET
  completed = :completed,
  fingerprint = :fingerprint,
  result = NULL,
  attempts = CASE WHEN :redrive > redrive OR kept_until <= {now} THEN 0 ELSE attempts END,
  redrive = CASE WHEN kept_until <= {now} THEN :redrive ELSE greatest(redrive, :redrive) END,
  kept_until = {now} + :retention
WHERE record_key = :key AND (completed = 0 OR kept_until <= {now});

-- name: attempts
-- As it is now, and as nobody else can change it: a plain SELECT could show an old snapshot.
SELECT attempts FROM {inbox} WHERE record_key = :key FOR UPDATE;

-- name: count
{briefly}
INSERT INTO {inbox} (record_key, kept_until, redrive, attempts, completed, fingerprint)
VALUES (:key, {now} + :retention, :redrive, :least, 0, :fingerprint);

-- name: count_again
{briefly}
UPDATE {inbox} SET
  completed = 0,
  attempts = CASE WHEN :redrive > redrive OR kept_until <= {now} THEN :least ELSE greatest(attempts + 1, :least) END,
  redrive = CASE WHEN kept_until <= {now} THEN :redrive ELSE greatest(redrive, :redrive) END,
  kept_until = {now} + :retention
WHERE record_key = :key AND (completed = 0 OR kept_until <= {now});

-- name: seen
SELECT record_key, completed, fingerprint, result FROM {inbox} WHERE record_key = :key LOCK IN SHARE MODE;

-- name: begin
UPDATE {inbox} SET completed = 1 WHERE record_key = :key;

-- name: failed
UPDATE {inbox} SET attempts = :attempts WHERE record_key = :key;

-- name: store
UPDATE {inbox} SET result = :result WHERE record_key = :key;

-- name: over
SELECT record_key FROM {inbox} WHERE kept_until <= {now} ORDER BY kept_until LIMIT :limit;

-- name: forget
DELETE FROM {inbox} WHERE record_key = :key;

-- name: purge
-- By its key alone: a range over the other index would lock the gaps in which new records are inserted.
DELETE FROM {inbox} WHERE record_key = :key AND kept_until <= {now};

-- name: wait_briefly
-- For servers that cannot limit the wait of one statement.
SET @idempotent_bus_wait = @@innodb_lock_wait_timeout, innodb_lock_wait_timeout = 1;

-- name: wait_as_before
SET innodb_lock_wait_timeout = @idempotent_bus_wait;
