-- Lands one message on one list unless its mark is there. Push first: an error at the push leaves no mark.
-- KEYS    1 the list; 2 the mark; from 3: all lists of the queue, if it expires
-- ARGV    1 the message; 2 window, ms; 3 the queue's expiry, ms (0: none)
-- returns 1 landed, 0 the mark was there
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], 1, 'PX', ARGV[2])
for i = 3, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
return 1
