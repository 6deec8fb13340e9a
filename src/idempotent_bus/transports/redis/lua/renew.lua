-- Extends an owner's lease on one queue, if it still has one.
-- KEYS    1 owners; from 2: the queue's lists, if it expires
-- ARGV    1 owner; 2 lease, ms; 3 the queue's expiry, ms
-- returns 1 renewed, 0 it had lapsed and its messages went back
for i = 2, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], clock() + tonumber(ARGV[2]), ARGV[1])
return 1
