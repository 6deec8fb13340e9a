-- Give a slot one bucket less: the last one goes back into the one that it was split from, if that has the room.
-- KEYS    the number of buckets of the slot, the bucket that stays, the last one
-- ARGV    the number of buckets that the caller knows
-- returns the number of buckets now; where the caller knew another one nothing else happens

local buckets = tonumber(redis.call('GET', KEYS[1]) or '1')
if buckets ~= tonumber(ARGV[1]) or buckets < 2 then
  return buckets
end
local now = server_time()
local staying, going = look_through(KEYS[2], now), look_through(KEYS[3], now)
if (#staying + #going) / 2 > CROWDED / 2 then
  return buckets
end
if #going > 0 then
  redis.call('HSET', KEYS[2], unpack(going))
  keep(KEYS[2], redis.call('PTTL', KEYS[3]))
  redis.call('DEL', KEYS[3])
end
redis.call('SET', KEYS[1], string.format('%.0f', buckets - 1))
return buckets - 1
