-- The short form: completed records without a result lie together in small hashes, the buckets of a slot. Put behind
-- record.lua before the scripts that must look there.
--
-- A bucket has at most 126 fields, so that Redis keeps it as one packed list (the default limits of every version: 128
-- entries or more, 64 bytes). One field per record: the last 15 bytes of the key, all that the slot does not say. Its
-- value:
--   1-4    when the record's retention is over, in units of 4 seconds since 1,750,000,000, times 32, + its attempts (room until 2042:
--          after that, as before that second, a record keeps its long form)
--   5-10   a digest of the hold that completed it: enough to tell a repeat of that completion from anybody else's
--   11-18  fingerprint, left out if there is none
-- A retention is rounded up to the next unit: never forgotten early, remembered 4 seconds longer at most. The bucket's
-- own expiry is later than that of every field. Fields that are over are dropped when every eighth record comes in.
--
-- How many buckets a slot has is written under its key `buckets` (nothing: 1). They grow one by one (linear hashing):
-- with `buckets` = 2^k + i the first i ones of 2^k have been split in two, so the number of a record's bucket is its hash
-- modulo 2^(k+1), or where that does not exist yet, modulo 2^k. The client names the bucket, since every key must be
-- declared; the script checks that it is still the right one, and else tells the number of buckets, as Cluster tells
-- where a slot has moved.

local UNIT, SINCE, MOST_UNITS, MOST_ATTEMPTS = 4, 1750000000, 2 ^ 27, 31
local MOST, CROWDED, SPARSE, LOOK_THROUGH = 126, 96, 8, 8

local function key_of(name)
  return string.sub(name, -16)
end

local function field_of(key)
  return string.sub(key, 2)
end

-- The number of the bucket of a key, or of a field with any byte before it.
local function bucket_of(key, buckets)
  local size = 1
  while size <= buckets do
    size = size * 2
  end
  local number = number4(key, 2) % size
  return number < buckets and number or number - size / 2
end

-- The number of buckets if the caller's bucket is the wrong one, else nothing. told: what stands under `buckets`.
local function moved(key, told, believed)
  local buckets = tonumber(told or '1')
  if buckets ~= believed and bucket_of(key, buckets) ~= bucket_of(key, believed) then
    return buckets
  end
end

-- When the retention of a short record is over, in microseconds.
local function short_until(short)
  return (math.floor(number4(short, 1) / 32) * UNIT + SINCE) * 1000000
end

-- The short record of a key in a bucket, if there is one that is not over. One that is over is dropped.
local function short_of(bucket, key, now)
  local short = redis.call('HGET', bucket, field_of(key))
  if short then
    if short_until(short) > now then
      return short
    end
    redis.call('HDEL', bucket, field_of(key))
  end
end

-- The fields of a bucket that are not over, as a flat list of fields and values; the others are dropped.
local function look_through(bucket, now)
  local all = redis.call('HGETALL', bucket)
  local live, over = {}, {}
  for at = 1, #all, 2 do
    if short_until(all[at + 1]) > now then
      live[#live + 1] = all[at]
      live[#live + 1] = all[at + 1]
    else
      over[#over + 1] = all[at]
    end
  end
  if #over > 0 then
    redis.call('HDEL', bucket, unpack(over))
  end
  return live
end

-- Let a bucket live for so many milliseconds at least; a little longer, so that few records need to move its expiry.
local function keep(bucket, ms)
  if redis.call('PTTL', bucket) < ms then
    redis.call('PEXPIRE', bucket, string.format('%.0f', ms + math.floor(ms / 8)))
  end
end
