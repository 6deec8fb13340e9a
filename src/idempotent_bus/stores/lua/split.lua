-- Give a slot one bucket more: the next bucket in turn shares its records with the new one.
-- KEYS    the number of buckets of the slot, the bucket in turn, the new one
-- ARGV    the number of buckets that the caller knows
-- returns the number of buckets now; where the caller knew another one nothing else happens

local buckets = tonumber(redis.call('GET', KEYS[1]) or '1')
if buckets ~= tonumber(ARGV[1]) then
  return buckets
end
local live = look_through(KEYS[2], server_time())
local going, gone = {}, {}
for at = 1, #live, 2 do
  if bucket_of('.' .. live[at], buckets + 1) == buckets then
    gone[#gone + 1] = live[at]
    going[#going + 1] = live[at]
    going[#going + 1] = live[at + 1]
  end
end
if #gone > 0 then
  redis.call('HSET', KEYS[3], unpack(going))
  keep(KEYS[3], redis.call('PTTL', KEYS[2]))
  redis.call('HDEL', KEYS[2], unpack(gone))
end
redis.call('SET', KEYS[1], string.format('%.0f', buckets + 1))
return buckets + 1
