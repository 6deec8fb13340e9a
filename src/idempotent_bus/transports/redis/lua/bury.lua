-- Settles one delivery by moving the message to the dead list, where it stays until a person moves it.
-- KEYS    1 the owner's held; 2 dead
-- ARGV    1 the delivery's number; 2 the reason, one word
-- returns 1 buried, 0 this delivery was not held any more
local value = redis.call('HGET', KEYS[1], ARGV[1])
if not value then return 0 end
redis.call('LPUSH', KEYS[2], clock() .. ' ' .. ARGV[2] .. ' ' .. value)
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
