-- The dedup store on PostgreSQL. Every statement is a transaction of its own, in READ COMMITTED.
--
-- Parameters: key, nonce (uuid), token, lease and retention in microseconds. {now} is the clock, read when evaluated.
-- State: 1 reserved, 2 in progress, 3 completed, 4 released, 5 quarantined. Flags: 1 if the claim took over from one that
-- had started, or from a reservation with this flag; 2 if a completed record has a result that is empty. {far} is the end
-- of time: kept_until and purge_after while quarantined.
-- A row without a result has an empty one, not NULL as rows of earlier versions do: a single NULL costs a row 8 bytes, for
-- its map of twelve columns. {told} is the result as it is told.

-- name: claim
-- One row (key, token, attempts, state, flags) if the record is ours now, else none.
INSERT INTO {records} AS r
  (record_key, nonce, token, state, flags, attempts, redrive, lease_ends, kept_until, purge_after, fingerprint, result)
SELECT CAST(:key AS uuid), CAST(:nonce AS uuid), {next_token}, CAST(:state AS smallint), 0, CAST(:counts AS integer),
       CAST(:redrive AS bigint), clock.now + CAST(:lease AS bigint),
       clock.now + CAST(:lease AS bigint) + CAST(:retention AS bigint), clock.now + CAST(:retention AS bigint),
       CAST(:fingerprint AS bytea), CAST('' AS bytea)
FROM (SELECT {now} AS now) AS clock
{take};

-- name: claim_many
-- The rows that are ours now. Sorted, so that two batches lock their common rows in the same order.
INSERT INTO {records} AS r
  (record_key, nonce, token, state, flags, attempts, redrive, lease_ends, kept_until, purge_after, fingerprint, result)
SELECT a.record_key, a.nonce, {next_token}, a.state, 0, a.counts, a.redrive, clock.now + a.lease,
       clock.now + a.lease + a.retention, clock.now + a.retention, a.fingerprint, CAST('' AS bytea)
FROM (SELECT {now} AS now) AS clock,
     unnest(CAST(:keys AS uuid[]), CAST(:nonces AS uuid[]), CAST(:states AS smallint[]), CAST(:counts AS integer[]),
            CAST(:redrives AS bigint[]), CAST(:leases AS bigint[]), CAST(:retentions AS bigint[]),
            CAST(:fingerprints AS bytea[]))
       AS a (record_key, nonce, state, counts, redrive, lease, retention, fingerprint)
ORDER BY a.record_key
{take};

-- name: take
-- The part that both claims share. The row is locked before WHERE and SET are evaluated, so the clock is fresh, and the
-- token is drawn after every earlier holder committed its own: per key, tokens grow in the order of the claims.
-- (The one drawn for the VALUES is older. It is used only where no record exists; a smaller one than a forgotten
-- record's could only come from a statement that hung there for that record's whole life: `timeout` ends it before.)
-- SET reads the clock once, in its sub-select; a later moment than WHERE's only turns "ours" into "forgotten".
ON CONFLICT (record_key) DO UPDATE SET
  (nonce, token, state, flags, attempts, redrive, lease_ends, kept_until, purge_after, fingerprint, result) = (
    SELECT EXCLUDED.nonce,
           CASE WHEN was.ours THEN r.token ELSE {next_token} END,
           CASE WHEN was.ours THEN r.state ELSE EXCLUDED.state END,
           CAST(CASE WHEN was.ours THEN r.flags WHEN was.forgotten THEN 0 WHEN r.state = 2 THEN 1
                     WHEN r.state = 1 THEN r.flags ELSE 0 END AS smallint),
           CASE WHEN was.ours THEN r.attempts
                WHEN was.forgotten OR EXCLUDED.redrive > r.redrive THEN EXCLUDED.attempts
                ELSE r.attempts + EXCLUDED.attempts END,
           CASE WHEN was.forgotten THEN EXCLUDED.redrive ELSE greatest(r.redrive, EXCLUDED.redrive) END,
           was.now + was.lease,
           was.now + was.lease + was.retention,
           CASE WHEN was.forgotten THEN was.now + was.retention
                ELSE least(r.purge_after, was.now + was.lease + was.retention) END,
           CASE WHEN was.ours THEN r.fingerprint ELSE EXCLUDED.fingerprint END,
           CAST('' AS bytea)
    FROM (SELECT clock.now,
                 r.kept_until <= clock.now AS forgotten,
                 r.kept_until > clock.now AND r.state IN (1, 2) AND r.nonce = EXCLUDED.nonce AS ours,
                 EXCLUDED.kept_until - EXCLUDED.purge_after AS lease,
                 EXCLUDED.kept_until - EXCLUDED.lease_ends AS retention
          FROM (SELECT {now} AS now) AS clock) AS was)
WHERE r.kept_until <= {now}
   OR r.state = 4
   OR (r.state IN (1, 2)
       AND (r.nonce = EXCLUDED.nonce
            OR (r.lease_ends <= {now} AND (r.fingerprint <> EXCLUDED.fingerprint) IS NOT TRUE)))
RETURNING r.record_key, r.token, r.attempts, r.state, r.flags;

-- name: seen
-- Why the claim of these keys was refused, as the records are now.
SELECT r.record_key, r.state, r.fingerprint, {told}, r.lease_ends - clock.now, r.nonce
FROM (SELECT {now} AS now) AS clock, {records} AS r
WHERE r.record_key = ANY (CAST(:keys AS uuid[])) AND r.kept_until > clock.now;

-- name: renew
UPDATE {records} AS r
SET lease_ends = clock.now + CAST(:lease AS bigint),
    kept_until = clock.now + CAST(:lease AS bigint) + CAST(:retention AS bigint),
    purge_after = least(purge_after, clock.now + CAST(:lease AS bigint) + CAST(:retention AS bigint))
FROM (SELECT {now} AS now) AS clock
WHERE record_key = CAST(:key AS uuid) AND token = :token AND nonce = CAST(:nonce AS uuid)
  AND kept_until > clock.now AND state IN (1, 2);

-- name: renew_many
-- The holds that are still good. Locked in order first: an UPDATE would take them in any order and could deadlock.
WITH clock AS MATERIALIZED (SELECT {now} AS now),
ours AS MATERIALIZED (
  SELECT r.record_key
  FROM unnest(CAST(:keys AS uuid[]), CAST(:tokens AS bigint[]), CAST(:nonces AS uuid[])) AS a (record_key, token, nonce)
  JOIN {records} AS r ON r.record_key = a.record_key AND r.token = a.token AND r.nonce = a.nonce
  WHERE r.kept_until > (SELECT now FROM clock) AND r.state IN (1, 2)
  ORDER BY r.record_key
  FOR UPDATE OF r)
UPDATE {records} AS r
SET lease_ends = clock.now + CAST(:lease AS bigint),
    kept_until = clock.now + CAST(:lease AS bigint) + CAST(:retention AS bigint),
    purge_after = least(purge_after, clock.now + CAST(:lease AS bigint) + CAST(:retention AS bigint))
FROM ours, clock
WHERE r.record_key = ours.record_key
RETURNING r.record_key, r.token, r.nonce;

-- name: complete
-- A record that is completed already is left as it is; `completed` tells whether it was by the same hold.
UPDATE {records} AS r
SET state = 3, result = coalesce(CAST(:result AS bytea), ''),
    flags = CASE WHEN CAST(:result AS bytea) = '' THEN 2 ELSE 0 END, kept_until = clock.now + CAST(:retention AS bigint),
    purge_after = least(purge_after, clock.now + CAST(:retention AS bigint))
FROM (SELECT {now} AS now) AS clock
WHERE record_key = CAST(:key AS uuid) AND token = :token AND nonce = CAST(:nonce AS uuid)
  AND kept_until > clock.now AND state IN (1, 2);

-- name: complete_many
-- The keys that were completed now. Locked in order first, as by `renew_many`.
WITH clock AS MATERIALIZED (SELECT {now} AS now),
ours AS MATERIALIZED (
  SELECT r.record_key, a.result, a.retention
  FROM unnest(CAST(:keys AS uuid[]), CAST(:tokens AS bigint[]), CAST(:nonces AS uuid[]), CAST(:results AS bytea[]),
              CAST(:retentions AS bigint[])) AS a (record_key, token, nonce, result, retention)
  JOIN {records} AS r ON r.record_key = a.record_key AND r.token = a.token AND r.nonce = a.nonce
  WHERE r.kept_until > (SELECT now FROM clock) AND r.state IN (1, 2)
  ORDER BY r.record_key
  FOR UPDATE OF r)
UPDATE {records} AS r
SET state = 3, result = coalesce(ours.result, ''), flags = CASE WHEN ours.result = '' THEN 2 ELSE 0 END,
    kept_until = clock.now + ours.retention,
    purge_after = least(purge_after, clock.now + ours.retention)
FROM ours, clock
WHERE r.record_key = ours.record_key
RETURNING r.record_key;

-- name: completed
SELECT 1 FROM {records}
WHERE record_key = CAST(:key AS uuid) AND token = :token AND nonce = CAST(:nonce AS uuid)
  AND kept_until > {now} AND state = 3;

-- name: release
UPDATE {records} AS r
SET state = 4, attempts = CAST(:attempts AS integer), kept_until = clock.now + CAST(:retention AS bigint),
    purge_after = least(purge_after, clock.now + CAST(:retention AS bigint))
FROM (SELECT {now} AS now) AS clock
WHERE record_key = CAST(:key AS uuid) AND token = :token AND nonce = CAST(:nonce AS uuid)
  AND kept_until > clock.now AND state IN (1, 2, 4);

-- name: abandon
UPDATE {records} AS r
SET state = 2, attempts = CAST(:attempts AS integer), lease_ends = clock.now,
    kept_until = clock.now + CAST(:retention AS bigint),
    purge_after = least(purge_after, clock.now + CAST(:retention AS bigint))
FROM (SELECT {now} AS now) AS clock
WHERE record_key = CAST(:key AS uuid) AND token = :token AND nonce = CAST(:nonce AS uuid)
  AND kept_until > clock.now AND state IN (1, 2);

-- name: quarantine
UPDATE {records}
SET state = 5, result = CASE WHEN state = 5 THEN result ELSE CAST(:note AS bytea) END, kept_until = {far},
    purge_after = {far}
WHERE record_key = CAST(:key AS uuid) AND token = :token AND nonce = CAST(:nonce AS uuid)
  AND kept_until > {now} AND state IN (1, 2, 5);

-- name: resolve
-- The nonce is this call's own: it knows its work again if it was done and the answer lost, and whoever put the record
-- into quarantine has no say any more.
UPDATE {records}
SET state = CAST(:state AS smallint), attempts = CASE WHEN CAST(:state AS smallint) = 3 THEN attempts ELSE 0 END,
    nonce = CAST(:nonce AS uuid), result = '', flags = 0, kept_until = {now} + CAST(:retention AS bigint),
    purge_after = {now} + CAST(:retention AS bigint)
WHERE record_key = CAST(:key AS uuid) AND (state = 5 OR (state IN (3, 4) AND nonce = CAST(:nonce AS uuid)));

-- name: quarantined
-- By the purge index. Materialized, or the order by key might tempt the planner to walk all records in that order.
WITH kept AS MATERIALIZED (SELECT * FROM {records} WHERE purge_after = {far} AND state = 5)
SELECT r.state, r.token, r.attempts, r.redrive, r.lease_ends - clock.now, r.kept_until - clock.now, r.fingerprint,
       {told}, r.record_key
FROM (SELECT {now} AS now) AS clock, kept AS r
WHERE r.record_key >= CAST(:first AS uuid) ORDER BY r.record_key LIMIT :limit;

-- name: forget
-- Absent from now on, as past its retention; whatever the clock does. The row stays until its purge: a claim that began
-- before then meets it, and draws its token after it (see `take`).
UPDATE {records} SET kept_until = 0, result = ''
WHERE record_key = CAST(:key AS uuid) AND kept_until > {now}
  AND (state IN (3, 4) OR (state IN (1, 2) AND lease_ends <= {now}));

-- name: lookup
SELECT r.state, r.token, r.attempts, r.redrive, r.lease_ends - clock.now, r.kept_until - clock.now, r.fingerprint,
       {told}
FROM (SELECT {now} AS now) AS clock, {records} AS r
WHERE r.record_key = CAST(:key AS uuid) AND r.kept_until > clock.now;

-- name: purge
-- A record in use is passed over, not waited for. The clock in a sub-select is read once, so that the index serves.
DELETE FROM {records}
WHERE record_key IN (
  SELECT record_key FROM {records}
  WHERE purge_after <= (SELECT {now}) AND kept_until <= (SELECT {now})
  ORDER BY purge_after LIMIT :limit
  FOR UPDATE SKIP LOCKED);
