-- Forget a record, unless it is held and its lease has not lapsed, or it is in quarantine.
-- KEYS    the record, the number of buckets of its slot, its bucket
-- ARGV    the number of buckets that the caller knows
-- returns 1 there is no record any more, 0 it stays; below 0: not yet, the bucket is another one: the number of buckets,
--         negative

local key = key_of(KEYS[1])
local buckets = moved(key, redis.call('GET', KEYS[2]), tonumber(ARGV[1]))
if buckets then
  return -buckets
end
local record = redis.call('GET', KEYS[1])
if record then
  local state = state_of(record)
  local held = state == RESERVED or state == IN_PROGRESS
  if state == QUARANTINED or (held and number8(record, 42) > server_time()) then
    return 0
  end
  redis.call('DEL', KEYS[1])
end
redis.call('HDEL', KEYS[3], field_of(key))
return 1
