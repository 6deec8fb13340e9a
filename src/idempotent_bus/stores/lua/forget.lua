-- Forget a record, unless it is held and its lease has not lapsed, or it is in quarantine.
-- KEYS    the record
-- ARGV    none
-- returns 1 there is no record any more, 0 it stays

local record = redis.call('GET', KEYS[1])
if record then
  local state = state_of(record)
  local held = state == RESERVED or state == IN_PROGRESS
  if state == QUARANTINED or (held and number8(record, 42) > server_time()) then
    return 0
  end
  redis.call('DEL', KEYS[1])
end
return 1
