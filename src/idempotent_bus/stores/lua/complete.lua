-- Make a held record completed, if the hold still owns it. Completed before by the same hold: 1, and nothing changes.
-- KEYS    the record
-- ARGV    the hold: token (8 bytes) and nonce (16 bytes); retention in ms; the result, left out if there is none
-- returns 1 completed, 0 ownership was lost

local record = redis.call('GET', KEYS[1])
if not owned(record, ARGV[1]) or state_of(record) == RELEASED or state_of(record) == QUARANTINED then
  return 0
end
if state_of(record) ~= COMPLETED then
  local flags = COMPLETED + (has(record, HAS_FINGERPRINT) and HAS_FINGERPRINT or 0) + (ARGV[3] and HAS_RESULT or 0)
  redis.call('SET', KEYS[1], string.char(flags) .. string.sub(record, 2, 41) .. (ARGV[3] or ''), 'PX', ARGV[2])
end
return 1
