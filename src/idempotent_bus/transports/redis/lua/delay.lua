-- Settles one delivery by letting the message wait: it comes back to its list when it is due.
-- KEYS    1 the owner's held; 2 delayed
-- ARGV    1 the delivery's number; 2 owner; 3 delay, ms
-- returns 1 it waits, 0 this delivery was not held any more (it had gone back by itself)
local value = redis.call('HGET', KEYS[1], ARGV[1])
if not value then return 0 end
local _, stop, priority = string.find(value, '^(%S+) ')
local count, text = split(string.sub(value, stop + 1))
text = redelivered(text)
if count > 0 then text = counted(text, count) end
redis.call('ZADD', KEYS[2], clock() + tonumber(ARGV[3]), ARGV[2] .. '.' .. ARGV[1] .. ' ' .. priority .. ' ' .. text)
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
