-- The dedup store on SQLite. One writer at a time: what is between BEGIN IMMEDIATE and COMMIT is alone in the file.
--
-- Parameters: key, nonce, token, lease and retention in microseconds. {now} is one moment within a statement.
-- State: 1 reserved, 2 in progress, 3 completed, 4 released, 5 quarantined. Flags: 1 if the claim took over from one that
-- had started, or from a reservation with this flag. {far} is the end of time: kept_until and purge_after while quarantined.

-- name: claim
-- One row (key, token, attempts, state, flags) if the record is ours now, else none. `draw` must follow in the same
-- transaction: then no two claims see the same value of the counter, and tokens grow in the order of the claims.
INSERT INTO {records} AS r
  (record_key, nonce, token, state, flags, attempts, redrive, lease_ends, kept_until, purge_after, fingerprint)
SELECT :key, :nonce, {next_token}, :state, 0, :counts, :redrive, now + :lease, now + :lease + :retention,
       now + :retention, :fingerprint
FROM (SELECT {now} AS now) WHERE true
ON CONFLICT (record_key) DO UPDATE SET
  nonce = excluded.nonce,
  token = CASE WHEN {ours} THEN r.token ELSE excluded.token END,
  state = CASE WHEN {ours} THEN r.state ELSE excluded.state END,
  flags = CASE WHEN {ours} THEN r.flags WHEN {forgotten} THEN 0 WHEN r.state = 2 THEN 1 WHEN r.state = 1 THEN r.flags ELSE 0 END,
  attempts = CASE WHEN {ours} THEN r.attempts
                  WHEN {forgotten} OR excluded.redrive > r.redrive THEN excluded.attempts
                  ELSE r.attempts + excluded.attempts END,
  redrive = CASE WHEN {forgotten} THEN excluded.redrive ELSE max(r.redrive, excluded.redrive) END,
  lease_ends = excluded.lease_ends,
  kept_until = excluded.kept_until,
  purge_after = CASE WHEN {forgotten} THEN excluded.purge_after ELSE min(r.purge_after, excluded.kept_until) END,
  fingerprint = CASE WHEN {ours} THEN r.fingerprint ELSE excluded.fingerprint END,
  result = NULL
WHERE {forgotten}
   OR r.state = 4
   OR (r.state IN (1, 2)
       AND (r.nonce = excluded.nonce
            OR (r.lease_ends <= {moment} AND (r.fingerprint <> excluded.fingerprint) IS NOT TRUE)))
RETURNING record_key, token, attempts, state, flags;

-- name: moment
-- The INSERT's own moment, taken back from what it proposed.
(excluded.purge_after + excluded.lease_ends - excluded.kept_until)

-- name: forgotten
r.kept_until <= {moment}

-- name: ours
(r.kept_until > {moment} AND r.state IN (1, 2) AND r.nonce = excluded.nonce)

-- name: draw
UPDATE {tokens} SET value = :token WHERE value < :token;

-- name: seen
-- Why the claim was refused.
SELECT r.record_key, r.state, r.fingerprint, r.result, r.lease_ends - clock.now, r.nonce
FROM (SELECT {now} AS now) AS clock, {records} AS r
WHERE r.record_key = :key AND r.kept_until > clock.now;

-- name: renew
UPDATE {records}
SET lease_ends = {now} + :lease, kept_until = {now} + :lease + :retention,
    purge_after = min(purge_after, {now} + :lease + :retention)
WHERE record_key = :key AND token = :token AND nonce = :nonce AND kept_until > {now} AND state IN (1, 2);

-- name: complete
-- A record that is completed already is left as it is; `completed` tells whether it was by the same hold.
UPDATE {records}
SET state = 3, result = :result, kept_until = {now} + :retention, purge_after = min(purge_after, {now} + :retention)
WHERE record_key = :key AND token = :token AND nonce = :nonce AND kept_until > {now} AND state IN (1, 2);

-- name: completed
SELECT 1 FROM {records}
WHERE record_key = :key AND token = :token AND nonce = :nonce AND kept_until > {now} AND state = 3;

-- name: release
UPDATE {records}
SET state = 4, attempts = :attempts, kept_until = {now} + :retention,
    purge_after = min(purge_after, {now} + :retention)
WHERE record_key = :key AND token = :token AND nonce = :nonce AND kept_until > {now} AND state IN (1, 2, 4);

-- name: abandon
UPDATE {records}
SET state = 2, attempts = :attempts, lease_ends = {now}, kept_until = {now} + :retention,
    purge_after = min(purge_after, {now} + :retention)
WHERE record_key = :key AND token = :token AND nonce = :nonce AND kept_until > {now} AND state IN (1, 2);

-- name: quarantine
UPDATE {records}
SET result = CASE WHEN state = 5 THEN result ELSE :note END, state = 5, kept_until = {far}, purge_after = {far}
WHERE record_key = :key AND token = :token AND nonce = :nonce AND kept_until > {now} AND state IN (1, 2, 5);

-- name: resolve
-- The nonce is this call's own: it knows its work again if it was done and the answer lost, and whoever put the record
-- into quarantine has no say any more.
UPDATE {records}
SET state = :state, attempts = CASE WHEN :state = 3 THEN attempts ELSE 0 END, nonce = :nonce, result = NULL,
    kept_until = {now} + :retention, purge_after = {now} + :retention
WHERE record_key = :key AND (state = 5 OR (state IN (3, 4) AND nonce = :nonce));

-- name: quarantined
-- By the purge index, which has the key at its end.
SELECT r.state, r.token, r.attempts, r.redrive, r.lease_ends - clock.now, r.kept_until - clock.now, r.fingerprint,
       r.result, r.record_key
FROM (SELECT {now} AS now) AS clock, {records} AS r
WHERE r.purge_after = {far} AND r.state = 5 AND r.record_key >= :first ORDER BY r.record_key LIMIT :limit;

-- name: forget
-- Absent from now on, as past its retention; whatever the clock does. The row stays until its purge.
UPDATE {records} SET kept_until = 0, result = NULL
WHERE record_key = :key AND kept_until > {now}
  AND (state IN (3, 4) OR (state IN (1, 2) AND lease_ends <= {now}));

-- name: lookup
SELECT r.state, r.token, r.attempts, r.redrive, r.lease_ends - clock.now, r.kept_until - clock.now, r.fingerprint,
       r.result
FROM (SELECT {now} AS now) AS clock, {records} AS r
WHERE r.record_key = :key AND r.kept_until > clock.now;

-- name: purge
DELETE FROM {records}
WHERE record_key IN (
  SELECT record_key FROM {records} WHERE purge_after <= {now} AND kept_until <= {now} ORDER BY purge_after LIMIT :limit);
