-- Keep a held record, with a note, until it is resolved. Quarantined before by the same hold: 1, and nothing changes.
-- KEYS    the record, the index of its slot
-- ARGV    the hold: token (8 bytes) and nonce (16 bytes); the record's entry in the index; the note
-- returns 1 quarantined, 0 ownership was lost

local record = redis.call('GET', KEYS[1])
if not owned(record, ARGV[1]) or state_of(record) == COMPLETED or state_of(record) == RELEASED then
  return lost(KEYS[1], record)
end
-- The index first: were the script to stop in between, an entry too many is harmless, and one too few hides a record.
redis.call('ZADD', KEYS[2], 0, ARGV[2])
if state_of(record) ~= QUARANTINED then
  local flags = QUARANTINED + HAS_RESULT + (has(record, HAS_FINGERPRINT) and HAS_FINGERPRINT or 0)
  redis.call('SET', KEYS[1], string.char(flags) .. string.sub(record, 2, 41) .. ARGV[3])
end
return 1
