-- Give a held record back, if the hold still owns it. Released before by the same hold: again, the same.
-- KEYS    the record
-- ARGV    the hold: token (8 bytes) and nonce (16 bytes); retention in ms; the attempts that were counted
-- returns 1 released, 0 ownership was lost

local record = redis.call('GET', KEYS[1])
if not owned(record, ARGV[1]) or state_of(record) == COMPLETED or state_of(record) == QUARANTINED then
  return lost(KEYS[1], record)
end
local flags = RELEASED + (has(record, HAS_FINGERPRINT) and HAS_FINGERPRINT or 0)
local rest = string.sub(record, 2, 33) .. bytes4(tonumber(ARGV[3])) .. string.sub(record, 38, 41)
redis.call('SET', KEYS[1], string.char(flags) .. rest, 'PX', ARGV[2])
return 1
