-- Show a record; writes nothing.
-- KEYS    the record, the number of buckets of its slot, its bucket
-- ARGV    the number of buckets that the caller knows
-- returns nil, or {the record as it lies there, ms until it is forgotten (-1: never), now in us}, a record in the short
--         form as the long one would be, without its token and nonce; or the number of buckets, if the bucket is another one

local now = server_time()
local record = redis.call('GET', KEYS[1])
if record then
  return {record, redis.call('PTTL', KEYS[1]), now}
end
local key = key_of(KEYS[1])
local buckets = moved(key, redis.call('GET', KEYS[2]), tonumber(ARGV[1]))
if buckets then
  return buckets
end
local short = redis.call('HGET', KEYS[3], field_of(key))
if not short or short_until(short) <= now then
  return false
end
local fingerprint = string.sub(short, 11)
local flags = COMPLETED + (fingerprint ~= '' and HAS_FINGERPRINT or 0)
local mark = fingerprint ~= '' and fingerprint or bytes8(0)
local attempts = bytes4(number4(short, 1) % 32)
local head = string.char(flags) .. string.rep(bytes8(0), 3) .. mark
return {head .. attempts .. bytes4(0), math.ceil((short_until(short) - now) / 1000), now}
