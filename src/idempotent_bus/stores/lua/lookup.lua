-- Show a record; writes nothing.
-- KEYS    the record
-- ARGV    none
-- returns nil, or {the record as it lies there, ms until it is forgotten (-1: never), now in us}

local record = redis.call('GET', KEYS[1])
if not record then
  return false
end
return {record, redis.call('PTTL', KEYS[1]), server_time()}
