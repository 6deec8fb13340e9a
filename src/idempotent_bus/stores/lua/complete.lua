-- Make a held record completed, if the hold still owns it. Completed before by the same hold: done, and nothing changes.
-- KEYS    the record, the number of buckets of its slot, its bucket
-- ARGV    packed: 1-24 the hold, token (8 bytes) and nonce (16 bytes); 25-30 the digest of the hold; 31-38 retention in
--         ms; 39-42 the number of buckets that the caller knows; 43 1 if the short form will do; and the result, left
--         out if there is none
-- returns 1 completed; 2 the same, and its slot needs a bucket more, 3 one less; 0 ownership was lost;
--         below 0: it has no key of its own, and the bucket is another one: the number of buckets, negative

local key, believed = key_of(KEYS[1]), number4(ARGV[1], 39)
local record = redis.call('GET', KEYS[1])
local elsewhere = moved(key, redis.call('GET', KEYS[2]), believed)
local now = server_time()
if not record then
  if elsewhere then
    return -elsewhere
  end
  local short = short_of(KEYS[3], key, now)
  local ours = short and string.sub(short, 5, 10) == string.sub(ARGV[1], 25, 30)
  return ours and 1 or lost(KEYS[1], record)
end
if not owned(record, string.sub(ARGV[1], 1, 24)) or state_of(record) == RELEASED or state_of(record) == QUARANTINED then
  return lost(KEYS[1], record)
end
if state_of(record) == COMPLETED then
  return 1
end

local retention, attempts = number8(ARGV[1], 31), number4(record, 34)
local units = math.ceil((now / 1000000 + retention / 1000 - SINCE) / UNIT)
-- Where the bucket is another one by now, the record keeps a key of its own: the caller may be dead and not ask again.
local fits = string.byte(ARGV[1], 43) == 1 and not ARGV[2] and not elsewhere
  and attempts <= MOST_ATTEMPTS and number4(record, 38) == 0 and units >= 0 and units < MOST_UNITS
local many = 0
if fits then
  many = redis.call('HLEN', KEYS[3])
  if many >= SPARSE and many % LOOK_THROUGH == 0 then
    many = #look_through(KEYS[3], now) / 2
  end
end
if fits and many < MOST then
  local short = bytes4(units * 32 + attempts) .. string.sub(ARGV[1], 25, 30)
  if has(record, HAS_FINGERPRINT) then
    short = short .. string.sub(record, 26, 33)
  end
  redis.call('HSET', KEYS[3], field_of(key), short)
  keep(KEYS[3], retention + UNIT * 1000)
  redis.call('DEL', KEYS[1])
else
  local flags = COMPLETED + (has(record, HAS_FINGERPRINT) and HAS_FINGERPRINT or 0) + (ARGV[2] and HAS_RESULT or 0)
  local kept = string.char(flags) .. string.sub(record, 2, 41) .. (ARGV[2] or '')
  redis.call('SET', KEYS[1], kept, 'PX', string.format('%.0f', retention))
end
if many >= CROWDED then
  return 2
end
return fits and many < SPARSE and believed > 1 and 3 or 1
