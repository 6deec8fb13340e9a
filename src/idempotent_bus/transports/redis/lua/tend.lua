-- Looks after one queue: moves what is due back to its lists and says whose lease has lapsed.
-- Leases count as lapsed only after the queue was watched without a gap for ARGV[1]: after an outage of the server
-- every live consumer must first have had the time to renew.
-- KEYS    1 owners; 2 watch; 3 delayed; from 4: the lists
-- ARGV    1 gap, ms; 2 most to move; 3 the queue's expiry, ms (0: none); from 4: the names of the priorities
-- returns 1 ms until the next is due (-1: none); from 2: owners whose lease lapsed
local now = clock()
local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, ARGV[2])
for i = #due, 1, -1 do
  local _, stop, priority = string.find(due[i], '^%S+ (%S+) ')
  local list = KEYS[4]
  for p = 4, #ARGV do
    if ARGV[p] == priority then list = KEYS[p] end
  end
  redis.call('RPUSH', list, string.sub(due[i], stop + 1))
  redis.call('ZREM', KEYS[3], due[i])
end
if #due > 0 and ARGV[3] ~= '0' then
  for i = 4, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
end
local gap = tonumber(ARGV[1])
local watch = redis.call('HMGET', KEYS[2], 'seen', 'since')
local seen, since = tonumber(watch[1] or 0), tonumber(watch[2] or 0)
if now - seen > gap or now < seen then since = now end
redis.call('HSET', KEYS[2], 'seen', now, 'since', since)
redis.call('PEXPIRE', KEYS[2], gap * 10)
local first = redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
local out = { first[2] and math.max(0, tonumber(first[2]) - now) or -1 }
if now - since >= gap then
  for _, owner in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 10)) do
    out[#out + 1] = owner
  end
end
return out
