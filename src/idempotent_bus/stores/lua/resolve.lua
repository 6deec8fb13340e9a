-- End a quarantine: the record is completed without a result, or released with no attempts counted.
-- KEYS    the record, the index of its slot
-- ARGV    the record's entry in the index; 1 if it is completed, else 0; retention in ms; a nonce of this call's own: it
--         knows its work again if the answer was lost, and whoever put the record into quarantine has no say any more
-- returns 1 resolved, 0 it was not quarantined

local record = redis.call('GET', KEYS[1])
local found = record and state_of(record) == QUARANTINED
if found then
  local flags, attempts = RELEASED, bytes4(0)
  if ARGV[2] == '1' then
    flags, attempts = COMPLETED, string.sub(record, 34, 37)
  end
  flags = flags + (has(record, HAS_FINGERPRINT) and HAS_FINGERPRINT or 0)
  local head = string.char(flags) .. string.sub(record, 2, 9) .. ARGV[4] .. string.sub(record, 26, 33)
  redis.call('SET', KEYS[1], head .. attempts .. string.sub(record, 38, 41), 'PX', ARGV[3])
end
redis.call('ZREM', KEYS[2], ARGV[1])
local again = record and string.sub(record, 10, 25) == ARGV[4] and not found
return (found or again) and 1 or 0
