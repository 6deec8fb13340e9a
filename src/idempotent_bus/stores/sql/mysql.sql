-- The dedup store on MariaDB and MySQL, in READ COMMITTED.
--
-- Parameters: key, nonce, token, lease and retention in microseconds. {now} is the clock, read when evaluated.
-- State: 1 reserved, 2 in progress, 3 completed, 4 released, 5 quarantined (its kept_until and purge_after are {far}).
-- Flags: bit 0: the claim took over from one that had started, or from a reservation with this bit. The rest is the
-- verdict on the last claim:
-- 0 refused, 2 ours already, 4 nothing was there (or it was forgotten), 6 taken over.

-- name: claim
-- Always one row per claim, the record after it; flags >= 2 if it is ours.
-- Assignments are made from left to right, each seeing the ones before: `flags` comes first and holds the verdict, made
-- once, under the row's lock; all others obey it, so that no two of them can disagree because the clock moved on.
-- That is also when the token is drawn: after every earlier holder committed its own, so per key tokens grow in the
-- order of the claims. (The one in VALUES is older. It is used only where no record exists; a smaller one than a
-- forgotten record's could only come from a statement that hung for that record's whole life: `timeout` ends it before.)
-- VALUES() is what was proposed: its times are the statement's start, all of one moment.
INSERT INTO {records}
  (record_key, nonce, token, state, flags, attempts, redrive, lease_ends, kept_until, purge_after, fingerprint)
VALUES {rows}
ON DUPLICATE KEY UPDATE
  flags = CASE WHEN kept_until <= {now} THEN 4
               WHEN state IN (1, 2) AND nonce = VALUES(nonce) THEN 2 + flags % 2
               WHEN state <> 4 AND fingerprint <> VALUES(fingerprint) THEN flags % 2
               WHEN state = 4 THEN 6
               WHEN state IN (1, 2) AND lease_ends <= {now} THEN 6 + (state = 2 OR flags % 2 = 1)
               ELSE flags % 2 END,
  token = IF(flags >= 4, {next_token}, token),
  nonce = IF(flags >= 4, VALUES(nonce), nonce),
  attempts = CASE WHEN flags < 4 THEN attempts
                  WHEN flags < 6 OR VALUES(redrive) > redrive THEN VALUES(attempts)
                  ELSE attempts + VALUES(attempts) END,
  redrive = CASE WHEN flags < 4 THEN redrive
                 WHEN flags < 6 THEN VALUES(redrive)
                 ELSE GREATEST(redrive, VALUES(redrive)) END,
  state = IF(flags >= 4, VALUES(state), state),
  fingerprint = IF(flags >= 4, VALUES(fingerprint), fingerprint),
  result = IF(flags >= 4, NULL, result),
  lease_ends = IF(flags >= 2, {now} + VALUES(kept_until) - VALUES(purge_after), lease_ends),
  kept_until = IF(flags >= 2, lease_ends + VALUES(kept_until) - VALUES(lease_ends), kept_until),
  purge_after = CASE WHEN flags < 2 THEN purge_after
                     WHEN flags BETWEEN 4 AND 5 THEN kept_until - VALUES(kept_until) + VALUES(purge_after)
                     ELSE LEAST(purge_after, kept_until) END
{returning};

-- name: row
-- One claim's VALUES; the parameters are numbered.
(:key_#, :nonce_#, {next_token}, :state_#, 4, :counts_#, :redrive_#, {start} + :lease_#,
 {start} + :lease_# + :retention_#, {start} + :retention_#, :fingerprint_#)

-- name: start
-- The statement's start: one moment.
TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6))

-- name: outcome
record_key, token, attempts, state, flags, fingerprint, result, lease_ends - {now}

-- name: outcomes
-- Where INSERT has no RETURNING (MySQL): in the claim's transaction, whose row locks still hold.
SELECT {outcome} FROM {records} WHERE record_key IN ({keys});

-- name: draw
-- Where there are no sequences (MySQL). The counter's row stays locked until the claim's COMMIT: claims come one by one,
-- and tokens grow in their order. All claims of a batch get the same one: tokens are compared within a key only.
UPDATE {tokens} SET value = LAST_INSERT_ID(value + 1) WHERE id = 1;

-- name: renew
UPDATE {records}
SET lease_ends = {now} + :lease, kept_until = {now} + :lease + :retention,
    purge_after = LEAST(purge_after, {now} + :lease + :retention)
WHERE record_key = :key AND token = :token AND nonce = :nonce AND kept_until > {now} AND state IN (1, 2);

-- name: complete
-- A record that is completed already is left as it is; `completed` tells whether it was by the same hold.
UPDATE {records}
SET state = 3, result = :result, kept_until = {now} + :retention, purge_after = LEAST(purge_after, {now} + :retention)
WHERE record_key = :key AND token = :token AND nonce = :nonce AND kept_until > {now} AND state IN (1, 2);

-- name: complete_many
-- As `complete`, for many; `completed_many` in the same transaction tells which are completed by their holds.
UPDATE {records} AS r JOIN ({asked}) AS a ON r.record_key = a.record_key AND r.token = a.token AND r.nonce = a.nonce
SET r.state = 3, r.result = a.result, r.kept_until = {now} + a.retention,
    r.purge_after = LEAST(r.purge_after, {now} + a.retention)
WHERE r.kept_until > {now} AND r.state IN (1, 2);

-- name: asked_one
SELECT :key_# AS record_key, :token_# AS token, :nonce_# AS nonce, :result_# AS result, :retention_# AS retention

-- name: completed_many
SELECT record_key FROM {records}
WHERE record_key IN ({keys}) AND (record_key, token, nonce) IN ({holds}) AND kept_until > {now} AND state = 3;

-- name: one_hold
(:key_#, :token_#, :nonce_#)

-- name: completed
SELECT 1 FROM {records}
WHERE record_key = :key AND token = :token AND nonce = :nonce AND kept_until > {now} AND state = 3;

-- name: release
UPDATE {records}
SET state = 4, attempts = :attempts, kept_until = {now} + :retention,
    purge_after = LEAST(purge_after, {now} + :retention)
WHERE record_key = :key AND token = :token AND nonce = :nonce AND kept_until > {now} AND state IN (1, 2, 4);

-- name: abandon
UPDATE {records}
SET state = 2, attempts = :attempts, lease_ends = {now}, kept_until = {now} + :retention,
    purge_after = LEAST(purge_after, {now} + :retention)
WHERE record_key = :key AND token = :token AND nonce = :nonce AND kept_until > {now} AND state IN (1, 2);

-- name: quarantine
-- `result` before `state`: assignments are made from left to right. `lease_ends` means nothing here, but a repeat must
-- change something: on an engine with a `creator` of the user's, PyMySQL counts only rows that were changed.
UPDATE {records}
SET result = IF(state = 5, result, :note), state = 5, kept_until = {far}, purge_after = {far}, lease_ends = {now}
WHERE record_key = :key AND token = :token AND nonce = :nonce AND kept_until > {now} AND state IN (1, 2, 5);

-- name: resolve
-- The nonce is this call's own: it knows its work again if it was done and the answer lost, and whoever put the record
-- into quarantine has no say any more.
UPDATE {records}
SET state = :state, attempts = IF(:state = 3, attempts, 0), nonce = :nonce, result = NULL,
    kept_until = {now} + :retention, purge_after = {now} + :retention
WHERE record_key = :key AND (state = 5 OR (state IN (3, 4) AND nonce = :nonce));

-- name: quarantined
-- By the purge index, which has the key at its end.
SELECT state, token, attempts, redrive, lease_ends - {now}, kept_until - {now}, fingerprint, result, record_key
FROM {records} WHERE purge_after = {far} AND state = 5 AND record_key >= :first ORDER BY record_key LIMIT :limit;

-- name: forget
-- Absent from now on, as past its retention; whatever the clock does. The row stays until its purge: a claim that began
-- before then meets it, and draws its token after it (see `claim`).
UPDATE {records} SET kept_until = 0, result = NULL
WHERE record_key = :key AND kept_until > {now}
  AND (state IN (3, 4) OR (state IN (1, 2) AND lease_ends <= {now}));

-- name: lookup
SELECT state, token, attempts, redrive, lease_ends - {now}, kept_until - {now}, fingerprint, result
FROM {records} WHERE record_key = :key AND kept_until > {now};

-- name: expired
-- A record in use is passed over, not waited for. The statement's start, not SYSDATE(), so that the index serves.
SELECT record_key FROM {records}
WHERE purge_after <= {start} AND kept_until <= {start} ORDER BY purge_after LIMIT :limit FOR UPDATE SKIP LOCKED;

-- name: purge
DELETE FROM {records} WHERE record_key IN ({keys});
